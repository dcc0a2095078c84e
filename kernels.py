"""
A faster way through the ledger for training in bfloat16 on a GPU. Optional: without this file the plain formulas of model.py run.

The residual update's arithmetic is small; what costs is memory traffic. So one Triton kernel goes from a sublayer's output y to the
next sublayer's input u: erase, write, commit, the next read and its RMSNorm. It reads D, C and y once and writes D, C and u once; the
gates never leave the chip. Its backward kernel computes the gates again. The function is model.py's (same formulas, sums in float32):
- the maps of u (erase gate, write gate, erase direction) are one product with stacked V: a = [V_e; V_w; V_k] u;
- the write map is folded into the output projection: y + U_g V_g y = (W + U_g V_g W) x + (b + U_g V_g b);
- kᵀD = v·D / ‖v‖, so k is never stored; (U_P V_P D)·C̄ = (V_P D)·(U_Pᵀ C̄), so the commit map is not computed again.

Shapes: N = B·T tokens (rows), d = n_embd, r = gate_rank; R is r rounded up to a power of two, for the tensor cores.
"""
import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from model import GPT, RESIDUALS, Ledger

HALF = torch.bfloat16              # of what enters a matrix product
ROWS, COLUMNS, WARPS = 64, 128, 8  # a program's rows and how many columns it holds at once. Measured on an H200


@triton.jit
def columns_of(matrix, cols, rank, d, r):
    """matrix: (d, r). Returns its rows `cols`, (COLUMNS, R), zero outside."""
    return tl.load(matrix + cols[:, None] * r + rank[None, :], mask=(cols < d)[:, None] & (rank < r)[None, :], other=0.0)


@triton.jit
def update_forward(D, C, Y, A, c, Ue, Uw, Uk, be, bw, VP, UP, read, gain, wc,
                   D2, C2, u, z, p, kD, length, rstd,
                   N, alpha, d: tl.constexpr, r: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, rank = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, R)
    there = row < N
    a_at, a_there = A + row[:, None] * (3 * r) + rank[None, :], there[:, None] & (rank < r)[None, :]
    ae, aw, ak = tl.load(a_at, a_there, 0.0), tl.load(a_at + r, a_there, 0.0), tl.load(a_at + 2 * r, a_there, 0.0)
    gate = tl.load(c + row, there, 0.0)

    square, product = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for j in range(0, d, COLUMNS):
        col = j + tl.arange(0, COLUMNS)
        at, ok = row[:, None] * d + col[None, :], there[:, None] & (col < d)[None, :]
        v = tl.dot(ak, tl.trans(columns_of(Uk, col, rank, d, r)))
        square += tl.sum(v * v, 1)
        product += tl.sum(v * tl.load(D + at, ok, 0.0).to(tl.float32), 1)
    norm = tl.maximum(tl.sqrt(square), 1e-12)
    k_D = product / norm
    erase = k_D / norm

    committed = tl.zeros((ROWS, R), tl.float32)
    for j in range(0, d, COLUMNS):
        col = j + tl.arange(0, COLUMNS)
        at, ok = row[:, None] * d + col[None, :], there[:, None] & (col < d)[None, :]
        v = tl.dot(ak, tl.trans(columns_of(Uk, col, rank, d, r)))
        e = tl.sigmoid(tl.dot(ae, tl.trans(columns_of(Ue, col, rank, d, r))) + tl.load(be + col, col < d, 0.0)[None, :])
        w = tl.sigmoid(tl.dot(aw, tl.trans(columns_of(Uw, col, rank, d, r))) + tl.load(bw + col, col < d, 0.0)[None, :])
        x = tl.load(D + at, ok, 0.0).to(tl.float32) - e * v * erase[:, None] + w * tl.load(Y + at, ok, 0.0).to(tl.float32)
        tl.store(D2 + at, x, ok)
        V = tl.load(VP + rank[:, None] * d + col[None, :], (rank < r)[:, None] & (col < d)[None, :], 0.0)
        committed += tl.dot(x.to(V.dtype), tl.trans(V))
    low = committed.to(ae.dtype)
    tl.debug_barrier()

    squares = tl.zeros((ROWS,), tl.float32)
    for j in range(0, d, COLUMNS):
        col = j + tl.arange(0, COLUMNS)
        at, ok = row[:, None] * d + col[None, :], there[:, None] & (col < d)[None, :]
        x = tl.load(D2 + at, ok, 0.0).to(tl.float32)
        y = tl.load(C + at, ok, 0.0).to(tl.float32) + gate[:, None] * (x + tl.dot(low, tl.trans(columns_of(UP, col, rank, d, r))))
        tl.store(C2 + at, y, ok)
        x = alpha * x + tl.load(read + col, col < d, 0.0)[None, :] * y
        squares += tl.sum(x * x, 1)
    scale = tl.rsqrt(squares / d + 1e-6)
    tl.debug_barrier()

    logit = tl.zeros((ROWS,), tl.float32)
    for j in range(0, d, COLUMNS):
        col = j + tl.arange(0, COLUMNS)
        at, ok = row[:, None] * d + col[None, :], there[:, None] & (col < d)[None, :]
        x = alpha * tl.load(D2 + at, ok, 0.0).to(tl.float32) + tl.load(read + col, col < d, 0.0)[None, :] * tl.load(C2 + at, ok, 0.0).to(tl.float32)
        x = x * scale[:, None] * tl.load(gain + col, col < d, 0.0)[None, :]
        tl.store(u + at, x, ok)
        logit += tl.sum(x * tl.load(wc + col, col < d, 0.0)[None, :], 1)
    tl.store(z + row, logit, there)
    tl.store(kD + row, k_D, there)
    tl.store(length + row, norm, there)
    tl.store(rstd + row, scale, there)
    tl.store(p + row[:, None] * r + rank[None, :], low, a_there)


