"""
The gradient that reaches a value is divided by (1 + the attention that the value received).

Chen et al. 2026 (arXiv 2603.17771) see the cause of sinks in the backward pass: a token that all queries
attend to gathers the gradients of all of them ("gradient sink"). Their remedy is a value scale; the rule here
is ours. The forward pass does not change. With P the attention of a head, o = P v, and g the gradient of o, a
value vⱼ receives

    (Pᵀ g)ⱼ / (1 + Σᵢ Pᵢⱼ)     instead of     (Pᵀ g)ⱼ.

The column sums Σᵢ Pᵢⱼ are the gradient Pᵀ 1 that a further dimension of the values would receive if the
gradient of its output were 1. So the values get that dimension, as zeros, and the fused attention makes the
sums in its backward pass: no T × T matrix is stored. Queries and keys get zeros beside it, since all three
must be of the same width. The fused kernels want a multiple of 8, hence 8 dimensions more; their heads of 72
run as slowly as heads of 96.
"""

import torch
import torch.nn.functional as F

import model
from data.loader import UserError

EXTRA = 8


class WithScaledGradient(torch.autograd.Function):
    """v: (…, n) → (…, n + EXTRA), with zeros in the new dimensions.
    In the backward pass the first of them brings the attention that each value received."""

    @staticmethod
    def forward(ctx, v):
        return F.pad(v, (0, EXTRA))

    @staticmethod
    def backward(ctx, gradient):
        n = gradient.shape[-1] - EXTRA
        gradient_v, mass = gradient[..., :n], gradient[..., n : n + 1]
        return gradient_v / (1 + mass)


class WithUnitGradient(torch.autograd.Function):
    """o: (…, n + EXTRA) → (…, n), without the new dimensions.
    In the backward pass the gradient of the first of them is 1."""

    @staticmethod
    def forward(ctx, o):
        return o[..., :-EXTRA].clone()

    @staticmethod
    def backward(ctx, gradient):
        ones = torch.ones_like(gradient[..., :1])
        return F.pad(torch.cat([gradient, ones], -1), (0, EXTRA - 1))


class Attention(model.Attention):
    def __init__(self, config):
        super().__init__(config)
        if config.attn_bias_kv:
            raise UserError('attn_bias_kv: the arm value_scale has no learned key and value', 'attn_bias_kv')

    def attend(self, q, k, v, bias_v=None):
        scale = q.shape[-1] ** -0.5
        q, k = F.pad(q, (0, EXTRA)), F.pad(k, (0, EXTRA))
        o = F.scaled_dot_product_attention(q, k, WithScaledGradient.apply(v), is_causal=True, scale=scale)
        return WithUnitGradient.apply(o)
