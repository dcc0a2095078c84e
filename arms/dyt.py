"""
No normalization: every norm becomes γ ⊙ tanh(a x) + β (Zhu et al. 2025, arXiv 2503.10622, "dynamic tanh").

What reads an outlier through a norm finds everything else made smaller by it. Through a tanh it does not: an
outlier cannot serve to rescale (arXiv 2601.22966).

γ starts at 1 and β at 0. The scalar a starts at 1, which the source found best for language models as narrow
as ours (1,024 dimensions and less), and is learned, one for each norm. As there, the embedded tokens are
multiplied by a learned number that starts at √d: our embeddings start at 0.02, where tanh would be linear and
its output tiny. The norms of queries and keys (qk_norm) stay as they are.
"""

import torch
import torch.nn as nn

import model


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))  # a
        self.weight = nn.Parameter(torch.ones(n))  # γ
        self.bias = nn.Parameter(torch.zeros(n))  # β

    def forward(self, x):
        x = x.to(self.weight.dtype)
        return self.weight * torch.tanh(self.slope * x) + self.bias


class Positions(model.Positions):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.full((1,), config.n_embd**0.5))

    def forward(self, x):
        return self.scale * super().forward(x)
