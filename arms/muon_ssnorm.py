"""
Muon, and norms with one gain for all dimensions: g · x / √(mean x² + 1e-6) (Park et al. 2025, arXiv
2506.19697).

With a gain of its own a dimension can be scaled up on its own; the single-scale norm takes that freedom away.
The gain starts at 1, as the RMSNorm's, which makes the start the same; the source starts at √d with a norm
that is 1/√d as large, which is the same again. The optimizer is that of arms/muon.py. The norms of queries
and keys (qk_norm) stay, and the source's third part, a learned projection of the embeddings, is left out.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from arms.muon import make_optimizer  # noqa: F401


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.width = n
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.gain * F.rms_norm(x.to(self.gain.dtype), (self.width,), eps=1e-6)
