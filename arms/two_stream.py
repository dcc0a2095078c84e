"""
Two equal streams without roles, which the model mixes as it likes (`hc2` of arXiv 2606.20743).

    start        s₀ = s₁ = embedding
    read         u = RMSNorm(a₀ s₀ + a₁ s₁)
    sublayer     y = F(u)
    update       sᵢ ← Mᵢ₀ s₀ + Mᵢ₁ s₁ + bᵢ y
    decode       logits = W · RMSNorm(s₀ + s₁)

Each sublayer has its own read weights a, which start at ½, its mix M, which starts at the identity, and its
output weights b. The source leaves the start of b open: at 1, where every RMSNorm sees what the baseline's
sees, the model starts as the baseline. All eight are a number each, the same for all dimensions, and none
decays.

The sum is carried along as a stream of its own, `sum`, so that what is decoded can be measured. It costs an
addition a sublayer. To change it does something after the last sublayer alone.
"""

import torch
import torch.nn as nn

import model


class Residual(model.Residual):
    streams, decoded = ('s0', 's1', 'sum'), 'sum'

    def __init__(self, config, s):
        super().__init__(config, s)
        self.read_weights = nn.Parameter(torch.full((2,), 0.5))
        # A row for each stream after the update. Vectors, since weight decay leaves those alone.
        self.mix_0 = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.mix_1 = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.output_weights = nn.Parameter(torch.ones(2))

    @staticmethod
    def start(x):
        return {'s0': x, 's1': x, 'sum': 2 * x}

    def read(self, streams):
        return self.read_weights[0] * streams['s0'] + self.read_weights[1] * streams['s1']

    def update(self, streams, u, y):
        s0, s1 = streams['s0'], streams['s1']
        new_s0 = self.mix_0[0] * s0 + self.mix_0[1] * s1 + self.output_weights[0] * y
        new_s1 = self.mix_1[0] * s0 + self.mix_1[1] * s1 + self.output_weights[1] * y
        return {'s0': new_s0, 's1': new_s1, 'sum': new_s0 + new_s1}, None
