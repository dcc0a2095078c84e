"""
A ledger whose commits are rotated: C ← C + c · Q (D + U_P V_P D), with one fixed random rotation Q.

Whatever a sublayer writes to one dimension of D reaches C spread over all of its dimensions. If C has an
outlier on its own axes all the same, the model has rebuilt it there. If only Qᵀ C has one, it has leaked from
D, through the identity in the commit.

Q is drawn once for all sublayers, uniformly among the rotations, from a seed of its own: a model has the
other start values of a ledger of the same seed, and its size, 175M parameters at 160m. It is kept in the
checkpoint, which holds it once, since the last bits of a QR decomposition depend on the machine.

Q multiplies in the precision of the step's other products. Under bfloat16 autocast its entries, what it
rotates and the result are rounded to 8 bits and the sums are float32. What a commit adds is then 0.3% off;
where one dimension of D is 100 times the others, those are 0.9% off in Qᵀ C. A measurement runs in float32,
where Q is orthogonal to 2e-8.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import model

SETTINGS = {'residual': 'ledger'}
SEED = 260620743


class Rotation(nn.Module):
    """Holds Q, (d, d) float32, where all sublayers find it."""

    def __init__(self, d):
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        normal = torch.randn(d, d, dtype=torch.float64, device='cpu', generator=generator)
        Q, R = torch.linalg.qr(normal)
        # These signs make Q uniform among the orthogonal matrices; one more leaves out the reflections.
        Q = Q * R.diagonal().sign()
        Q[:, 0] *= torch.linalg.det(Q).sign()
        self.register_buffer('Q', Q.float())


class Residual(model.Ledger):
    @classmethod
    def for_sublayers(cls, config):
        operators, shared = super().for_sublayers(config), Rotation(config.n_embd)
        for operator in operators:
            operator.shared = shared
        return operators

    rotation = property(lambda self: self.shared.Q)

    def committed(self, D):
        return F.linear(super().committed(D), self.rotation)

    def derived(self, streams):
        """Qᵀ C: what C holds on the axes of D."""
        C = streams['C']
        return {'C_unrotated': C @ self.rotation.to(C.dtype)}
