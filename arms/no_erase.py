"""
A ledger that never erases: D ← D + w ⊙ (y + U_g V_g y).

Everything else is the ledger's. The arm shows what the erase term of the delta rule is good for, and how an
arm is written: a class, named after the part that it replaces, that changes one method. Without the erase
gate and the erase direction the model has 170M parameters at 160m, 4.7M fewer than the ledger.
"""

import torch

import model

SETTINGS = {'residual': 'ledger'}


class Residual(model.Ledger):
    def __init__(self, config, s):
        super().__init__(config, s)
        # A parameter that no gradient reaches would stop training on several GPUs.
        del self.erase_gate, self.erase_direction

    def deliberate(self, D, u, y):
        w = torch.sigmoid(self.write_gate(u))
        return D + w * (y + self.write_map(y))
