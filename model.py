"""
The baseline and the ledger transformer, in one file: `residual` is the flag.

What differs from a textbook GPT-2:
- what happens between sublayers is a residual operator, a class of four methods: start, read, update, decode;
- `baseline` keeps one stream, h; `ledger` keeps two: Deliberation D, scratch that any sublayer may overwrite,
  and Commitment C, append-only, the only one that is decoded (Vemula 2026, arXiv 2606.20743);
- RMSNorm instead of LayerNorm, optional RMSNorm on queries and keys;
- no biases in attention or head, and an untied head;
- a sublayer returns its streams, so that a forward hook on it sees them;
- `arm` names files in arms/ whose classes take the place of some of these (arms/__init__.py says how).

Shapes: B sequences, T tokens, d = n_embd, r = gate_rank, V = vocab_size; sublayers s = 0 … 2·n_layer − 1,
attention first.
"""

import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from arms import arm_part, check_arms
from data.loader import UserError

# Of more logits than these the loss is taken in parts.
LOGITS_AT_ONCE = 2**30


@dataclass
class GPTConfig:
    """The settings of a model. train.py adds those of a run."""

    # the arm
    residual: str = 'baseline'  # or 'ledger': a name in RESIDUALS, after the operators below
    arm: str = ''  # names of files in arms/ with commas between: what they hold replaces parts of this file
    qk_norm: bool = False  # RMSNorm on each head's queries and keys: a plain suppression of the outlier
    attn_bias_kv: bool = False  # a learned key and value a head, which every query sees (Sun et al. 2024, §4)
    gate_rank: int = 64  # ledger: rank of the gates' maps, keeps its parameters within 8% of the baseline's
    commit_sparsity: float = 0.02  # ledger: α, the price of committing: weight of the mean commit gate
    decode_gamma: float = 0.0  # ledger: γ, how much of D is decoded beside C; 0: nothing
    commit_ramp: float = 1.0  # ledger: b_c starts at −4 + 8 (s / last) ** this; larger is later
    bf16_streams: bool = False  # True keeps the streams in bfloat16, False in the parameters' precision
    # its size
    n_layer: int = 12  # each is two sublayers, attention and MLP
    n_head: int = 12
    n_embd: int = 768  # d, the width of a stream
    mlp_ratio: int = 4  # width of the MLP over n_embd
    block_size: int = 1024  # tokens of the longest sequence
    vocab_size: int = 50257  # GPT-2's; train.py takes it from the data

    def __post_init__(self):
        # train.Config inherits this: only the fields declared here are checked.
        for field in fields(GPTConfig):
            value = getattr(self, field.name)
            whole_for_float = field.type is float and type(value) is int
            if type(value) is not field.type and not whole_for_float:
                raise UserError(f'{field.name} is {value!r}: expected {field.type.__name__}', field.name)
            if field.type is int and value < 1:
                raise UserError(f'{field.name} is {value}: expected at least 1', field.name)
        if self.residual not in RESIDUALS:
            names = ', '.join(RESIDUALS)
            raise UserError(f"residual is '{self.residual}': expected one of {names}", 'residual')
        if self.n_embd % self.n_head:
            text = f'n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}'
            raise UserError(f'{text}: every head has n_embd / n_head dimensions', 'n_embd')
        ranges = {
            'commit_sparsity': (0 <= self.commit_sparsity < math.inf, '0 or more'),
            'commit_ramp': (0 < self.commit_ramp < math.inf, 'a number above 0'),
            'decode_gamma': (math.isfinite(self.decode_gamma), 'a finite number'),
        }
        for name, (is_in_range, expected) in ranges.items():
            if not is_in_range:
                raise UserError(f'{name} is {getattr(self, name)}: expected {expected}', name)
        check_arms(self.arm)
        for name, parent in RESIDUALS.items():
            if self.arm and name != self.residual and issubclass(operator_of(self), parent):
                text = f"arm is '{self.arm}', a kind of {name}, but residual is '{self.residual}'"
                raise UserError(f'{text}: start from a {name} config, or add --residual={name}', 'arm')


def linear(n_in, n_out, bias=False, std=0.02):
    """Returns a linear map with weights from N(0, std) and, if it has one, a bias of zero."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class RMSNorm(nn.RMSNorm):
    """RMSNorm with a gain, over the last dimension. It computes in the gain's precision."""

    def __init__(self, n):
        super().__init__(n, eps=1e-6)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Positions(nn.Embedding):
    """How the model knows positions: a learned vector for each is added to the embedded tokens.
    (B, T, d) → (B, T, d)."""

    def __init__(self, config):
        super().__init__(config.block_size, config.n_embd)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        return x + self.weight[: x.shape[1]]

    @staticmethod
    def turn(x):
        """x: queries or keys, (B, n_head, T, d / n_head), the same shape as what is returned. Learned
        positions leave them alone; rotary ones turn them (arms/rope_swiglu.py)."""
        return x


