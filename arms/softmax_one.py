"""
Attention that may attend to nothing: the weight of key j is exp(q·kⱼ/√n) / (1 + Σᵢ exp(q·kᵢ/√n)).

Kaul et al. 2024 (arXiv 2410.17174) report that the first token loses its attention and the outliers of the
stream shrink, though they need their optimizer as well. The 1 in the denominator is a key of zeros with a
value of zeros, which every query sees. Computed so, attention stays one fused kernel. It is attn_bias_kv with
nothing learned.
"""

import torch.nn.functional as F

import model
from data.loader import UserError


class Attention(model.Attention):
    def __init__(self, config):
        super().__init__(config)
        if config.attn_bias_kv:
            raise UserError('attn_bias_kv: the arm softmax_one has no learned key and value', 'attn_bias_kv')

    def attend(self, q, k, v, bias_v=None):
        # A position of zeros before all others, in queries too, so that the causal mask stays square.
        q, k, v = (F.pad(x, (0, 0, 1, 0)) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 1:]
