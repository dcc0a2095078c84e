"""
A faster deliberation step of the ledger for training in bfloat16 on a GPU. Optional: without this file the plain formula of model.py runs.

    D ← D − e ⊙ k (kᵀD) + w ⊙ (y + U_g V_g y)

Its arithmetic is small; what costs is memory traffic: e, w and k are as large as D. Here neither they nor their gradients ever leave the
chip. A tile of the result is computed from tiles of D and y and from a = [V_e; V_w; V_k] u, which has 3r numbers a token; backward
computes the gates again, twice, since the gradients of a are sums over columns and those of U sums over tokens. The rest is cuBLAS's:
- the write map is folded into the output projection: y + U_g V_g y = (W + U_g V_g W) x + (b + U_g V_g b);
- with v = U_k a_k and G = U_kᵀU_k: ‖v‖² = a_kᵀ G a_k and kᵀD = a_kᵀ(U_kᵀD) / ‖v‖, so neither needs v;
- the gradient of v is f · (−g ⊙ e) + h · D − 2 f h · v, with g that of the new D, f = kᵀD / ‖v‖ and h = −(g ⊙ e)ᵀv / ‖v‖².
  Where ‖v‖ is held at 1e-12, its last part is missing.

Shapes: N = B·T tokens, d = n_embd, r = gate_rank; R is r rounded up to a power of two, for the tensor cores.
D, y, g: (N, d); a: (N, 3r); U: (3, d, r), in the order e, w, k; be, bw: (d,); f, h, length = ‖v‖: (N,); projected = U_kᵀD, Ga = G a_k: (N, r).
"""
import copy
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
import triton
import triton.language as tl

from model import GPT, RESIDUALS, Ledger, Sublayer

HALF = torch.bfloat16  # of what enters a matrix product
# What one program does, by timing some on an H200: tiles of ROWS × COLUMNS, LOOP of them down the rows or all across the columns.
DELIBERATE = dict(ROWS=64, COLUMNS=64, LOOP=16, STAGES=2, num_warps=4)
GRADIENT_A = dict(ROWS=64, COLUMNS=64, STAGES=2, num_warps=4)
GRADIENT_U = dict(ROWS=64, COLUMNS=32, LOOP=16, STAGES=2, num_warps=4)


@triton.jit
def load_U(U, gate: tl.constexpr, col, d: tl.constexpr, r: tl.constexpr, R: tl.constexpr):
    """Returns (R, COLUMNS)."""
    rank = tl.arange(0, R)
    return tl.load(U + gate * d * r + col[None, :] * r + rank[:, None], (col < d)[None, :] & (rank < r)[:, None], 0.0)


@triton.jit
def load_a(A, gate: tl.constexpr, row, N, r: tl.constexpr, R: tl.constexpr):
    """Returns (ROWS, R)."""
    rank = tl.arange(0, R)
    return tl.load(A + row[:, None] * (3 * r) + gate * r + rank[None, :], (row < N)[:, None] & (rank < r)[None, :], 0.0)


