"""
The baseline and the ledger transformer, in one file: `residual` is the flag.

What differs from a textbook GPT-2:
- what happens between sublayers is a residual operator, a class of four methods: start, read, update, decode;
- `baseline` keeps one stream, h; `ledger` keeps two: Deliberation D, scratch that any sublayer may overwrite, and
  Commitment C, append-only, the only one decoded (Vemula 2026, arXiv 2606.20743);
- RMSNorm instead of LayerNorm, no biases in attention or head, an untied head, optional RMSNorm on queries and keys;
- a sublayer returns its streams, so that a forward hook on it sees them.

Shapes: B sequences, T tokens, d = n_embd, r = gate_rank, V = vocab_size; sublayers s = 0 … 2·n_layer − 1, attention first.
"""

import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.loader import UserError

LOGITS_AT_ONCE = 2**30  # where there are more, the loss is taken in parts


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest sequence: positions are learned
    vocab_size: int = 50257  # GPT-2's BPE
    n_layer: int = 12  # each is two sublayers, attention and MLP
    n_head: int = 12
    n_embd: int = 768
    residual: str = 'baseline'  # a name in RESIDUALS, at the end of the operators below
    mlp_ratio: int = 4  # width of the MLP over n_embd
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    attn_bias_kv: bool = False  # one learned key and value a head, which every query sees: a place to rest other than the first token
    gate_rank: int = 64  # ledger: rank of the gates' maps, keeps the parameter count near the baseline's
    commit_sparsity: float = 0.02  # ledger: α, weight of the mean commit gate in the objective
    decode_gamma: float = (
        0.0  # ledger: γ, how much of D is decoded beside C; 1 turns a closed ledger into the baseline
    )
    commit_ramp: float = 1.0  # ledger: b_c starts at −4 + 8 (s / last) ** this; the larger, the later commits begin: at 64 C starts as the last D
    bf16_streams: bool = False  # True: streams are kept in bfloat16; False: in the parameters' precision

    def __post_init__(self):
        for field in fields(GPTConfig):  # a class that inherits checks its own
            value = getattr(self, field.name)
            if type(value) is not field.type and not (field.type is float and type(value) is int):
                raise UserError(f'{field.name} is {value!r}: expected {field.type.__name__}', field.name)
            if field.type is int and value < 1:
                raise UserError(f'{field.name} is {value}: expected at least 1', field.name)
        if self.residual not in RESIDUALS:
            expected = ', '.join(RESIDUALS)
            raise UserError(f"residual is '{self.residual}': expected one of {expected}", 'residual')
        if self.n_embd % self.n_head:
            raise UserError(
                f'n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}: every head has n_embd / n_head dimensions',
                'n_embd',
            )
        if not 0 <= self.commit_sparsity < math.inf:
            raise UserError(
                f'commit_sparsity is {self.commit_sparsity}: expected 0 or more', 'commit_sparsity'
            )
        if not 0 < self.commit_ramp < math.inf:
            raise UserError(f'commit_ramp is {self.commit_ramp}: expected a number above 0', 'commit_ramp')
        if not math.isfinite(self.decode_gamma):
            raise UserError(f'decode_gamma is {self.decode_gamma}: expected a finite number', 'decode_gamma')


