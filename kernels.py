"""
A faster deliberation step of the ledger for training in bfloat16 on a GPU. Optional: without this file the plain formula of model.py runs.

    D ← D − e ⊙ k (kᵀD) + w ⊙ (y + U_g V_g y)

Its arithmetic is small; what costs is memory traffic: e, w and k are as large as D. Here they never leave the chip. A tile of the result
is computed from tiles of D and y and from a = [V_e; V_w; V_k] u, which has 3r numbers a token; backward computes the gates again. What remains are
products with matrices of r columns, which cuBLAS does:
- the write map is folded into the output projection: y + U_g V_g y = (W + U_g V_g W) x + (b + U_g V_g b);
- with v = U_k a_k and G = U_kᵀU_k: ‖v‖² = a_kᵀ G a_k and kᵀD = a_kᵀ(U_kᵀD) / ‖v‖, so neither needs v;
- the gradient of v is a sum of three terms, each a number a token times what is there already, so it is never stored.

Shapes: N = B·T tokens, d = n_embd, r = gate_rank; R is r rounded up to a power of two, for the tensor cores.
"""
import copy
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
import triton
import triton.language as tl

from model import GPT, RESIDUALS, Ledger, Sublayer

HALF = torch.bfloat16                          # of what enters a matrix product
TILE = dict(ROWS=64, COLUMNS=32, num_warps=4)  # of one program: the fastest of ten on an H200


@triton.jit
def expand(A, U, row, col, N, part: tl.constexpr, d: tl.constexpr, r: tl.constexpr, R: tl.constexpr):
    """A: (N, 3r), U: (3, d, r). Returns the tile of a Uᵀ, (ROWS, COLUMNS), of gate `part`."""
    rank = tl.arange(0, R)
    a = tl.load(A + row[:, None] * (3 * r) + part * r + rank[None, :], (row < N)[:, None] & (rank < r)[None, :], 0.0)
    u = tl.load(U + part * d * r + col[None, :] * r + rank[:, None], (col < d)[None, :] & (rank < r)[:, None], 0.0)
    return tl.dot(a, u)