class Attention(nn.Module):
    """Causal multi-head self-attention. (B, T, d) → (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        d, self.n_head = config.n_embd, config.n_head
        self.qkv = linear(d, 3 * d)
        self.proj = linear(d, d)
        self.q_norm = RMSNorm(d // self.n_head) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d // self.n_head) if config.qk_norm else nn.Identity()
        self.turn = arm_part(config, 'Positions', Positions).turn
        # k′ and v′ of Sun et al. 2024, §4: a place to rest that is not the first token
        self.bias_k = nn.Parameter(torch.zeros(d)) if config.attn_bias_kv else None
        self.bias_v = nn.Parameter(torch.zeros(d)) if config.attn_bias_kv else None

    def heads(self, q, k, v):
        """q, k, v: (B, T, d), the thirds of what self.qkv returns.
        Returns queries, keys and values, each (B, n_head, T, d / n_head)."""
        q, k, v = (x.unflatten(-1, (self.n_head, -1)) for x in (q, k, v))
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        return self.turn(q), self.turn(k), v.transpose(1, 2)

    def attend(self, q, k, v, bias_v=None):
        """q, k, v: (B, n_head, T, d / n_head). Returns what the queries find, of the same shape.
        bias_v: (d,), the value of the learned key, if there is one; None: zero."""
        if self.bias_k is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # The learned key stands before all others; what the query beside it finds is dropped.
        zero = torch.zeros_like(self.bias_k)
        q = self.put_before(zero, q)
        k = self.put_before(self.bias_k, k)
        v = self.put_before(zero if bias_v is None else bias_v, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 1:]

    def put_before(self, first, x):
        """first: (d,). x: (B, n_head, T, d / n_head). Returns x with `first` as its position 0."""
        first = first.to(x.dtype).view(1, self.n_head, 1, -1)
        return torch.cat([first.expand(len(x), -1, -1, -1), x], 2)

    def inner(self, q, k, v):
        """What happens between the two linear maps. q, k, v: (B, T, d). Returns (B, T, d)."""
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


class Residual(nn.Module):
    """What all residual operators share. A model has one instance for each sublayer, and they carry the
    streams along: a dict of (B, T, d) by name. An operator defines three methods more.

    start(x), static: x is (B, T, d), the embedded tokens. Returns the streams before the first sublayer.
    read(streams): returns what the sublayer sees before its norm, (B, T, d).
    update(streams, u, y): u is the normalized read, y the sublayer's output, both (B, T, d). Returns the
        streams after the sublayer, and the commit gate, (B, T, 1), or None where there is none.
    """

    streams = ()  # their names
    decoded = ''  # the name of the one that the head sees
    settings = ()  # those of GPTConfig that only this operator reads: train.py refuses them for others

    def __init__(self, config, s):
        super().__init__()

    @classmethod
    def for_sublayers(cls, config):
        """Returns the operators of all sublayers, in order."""
        return [cls(config, s) for s in range(2 * config.n_layer)]

    @classmethod
    def decode(cls, streams, config):
        """Returns (B, T, d): what the last norm and the head see."""
        return streams[cls.decoded]

    def derived(self, streams):
        """Returns {name: (B, T, d)}: other views of the streams, to be measured beside them."""
        return {}


class Baseline(Residual):
    """One stream: h ← h + F(RMSNorm(h)); h is decoded."""

    streams, decoded = ('h',), 'h'

    @staticmethod
    def start(x):
        return {'h': x}

    def read(self, streams):
        return streams['h']

    def update(self, streams, u, y):
        return {'h': streams['h'] + y}, None


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


class Ledger(Residual):
    """Two streams: D is rewritten by a gated delta rule along the depth; C only ever grows, and C alone is
    decoded. Vemula 2026, arXiv 2606.20743."""

    streams, decoded = ('D', 'C'), 'C'
    settings = ('gate_rank', 'commit_sparsity', 'decode_gamma', 'commit_ramp')

    def __init__(self, config, s):
        super().__init__(config, s)
        d, r, last = config.n_embd, config.gate_rank, 2 * config.n_layer - 1
        self.read_scale = nn.Parameter(torch.zeros(d))  # λ
        self.erase_gate = LowRank(d, r, bias=-3.0)  # U_e V_e, b_e: starts nearly closed
        self.write_gate = LowRank(d, r, bias=+3.0)  # U_w V_w, b_w: starts nearly open
        self.erase_direction = LowRank(d, r, std_U=0.02)  # U_k V_k: a zero direction would have no gradient
        self.write_map = LowRank(d, r)  # U_g V_g
        self.commit_map = LowRank(d, r)  # U_P V_P
        # w_c: a vector, so that weight decay leaves it alone
        self.commit_weight = nn.Parameter(torch.zeros(d))
        # b_c: early sublayers deliberate, late ones commit
        self.commit_bias = nn.Parameter(torch.tensor([-4.0 + 8.0 * (s / last) ** config.commit_ramp]))

    @staticmethod
    def start(x):
        return {'D': x, 'C': torch.zeros_like(x)}

    def read(self, streams):
        return streams['D'] + self.read_scale * streams['C']

    def update(self, streams, u, y):
        D = self.deliberate(streams['D'], u, y)
        return self.commit(D, streams['C'], u)

    def deliberate(self, D, u, y):
        """Returns the new D, (B, T, d)."""
        e = torch.sigmoid(self.erase_gate(u))
        w = torch.sigmoid(self.write_gate(u))
        k = F.normalize(self.erase_direction(u).to(D.dtype), dim=-1, eps=1e-12)
        return D - e * k * (k * D).sum(-1, keepdim=True) + w * (y + self.write_map(y))

    def commit(self, D, C, u):
        """D: the new one. Returns the streams and the commit gate."""
        # a sum and not a matrix product: autocast leaves it in float32
        c = torch.sigmoid((u * self.commit_weight).sum(-1, keepdim=True) + self.commit_bias)
        return {'D': D, 'C': C + c * self.committed(D)}, c

    def committed(self, D):
        """Returns what a full commit adds to C, (B, T, d)."""
        return D + self.commit_map(D)

    @classmethod
    def decode(cls, streams, config):
        if config.decode_gamma:
            return streams['C'] + config.decode_gamma * streams['D']
        return streams['C']


RESIDUALS = {'baseline': Baseline, 'ledger': Ledger}


def operator_of(config):
    """Returns the class of the residual operators: an arm's, or else the one that `residual` names."""
    return arm_part(config, 'Residual', RESIDUALS[config.residual])