@triton.jit
def update_backward(D, Y, A, c, Ue, Uw, Uk, be, bw, VP, UP, read, gain, wc, D2, C2, p, kD, length, rstd,
                    gD2, gC2, gu, gz,
                    gD, gC, gY, ge, gw, gv, gA, gc, gp, sums,
                    N, alpha, d: tl.constexpr, r: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, rank = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, R)
    there = row < N
    low_at, low_there = row[:, None] * r + rank[None, :], there[:, None] & (rank < r)[None, :]
    a_at = row[:, None] * (3 * r) + rank[None, :]
    ae, aw, ak = tl.load(A + a_at, low_there, 0.0), tl.load(A + a_at + r, low_there, 0.0), tl.load(A + a_at + 2 * r, low_there, 0.0)
    gate, scale, logit = tl.load(c + row, there, 0.0)[:, None], tl.load(rstd + row, there, 0.0)[:, None], tl.load(gz + row, there, 0.0)[:, None]
    k_D, norm = tl.load(kD + row, there, 0.0)[:, None], tl.load(length + row, there, 1.0)[:, None]
    total = sums + tl.program_id(0) * 5 * d  # of this program's rows: gain, read, w_c, b_e, b_w

    mean = tl.zeros((ROWS,), tl.float32)
    for j in range(0, d, COLUMNS):
        col = j + tl.arange(0, COLUMNS)
        at, ok = row[:, None] * d + col[None, :], there[:, None] & (col < d)[None, :]
        x = alpha * tl.load(D2 + at, ok, 0.0).to(tl.float32) + tl.load(read + col, col < d, 0.0)[None, :] * tl.load(C2 + at, ok, 0.0).to(tl.float32)
        t = (tl.load(gu + at, ok, 0.0).to(tl.float32) + logit * tl.load(wc + col, col < d, 0.0)[None, :]) * tl.load(gain + col, col < d, 0.0)[None, :]
        mean += tl.sum(t * x, 1)
    along = mean[:, None] * scale / d

    low, g_gate = tl.zeros((ROWS, R), tl.float32), tl.zeros((ROWS,), tl.float32)
    for j in range(0, d, COLUMNS):
        col = j + tl.arange(0, COLUMNS)
        at, ok = row[:, None] * d + col[None, :], there[:, None] & (col < d)[None, :]
        lam, g, w_c = tl.load(read + col, col < d, 0.0)[None, :], tl.load(gain + col, col < d, 0.0)[None, :], tl.load(wc + col, col < d, 0.0)[None, :]
        x, y = tl.load(D2 + at, ok, 0.0).to(tl.float32), tl.load(C2 + at, ok, 0.0).to(tl.float32)
        normed = (alpha * x + lam * y) * scale
        t = tl.load(gu + at, ok, 0.0).to(tl.float32) + logit * w_c
        gx = scale * (t * g - normed * along)
        tl.store(total + col, tl.sum(t * normed, 0), col < d)
        tl.store(total + d + col, tl.sum(gx * y, 0), col < d)
        tl.store(total + 2 * d + col, tl.sum(logit * normed * g, 0), col < d)
        y = tl.load(gC2 + at, ok, 0.0).to(tl.float32) + lam * gx
        tl.store(gC + at, y, ok)
        tl.store(gD + at, tl.load(gD2 + at, ok, 0.0).to(tl.float32) + alpha * gx + gate * y, ok)  # its third part follows
        g_gate += tl.sum(y * x, 1)
        U = columns_of(UP, col, rank, d, r)
        low += tl.dot(y.to(U.dtype), U)
    g_gate += tl.sum(low * tl.load(p + low_at, low_there, 0.0).to(tl.float32), 1)
    tl.store(gc + row, g_gate, there)
    low16 = (low * gate).to(ae.dtype)
    tl.store(gp + low_at, low16, low_there)
    tl.debug_barrier()

    gae, gaw, g_k_D = tl.zeros((ROWS, R), tl.float32), tl.zeros((ROWS, R), tl.float32), tl.zeros((ROWS,), tl.float32)
    for j in range(0, d, COLUMNS):
        col = j + tl.arange(0, COLUMNS)
        at, ok = row[:, None] * d + col[None, :], there[:, None] & (col < d)[None, :]
        V = tl.load(VP + rank[:, None] * d + col[None, :], (rank < r)[:, None] & (col < d)[None, :], 0.0)
        x = tl.load(gD + at, ok, 0.0).to(tl.float32) + tl.dot(low16, V)
        tl.store(gD + at, x, ok)
        U = columns_of(Uw, col, rank, d, r)
        w = tl.sigmoid(tl.dot(aw, tl.trans(U)) + tl.load(bw + col, col < d, 0.0)[None, :])
        y = x * tl.load(Y + at, ok, 0.0).to(tl.float32) * w * (1 - w)
        tl.store(gY + at, x * w, ok)
        tl.store(gw + at, y, ok)
        tl.store(total + 4 * d + col, tl.sum(y, 0), col < d)
        gaw += tl.dot(y.to(U.dtype), U)
        U = columns_of(Ue, col, rank, d, r)
        e = tl.sigmoid(tl.dot(ae, tl.trans(U)) + tl.load(be + col, col < d, 0.0)[None, :])
        x = -x * e
        tl.store(gv + at, x, ok)  # for the next loop
        x *= tl.dot(ak, tl.trans(columns_of(Uk, col, rank, d, r))) / norm
        g_k_D += tl.sum(x, 1)
        y = x * k_D * (1 - e)
        tl.store(ge + at, y, ok)
        tl.store(total + 3 * d + col, tl.sum(y, 0), col < d)
        gae += tl.dot(y.to(U.dtype), U)
    tl.store(gA + a_at, gae, low_there)
    tl.store(gA + a_at + r, gaw, low_there)
    tl.debug_barrier()

    gs, gak = g_k_D[:, None], tl.zeros((ROWS, R), tl.float32)
    for j in range(0, d, COLUMNS):
        col = j + tl.arange(0, COLUMNS)
        at, ok = row[:, None] * d + col[None, :], there[:, None] & (col < d)[None, :]
        U = columns_of(Uk, col, rank, d, r)
        k = tl.dot(ak, tl.trans(U)) / norm
        tl.store(gD + at, tl.load(gD + at, ok, 0.0).to(tl.float32) + gs * k, ok)
        y = (k_D * tl.load(gv + at, ok, 0.0).to(tl.float32) + gs * (tl.load(D + at, ok, 0.0).to(tl.float32) - 2 * k_D * k)) / norm
        tl.store(gv + at, y, ok)
        gak += tl.dot(y.to(U.dtype), U)
    tl.store(gA + a_at + 2 * r, gak, low_there)