@triton.jit
def deliberate_tile(D, Y, A, f, U, be, bw, D2, N, d: tl.constexpr, r: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """D2 = D − e ⊙ v · f + w ⊙ y, with f = kᵀD / ‖v‖."""
    row, col = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at, there = row[:, None] * d + col[None, :], (row < N)[:, None] & (col < d)[None, :]
    e = tl.sigmoid(expand(A, U, row, col, N, 0, d, r, R) + tl.load(be + col, col < d, 0.0)[None, :])
    x = e * expand(A, U, row, col, N, 2, d, r, R) * tl.load(f + row, row < N, 0.0)[:, None]
    x = tl.load(D + at, there, 0.0).to(tl.float32) - x
    w = tl.sigmoid(expand(A, U, row, col, N, 1, d, r, R) + tl.load(bw + col, col < d, 0.0)[None, :])
    tl.store(D2 + at, x + w * tl.load(Y + at, there, 0.0).to(tl.float32), there)


@triton.jit
def backward_tile(g, Y, A, f, U, be, bw, gY, G, sums, N, d: tl.constexpr, r: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """g: the gradient of D2. G: (3, N, d): the gradients of the gates before σ, e and w, and −g ⊙ e. sums: the first two summed over the tile's rows."""
    row, col = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at, there = row[:, None] * d + col[None, :], (row < N)[:, None] & (col < d)[None, :]
    total, size = sums + tl.program_id(1) * 2 * d + col, N.to(tl.int64) * d
    x = tl.load(g + at, there, 0.0).to(tl.float32)
    w = tl.sigmoid(expand(A, U, row, col, N, 1, d, r, R) + tl.load(bw + col, col < d, 0.0)[None, :])
    tl.store(gY + at, x * w, there)
    w = x * tl.load(Y + at, there, 0.0).to(tl.float32) * w * (1 - w)
    tl.store(G + size + at, w, there)
    tl.store(total + d, tl.sum(w, 0), col < d)
    e = tl.sigmoid(expand(A, U, row, col, N, 0, d, r, R) + tl.load(be + col, col < d, 0.0)[None, :])
    x = -x * e
    tl.store(G + 2 * size + at, x, there)
    x *= expand(A, U, row, col, N, 2, d, r, R) * tl.load(f + row, row < N, 0.0)[:, None] * (1 - e)
    tl.store(G + at, x, there)
    tl.store(total, tl.sum(x, 0), col < d)


def launch(kernel, tensors, shape, r):
    (N, d), R = shape, max(16, triton.next_power_of_2(r))
    kernel[triton.cdiv(d, TILE['COLUMNS']), triton.cdiv(N, TILE['ROWS'])](*tensors, N, d, r, R, **TILE, num_stages=1)


@torch.library.custom_op('ledger::deliberate', mutates_args=())
def deliberate(D: torch.Tensor, y: torch.Tensor, a: torch.Tensor, f: torch.Tensor, U: torch.Tensor, be: torch.Tensor, bw: torch.Tensor) -> torch.Tensor:
    D2 = torch.empty_like(D)
    launch(deliberate_tile, (D, y, a, f, U, be, bw, D2), D.shape, U.shape[2])
    return D2


@deliberate.register_fake
def _(D, y, a, f, U, be, bw):
    return torch.empty_like(D)


def empty_gradients(y, be):
    (N, d) = y.shape
    return torch.empty_like(y), y.new_empty(3, N, d), be.new_empty(triton.cdiv(N, TILE['ROWS']), 2, d)


@torch.library.custom_op('ledger::deliberate_backward', mutates_args=())
def deliberate_backward(g: torch.Tensor, y: torch.Tensor, a: torch.Tensor, f: torch.Tensor, U: torch.Tensor, be: torch.Tensor,
                        bw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = empty_gradients(y, be)
    launch(backward_tile, (g, y, a, f, U, be, bw, *outputs), y.shape, U.shape[2])
    return outputs


@deliberate_backward.register_fake
def _(g, y, a, f, U, be, bw):
    return empty_gradients(y, be)


class Deliberate(torch.autograd.Function):
    """D: (N, d), any precision; y: (N, d), a: (N, 3r), U: (3, d, r), bfloat16; be, bw: (d,) float32. Returns the new D."""

    @staticmethod
    def forward(ctx, D, y, a, U, be, bw):
        with torch.autocast(D.device.type, enabled=False):
            ak = a.chunk(3, 1)[2].float()
            projected = D.to(U.dtype) @ U[2]                    # U_kᵀD
            Ga = ak @ (U[2].float().T @ U[2].float())           # float32: a quadratic form in bfloat16 loses what is small
            length = (ak * Ga).sum(1).clamp_min(1e-24).sqrt()   # ‖v‖
            f = (ak * projected).sum(1) / length.square()
            ctx.save_for_backward(D, y, a, U, be, bw, projected, Ga.to(U.dtype), length, f)
            return deliberate(D, y, a, f, U, be, bw)

    @staticmethod
    def backward(ctx, g):
        D, y, a, U, be, bw, projected, Ga, length, f = ctx.saved_tensors
        with torch.autocast(D.device.type, enabled=False):
            gy, G, sums = deliberate_backward(g.contiguous(), y, a, f, U, be, bw)
            ae, aw, ak = a.chunk(3, 1)
            along = torch.bmm(G, U)                             # (3, N, r): the gradients of a_e and a_w, and −U_kᵀ(g ⊙ e)
            h = ((ak * along[2]).sum(1, dtype=torch.float32) / length.square())[:, None]  # (the gradient of kᵀD) / ‖v‖
            # gradient of v = f · (−g ⊙ e) + h · D − 2 f h · v; where ‖v‖ is held at 1e-12, the last is missing
            last = torch.where(length > 1e-12, 2 * f * h[:, 0], 0.0)[:, None]
            gak = f[:, None] * along[2] + h * projected - last * Ga
            gU = torch.bmm(G.mT, torch.stack([ae, aw, (f[:, None] * ak).to(a.dtype)])).float()
            h_ak = (h * ak).to(a.dtype)
            gUk = gU[2] + (D.to(a.dtype).T @ h_ak).float() - U[2].float() @ (ak.T @ (last * ak).to(a.dtype)).float()
            gD = torch.addmm(g, h_ak, U[2].T) if g.dtype == U.dtype else g + h_ak @ U[2].T
            g_be, g_bw = sums.sum(0)
            return gD, gy, torch.cat([along[0], along[1], gak.to(a.dtype)], 1), torch.stack([gU[0], gU[1], gUk]).to(U.dtype), g_be, g_bw


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
    """Returns as_fast(model); or None if the model's formulas are not those of the kernels, which a small random model of the same
    widths shows: model.py is there to be changed."""
    if RESIDUALS.get(model.config.residual) is not Ledger or model.config.gate_rank > 128:
        return None
    device = model.norm.weight.device
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast(device.type, HALF):
        plain = GPT(replace(model.config, n_layer=1, vocab_size=64, block_size=64))
        for parameter in plain.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        plain.to(device)
        idx = torch.arange(64, device=device)[None]
        expected, found = plain(idx), as_fast(plain)(idx)
    return as_fast(model) if (found - expected).norm() < 0.05 * expected.norm() else None
