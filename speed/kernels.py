"""
A faster ledger for training in bfloat16 on a GPU. Optional: without this file the plain formulas of model.py run.

    u = RMSNorm(D + λ ⊙ C),   D ← D − e ⊙ k (kᵀD) + w ⊙ (y + U_g V_g y),   C ← C + c (D + U_P V_P D)

Its arithmetic is small; what costs is memory traffic: e, w, k and most gradients are as large as D. So
- in the deliberation, e, w and k and their gradients never leave the chip. A tile of the result is computed from tiles of D and y and from
  a = [V_e; V_w; V_k] u, which has 3r numbers a token; backward computes the gates again, twice, since the gradients of a are sums over
  columns and those of U sums over tokens. With v = U_k a_k and G = U_kᵀU_k: ‖v‖² = a_kᵀ G a_k and kᵀD = a_kᵀ(U_kᵀD) / ‖v‖, so neither
  needs v. With g the gradient of the new D, f = kᵀD / ‖v‖ and h = −(g ⊙ e)ᵀv / ‖v‖², that of D is g; that of U_kᵀD is h a_k, which goes on to
  D and U_k by that product; and that of v is −f g ⊙ e − 2 f h v, without its last part where ‖v‖ is held at 1e-12;
- a sublayer's commit waits for the next sublayer's read, and the read hands the streams on: one pass over the rows of its backward adds up all
  that comes back through D, C and the commit gate;
- a comes out of the product in which the sublayer reads u, the write map is folded into the one with which it writes
  (y + U_g V_g y = (W + U_g V_g W) x + (b + U_g V_g b)), and c multiplies p = V_P D, which has r numbers a token, not U_P V_P D.

Shapes: N = B·T tokens, d = n_embd, a multiple of 16; WIDTH is d rounded up to a power of two. r is gate_rank, filled up with zeros to 64 or 128:
the kernels then mask no ranks, and every product is of a size that tensor cores take whole.
D, C, y, u, g: (N, d); a: (N, 3r), rows may lie apart; U: (3, d, r), in the order e, w, k; be, bw: (d,); c, f, h, last = 2 f h: (N,);
p, projected = U_kᵀD, Ga = G a_k: (N, r), projected's rows may lie apart; VP: (r, d), UP: (d, r). A name that begins with g is a gradient.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, RESIDUALS, Ledger, Sublayer, twin

HALF = torch.bfloat16  # of what enters a matrix product
PTX = tl.constexpr(bool(torch.version.cuda) and not triton.knobs.runtime.interpret)
# LOOP is no constant, or training would compile again what fast() has compiled; the kernels say that it is above 0, or ptxas lets their products wait for
# one another. The interpreter's loops want a Python number.
COUNT = tl.constexpr if triton.knobs.runtime.interpret else int
# What one program does: a tile of ROWS × COLUMNS, all tiles across the columns, or its share of those down the rows where there are PROGRAMS
# programs: as many as an H100 or H200 runs at once. speed/tiles.py times them.
DELIBERATE = dict(ROWS=32, COLUMNS=128, PROGRAMS=264, STAGES=3, num_warps=4)
GRADIENT_A = dict(ROWS=64, COLUMNS=32, STAGES=3, num_warps=4)
GRADIENT_U = dict(ROWS=32, COLUMNS=64, PROGRAMS=264, STAGES=3, num_warps=4)
GRADIENT_READ = dict(ROWS=2, PROGRAMS=1056, STAGES=3)
ADD_PRODUCT = dict(ROWS=64, COLUMNS=128, num_warps=4)
DIRECTION = dict(ROWS=64, num_warps=4)


@triton.jit
def sigmoid(x, bias):
    """σ(x + bias)."""
    if PTX:  # four instructions, of which the first is this sum; tl.sigmoid's care for infinities and denormal numbers makes twelve
        return tl.inline_asm_elementwise(
            'ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;',
            '=f,f',
            [x * -1.4426950408889634 + bias * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.sigmoid(x + bias)


@triton.jit
def inside(col, d: tl.constexpr, COLUMNS: tl.constexpr):
    """col < d, without a comparison where the tiles fill d."""
    if d % COLUMNS:
        return col < d
    else:
        return tl.full([COLUMNS], True, tl.int1)


@triton.jit
def load_U(U, gate: tl.constexpr, col, real, d, r: tl.constexpr):
    """Returns (r, COLUMNS)."""
    return tl.load(U + gate * d * r + col[None, :] * r + tl.arange(0, r)[:, None], real[None, :], 0.0)


@triton.jit
def load_a(a, gate: tl.constexpr, row, left, apart, r: tl.constexpr):
    """Returns (ROWS, r)."""
    return tl.load(a + row[:, None] * apart + gate * r + tl.arange(0, r)[None, :], (row < left)[:, None], 0.0)


@triton.jit
def direction_kernel(a, projected, G, Ga, length, f, N, apart, apart_p, r: tl.constexpr, ROWS: tl.constexpr):
    """Ga, ‖v‖ and f."""
    first, row, rank = tl.program_id(1).to(tl.int64) * ROWS, tl.arange(0, ROWS), tl.arange(0, r)
    there = (row < N - first)[:, None]
    ak = load_a(a + first * apart, 2, row, N - first, apart, r)
    more, x = tl.load(G + rank[:, None] * r + rank[None, :]), tl.zeros((ROWS, r), tl.float32)
    for _ in tl.static_range(
        3
    ):  # G in three parts has all its bits: a quadratic form in less loses what is small
        part = more.to(ak.dtype)
        x, more = tl.dot(ak, part, x), more - part.to(tl.float32)
    ak = ak.to(tl.float32)
    tl.store(Ga + first * r + row[:, None] * r + rank[None, :], x, there)
    norm = tl.sqrt(tl.maximum(tl.sum(ak * x, 1), 1e-24))
    tl.store(length + first + row, norm, row < N - first)
    x = tl.load(projected + first * apart_p + row[:, None] * apart_p + rank[None, :], there, 0.0).to(
        tl.float32
    )
    tl.store(f + first + row, tl.sum(ak * x, 1) / (norm * norm), row < N - first)


@triton.jit(do_not_specialize=['LOOP'])
def deliberate_kernel(
    D,
    y,
    a,
    f,
    U,
    be,
    bw,
    D2,
    N,
    apart,
    d: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOOP,
    STAGES: tl.constexpr,
):
    """D2 = D − e ⊙ v · f + w ⊙ y."""
    col, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    real = inside(col, d, COLUMNS)
    Ue, Uw, Uk = load_U(U, 0, col, real, d, r), load_U(U, 1, col, real, d, r), load_U(U, 2, col, real, d, r)
    b_e, b_w = tl.load(be + col, real, 0.0)[None, :], tl.load(bw + col, real, 0.0)[None, :]
    at = row[:, None] * d + col[None, :]
    tl.assume(LOOP > 0)
    for i in tl.range(LOOP, num_stages=STAGES):
        first = (tl.program_id(1) * LOOP + i).to(tl.int64) * ROWS
        left = N - first
        there, a_row = (row < left)[:, None] & real[None, :], a + first * apart
        x = (
            sigmoid(tl.dot(load_a(a_row, 0, row, left, apart, r), Ue), b_e)
            * tl.load(f + first + row, row < left, 0.0)[:, None]
        )
        x = tl.load(D + first * d + at, there, 0.0).to(tl.float32) - x * tl.dot(
            load_a(a_row, 2, row, left, apart, r), Uk
        )
        w = sigmoid(tl.dot(load_a(a_row, 1, row, left, apart, r), Uw), b_w)
        tl.store(D2 + first * d + at, x + w * tl.load(y + first * d + at, there, 0.0).to(tl.float32), there)


@triton.jit
def gradient_a_kernel(
    g,
    y,
    a,
    f,
    U,
    be,
    bw,
    projected,
    Ga,
    length,
    ga,
    gprojected,
    last,
    N,
    apart,
    apart_p,
    d: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of a and of projected, and 2 f h: whole rows."""
    first = tl.program_id(1).to(tl.int64) * ROWS
    row, rank, left = tl.arange(0, ROWS), tl.arange(0, r), N - first
    a += first * apart
    ae, aw, ak = (
        load_a(a, 0, row, left, apart, r),
        load_a(a, 1, row, left, apart, r),
        load_a(a, 2, row, left, apart, r),
    )
    f_row = tl.load(f + first + row, row < left, 0.0)
    ge, gw, gk = (
        tl.zeros((ROWS, r), tl.float32),
        tl.zeros((ROWS, r), tl.float32),
        tl.zeros((ROWS, r), tl.float32),
    )
    for j in tl.range(0, d, COLUMNS, num_stages=STAGES):
        col = j + tl.arange(0, COLUMNS)
        real = inside(col, d, COLUMNS)
        at, there = row[:, None] * d + col[None, :], (row < left)[:, None] & real[None, :]
        x = tl.load(g + first * d + at, there, 0.0).to(tl.float32)
        u = load_U(U, 1, col, real, d, r)
        w = sigmoid(tl.dot(aw, u), tl.load(bw + col, real, 0.0)[None, :])
        w = x * tl.load(y + first * d + at, there, 0.0).to(tl.float32) * (w - w * w)
        gw += tl.dot(w.to(u.dtype), tl.trans(u))
        u = load_U(U, 0, col, real, d, r)
        e = sigmoid(tl.dot(ae, u), tl.load(be + col, real, 0.0)[None, :])
        x = -x * e
        uk = load_U(U, 2, col, real, d, r)
        gk += tl.dot(x.to(u.dtype), tl.trans(uk))
        x *= tl.dot(ak, uk)
        ge += tl.dot((x - x * e).to(u.dtype), tl.trans(u))
    there, norm = (row < left)[:, None], tl.load(length + first + row, row < left, 1.0)
    h_row = tl.sum(ak.to(tl.float32) * gk, 1) / (norm * norm)
    last_row = tl.where(norm > 1e-12, 2 * f_row * h_row, 0.0)
    gk = f_row[:, None] * gk + h_row[:, None] * tl.load(
        projected + first * apart_p + row[:, None] * apart_p + rank[None, :], there, 0.0
    ).to(tl.float32)
    gk -= last_row[:, None] * tl.load(Ga + first * r + row[:, None] * r + rank[None, :], there, 0.0).to(
        tl.float32
    )
    at = first * (3 * r) + row[:, None] * (3 * r) + rank[None, :]
    tl.store(ga + at, f_row[:, None] * ge, there)
    tl.store(ga + at + r, gw, there)
    tl.store(ga + at + 2 * r, gk, there)
    tl.store(
        gprojected + first * r + row[:, None] * r + rank[None, :], h_row[:, None] * ak.to(tl.float32), there
    )
    tl.store(last + first + row, last_row, row < left)