class Sublayer(nn.Module):
    """One step of attention or MLP: read, normalize, compute, update.
    A forward hook sees its output: (streams by name, commit gate)."""

    def __init__(self, kind, norm, function, residual):
        super().__init__()
        self.kind = kind
        self.norm = norm
        self.function = function
        self.residual = residual

    def forward(self, streams):
        u = self.norm(self.residual.read(streams))
        updated, commit_gate = self.residual.update(streams, u, self.function(u))
        return {name: x.to(streams[name].dtype) for name, x in updated.items()}, commit_gate


class LossInParts(torch.autograd.Function):
    """The sum of the cross-entropies of the logits x Wᵀ + bias, taken in parts. The gradients of each part
    are made beside its loss, so that its logits need not be kept.
    x: (N, d), W: (V, d), bias: (V,), targets: (N,) int64."""

    @staticmethod
    def forward(ctx, x, W, bias, targets, parts):
        loss, gradients_x, gradient_W = 0, [], 0
        for rows, target in zip(x.chunk(parts), targets.chunk(parts)):
            if gradients_x:
                # Each part waits for the one before: otherwise the compiler begins with the logits of all.
                nothing = (gradients_x[-1][0, 0] + gradient_W[0, 0]).abs().clamp(max=0)
                rows = rows + nothing.to(rows.dtype)
            logits = F.linear(rows, W, bias)
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            log_total = scores.logsumexp(-1, keepdim=True)
            loss = loss + (log_total - scores.gather(1, target[:, None])).sum()
            probability = (scores - log_total).exp()
            is_target = torch.arange(len(W), device=target.device) == target[:, None]
            slope = torch.where(is_target, probability - 1, probability).to(logits.dtype)
            gradients_x.append((slope @ W.to(slope.dtype)).to(x.dtype))
            gradient_W = gradient_W + (slope.T @ rows.to(slope.dtype)).to(W.dtype)
        ctx.save_for_backward(torch.cat(gradients_x), gradient_W)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        gradient_x, gradient_W = ctx.saved_tensors
        return gradient * gradient_x, gradient * gradient_W, None, None, None


