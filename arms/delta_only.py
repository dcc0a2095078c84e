"""
One stream with the ledger's delta rule and no Commitment: h ← h − e ⊙ k (kᵀh) + w ⊙ (y + U_g V_g y); h is
decoded.

Gates, direction and start values are the ledger's. It is a control of arXiv 2606.20743: what erasing alone
does. At 160m it has 9.5M parameters more than the baseline (5.8%).
"""

import model


class Residual(model.Baseline):
    settings = ('gate_rank',)

    def __init__(self, config, s):
        super().__init__(config, s)
        d, r = config.n_embd, config.gate_rank
        self.erase_gate = model.LowRank(d, r, bias=-3.0)
        self.write_gate = model.LowRank(d, r, bias=+3.0)
        self.erase_direction = model.LowRank(d, r, std_U=0.02)
        self.write_map = model.LowRank(d, r)

    deliberate = model.Ledger.deliberate

    def update(self, streams, u, y):
        return {'h': self.deliberate(streams['h'], u, y)}, None