def linear(n_in, n_out, bias=False, std=0.02):
    """A linear map with weights N(0, std) and, if it has one, a bias of zero."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def embedding(n, d):
    table = nn.Embedding(n, d)
    nn.init.normal_(table.weight, std=0.02)
    return table


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension with a gain; computed in the gain's precision, whatever the stream's."""

    def __init__(self, n):
        super().__init__(n, eps=1e-6)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Causal multi-head self-attention. (B, T, d) → (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        d, self.n_head = config.n_embd, config.n_head
        self.qkv = linear(d, 3 * d)
        self.proj = linear(d, d)
        self.q_norm = RMSNorm(d // self.n_head) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d // self.n_head) if config.qk_norm else nn.Identity()
        self.bias_k, self.bias_v = (
            nn.Parameter(torch.zeros(d)) if config.attn_bias_kv else None for _ in 'kv'
        )  # k′, v′ of Sun et al. 2024, §4

    def heads(self, q, k, v):
        """q, k, v: (B, T, d), the thirds of what self.qkv returns. Returns queries, keys and values, each (B, n_head, T, d / n_head)."""
        q, k, v = (x.unflatten(-1, (self.n_head, -1)) for x in (q, k, v))
        return self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def attend(self, q, k, v, bias_v=None):
        """q, k, v: (B, n_head, T, d / n_head). Causal attention, the same shape. bias_v: (d,), the value of the learned key; None: zero."""
        if self.bias_k is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        zero = torch.zeros_like(self.bias_k)
        first = (
            zero,
            self.bias_k,
            zero if bias_v is None else bias_v,
        )  # a position before all others; what its query finds is dropped
        q, k, v = (
            torch.cat([b.to(x.dtype).view(1, self.n_head, 1, -1).expand(len(x), -1, -1, -1), x], 2)
            for b, x in zip(first, (q, k, v))
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 1:]

    def inner(self, q, k, v):
        return self.attend(*self.heads(q, k, v), self.bias_v).transpose(1, 2).flatten(2)

    def forward(self, u):
        return self.proj(self.inner(*self.qkv(u).chunk(3, -1)))


class MLP(nn.Module):
    """d → mlp_ratio · d → d with exact GELU. (B, T, d) → (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        self.fc = linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=True)
        self.proj = linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=True)

    def inner(self, x):
        return F.gelu(x)

    def forward(self, u):
        return self.proj(self.inner(self.fc(u)))


# ---- Residual operators: one instance a sublayer. To make another: copy a class, change a line, add its name to RESIDUALS.


class Baseline(nn.Module):
    """One stream: h ← h + F(RMSNorm(h)); h is decoded."""

    streams, decoded = ('h',), 'h'
    settings = ()  # keys of GPTConfig that this operator reads; train.py refuses them for the others

    def __init__(self, config, s):
        super().__init__()

    @staticmethod
    def start(x):
        """x: (B, T, d), token plus position embedding. Returns the streams before the first sublayer, by name."""
        return {'h': x}

    def read(self, streams):
        """Returns (B, T, d): what the sublayer sees, before its RMSNorm."""
        return streams['h']

    def update(self, streams, u, y):
        """u: (B, T, d), the normalized read; y: (B, T, d), the sublayer's output.
        Returns the streams after the sublayer and the commit gate (B, T, 1), or None where there is none."""
        return {'h': streams['h'] + y}, None

    @staticmethod
    def decode(streams, config):
        """Returns (B, T, d): what the last RMSNorm and the head see."""
        return streams['h']


class LowRank(nn.Module):
    """x → U V x (+ bias): d → r → d."""

    def __init__(self, d, r, bias=None, std_U=0.0):
        super().__init__()
        self.V = linear(d, r)
        self.U = linear(r, d, bias=bias is not None, std=std_U)
        if bias is not None:
            nn.init.constant_(self.U.bias, bias)

    def forward(self, x):
        return self.U(self.V(x))


class Ledger(nn.Module):
    """Two streams: D is rewritten by a gated delta rule along the depth, C only ever grows and alone is decoded. Vemula 2026."""

    streams, decoded = ('D', 'C'), 'C'
    settings = ('gate_rank', 'commit_sparsity', 'decode_gamma', 'commit_ramp')

    def __init__(self, config, s):
        super().__init__()
        d, r, last = config.n_embd, config.gate_rank, 2 * config.n_layer - 1
        self.read_scale = nn.Parameter(torch.zeros(d))  # λ
        self.erase_gate = LowRank(d, r, bias=-3.0)  # U_e V_e, b_e: starts nearly closed
        self.write_gate = LowRank(d, r, bias=+3.0)  # U_w V_w, b_w: starts nearly open
        self.erase_direction = LowRank(d, r, std_U=0.02)  # U_k V_k: a zero direction would have no gradient
        self.write_map = LowRank(d, r)  # U_g V_g
        self.commit_map = LowRank(d, r)  # U_P V_P
        self.commit_weight = nn.Parameter(
            torch.zeros(d)
        )  # w_c: a vector, so that weight decay leaves it alone
        self.commit_bias = nn.Parameter(
            torch.tensor([-4.0 + 8.0 * (s / last) ** config.commit_ramp])
        )  # b_c: early sublayers deliberate, late ones commit

    @staticmethod
    def start(x):
        return {'D': x, 'C': torch.zeros_like(x)}

    def read(self, streams):
        return streams['D'] + self.read_scale * streams['C']

    def update(self, streams, u, y):
        return self.commit(self.deliberate(streams['D'], u, y), streams['C'], u)

    def deliberate(self, D, u, y):
        e = torch.sigmoid(self.erase_gate(u))
        w = torch.sigmoid(self.write_gate(u))
        k = F.normalize(self.erase_direction(u).to(D.dtype), dim=-1, eps=1e-12)
        return D - e * k * (k * D).sum(-1, keepdim=True) + w * (y + self.write_map(y))

    def commit(self, D, C, u):
        c = torch.sigmoid(
            (u * self.commit_weight).sum(-1, keepdim=True) + self.commit_bias
        )  # a sum, not a product: autocast leaves it alone
        return {'D': D, 'C': C + c * (D + self.commit_map(D))}, c

    @staticmethod
    def decode(streams, config):
        return streams['C'] + config.decode_gamma * streams['D'] if config.decode_gamma else streams['C']


RESIDUALS = {'baseline': Baseline, 'ledger': Ledger}


class Sublayer(nn.Module):
    """One attention or MLP step: read, normalize, compute, update. Forward hooks see its output: (streams by name, commit gate)."""

    def __init__(self, config, s, function):
        super().__init__()
        self.kind = 'attn' if s % 2 == 0 else 'mlp'
        self.norm = RMSNorm(config.n_embd)
        self.function = function
        self.residual = RESIDUALS[config.residual](config, s)

    def forward(self, streams):
        u = self.norm(self.residual.read(streams))
        updated, commit_gate = self.residual.update(streams, u, self.function(u))
        return {name: x.to(streams[name].dtype) for name, x in updated.items()}, commit_gate


class LossInParts(torch.autograd.Function):
    """The cross-entropies of the logits x Wᵀ + bias, summed, in parts: the gradients of each part are made beside its loss, so that its logits need not be kept.
    x: (N, d), W: (V, d), bias: (V,), targets: (N,) int64."""

    @staticmethod
    def forward(ctx, x, W, bias, targets, parts):
        loss, gx, gW = 0, [], 0
        for u, y in zip(x.chunk(parts), targets.chunk(parts)):
            if gx:  # one part after another: the compiler would rather begin with the logits of all
                u = u + (gx[-1][0, 0] + gW[0, 0]).abs().clamp(max=0).to(u.dtype)
            logits = F.linear(u, W, bias)
            z = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = z.logsumexp(-1, keepdim=True)
            loss = loss + (total - z.gather(1, y[:, None])).sum()
            p, target = (z - total).exp(), torch.arange(len(W), device=y.device) == y[:, None]
            g = torch.where(target, p - 1, p).to(logits.dtype)
            gx.append((g @ W.to(g.dtype)).to(x.dtype))
            gW = gW + (g.T @ u.to(g.dtype)).to(W.dtype)
        ctx.save_for_backward(torch.cat(gx), gW)
        return loss

    @staticmethod
    def backward(ctx, g):
        gx, gW = ctx.saved_tensors
        return g * gx, g * gW, None, None, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = embedding(config.vocab_size, config.n_embd)
        self.pos_emb = embedding(config.block_size, config.n_embd)
        functions = [(Attention, MLP)[s % 2](config) for s in range(2 * config.n_layer)]
        self.head = linear(config.n_embd, config.vocab_size)
        # the operators draw their weights last: with one seed, all that the arms share starts equal
        self.sublayers = nn.ModuleList(Sublayer(config, s, function) for s, function in enumerate(functions))
        self.norm = RMSNorm(config.n_embd)

    @property
    def stream_names(self):
        return RESIDUALS[self.config.residual].streams

    @property
    def decoded(self):
        """The name of the stream that the head reads."""
        return RESIDUALS[self.config.residual].decoded

    @property
    def n_embd(self):
        return self.config.n_embd

    @property
    def n_head(self):
        return self.config.n_head

    @property
    def decoder_input_module(self):
        """The last norm: a forward pre-hook on it sees, and may replace, what the head reads."""
        return self.norm

    def start(self, idx):
        """idx: (B, T). Returns the streams before the first sublayer, by name."""
        x = self.tok_emb(idx) + self.pos_emb.weight[: idx.shape[1]]
        return RESIDUALS[self.config.residual].start(x.bfloat16() if self.config.bf16_streams else x)

    def decode(self, streams):
        """Returns what the head sees, (B, T, d)."""
        return self.norm(RESIDUALS[self.config.residual].decode(streams, self.config))

    def cross_entropy(self, streams, targets):
        """Returns the cross-entropy of the decoded streams, in nats per token."""
        # tensor cores want rows in multiples of 64: classes without weights, of a logit so low that they have no part in the loss
        x, V, more = self.decode(streams), self.config.vocab_size, -self.config.vocab_size % 64
        W, bias = F.pad(self.head.weight, (0, 0, 0, more)), F.pad(x.new_zeros(V), (0, more), value=-1e9)
        x, targets = x.flatten(0, 1), targets.flatten()
        parts = 2 ** math.ceil(math.log2(max(1, len(targets) * V / LOGITS_AT_ONCE)))
        if parts > 1 and torch.is_grad_enabled():
            return LossInParts.apply(x, W, bias, targets, parts) / len(targets)
        return sum(
            F.cross_entropy(F.linear(u, W, bias), y, reduction='sum')
            for u, y in zip(x.chunk(parts), targets.chunk(parts))
        ) / len(targets)

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64, T at most block_size.
        Without targets returns the logits, (B, T, V). With targets returns three things: the objective to minimize,
        cross-entropy + α · mean commit gate; the cross-entropy alone, in nats per token; and the mean commit gate of
        each sublayer, (2·n_layer,), or (0,) for an operator that has none."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise UserError(f'a sequence of {T} tokens is longer than block_size = {self.config.block_size}')
        streams, gates = self.start(idx), []
        for sublayer in self.sublayers:
            streams, gate = sublayer(streams)
            if gate is not None:
                gates.append(gate)
        if targets is None:
            return self.head(self.decode(streams))
        loss = self.cross_entropy(streams, targets)
        if not gates:
            return loss, loss, loss.new_zeros(0)
        gates = torch.stack(gates).flatten(1).mean(1)
        return loss + self.config.commit_sparsity * gates.mean(), loss, gates.detach()

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """FLOPs of one training step per token, at T = block_size: 6 for each weight of a matrix product (2 forward, 4 backward;
        the gates' products and the head are in, embedding look-ups are not) and 12 · n_layer · d · T for attention scores and
        values, counted over the full T × T square as is the custom (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
        Elementwise work is not counted."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size


def twin(model):
    """Returns a GPT of the same parameters whose parts can be changed without changing those of `model`."""
    other = copy.copy(model)
    other._modules = {
        **model._modules,
        'sublayers': nn.ModuleList(copy.copy(sublayer) for sublayer in model.sublayers),
    }
    return other