@triton.jit
def turned(x, one):
    """xᵀ in float32. In bfloat16 as a product with the identity, which is exact: tensor cores find x where it was loaded to, and leave it where the gates are."""
    if x.dtype == tl.bfloat16:
        return tl.dot(one, tl.trans(x))
    else:
        return tl.trans(x).to(tl.float32)


@triton.jit(do_not_specialize=['LOOP'])
def gradient_U_kernel(
    g,
    y,
    a,
    f,
    last,
    U,
    be,
    bw,
    gy,
    gU,
    gb,
    N,
    apart,
    d: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOOP,
    STAGES: tl.constexpr,
):
    """The gradient of y, and this program's share of those of U and of the biases: its rows. Tiles lie turned, (COLUMNS, ROWS): so they
    enter the products that sum over tokens from the registers that they are in."""
    col, row, rank = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, r)
    real = inside(col, d, COLUMNS)
    Ue, Uw, Uk = (
        tl.trans(load_U(U, 0, col, real, d, r)),
        tl.trans(load_U(U, 1, col, real, d, r)),
        tl.trans(load_U(U, 2, col, real, d, r)),
    )
    b_e, b_w = tl.load(be + col, real, 0.0)[:, None], tl.load(bw + col, real, 0.0)[:, None]
    sum_e, sum_w = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    ge, gw, gk = (
        tl.zeros((COLUMNS, r), tl.float32),
        tl.zeros((COLUMNS, r), tl.float32),
        tl.zeros((COLUMNS, r), tl.float32),
    )
    at = row[:, None] * d + col[None, :]
    one = (tl.arange(0, COLUMNS)[:, None] == tl.arange(0, COLUMNS)[None, :]).to(U.dtype.element_ty)
    tl.assume(LOOP > 0)
    for i in tl.range(LOOP, num_stages=STAGES):
        first = (tl.program_id(1) * LOOP + i).to(tl.int64) * ROWS
        left = N - first
        there, a_row = (row < left)[:, None] & real[None, :], a + first * apart
        x = turned(tl.load(g + first * d + at, there, 0.0), one)
        a_gate = load_a(a_row, 1, row, left, apart, r)
        w = sigmoid(tl.dot(Uw, tl.trans(a_gate)), b_w)
        z = x * w
        tl.store(gy + first * d + at, tl.trans(z.to(gy.dtype.element_ty)), there)
        z *= turned(tl.load(y + first * d + at, there, 0.0), one)
        z -= z * w
        sum_w += tl.sum(z, 1)
        gw += tl.dot(z.to(a_gate.dtype), a_gate)
        f_row, last_row = (
            tl.load(f + first + row, row < left, 0.0),
            tl.load(last + first + row, row < left, 0.0),
        )
        ak = load_a(a_row, 2, row, left, apart, r)
        v = tl.dot(Uk, tl.trans(ak))
        a_gate = load_a(a_row, 0, row, left, apart, r)
        e = sigmoid(tl.dot(Ue, tl.trans(a_gate)), b_e)
        x = -x * e * f_row[None, :]
        gk += tl.dot((x - last_row[None, :] * v).to(ak.dtype), ak)
        x *= v
        x -= x * e
        sum_e += tl.sum(x, 1)
        ge += tl.dot(x.to(a_gate.dtype), a_gate)
    at = tl.program_id(1) * 3 * d * r + col[:, None] * r + rank[None, :]
    tl.store(gU + at, ge, real[:, None])
    tl.store(gU + at + d * r, gw, real[:, None])
    tl.store(gU + at + 2 * d * r, gk, real[:, None])
    tl.store(gb + tl.program_id(1) * 2 * d + col, sum_e, real)
    tl.store(gb + tl.program_id(1) * 2 * d + d + col, sum_w, real)


