"""
The model and its arms in numpy, float64, written from the equations of DESIGN.md and not from model.py.

`Reference(model)` computes the baseline and the ledger; an arm is a subclass that changes what its equation
changes, and ARMS says which. Shapes: idx (B, T), streams (B, T, d), heads (B, n_head, T, n).
"""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def rms_norm(x, gain):
    return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def matrix_times(matrix, x):
    """matrix: (…, d, d), x: (…, d). Returns (…, d)."""
    return np.einsum('...ij,...j->...i', matrix, x)


def outer(a, b):
    """a, b: (…, d). Returns (…, d, d)."""
    return a[..., :, None] * b[..., None, :]


def nothing(where, level, streams):
    """A touch that changes nothing."""
    return streams


class Reference:
    """A model in float64. Its methods take a prefix, the name of the part whose parameters they use."""

    def __init__(self, model):
        self.config = model.config
        self.sublayers = len(model.sublayers)
        state = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
        self.state = state

    def forward(self, idx, touch=nothing):
        """idx: (B, T). touch(where, level, streams) returns the streams as they go on: where is 'stream'
        (after sublayer level − 1), 'reads' (what sublayer `level` alone reads) or 'decoder' (what the head
        alone reads). Returns the logits, (B, T, V); the streams at each level, 0 … S; and the commit gates,
        (B, T, 1) or None."""
        streams = self.start(self.embedded(idx))
        levels, gates = [streams], []
        for s in range(self.sublayers):
            prefix = f'sublayers.{s}.'
            u = self.norm(self.read(touch('reads', s, streams), prefix), prefix + 'norm.')
            function = self.attention if s % 2 == 0 else self.mlp
            y = function(u, prefix + 'function.')
            streams, gate = self.update(streams, u, y, prefix + 'residual.')
            streams = touch('stream', s + 1, streams)
            levels.append(streams)
            gates.append(gate)
        read = self.decode(touch('decoder', self.sublayers, streams))
        return self.norm(read, 'norm.') @ self.state['head.weight'].T, levels, gates

    def linear(self, x, prefix):
        y = x @ self.state[prefix + 'weight'].T
        return y + self.state[prefix + 'bias'] if prefix + 'bias' in self.state else y

    def low_rank(self, x, prefix):
        return self.linear(self.linear(x, prefix + 'V.'), prefix + 'U.')

    def embedded(self, idx):
        return self.state['tok_emb.weight'][idx] + self.state['pos_emb.weight'][: idx.shape[1]]

    def norm(self, x, prefix):
        return rms_norm(x, self.state[prefix + 'weight'])

    # ---- attention and MLP

    def heads(self, u, prefix):
        """Returns queries, keys and values."""
        parts = np.split(u @ self.state[prefix + 'qkv.weight'].T, 3, -1)
        q, k, v = (part.reshape(*part.shape[:2], self.config.n_head, -1).swapaxes(1, 2) for part in parts)
        if self.config.qk_norm:
            q = rms_norm(q, self.state[prefix + 'q_norm.weight'])
            k = rms_norm(k, self.state[prefix + 'k_norm.weight'])
        return q, k, v

    def extra_weight(self):
        """What stands in the denominator of a query's attention beside its own and the earlier keys."""
        return 0

    def probabilities(self, q, k):
        """Returns (B, n_head, T, T): query t gives a weight to keys 0 … t alone."""
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        weights = np.exp(scores) * np.tril(np.ones(scores.shape[-2:]))
        return weights / (self.extra_weight() + weights.sum(-1, keepdims=True))

    def heads_output(self, u, prefix):
        """Returns (B, T, d): the heads side by side, before the projection."""
        q, k, v = self.heads(u, prefix)
        if self.config.attn_bias_kv:
            return self.heads_output_with_learned_key(q, k, v, prefix)
        return (self.probabilities(q, k) @ v).swapaxes(1, 2).reshape(u.shape)

    def heads_output_with_learned_key(self, q, k, v, prefix):
        """Each query meets the learned key, its own and the earlier ones."""
        B, H, T, n = q.shape
        k0, v0 = (self.state[prefix + name].reshape(H, n) for name in ('bias_k', 'bias_v'))
        out = np.empty((B, T, H, n))
        for b, h, t in np.ndindex(B, H, T):
            keys = np.vstack([k0[h], k[b, h, : t + 1]])
            values = np.vstack([v0[h], v[b, h, : t + 1]])
            weights = np.exp(keys @ q[b, h, t] / math.sqrt(n))
            out[b, t, h] = weights @ values / weights.sum()
        return out.reshape(B, T, H * n)

    def attention(self, u, prefix):
        return self.linear(self.heads_output(u, prefix), prefix + 'proj.')

    def mlp(self, u, prefix):
        return self.linear(gelu(self.linear(u, prefix + 'fc.')), prefix + 'proj.')

    # ---- the residual operator

    def start(self, x):
        return {'h': x} if self.config.residual == 'baseline' else {'D': x, 'C': np.zeros_like(x)}

    def read(self, streams, prefix):
        if self.config.residual == 'baseline':
            return streams['h']
        return streams['D'] + self.state[prefix + 'residual.read_scale'] * streams['C']

    def update(self, streams, u, y, prefix):
        if self.config.residual == 'baseline':
            return {'h': streams['h'] + y}, None
        D = self.deliberate(streams['D'], u, y, prefix)
        c = sigmoid(u @ self.state[prefix + 'commit_weight'][:, None] + self.state[prefix + 'commit_bias'])
        return {'D': D, 'C': streams['C'] + c * self.committed(D, prefix)}, c

    def direction(self, u, prefix):
        v = self.low_rank(u, prefix + 'erase_direction.')
        return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)

    def deliberate(self, D, u, y, prefix):
        """D ← (I − diag(e) k kᵀ) D + w ⊙ (y + U_g V_g y), with the matrix of each token written out."""
        e = sigmoid(self.low_rank(u, prefix + 'erase_gate.'))
        w = sigmoid(self.low_rank(u, prefix + 'write_gate.'))
        k = self.direction(u, prefix)
        keep = np.eye(D.shape[-1]) - e[..., :, None] * outer(k, k)
        return matrix_times(keep, D) + w * (y + self.low_rank(y, prefix + 'write_map.'))

    def committed(self, D, prefix):
        return D + self.low_rank(D, prefix + 'commit_map.')

    def decode(self, streams):
        if self.config.residual == 'baseline':
            return streams['h']
        return streams['C'] + self.config.decode_gamma * streams['D']