def launch(kernel, tensors, N, alpha, d, r):
    R = max(16, triton.next_power_of_2(r))
    kernel[(triton.cdiv(N, ROWS),)](*tensors, N, alpha, d, r, R, ROWS, COLUMNS, num_warps=WARPS)


@torch.library.custom_op('ledger::update', mutates_args=())
def update(D: torch.Tensor, C: torch.Tensor, y: torch.Tensor, a: torch.Tensor, c: torch.Tensor,
           Ue: torch.Tensor, Uw: torch.Tensor, Uk: torch.Tensor, be: torch.Tensor, bw: torch.Tensor, VP: torch.Tensor, UP: torch.Tensor,
           read: torch.Tensor, gain: torch.Tensor, wc: torch.Tensor, alpha: float) -> list[torch.Tensor]:
    """D, C: (N, d), any precision; y: (N, d), a: (N, 3r), U: (d, r), V: (r, d), bfloat16; c: (N,) and the vectors (d,) float32.
    The next read is alpha · D + read ⊙ C. Returns D, C, the next u (bfloat16), w_cᵀu (N,), and what backward needs: V_P D, kᵀD, ‖v‖, 1/rms."""
    (N, d), r = D.shape, Ue.shape[1]
    outputs = [torch.empty_like(D), torch.empty_like(C), torch.empty_like(y), torch.empty_like(c), y.new_empty(N, r), *(torch.empty_like(c) for _ in range(3))]
    launch(update_forward, (D, C, y, a, c, Ue, Uw, Uk, be, bw, VP, UP, read, gain, wc, *outputs), N, alpha, d, r)
    return outputs