@triton.jit(do_not_specialize=['LOOP'])
def gradient_read_kernel(
    gu,
    gs,
    gD,
    gC,
    D,
    C,
    c,
    scale,
    gain,
    wc,
    gD2,
    gC2,
    gc,
    sums,
    N,
    eps,
    d: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LOOP,
    STAGES: tl.constexpr,
):
    """The gradients of D and C as they leave the deliberation and the commit before, the part of that of c that comes by D, and this program's
    share of those of scale, gain and wc: its rows."""
    col, row = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    scale, gain, wc = (
        tl.load(scale + col, col < d, 0.0)[None, :],
        tl.load(gain + col, col < d, 0.0)[None, :],
        tl.load(wc + col, col < d, 0.0)[None, :],
    )
    sum_scale, sum_gain, sum_wc = (
        tl.zeros((ROWS, WIDTH), tl.float32),
        tl.zeros((ROWS, WIDTH), tl.float32),
        tl.zeros((ROWS, WIDTH), tl.float32),
    )
    tl.assume(LOOP > 0)
    for i in tl.range(LOOP, num_stages=STAGES):
        first = (tl.program_id(1) * LOOP + i).to(tl.int64) * ROWS
        at, there = (
            first * d + row[:, None] * d + col[None, :],
            (row < N - first)[:, None] & (col < d)[None, :],
        )
        x, y = tl.load(D + at, there, 0.0).to(tl.float32), tl.load(C + at, there, 0.0).to(tl.float32)
        n = x + scale * y
        inverse = tl.rsqrt(tl.sum(n * n, 1) / d + eps)[:, None]
        n *= inverse
        s = tl.load(gs + first + row, row < N - first, 0.0)[:, None]
        g = tl.load(gu + at, there, 0.0).to(tl.float32) + s * wc
        sum_wc += s * n
        sum_gain += g * n
        g *= gain
        g = inverse * (g - n * (tl.sum(g * n, 1) / d)[:, None])
        sum_scale += g * y
        y = tl.load(gC + at, there, 0.0).to(tl.float32) + scale * g
        tl.store(gC2 + at, y, there)
        tl.store(gc + first + row, tl.sum(x * y, 1), row < N - first)
        y = tl.load(c + first + row, row < N - first, 0.0)[:, None] * y
        tl.store(gD2 + at, tl.load(gD + at, there, 0.0).to(tl.float32) + g + y, there)
    sums += tl.program_id(1) * 3 * d + col
    tl.store(sums, tl.sum(sum_scale, 0), col < d)
    tl.store(sums + d, tl.sum(sum_gain, 0), col < d)
    tl.store(sums + 2 * d, tl.sum(sum_wc * gain, 0), col < d)


