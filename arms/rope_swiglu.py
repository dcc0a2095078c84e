"""
The architecture in which the literature sees the outlier: rotary positions and SwiGLU, no learned positions.

    heads       dimensions i and i + n/2 of queries and keys turn by the angle t · 10000^(−2i/n) at position t
                (Su et al. 2021, arXiv 2104.09864; in halves, as LLaMA has it), after qk_norm where that is on
    MLP         W_o (silu(W_a u) ⊙ W_b u), without biases (Shazeer 2020, arXiv 2002.05202)

The MLP is 2/3 · mlp_ratio · d wide, to the nearest multiple of 8, which makes its three matrices as large as
the two that they replace. At 160m the model has 0.5% fewer parameters than the baseline, the positions. With
--bos=True every window starts with the end-of-text id, as the models of the literature are trained.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from data.loader import UserError

BASE = 10000.0


class Positions(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd // config.n_head % 2:
            raise UserError('n_embd / n_head is odd: the arm rope_swiglu turns pairs of dimensions', 'n_head')

    def forward(self, x):
        return x

    @staticmethod
    def turn(x):
        """x: (B, n_head, T, n). Angles and products are float32, or float64 if x is."""
        T, half = x.shape[-2], x.shape[-1] // 2
        like = dict(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        frequency = BASE ** (-torch.arange(half, **like) / half)
        angle = torch.arange(T, **like)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        a, b = x.to(angle.dtype).chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class MLP(model.MLP):
    def __init__(self, config):
        nn.Module.__init__(self)
        d = config.n_embd
        width = 8 * max(1, round(2 / 3 * config.mlp_ratio * d / 8))
        self.fc = model.linear(d, 2 * width)
        self.proj = model.linear(width, d)

    def inner(self, x):
        a, b = x.chunk(2, -1)
        return F.silu(a) * b