@update.register_fake
def _(D, C, y, a, c, Ue, Uw, Uk, be, bw, VP, UP, read, gain, wc, alpha):
    return [torch.empty_like(D), torch.empty_like(C), torch.empty_like(y), torch.empty_like(c), y.new_empty(y.shape[0], Ue.shape[1]),
            *(torch.empty_like(c) for _ in range(3))]


@torch.library.custom_op('ledger::update_backward', mutates_args=())
def backward(D: torch.Tensor, y: torch.Tensor, a: torch.Tensor, c: torch.Tensor,
             Ue: torch.Tensor, Uw: torch.Tensor, Uk: torch.Tensor, be: torch.Tensor, bw: torch.Tensor, VP: torch.Tensor, UP: torch.Tensor,
             read: torch.Tensor, gain: torch.Tensor, wc: torch.Tensor,
             D2: torch.Tensor, C2: torch.Tensor, p: torch.Tensor, kD: torch.Tensor, length: torch.Tensor, rstd: torch.Tensor,
             gD2: torch.Tensor, gC2: torch.Tensor, gu: torch.Tensor, gz: torch.Tensor, alpha: float) -> list[torch.Tensor]:
    """Returns the gradients of D, C, y, the gates before σ (e, w), v, a, c, V_P D, and of (gain, read, w_c, b_e, b_w) as (programs, 5, d)."""
    (N, d), r = D.shape, Ue.shape[1]
    outputs = [torch.empty_like(D), torch.empty_like(D), *(torch.empty_like(y) for _ in range(4)), torch.empty_like(a), torch.empty_like(c),
               torch.empty_like(p), c.new_empty(triton.cdiv(N, ROWS), 5, d)]
    launch(update_backward, (D, y, a, c, Ue, Uw, Uk, be, bw, VP, UP, read, gain, wc, D2, C2, p, kD, length, rstd, gD2, gC2, gu, gz, *outputs), N, alpha, d, r)
    return outputs


