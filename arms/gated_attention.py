"""
Each head's output is gated before the projection: y = W_o (σ(W_g u) ⊙ heads(u)).

Qiu et al. 2025 (arXiv 2505.06708) report that attention sinks disappear: a head that has nothing to say can
close its gate, and need not look at a first token whose value is zero. Of their variants this is the one that
they found best, elementwise, with the gate made from the normalized input u of the sublayer.

W_g is d × d without a bias and starts at N(0, 0.02), gates near one half. It adds 7.1M parameters at 160m,
4.3%.
"""

import torch

import model


class Attention(model.Attention):
    def __init__(self, config):
        super().__init__(config)
        self.gate = model.linear(config.n_embd, config.n_embd)

    def forward(self, u):
        heads = self.inner(*self.qkv(u).chunk(3, -1))
        return self.proj(torch.sigmoid(self.gate(u)) * heads)
