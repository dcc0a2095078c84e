"""
A norm before and after each sublayer: h ← h + RMSNorm(F(RMSNorm(h))).

Sun et al. 2026 (arXiv 2603.05498) hold the placement of the norms for the cause of the outlier: under
pre-norm a sublayer can write a vector of any length into h; here its length is bounded by the gain of the
second norm. That gain is learned and starts at 1, as every other. The norm before the head stays.
"""

import model
from arms import arm_part


class Residual(model.Baseline):
    def __init__(self, config, s):
        super().__init__(config, s)
        Norm = arm_part(config, 'Norm', model.RMSNorm)
        self.output_norm = Norm(config.n_embd)

    def update(self, streams, u, y):
        return {'h': streams['h'] + self.output_norm(y)}, None
