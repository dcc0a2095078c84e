"""
A ledger that decodes its scratch: logits = W · RMSNorm(D). C is committed to and read as before, but never
decoded.

The ledger decodes C alone. If the outlier sits in the stream that is decoded, whatever its role, it moves to
the D of the last sublayer here, and C loses it. The size is the ledger's, 175M parameters at 160m.
"""

import model

SETTINGS = {'residual': 'ledger'}


class Residual(model.Ledger):
    decoded = 'D'
    settings = ('gate_rank', 'commit_sparsity', 'commit_ramp')

    @classmethod
    def decode(cls, streams, config):
        # Nothing of the last commit is used, but a parameter without a gradient would stop training on
        # several GPUs.
        return streams['D'] + 0 * streams['C']
