"""
A norm that can rescale by itself: n = RMSNorm(x), then n ⊙ σ(U V n + b).

Qiu et al. 2026 (arXiv 2601.22966) take outliers for a means of rescaling: one large dimension makes a norm
shrink all others. With a gate that does so explicitly they should be of no use.

The gate is of rank 16 and costs 0.6M parameters at 160m (0.4%). U and b start at zero, V at N(0, 0.02), so
every gate starts at one half, which the gains can undo. The rank, the start values and the missing
nonlinearity between V and U are our choice. All norms have a gate, the one before the head too, but not those
of queries and keys (qk_norm).
"""

import torch

import model

RANK = 16


class Norm(model.RMSNorm):
    def __init__(self, n):
        super().__init__(n)
        self.gate = model.LowRank(n, RANK, bias=0.0)

    def forward(self, x):
        normed = super().forward(x)
        return normed * torch.sigmoid(self.gate(normed))