# ---- arms


class NoErase(Reference):
    def deliberate(self, D, u, y, prefix):
        w = sigmoid(self.low_rank(u, prefix + 'write_gate.'))
        return D + w * (y + self.low_rank(y, prefix + 'write_map.'))


class RotatedCommit(Reference):
    def committed(self, D, prefix):
        return matrix_times(self.state['sublayers.0.residual.shared.Q'], super().committed(D, prefix))


class DecodeScratch(Reference):
    def decode(self, streams):
        return streams['D']


class DeltaOnly(Reference):
    def update(self, streams, u, y, prefix):
        return {'h': self.deliberate(streams['h'], u, y, prefix)}, None


class DeltaOnlyTied(DeltaOnly):
    def deliberate(self, h, u, y, prefix):
        gate = sigmoid(self.low_rank(u, prefix + 'write_gate.'))
        k = self.direction(u, prefix)
        erased = matrix_times(outer(k, k), h)
        return h + gate * (y + self.low_rank(y, prefix + 'write_map.') - erased)


class TwoStream(Reference):
    def start(self, x):
        return {'s0': x, 's1': x, 'sum': x + x}

    def read(self, streams, prefix):
        a = self.state[prefix + 'residual.read_weights']
        return a[0] * streams['s0'] + a[1] * streams['s1']

    def update(self, streams, u, y, prefix):
        M = np.stack([self.state[prefix + 'mix_0'], self.state[prefix + 'mix_1']])
        b = self.state[prefix + 'output_weights']
        both = np.stack([streams['s0'], streams['s1']])
        s0, s1 = np.tensordot(M, both, 1) + np.multiply.outer(b, y)
        return {'s0': s0, 's1': s1, 'sum': s0 + s1}, None

    def decode(self, streams):
        return streams['sum']


class Sandwich(Reference):
    def update(self, streams, u, y, prefix):
        return {'h': streams['h'] + self.norm(y, prefix + 'output_norm.')}, None


class Dyt(Reference):
    def norm(self, x, prefix):
        a, gain, bias = (self.state[prefix + name] for name in ('slope', 'weight', 'bias'))
        return gain * np.tanh(a * x) + bias

    def embedded(self, idx):
        return self.state['pos_emb.scale'] * super().embedded(idx)


class GatedNorm(Reference):
    def norm(self, x, prefix):
        normed = super().norm(x, prefix)
        return normed * sigmoid(self.low_rank(normed, prefix + 'gate.'))


class GatedAttention(Reference):
    def attention(self, u, prefix):
        gate = sigmoid(self.linear(u, prefix + 'gate.'))
        return self.linear(gate * self.heads_output(u, prefix), prefix + 'proj.')


class SoftmaxOne(Reference):
    def extra_weight(self):
        return 1


class RopeSwiglu(Reference):
    def embedded(self, idx):
        return self.state['tok_emb.weight'][idx]

    def turned(self, x):
        """Each pair of dimensions is a complex number, which is multiplied by e^(i angle)."""
        half = x.shape[-1] // 2
        frequency = 10000.0 ** (-np.arange(half) / half)
        z = x[..., :half] + 1j * x[..., half:]
        z = z * np.exp(1j * np.arange(x.shape[-2])[:, None] * frequency)
        return np.concatenate([z.real, z.imag], -1)

    def heads(self, u, prefix):
        q, k, v = super().heads(u, prefix)
        return self.turned(q), self.turned(k), v

    def mlp(self, u, prefix):
        a, b = np.split(self.linear(u, prefix + 'fc.'), 2, -1)
        return self.linear(silu(a) * b, prefix + 'proj.')


class SingleScaleNorm(Reference):
    def norm(self, x, prefix):
        return rms_norm(x, self.state[prefix + 'gain'])


ARMS = {
    'baseline_wide': Reference,
    'decode_scratch': DecodeScratch,
    'delta_only': DeltaOnly,
    'delta_only_tied': DeltaOnlyTied,
    'dyt': Dyt,
    'gated_attention': GatedAttention,
    'gated_norm': GatedNorm,
    'muon': Reference,
    'muon_ssnorm': SingleScaleNorm,
    'no_erase': NoErase,
    'rope_swiglu': RopeSwiglu,
    'rotated_commit': RotatedCommit,
    'sandwich': Sandwich,
    'softmax_one': SoftmaxOne,
    'two_stream': TwoStream,
    'value_scale': Reference,  # differs in its gradient alone
}


def reference_of(model):
    """Returns the Reference of a model, whatever its arms."""
    kinds = tuple(ARMS[name] for name in model.config.arm.split(',') if name)
    chosen = [kind for kind in kinds if kind is not Reference]
    return type('Arms', tuple(chosen) or (Reference,), {})(model)
