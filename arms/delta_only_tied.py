"""
delta_only with one gate, w = e: h ← h + e ⊙ (y + U_g V_g y − k (kᵀh)).

What is written where is what is erased there, as in the delta rule of fast weights. The source (arXiv
2606.20743) does not say how a tied gate starts. Here it starts as the write gate does, nearly open (b = +3):
nearly closed, as an erase gate, it would let almost nothing through at first. At 160m the arm has 7.1M
parameters more than the baseline (4.4%).
"""

import torch
import torch.nn.functional as F

from arms.delta_only import Residual as DeltaOnly


class Residual(DeltaOnly):
    def __init__(self, config, s):
        super().__init__(config, s)
        del self.erase_gate

    def deliberate(self, h, u, y):
        gate = torch.sigmoid(self.write_gate(u))
        k = F.normalize(self.erase_direction(u).to(h.dtype), dim=-1, eps=1e-12)
        return h + gate * (y + self.write_map(y) - k * (k * h).sum(-1, keepdim=True))