class GPT(nn.Module):
    """The whole model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.operator = operator_of(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.tok_emb.weight, std=0.02)
        self.pos_emb = Positions(config)
        kinds = ['attn', 'mlp'] * config.n_layer
        functions = [Attention(config) if kind == 'attn' else MLP(config) for kind in kinds]
        self.head = linear(config.n_embd, config.vocab_size)
        # The operators draw their weights after all else, and the parts of an arm after those:
        # with one seed, all that two models share starts equal.
        operators = self.operator.for_sublayers(config)
        norms = [RMSNorm(config.n_embd) for _ in kinds]
        self.sublayers = nn.ModuleList(map(Sublayer, kinds, norms, functions, operators))
        self.norm = RMSNorm(config.n_embd)
        if config.arm:
            self.replace_parts(config)

    def replace_parts(self, config):
        """Puts the parts of an arm in the place of the default ones."""
        self.pos_emb = replaced(self.pos_emb, arm_part(config, 'Positions', Positions), config)
        self.norm = replaced(self.norm, arm_part(config, 'Norm', RMSNorm), config.n_embd)
        attention, mlp = arm_part(config, 'Attention', Attention), arm_part(config, 'MLP', MLP)
        for sublayer in self.sublayers:
            chosen = attention if sublayer.kind == 'attn' else mlp
            sublayer.function = replaced(sublayer.function, chosen, config)
            sublayer.norm = replaced(sublayer.norm, arm_part(config, 'Norm', RMSNorm), config.n_embd)

    # What measurements ask for, of a pretrained model too.
    stream_names = property(lambda self: self.operator.streams)
    decoded = property(lambda self: self.operator.decoded)

    n_embd = property(lambda self: self.config.n_embd)
    n_head = property(lambda self: self.config.n_head)

    # A forward pre-hook on this module sees, and may replace, what the head reads.
    decoder_input_module = property(lambda self: self.norm)

    def start(self, idx):
        """idx: (B, T). Returns the streams before the first sublayer, by name."""
        x = self.pos_emb(self.tok_emb(idx))
        return self.operator.start(x.bfloat16() if self.config.bf16_streams else x)

    def decode(self, streams):
        """Returns what the head sees, (B, T, d)."""
        return self.norm(self.operator.decode(streams, self.config))

    def cross_entropy(self, streams, targets):
        """Returns the cross-entropy of the decoded streams, in nats per token."""
        x, targets, V = self.decode(streams).flatten(0, 1), targets.flatten(), self.config.vocab_size
        # Tensor cores want rows in multiples of 64. The classes that fill them up have no weights, and a
        # logit so low that they have no part in the loss.
        extra = -V % 64
        W = F.pad(self.head.weight, (0, 0, 0, extra))
        bias = F.pad(x.new_zeros(V), (0, extra), value=-1e9)
        parts = 2 ** math.ceil(math.log2(max(1, len(targets) * V / LOGITS_AT_ONCE)))
        if parts > 1 and torch.is_grad_enabled():
            return LossInParts.apply(x, W, bias, targets, parts) / len(targets)
        losses = [
            F.cross_entropy(F.linear(rows, W, bias), target, reduction='sum')
            for rows, target in zip(x.chunk(parts), targets.chunk(parts))
        ]
        return sum(losses) / len(targets)

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64, T at most block_size.

        Without targets returns the logits, (B, T, V). With targets returns three things: the objective to
        minimize, cross-entropy + α · mean commit gate; the cross-entropy alone, in nats per token; and the
        mean commit gate of each sublayer, (2·n_layer,), or (0,) for an operator that has none."""
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
        """Returns the FLOPs of one training step per token, at T = block_size.

        They are 6 for each weight of a matrix product (2 forward, 4 backward; the gates' products and the
        head are in, embedding look-ups are not) and 12 · n_layer · d · T for attention scores and values,
        counted over the full T × T square as is the custom (Chowdhery et al. 2022, arXiv 2204.02311, appendix
        B). Elementwise work and constant matrices are not counted."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size


def replaced(part, chosen, argument):
    """Returns `part` if it is of the class `chosen`, and otherwise a new chosen(argument). Where `part` has a
    parameter of the same name and shape, the new one starts with its value."""
    if type(part) is chosen:
        return part
    new = chosen(argument)
    shapes = {name: value.shape for name, value in new.state_dict().items()}
    shared = {name: value for name, value in part.state_dict().items() if shapes.get(name) == value.shape}
    new.load_state_dict(shared, strict=False)
    return new


def twin(model):
    """Returns a GPT of the same parameters whose parts can be changed without changing those of `model`."""
    other = copy.copy(model)
    sublayers = nn.ModuleList(copy.copy(sublayer) for sublayer in model.sublayers)
    other._modules = {**model._modules, 'sublayers': sublayers}
    return other