@triton.jit
def add_product_kernel(
    g, x, W, g2, N, d: tl.constexpr, r: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """g2 = g + x W; x: (N, r), W: (r, d)."""
    col, row, rank = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, r)
    first, real = tl.program_id(1).to(tl.int64) * ROWS, inside(col, d, COLUMNS)
    at, there = first * d + row[:, None] * d + col[None, :], (row < N - first)[:, None] & real[None, :]
    x = tl.load(x + first * r + row[:, None] * r + rank[None, :], (row < N - first)[:, None], 0.0)
    x = tl.dot(x, tl.load(W + rank[:, None] * d + col[None, :], real[None, :], 0.0))
    tl.store(g2 + at, tl.load(g + at, there, 0.0).to(tl.float32) + x, there)


def grid(tile, N, d=0):
    """Returns how many programs lie side by side, one where each does all columns, and how many share the rows."""
    columns, rows = triton.cdiv(d, tile['COLUMNS']) if d else 1, triton.cdiv(N, tile['ROWS'])
    return columns, min(rows, max(1, tile['PROGRAMS'] // columns)) if 'PROGRAMS' in tile else rows


def launch(kernel, tile, N, d, *arguments):
    programs, tile = grid(tile, N, d), dict(tile)
    if tile.pop('PROGRAMS', None):
        tile['LOOP'] = COUNT(triton.cdiv(N, tile['ROWS'] * programs[1]))
    kernel[programs](*arguments, **tile)


# To the compiler each launch is one opaque operation: what it returns, what it does, and what it returns once more for tracing.


def empty_direction(a, G):
    return a.new_empty(len(a), len(G)), G.new_empty(len(a)), G.new_empty(len(a))


@torch.library.custom_op('ledger::direction', mutates_args=())
def direction(
    a: torch.Tensor, projected: torch.Tensor, G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = empty_direction(a, G)
    launch(
        direction_kernel,
        DIRECTION,
        len(a),
        0,
        a,
        projected,
        G,
        *outputs,
        len(a),
        a.stride(0),
        projected.stride(0),
        len(G),
    )
    return outputs


@direction.register_fake
def _(a, projected, G):
    return empty_direction(a, G)


@torch.library.custom_op('ledger::deliberate', mutates_args=())
def deliberate(
    D: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor,
    f: torch.Tensor,
    U: torch.Tensor,
    be: torch.Tensor,
    bw: torch.Tensor,
) -> torch.Tensor:
    D2 = torch.empty_like(D)
    launch(
        deliberate_kernel, DELIBERATE, *y.shape, D, y, a, f, U, be, bw, D2, len(y), a.stride(0), *U.shape[1:]
    )
    return D2


@deliberate.register_fake
def _(D, y, a, f, U, be, bw):
    return torch.empty_like(D)


def empty_gradients_a(a, f):
    return a.new_empty(a.shape), a.new_empty(len(a), a.shape[1] // 3), torch.empty_like(f)


@torch.library.custom_op('ledger::gradient_a', mutates_args=())
def gradient_a(
    g: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor,
    f: torch.Tensor,
    U: torch.Tensor,
    be: torch.Tensor,
    bw: torch.Tensor,
    projected: torch.Tensor,
    Ga: torch.Tensor,
    length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = empty_gradients_a(a, f)
    launch(
        gradient_a_kernel,
        GRADIENT_A,
        len(y),
        0,
        g,
        y,
        a,
        f,
        U,
        be,
        bw,
        projected,
        Ga,
        length,
        *outputs,
        len(y),
        a.stride(0),
        projected.stride(0),
        *U.shape[1:],
    )
    return outputs


@gradient_a.register_fake
def _(g, y, a, f, U, be, bw, projected, Ga, length):
    return empty_gradients_a(a, f)


def empty_gradients_U(y, U, be):
    n = grid(GRADIENT_U, *y.shape)[1]
    return torch.empty_like(y), be.new_empty(n, *U.shape), be.new_empty(n, 2, len(be))


@torch.library.custom_op('ledger::gradient_U', mutates_args=())
def gradient_U(
    g: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor,
    f: torch.Tensor,
    last: torch.Tensor,
    U: torch.Tensor,
    be: torch.Tensor,
    bw: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = empty_gradients_U(y, U, be)
    launch(
        gradient_U_kernel,
        GRADIENT_U,
        *y.shape,
        g,
        y,
        a,
        f,
        last,
        U,
        be,
        bw,
        *outputs,
        len(y),
        a.stride(0),
        *U.shape[1:],
    )
    return outputs


@gradient_U.register_fake
def _(g, y, a, f, last, U, be, bw):
    return empty_gradients_U(y, U, be)


def empty_gradients_read(D, C, c, gain):
    return (
        torch.empty_like(D),
        torch.empty_like(C),
        torch.empty_like(c),
        gain.new_empty(grid(GRADIENT_READ, D.numel() // len(gain))[1], 3, len(gain)),
    )


@torch.library.custom_op('ledger::gradient_read', mutates_args=())
def gradient_read(
    gu: torch.Tensor,
    gs: torch.Tensor,
    gD: torch.Tensor,
    gC: torch.Tensor,
    D: torch.Tensor,
    C: torch.Tensor,
    c: torch.Tensor,
    scale: torch.Tensor,
    gain: torch.Tensor,
    wc: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs, d = empty_gradients_read(D, C, c, gain), len(gain)
    N, width = D.numel() // d, triton.next_power_of_2(d)
    launch(
        gradient_read_kernel,
        dict(GRADIENT_READ, num_warps=min(16, max(1, width // 256))),
        N,
        0,
        gu,
        gs,
        gD,
        gC,
        D,
        C,
        c,
        scale,
        gain,
        wc,
        *outputs,
        N,
        eps,
        d,
        width,
    )
    return outputs


@gradient_read.register_fake
def _(gu, gs, gD, gC, D, C, c, scale, gain, wc, eps):
    return empty_gradients_read(D, C, c, gain)


@torch.library.custom_op('ledger::add_product', mutates_args=())
def add_product(g: torch.Tensor, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    g2, (N, r), d = torch.empty_like(g), x.shape, W.shape[1]
    launch(add_product_kernel, ADD_PRODUCT, N, d, g, x, W, g2, N, d, r)
    return g2


@add_product.register_fake
def _(g, x, W):
    return torch.empty_like(g)


def half(x):
    """x in bfloat16. PyTorch 2.11: what an autograd.Function returns has no gradient under torch.compile if it was converted to the precision that it has."""
    return x if x.dtype == HALF else x.to(HALF)


def commit(D, C, c, p, UP):
    """D, C: (B, T, d), any precision; c: (B, T, 1) float32; p = V_P D: (B, T, r), UP: (d, r), bfloat16. Returns the new C."""
    # copy=True: see half()
    return (C + c * D + (c * p).to(HALF) @ UP.T).to(C.dtype, copy=True)


class Read(torch.autograd.Function):
    """The commit before, then the read. Of the commit: D, C: (B, T, d), any precision; c: (B, T, 1) float32; VP: (r, d), UP: (d, r), bfloat16.
    Uk: (d, r) bfloat16; scale = λ, gain, wc = w_c: (d,) float32.
    Returns u in bfloat16; uᵀw_c, (B, T, 1) float32; D; the new C; and projected = U_kᵀD, (B, T, r)."""

    @staticmethod
    def forward(ctx, D, C, c, VP, UP, Uk, scale, gain, wc, eps):
        with torch.autocast(D.device.type, enabled=False):
            p, projected = (half(D) @ torch.cat([VP.T, Uk], 1)).chunk(2, -1)
            C = commit(D, C, c, p, UP)
        ctx.save_for_backward(D, C, c, p, VP, UP, Uk, scale, gain, wc)
        ctx.eps = eps
        x = D + scale * C
        u = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
        return u.to(HALF, copy=True), (u * wc).sum(-1, keepdim=True), D.view_as(D), C, projected

    @staticmethod
    def backward(ctx, gu, gs, gD, gC, gprojected):
        D, C, c, p, VP, UP, Uk, scale, gain, wc = ctx.saved_tensors
        gD, gC, gc, sums = gradient_read(
            *(g.contiguous() for g in (gu, gs, gD, gC)), D, C, c, scale, gain, wc, ctx.eps
        )
        with torch.autocast(D.device.type, enabled=False):
            z = half(gC) @ UP
            both = torch.cat([(c * z).to(HALF), gprojected], -1).flatten(
                0, 1
            )  # the gradients of p and of projected
            gVP, gUk = (both.T @ half(D).flatten(0, 1)).chunk(2)
            gUP = half(gC).flatten(0, 1).T @ (c * p).to(HALF).flatten(0, 1)
        gD, gc = (
            add_product(gD, both, torch.cat([VP, Uk.T])),
            gc + (z * p).sum(-1, keepdim=True, dtype=torch.float32),
        )
        return gD, gC, gc, gVP, gUP, gUk.T, *sums.sum(0), None


class Deliberate(torch.autograd.Function):
    """D: (N, d), any precision; y: (N, d), a: (N, 3r), projected: (N, r), U: (3, d, r), bfloat16; be, bw: (d,) float32. Returns the new D."""

    @staticmethod
    def forward(ctx, D, y, a, projected, U, be, bw):
        with torch.autocast(D.device.type, enabled=False):
            Ga, length, f = direction(a, projected, U[2].float().T @ U[2].float())
        ctx.save_for_backward(y, a, projected, U, be, bw, Ga, length, f)
        return deliberate(D, y, a, f, U, be, bw)

    @staticmethod
    def backward(ctx, g):
        y, a, projected, U, be, bw, Ga, length, f = ctx.saved_tensors
        g = g.contiguous()
        ga, gprojected, last = gradient_a(g, y, a, f, U, be, bw, projected, Ga, length)
        gy, gU, gb = gradient_U(g, y, a, f, last, U, be, bw)
        return g, gy, ga, gprojected, gU.sum(0).to(U.dtype), *gb.sum(0)


def filled(rank):
    return 64 if rank <= 64 else 128


class FastSublayer(Sublayer):
    """A ledger's sublayer that runs through the kernels. It returns the C of the sublayer before, and beside the streams what is still to be committed: c, VP, UP."""

    def forward(self, streams):
        r, function = self.residual, self.function
        gates = r.erase_gate, r.write_gate, r.erase_direction
        more = filled(len(r.commit_map.V.weight)) - len(r.commit_map.V.weight)
        U = torch.stack([F.pad(gate.U.weight, (0, more)).to(HALF) for gate in gates])
        u, s, D, C, projected = Read.apply(
            *streams.values(), U[2], r.read_scale, self.norm.weight, r.commit_weight, self.norm.eps
        )
        inputs, parts = (function.qkv, 3) if self.kind == 'attn' else (function.fc, 1)
        W = torch.cat(
            [
                part.to(HALF)
                for part in (inputs.weight, *(F.pad(gate.V.weight, (0, 0, 0, more)) for gate in gates))
            ]
        )
        n = len(inputs.weight)
        *x, a = F.linear(u, W, None if inputs.bias is None else F.pad(inputs.bias, (0, len(W) - n))).split(
            [n // parts] * parts + [len(W) - n], -1
        )
        W, b = function.proj.weight, function.proj.bias
        y = F.linear(function.inner(*x), W + r.write_map(W.T).T, None if b is None else b + r.write_map(b))
        D = Deliberate.apply(
            *(x.flatten(0, 1) for x in (D, y, a, projected)), U, r.erase_gate.U.bias, r.write_gate.U.bias
        ).view(D.shape)
        c = torch.sigmoid(s + r.commit_bias)
        VP, UP = (
            F.pad(r.commit_map.V.weight, (0, 0, 0, more)).to(HALF),
            F.pad(r.commit_map.U.weight, (0, more)).to(HALF),
        )
        return {'D': D, 'C': C, 'c': c, 'VP': VP, 'UP': UP}, c


class FastGPT(GPT):
    """A ledger that runs through the kernels."""

    def start(self, idx):
        D, C = super().start(idx).values()
        # the first read finds an empty commit, with a gradient to take: to the compiler all sublayers are the same
        r, nothing = filled(self.config.gate_rank), 0 * self.norm.weight
        return {
            'D': D,
            'C': C + nothing.to(C.dtype),
            'c': D.new_zeros(*idx.shape, 1, dtype=torch.float32) + nothing[0],
            'VP': nothing.to(HALF).repeat(r, 1),
            'UP': nothing.to(HALF)[:, None].repeat(1, r),
        }

    def decode(self, streams):
        D, C, c, VP, UP = streams.values()
        return super().decode({'D': D, 'C': commit(D, C, c, F.linear(half(D), VP), UP)})


def as_fast(model):
    """Returns a GPT with the parameters of `model` that runs through the kernels."""
    fast_model = twin(model)
    fast_model.__class__ = FastGPT
    for sublayer in fast_model.sublayers:
        sublayer.__class__ = FastSublayer
    return fast_model


def outputs_and_gradients(model, idx):
    """Returns the logits and the gradients of the objective, each in one dimension."""
    with sdpa_kernel(SDPBackend.MATH):  # cuDNN's attention takes seconds to set up, for these sizes alone
        logits = model(idx)
        return logits.detach().flatten(), torch.cat(
            [x.flatten() for x in torch.autograd.grad(model(idx, idx)[0], model.parameters())]
        )


def fast(model):
    """Returns as_fast(model); or None if the kernels cannot run at the model's widths on its device, or if its formulas are not theirs (model.py
    is there to be changed): a random model of one layer shows both."""
    config, device = model.config, model.norm.weight.device
    if RESIDUALS.get(config.residual) is not Ledger or config.gate_rank > 128 or config.n_embd % 16:
        return None
    idx = torch.arange(64, device=device)[None]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            plain = GPT(replace(config, n_layer=1, vocab_size=64, block_size=64))
            for (
                name,
                parameter,
            ) in plain.named_parameters():  # every term of the formula counts: gates are half open, products neither vanish nor outgrow the rest
                parameter += 0.2 * torch.randn_like(parameter) * (
                    32 / parameter.shape[-1] if parameter.dim() == 2 else 1
                ) ** 0.5 + 3 * name.endswith('erase_gate.U.bias')
        expected = outputs_and_gradients(plain.to(device), idx)
        with torch.autocast(device.type, HALF):
            found = outputs_and_gradients(as_fast(plain), idx)
        if not all(
            (x - y).norm() < tolerance * y.norm() for x, y, tolerance in zip(found, expected, (0.03, 0.08))
        ):  # plain bfloat16: 0.014, 0.037 at most, at widths of 32 to 2,048
            return None
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
        triton.runtime.errors.OutOfResources,
    ):  # other parts, or a GPU too small for the tiles
        return None
    return as_fast(model)