@triton.jit
def deliberate_kernel(D, Y, A, f, U, be, bw, D2, N, d: tl.constexpr, r: tl.constexpr, R: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr):
    """D2 = D − e ⊙ v · f + w ⊙ y."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    Ue, Uw, Uk = load_U(U, 0, col, d, r, R), load_U(U, 1, col, d, r, R), load_U(U, 2, col, d, r, R)
    b_e, b_w = tl.load(be + col, col < d, 0.0)[None, :], tl.load(bw + col, col < d, 0.0)[None, :]
    for i in tl.range(LOOP, num_stages=STAGES):
        row = ((tl.program_id(1) * LOOP + i) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at, there = row[:, None] * d + col[None, :], (row < N)[:, None] & (col < d)[None, :]
        x = tl.sigmoid(tl.dot(load_a(A, 0, row, N, r, R), Ue) + b_e) * tl.dot(load_a(A, 2, row, N, r, R), Uk) * tl.load(f + row, row < N, 0.0)[:, None]
        x = tl.load(D + at, there, 0.0).to(tl.float32) - x
        w = tl.sigmoid(tl.dot(load_a(A, 1, row, N, r, R), Uw) + b_w)
        tl.store(D2 + at, x + w * tl.load(Y + at, there, 0.0).to(tl.float32), there)


@triton.jit
def gradient_a_kernel(g, Y, A, f, U, be, bw, projected, Ga, length, gA, h, N, d: tl.constexpr, r: tl.constexpr, R: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """The gradient of a, and h: whole rows."""
    row, rank = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, R)
    ae, aw, ak = load_a(A, 0, row, N, r, R), load_a(A, 1, row, N, r, R), load_a(A, 2, row, N, r, R)
    f_row = tl.load(f + row, row < N, 0.0)[:, None]
    ge, gw, gk = tl.zeros((ROWS, R), tl.float32), tl.zeros((ROWS, R), tl.float32), tl.zeros((ROWS, R), tl.float32)
    for j in tl.range(0, d, COLUMNS, num_stages=STAGES):
        col = j + tl.arange(0, COLUMNS)
        at, there = row[:, None] * d + col[None, :], (row < N)[:, None] & (col < d)[None, :]
        x = tl.load(g + at, there, 0.0).to(tl.float32)
        u = load_U(U, 1, col, d, r, R)
        w = tl.sigmoid(tl.dot(aw, u) + tl.load(bw + col, col < d, 0.0)[None, :])
        w = x * tl.load(Y + at, there, 0.0).to(tl.float32) * w * (1 - w)
        gw += tl.dot(w.to(u.dtype), tl.trans(u))
        u = load_U(U, 0, col, d, r, R)
        e = tl.sigmoid(tl.dot(ae, u) + tl.load(be + col, col < d, 0.0)[None, :])
        x = -x * e
        uk = load_U(U, 2, col, d, r, R)
        gk += tl.dot(x.to(u.dtype), tl.trans(uk))
        x *= tl.dot(ak, uk) * f_row * (1 - e)
        ge += tl.dot(x.to(u.dtype), tl.trans(u))
    at, there, norm = row[:, None] * r + rank[None, :], (row < N)[:, None] & (rank < r)[None, :], tl.load(length + row, row < N, 1.0)
    h_row = tl.sum(ak.to(tl.float32) * gk, 1) / (norm * norm)
    last = tl.where(norm > 1e-12, 2.0, 0.0)[:, None] * f_row * h_row[:, None]
    gk = f_row * gk + h_row[:, None] * tl.load(projected + at, there, 0.0).to(tl.float32) - last * tl.load(Ga + at, there, 0.0).to(tl.float32)
    out = gA + row[:, None] * (3 * r) + rank[None, :]
    tl.store(out, ge, there)
    tl.store(out + r, gw, there)
    tl.store(out + 2 * r, gk, there)
    tl.store(h + row, h_row, row < N)


@triton.jit
def gradient_U_kernel(g, Y, D, A, f, h, length, U, be, bw, gY, gD, gU, gb, N, d: tl.constexpr, r: tl.constexpr, R: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr):
    """The gradients of y and D, and this program's share of those of U and of the biases: its rows."""
    col, rank = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R)
    Ue, Uw, Uk = load_U(U, 0, col, d, r, R), load_U(U, 1, col, d, r, R), load_U(U, 2, col, d, r, R)
    b_e, b_w = tl.load(be + col, col < d, 0.0)[None, :], tl.load(bw + col, col < d, 0.0)[None, :]
    sum_e, sum_w = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    ge, gw, gk = tl.zeros((COLUMNS, R), tl.float32), tl.zeros((COLUMNS, R), tl.float32), tl.zeros((COLUMNS, R), tl.float32)
    for i in tl.range(LOOP, num_stages=STAGES):
        row = ((tl.program_id(1) * LOOP + i) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at, there = row[:, None] * d + col[None, :], (row < N)[:, None] & (col < d)[None, :]
        x = tl.load(g + at, there, 0.0).to(tl.float32)
        f_row, h_row, norm = tl.load(f + row, row < N, 0.0)[:, None], tl.load(h + row, row < N, 0.0)[:, None], tl.load(length + row, row < N, 1.0)[:, None]
        a = load_a(A, 1, row, N, r, R)
        w = tl.sigmoid(tl.dot(a, Uw) + b_w)
        tl.store(gY + at, x * w, there)
        w = x * tl.load(Y + at, there, 0.0).to(tl.float32) * w * (1 - w)
        sum_w += tl.sum(w, 0)
        gw += tl.dot(tl.trans(w.to(a.dtype)), a)
        ak = load_a(A, 2, row, N, r, R)
        v = tl.dot(ak, Uk)
        tl.store(gD + at, x + h_row * v, there)
        a = load_a(A, 0, row, N, r, R)
        e = tl.sigmoid(tl.dot(a, Ue) + b_e)
        x = -x * e * f_row
        y = x + h_row * tl.load(D + at, there, 0.0).to(tl.float32) - tl.where(norm > 1e-12, 2.0, 0.0) * f_row * h_row * v
        gk += tl.dot(tl.trans(y.to(a.dtype)), ak)
        x = x * v * (1 - e)
        sum_e += tl.sum(x, 0)
        ge += tl.dot(tl.trans(x.to(a.dtype)), a)
    at, there = tl.program_id(1) * 3 * d * r + col[:, None] * r + rank[None, :], (col < d)[:, None] & (rank < r)[None, :]
    tl.store(gU + at, ge, there)
    tl.store(gU + at + d * r, gw, there)
    tl.store(gU + at + 2 * d * r, gk, there)
    tl.store(gb + tl.program_id(1) * 2 * d + col, sum_e, col < d)
    tl.store(gb + tl.program_id(1) * 2 * d + d + col, sum_w, col < d)


def groups(tile, N):
    return triton.cdiv(N, tile['ROWS'] * tile.get('LOOP', 1))


def launch(kernel, tile, tensors, y, U):
    (N, d), r = y.shape, U.shape[2]
    grid = (triton.cdiv(d, tile['COLUMNS']), groups(tile, N)) if 'LOOP' in tile else (groups(tile, N),)
    kernel[grid](*tensors, N, d, r, max(16, triton.next_power_of_2(r)), **tile)


# To the compiler each launch is one opaque operation: what it returns, what it does, and what it returns once more for tracing.

@torch.library.custom_op('ledger::deliberate', mutates_args=())
def deliberate(D: torch.Tensor, y: torch.Tensor, a: torch.Tensor, f: torch.Tensor, U: torch.Tensor, be: torch.Tensor, bw: torch.Tensor) -> torch.Tensor:
    D2 = torch.empty_like(D)
    launch(deliberate_kernel, DELIBERATE, (D, y, a, f, U, be, bw, D2), y, U)
    return D2


@deliberate.register_fake
def _(D, y, a, f, U, be, bw):
    return torch.empty_like(D)


@torch.library.custom_op('ledger::gradient_a', mutates_args=())
def gradient_a(g: torch.Tensor, y: torch.Tensor, a: torch.Tensor, f: torch.Tensor, U: torch.Tensor, be: torch.Tensor, bw: torch.Tensor,
               projected: torch.Tensor, Ga: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = torch.empty_like(a), torch.empty_like(f)
    launch(gradient_a_kernel, GRADIENT_A, (g, y, a, f, U, be, bw, projected, Ga, length, *outputs), y, U)
    return outputs


@gradient_a.register_fake
def _(g, y, a, f, U, be, bw, projected, Ga, length):
    return torch.empty_like(a), torch.empty_like(f)


def empty_gradients(y, D, U, be):
    n = groups(GRADIENT_U, len(y))
    return torch.empty_like(y), torch.empty_like(D), be.new_empty(n, *U.shape), be.new_empty(n, 2, len(be))


@torch.library.custom_op('ledger::gradient_U', mutates_args=())
def gradient_U(g: torch.Tensor, y: torch.Tensor, D: torch.Tensor, a: torch.Tensor, f: torch.Tensor, h: torch.Tensor, length: torch.Tensor, U: torch.Tensor,
               be: torch.Tensor, bw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = empty_gradients(y, D, U, be)
    launch(gradient_U_kernel, GRADIENT_U, (g, y, D, a, f, h, length, U, be, bw, *outputs), y, U)
    return outputs


@gradient_U.register_fake
def _(g, y, D, a, f, h, length, U, be, bw):
    return empty_gradients(y, D, U, be)


class Deliberate(torch.autograd.Function):
    """D: (N, d), any precision; y: (N, d), a: (N, 3r), U: (3, d, r), bfloat16; be, bw: (d,) float32. Returns the new D."""

    @staticmethod
    def forward(ctx, D, y, a, U, be, bw):
        with torch.autocast(D.device.type, enabled=False):
            ak = a.chunk(3, 1)[2].float()
            projected = D.to(U.dtype) @ U[2]
            Ga = ak @ (U[2].float().T @ U[2].float())           # float32: a quadratic form in bfloat16 loses what is small
            length = (ak * Ga).sum(1).clamp_min(1e-24).sqrt()
            f = (ak * projected).sum(1) / length.square()
            ctx.save_for_backward(D, y, a, U, be, bw, projected, Ga.to(U.dtype), length, f)
            return deliberate(D, y, a, f, U, be, bw)

    @staticmethod
    def backward(ctx, g):
        D, y, a, U, be, bw, projected, Ga, length, f = ctx.saved_tensors
        g = g.contiguous()
        ga, h = gradient_a(g, y, a, f, U, be, bw, projected, Ga, length)
        gy, gD, gU, gb = gradient_U(g, y, D, a, f, h, length, U, be, bw)
        return gD, gy, ga, gU.sum(0).to(U.dtype), *gb.sum(0)


class FastSublayer(Sublayer):
    """A ledger's sublayer that deliberates through the kernels."""

    def forward(self, streams):
        r, proj, shape = self.residual, self.function.proj, streams['D'].shape
        u = self.norm(r.read(streams))
        y = F.linear(self.function.inner(u), proj.weight + r.write_map(proj.weight.T).T, None if proj.bias is None else proj.bias + r.write_map(proj.bias))
        gates = r.erase_gate, r.write_gate, r.erase_direction
        a = F.linear(u, torch.cat([gate.V.weight for gate in gates]))
        U = torch.stack([gate.U.weight for gate in gates]).to(HALF)
        D = Deliberate.apply(*(x.flatten(0, 1) for x in (streams['D'], y, a)), U, r.erase_gate.U.bias, r.write_gate.U.bias)
        updated, commit_gate = r.commit(D.view(shape), streams['C'], u)
        return {name: x.to(streams[name].dtype) for name, x in updated.items()}, commit_gate


def as_fast(model):
    """Returns a GPT with the parameters of `model` that deliberates through the kernels."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, 'sublayers': nn.ModuleList(copy.copy(sublayer) for sublayer in model.sublayers)}
    for sublayer in twin.sublayers:
        sublayer.__class__ = FastSublayer
    return twin


def fast(model):
    """Returns as_fast(model); or None if the model's formulas are not those of the kernels, which a small random model shows (model.py is
    there to be changed), or if the kernels cannot run at the model's own widths on its device."""
    config, device = model.config, model.norm.weight.device
    if RESIDUALS.get(config.residual) is not Ledger or config.gate_rank > 128:
        return None
    own = replace(config, n_layer=1, vocab_size=64, block_size=64)
    small = replace(own, n_head=2, n_embd=32, gate_rank=16)  # few dimensions: every term of the formula counts
    idx = torch.arange(64, device=device)[None]
    try:
        for sizes, tolerance in ((small, 0.03), (own, 0.3)):
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                plain = GPT(sizes)
                for name, parameter in plain.named_parameters():
                    parameter += 0.2 * torch.randn_like(parameter) + 3 * name.endswith('erase_gate.U.bias')  # gates half open
            plain.to(device)
            expected = plain(idx).detach()
            with torch.autocast(device.type, HALF):
                objective = as_fast(plain)(idx, idx)[0]
                found = as_fast(plain)(idx).detach()
            objective.backward()
            if not (found - expected).norm() < tolerance * expected.norm():
                return None
    except (RuntimeError, triton.runtime.errors.OutOfResources):  # a GPU that is too small for the tiles
        return None
    return as_fast(model)