@backward.register_fake
def _(D, y, a, c, Ue, Uw, Uk, be, bw, VP, UP, read, gain, wc, D2, C2, p, kD, length, rstd, gD2, gC2, gu, gz, alpha):
    return [torch.empty_like(D), torch.empty_like(D), *(torch.empty_like(y) for _ in range(4)), torch.empty_like(a), torch.empty_like(c),
            torch.empty_like(p), c.new_empty(triton.cdiv(D.shape[0], ROWS), 5, D.shape[1])]


def keep(ctx, inputs, output):
    D, C, y, a, c, *weights, ctx.alpha = inputs
    D2, C2, u, z, *rest = output
    ctx.save_for_backward(D, y, a, c, *weights, D2, C2, *rest)


def gradients(ctx, grads):
    D, y, a, c, Ue, Uw, Uk, be, bw, VP, UP, read, gain, wc, D2, C2, p, *_ = saved = ctx.saved_tensors
    like = (D2, C2, y, c)
    grads = [g.contiguous() if g is not None else torch.zeros_like(x) for g, x in zip(grads, like)]
    gD, gC, gy, ge, gw, gv, ga, gc, gp, sums = backward(*saved, *grads, ctx.alpha)
    g_gain, g_read, g_wc, g_be, g_bw = sums.sum(0)
    ae, aw, ak = a.chunk(3, 1)
    g_UP = gC.to(p.dtype).T @ (p * c[:, None]).to(p.dtype)
    return gD, gC, gy, ga, gc, ge.T @ ae, gw.T @ aw, gv.T @ ak, g_be, g_bw, gp.T @ D2.to(gp.dtype), g_UP, g_read, g_gain, g_wc, None


update.register_autograd(gradients, setup_context=keep)


class Fast(GPT):
    """A GPT whose trunk runs through the kernel. It shares the parameters of the model that it was made from."""

    def trunk(self, idx):
        first, config = self.sublayers[0], self.config
        x = self.embed(idx)
        streams = first.residual.start(x.flatten(0, 1))
        u = first.norm(first.residual.read(streams))
        D, C, z, gates = streams['D'], streams['C'], (u * first.residual.commit_weight).sum(-1), []
        u = u.to(HALF)
        for sublayer, next in zip(self.sublayers, [*self.sublayers[1:], None]):
            r, proj = sublayer.residual, sublayer.function.proj
            c = torch.sigmoid(z + r.commit_bias)
            gates.append(c.mean())
            maps = (r.erase_gate, r.write_gate, r.erase_direction)
            V, *U = (w.to(HALF) for w in (torch.cat([m.V.weight for m in maps]), *(m.U.weight for m in maps), r.commit_map.V.weight, r.commit_map.U.weight))
            x = sublayer.function.inner(u.view(*idx.shape, -1)).flatten(0, 1)
            y = F.linear(x, proj.weight + r.write_map(proj.weight.T).T, None if proj.bias is None else proj.bias + r.write_map(proj.bias))
            if next:
                alpha, read, gain, wc = 1.0, next.residual.read_scale, next.norm.weight, next.residual.commit_weight
            else:  # the decoder reads γ D + C
                alpha, read, gain, wc = config.decode_gamma, torch.ones_like(self.norm.weight), self.norm.weight, torch.zeros_like(self.norm.weight)
            D, C, u, z, *_ = update(D, C, y, F.linear(u, V), c, *U[:3], r.erase_gate.U.bias, r.write_gate.U.bias, *U[3:], read, gain, wc, alpha)
        return u.view(*idx.shape, -1), gates


def fast(model):
    """Returns a GPT with the parameters of `model`, on a GPU, that runs through the kernel under bfloat16 autocast; or None if the model's
    formulas are not the kernel's, which a small random model of the same widths shows: model.py is there to be changed."""
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


def as_fast(model):
    twin = copy.copy(model)
    twin.__class__ = Fast
    return twin
