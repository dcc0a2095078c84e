"""
A faster ledger for training in bfloat16 on a GPU. It is optional: without this file model.py's plain
formulas run.

    u = RMSNorm(D + λ ⊙ C)
    D ← D − e ⊙ k (kᵀD) + w ⊙ (y + U_g V_g y)
    C ← C + c (D + U_P V_P D)            or, through a rotation,            C ← C + c Q (D + U_P V_P D)

The arithmetic of these formulas is small. What costs time is memory traffic, because the gates e and w, the
direction k and most gradients are as large as D. Three ideas avoid most of it.

1. The gates and their gradients never leave the chip. A tile of the new D is computed from tiles of D and
   y and from hidden = [V_e u, V_w u, V_k u], which has only 3r numbers a token. The backward pass
   computes the gates again, twice: the gradient of hidden is a sum over columns, and that of U is a sum
   over tokens.
2. The commit of a sublayer waits for the read of the next one, and the read hands the streams on. So one
   pass over the rows adds up everything that comes back through D, through C and through the commit gate.
3. Small maps ride on large products. V_e, V_w and V_k are rows of the product in which the sublayer reads
   u. The write map is folded into the product with which it writes: y + U_g V_g y = (W + U_g V_g W) x +
   (b + U_g V_g b). The commit gate multiplies p = V_P D, which has r numbers a token, and not U_P V_P D.
   A rotation Q of what is committed is d more columns of the product that makes p, and Q U_P takes the
   place of U_P.

The erase direction, with v = U_k hidden_k and k = v / ‖v‖, needs v nowhere as a whole:

    gram            = U_kᵀ U_k                                   (r, r)
    projected       = U_kᵀ D                                     r numbers a token
    ‖v‖²            = hidden_kᵀ gram hidden_k
    overlap         = kᵀD / ‖v‖ = hidden_kᵀ projected / ‖v‖²     so that e ⊙ k (kᵀD) = e ⊙ v · overlap

Backward, with g the gradient of the new D:

    slope           = −(g ⊙ e)ᵀ v / ‖v‖²                         the gradient of overlap, over ‖v‖²
    shrink          = 2 · overlap · slope                        0 where ‖v‖ is held at 1e-12
    grad v          = −overlap · g ⊙ e − shrink · v              and by way of projected:
    grad projected  = slope · hidden_k
    grad D          = g + U_k · grad projected

Shapes: N = B·T tokens. d = n_embd, a multiple of 16; WIDTH is d rounded up to a power of two. r is
gate_rank, padded with zeros to 64 or 128: so the kernels mask no ranks, and every product has a size that
tensor cores take whole. D, C, y, u and their gradients are (N, d); hidden is (N, 3r); projected,
gram_hidden = gram hidden_k and p are (N, r). The rows of hidden and of projected may be parts of wider
rows, so their strides are given. U is (3, d, r), in the order of ERASE, WRITE and ALONG. Biases, λ, gains
and w_c are (d,); c, overlap, shrink and length = ‖v‖ are (N,). VP is (r, d), UP (d, r), Q (d, d). A name
that begins with grad is the gradient of the loss with respect to what the rest of the name says.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, MLP, Attention, Ledger, RMSNorm, Sublayer, twin

HALF = torch.bfloat16  # the precision of what enters a matrix product
RANKS = (64, 128)  # the sizes to which a rank is padded

# The three low-rank gates, by their place in U and in hidden: e, w, and v, along which D is erased.
ERASE = tl.constexpr(0)
WRITE = tl.constexpr(1)
ALONG = tl.constexpr(2)

INTERPRETED = triton.knobs.runtime.interpret
PTX = tl.constexpr(bool(torch.version.cuda) and not INTERPRETED)

# TILES, how many tiles a program does one after another, is not a constant of compilation, because training
# would then compile again what fast() has compiled for its check. The kernels declare that it is above 0:
# ptxas lets the products of a loop that may be empty wait for one another. The interpreter's loops want a
# Python number.
TILE_COUNT = tl.constexpr if INTERPRETED else int

# What one program of each kernel does. It takes tiles of ROWS tokens by COLUMNS dimensions, or of whole
# rows where COLUMNS is missing. Where PROGRAMS is given, that many programs share the rows: as many as an
# H100 or H200 runs at once. STAGES is the depth to which loads run ahead. speed/tiles.py times the
# alternatives.
DELIBERATE_TILE = dict(ROWS=32, COLUMNS=128, PROGRAMS=264, STAGES=3, num_warps=4)
GRADIENT_HIDDEN_TILE = dict(ROWS=64, COLUMNS=32, STAGES=3, num_warps=4)
GRADIENT_U_TILE = dict(ROWS=32, COLUMNS=64, PROGRAMS=264, STAGES=3, num_warps=4)
GRADIENT_READ_TILE = dict(ROWS=2, PROGRAMS=1056, STAGES=3)
ADD_PRODUCT_TILE = dict(ROWS=64, COLUMNS=128, num_warps=4)
DIRECTION_TILE = dict(ROWS=64, num_warps=4)


# ---- What the kernels share


@triton.jit
def sigmoid(x, bias):
    """Returns σ(x + bias)."""
    if PTX:
        # Four instructions, of which the first is this sum. tl.sigmoid takes twelve, because it minds
        # infinities and denormal numbers.
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
def within(col, d: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns col < d as a mask, without a comparison where the tiles fill d."""
    if d % COLUMNS:
        return col < d
    else:
        return tl.full([COLUMNS], True, tl.int1)


@triton.jit
def load_map(U, gate: tl.constexpr, col, col_mask, d, r: tl.constexpr):
    """Returns (r, COLUMNS), the transposed U of one gate for these columns."""
    rank = tl.arange(0, r)
    return tl.load(U + gate * d * r + col[None, :] * r + rank[:, None], col_mask[None, :], 0.0)


@triton.jit
def load_hidden(hidden, gate: tl.constexpr, row, rows_left, hidden_stride, r: tl.constexpr):
    """Returns (ROWS, r), the hidden values of one gate for these rows."""
    rank = tl.arange(0, r)
    row_mask = (row < rows_left)[:, None]
    return tl.load(hidden + row[:, None] * hidden_stride + gate * r + rank[None, :], row_mask, 0.0)


@triton.jit
def transposed(tile, identity):
    """Returns tileᵀ in float32. In bfloat16 this is a product with the identity, which is exact: tensor
    cores find the tile where it was loaded to, and leave the result in the registers in which the gates
    are."""
    if tile.dtype == tl.bfloat16:
        return tl.dot(identity, tl.trans(tile))
    else:
        return tl.trans(tile).to(tl.float32)


# ---- The kernels


@triton.jit
def direction_kernel(
    hidden,
    projected,
    gram,
    gram_hidden,
    length,
    overlap,
    N,
    hidden_stride,
    projected_stride,
    r: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes gram_hidden, length and overlap."""
    first = tl.program_id(1).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    rank = tl.arange(0, r)
    row_mask = (row < N - first)[:, None]
    hidden_k = load_hidden(hidden + first * hidden_stride, ALONG, row, N - first, hidden_stride, r)
    gram_rest = tl.load(gram + rank[:, None] * r + rank[None, :])
    product = tl.zeros((ROWS, r), tl.float32)
    # Three parts of bfloat16 have all the bits of gram; with fewer, a quadratic form loses what is small.
    for _ in tl.static_range(3):
        gram_part = gram_rest.to(hidden_k.dtype)
        product = tl.dot(hidden_k, gram_part, product)
        gram_rest = gram_rest - gram_part.to(tl.float32)
    hidden_k = hidden_k.to(tl.float32)
    tl.store(gram_hidden + first * r + row[:, None] * r + rank[None, :], product, row_mask)
    # ‖v‖² = hidden_kᵀ gram hidden_k
    norm = tl.sqrt(tl.maximum(tl.sum(hidden_k * product, 1), 1e-24))
    tl.store(length + first + row, norm, row < N - first)
    # overlap = hidden_kᵀ projected / ‖v‖²
    projected += first * projected_stride
    projected_tile = tl.load(projected + row[:, None] * projected_stride + rank[None, :], row_mask, 0.0)
    projected_tile = projected_tile.to(tl.float32)
    tl.store(overlap + first + row, tl.sum(hidden_k * projected_tile, 1) / (norm * norm), row < N - first)


@triton.jit(do_not_specialize=['TILES'])
def deliberate_kernel(
    D,
    y,
    hidden,
    overlap,
    U,
    erase_bias,
    write_bias,
    new_D,
    N,
    hidden_stride,
    d: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES,
    STAGES: tl.constexpr,
):
    """Writes new_D = D − e ⊙ v · overlap + w ⊙ y."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    col_mask = within(col, d, COLUMNS)
    U_e = load_map(U, ERASE, col, col_mask, d, r)
    U_w = load_map(U, WRITE, col, col_mask, d, r)
    U_k = load_map(U, ALONG, col, col_mask, d, r)
    b_e = tl.load(erase_bias + col, col_mask, 0.0)[None, :]
    b_w = tl.load(write_bias + col, col_mask, 0.0)[None, :]
    place = row[:, None] * d + col[None, :]
    tl.assume(TILES > 0)
    for i in tl.range(TILES, num_stages=STAGES):
        first = (tl.program_id(1) * TILES + i).to(tl.int64) * ROWS
        rows_left = N - first
        mask = (row < rows_left)[:, None] & col_mask[None, :]
        hidden_rows = hidden + first * hidden_stride
        # e · overlap, e = σ(U_e hidden_e + b_e)
        hidden_e = load_hidden(hidden_rows, ERASE, row, rows_left, hidden_stride, r)
        e = sigmoid(tl.dot(hidden_e, U_e), b_e)
        e_overlap = e * tl.load(overlap + first + row, row < rows_left, 0.0)[:, None]
        # D − e ⊙ v · overlap, v = U_k hidden_k
        D_tile = tl.load(D + first * d + place, mask, 0.0).to(tl.float32)
        hidden_k = load_hidden(hidden_rows, ALONG, row, rows_left, hidden_stride, r)
        erased = D_tile - e_overlap * tl.dot(hidden_k, U_k)
        # … + w ⊙ y, w = σ(U_w hidden_w + b_w)
        hidden_w = load_hidden(hidden_rows, WRITE, row, rows_left, hidden_stride, r)
        w = sigmoid(tl.dot(hidden_w, U_w), b_w)
        target = new_D + first * d + place
        y_tile = tl.load(y + first * d + place, mask, 0.0).to(tl.float32)
        tl.store(target, erased + w * y_tile, mask)


@triton.jit
def gradient_hidden_kernel(
    grad_new_D,
    y,
    hidden,
    overlap,
    U,
    erase_bias,
    write_bias,
    projected,
    gram_hidden,
    length,
    grad_hidden,
    grad_projected,
    shrink,
    N,
    hidden_stride,
    projected_stride,
    d: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes the gradients of hidden and of projected, and shrink. A program does whole rows, tile by
    tile."""
    first = tl.program_id(1).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    rank = tl.arange(0, r)
    rows_left = N - first
    hidden += first * hidden_stride
    hidden_e = load_hidden(hidden, ERASE, row, rows_left, hidden_stride, r)
    hidden_w = load_hidden(hidden, WRITE, row, rows_left, hidden_stride, r)
    hidden_k = load_hidden(hidden, ALONG, row, rows_left, hidden_stride, r)
    overlap_rows = tl.load(overlap + first + row, row < rows_left, 0.0)
    sum_e = tl.zeros((ROWS, r), tl.float32)
    sum_w = tl.zeros((ROWS, r), tl.float32)
    sum_k = tl.zeros((ROWS, r), tl.float32)
    for j in tl.range(0, d, COLUMNS, num_stages=STAGES):
        col = j + tl.arange(0, COLUMNS)
        col_mask = within(col, d, COLUMNS)
        place = row[:, None] * d + col[None, :]
        mask = (row < rows_left)[:, None] & col_mask[None, :]
        g = tl.load(grad_new_D + first * d + place, mask, 0.0).to(tl.float32)
        # Through w: the gradient before the sigmoid is g ⊙ y ⊙ (w − w²), and U_wᵀ takes it to hidden_w.
        U_w = load_map(U, WRITE, col, col_mask, d, r)
        w = sigmoid(tl.dot(hidden_w, U_w), tl.load(write_bias + col, col_mask, 0.0)[None, :])
        y_tile = tl.load(y + first * d + place, mask, 0.0).to(tl.float32)
        before_w = g * y_tile * (w - w * w)
        sum_w += tl.dot(before_w.to(U_w.dtype), tl.trans(U_w))
        # Through v: −g ⊙ e, and U_kᵀ takes it to hidden_k.
        U_e = load_map(U, ERASE, col, col_mask, d, r)
        e = sigmoid(tl.dot(hidden_e, U_e), tl.load(erase_bias + col, col_mask, 0.0)[None, :])
        minus_g_e = -g * e
        U_k = load_map(U, ALONG, col, col_mask, d, r)
        sum_k += tl.dot(minus_g_e.to(U_k.dtype), tl.trans(U_k))
        # Through e: the gradient before the sigmoid is −g ⊙ v ⊙ (e − e²), times overlap, and U_eᵀ takes it
        # to hidden_e.
        minus_g_e_v = minus_g_e * tl.dot(hidden_k, U_k)
        sum_e += tl.dot((minus_g_e_v - minus_g_e_v * e).to(U_e.dtype), tl.trans(U_e))
    row_mask = (row < rows_left)[:, None]
    norm = tl.load(length + first + row, row < rows_left, 1.0)
    # slope = −(g ⊙ e)ᵀ v / ‖v‖² = −(U_kᵀ (g ⊙ e))ᵀ hidden_k / ‖v‖²
    slope_rows = tl.sum(hidden_k.to(tl.float32) * sum_k, 1) / (norm * norm)
    shrink_rows = tl.where(norm > 1e-12, 2 * overlap_rows * slope_rows, 0.0)
    # grad hidden_k = −overlap · U_kᵀ (g ⊙ e) + slope · projected − shrink · gram hidden_k
    grad_k = overlap_rows[:, None] * sum_k
    projected += first * projected_stride
    projected_tile = tl.load(projected + row[:, None] * projected_stride + rank[None, :], row_mask, 0.0)
    grad_k += slope_rows[:, None] * projected_tile.to(tl.float32)
    gram_tile = tl.load(gram_hidden + first * r + row[:, None] * r + rank[None, :], row_mask, 0.0)
    grad_k -= shrink_rows[:, None] * gram_tile.to(tl.float32)
    place = first * (3 * r) + row[:, None] * (3 * r) + rank[None, :]
    tl.store(grad_hidden + place + ERASE * r, overlap_rows[:, None] * sum_e, row_mask)
    tl.store(grad_hidden + place + WRITE * r, sum_w, row_mask)
    tl.store(grad_hidden + place + ALONG * r, grad_k, row_mask)
    # grad projected = slope · hidden_k
    target = grad_projected + first * r + row[:, None] * r + rank[None, :]
    tl.store(target, slope_rows[:, None] * hidden_k.to(tl.float32), row_mask)
    tl.store(shrink + first + row, shrink_rows, row < rows_left)


@triton.jit(do_not_specialize=['TILES'])
def gradient_U_kernel(
    grad_new_D,
    y,
    hidden,
    overlap,
    shrink,
    U,
    erase_bias,
    write_bias,
    grad_y,
    grad_U,
    grad_bias,
    N,
    hidden_stride,
    d: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES,
    STAGES: tl.constexpr,
):
    """Writes the gradient of y, and the shares that this program's rows have in the gradients of U and
    of the biases. Tiles are transposed, (COLUMNS, ROWS): so they enter the products that sum over tokens
    from the registers they are in."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    rank = tl.arange(0, r)
    col_mask = within(col, d, COLUMNS)
    U_e = tl.trans(load_map(U, ERASE, col, col_mask, d, r))
    U_w = tl.trans(load_map(U, WRITE, col, col_mask, d, r))
    U_k = tl.trans(load_map(U, ALONG, col, col_mask, d, r))
    b_e = tl.load(erase_bias + col, col_mask, 0.0)[:, None]
    b_w = tl.load(write_bias + col, col_mask, 0.0)[:, None]
    bias_sum_e = tl.zeros((COLUMNS,), tl.float32)
    bias_sum_w = tl.zeros((COLUMNS,), tl.float32)
    sum_e = tl.zeros((COLUMNS, r), tl.float32)
    sum_w = tl.zeros((COLUMNS, r), tl.float32)
    sum_k = tl.zeros((COLUMNS, r), tl.float32)
    place = row[:, None] * d + col[None, :]
    identity = tl.arange(0, COLUMNS)[:, None] == tl.arange(0, COLUMNS)[None, :]
    identity = identity.to(U.dtype.element_ty)
    tl.assume(TILES > 0)
    for i in tl.range(TILES, num_stages=STAGES):
        first = (tl.program_id(1) * TILES + i).to(tl.int64) * ROWS
        rows_left = N - first
        mask = (row < rows_left)[:, None] & col_mask[None, :]
        hidden_rows = hidden + first * hidden_stride
        g = transposed(tl.load(grad_new_D + first * d + place, mask, 0.0), identity)
        # grad y = g ⊙ w
        hidden_w = load_hidden(hidden_rows, WRITE, row, rows_left, hidden_stride, r)
        w = sigmoid(tl.dot(U_w, tl.trans(hidden_w)), b_w)
        g_w = g * w
        tl.store(grad_y + first * d + place, tl.trans(g_w.to(grad_y.dtype.element_ty)), mask)
        # Through w: the gradient before the sigmoid is g ⊙ y ⊙ (w − w²).
        g_w_y = g_w * transposed(tl.load(y + first * d + place, mask, 0.0), identity)
        before_w = g_w_y - g_w_y * w
        bias_sum_w += tl.sum(before_w, 1)
        sum_w += tl.dot(before_w.to(hidden_w.dtype), hidden_w)
        # grad v = −overlap · g ⊙ e − shrink · v
        overlap_rows = tl.load(overlap + first + row, row < rows_left, 0.0)
        shrink_rows = tl.load(shrink + first + row, row < rows_left, 0.0)
        hidden_k = load_hidden(hidden_rows, ALONG, row, rows_left, hidden_stride, r)
        v = tl.dot(U_k, tl.trans(hidden_k))
        hidden_e = load_hidden(hidden_rows, ERASE, row, rows_left, hidden_stride, r)
        e = sigmoid(tl.dot(U_e, tl.trans(hidden_e)), b_e)
        minus_g_e = -g * e * overlap_rows[None, :]
        grad_v = minus_g_e - shrink_rows[None, :] * v
        sum_k += tl.dot(grad_v.to(hidden_k.dtype), hidden_k)
        # Through e: the gradient before the sigmoid is −overlap · g ⊙ v ⊙ (e − e²).
        minus_g_e_v = minus_g_e * v
        before_e = minus_g_e_v - minus_g_e_v * e
        bias_sum_e += tl.sum(before_e, 1)
        sum_e += tl.dot(before_e.to(hidden_e.dtype), hidden_e)
    place = tl.program_id(1) * 3 * d * r + col[:, None] * r + rank[None, :]
    tl.store(grad_U + place + ERASE * d * r, sum_e, col_mask[:, None])
    tl.store(grad_U + place + WRITE * d * r, sum_w, col_mask[:, None])
    tl.store(grad_U + place + ALONG * d * r, sum_k, col_mask[:, None])
    tl.store(grad_bias + tl.program_id(1) * 2 * d + col, bias_sum_e, col_mask)
    tl.store(grad_bias + tl.program_id(1) * 2 * d + d + col, bias_sum_w, col_mask)


@triton.jit(do_not_specialize=['TILES'])
def gradient_read_kernel(
    grad_u,
    grad_logit,
    grad_D,
    grad_C,
    D,
    C,
    c,
    scale,
    gain,
    commit_weight,
    rotated,
    grad_old_D,
    grad_old_C,
    grad_c,
    sums,
    N,
    eps,
    rotated_stride,
    d: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILES,
    STAGES: tl.constexpr,
):
    """Backward through the read and through the commit before it. rotated is Q D, or None where D itself
    is committed. Writes the gradient of C before the commit; that of D, without what comes by p, by
    projected and by rotated; that of c, without what comes by p; and the shares that this program's rows
    have in those of λ, of the gain and of w_c."""
    col = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    scale_row = tl.load(scale + col, col < d, 0.0)[None, :]
    gain_row = tl.load(gain + col, col < d, 0.0)[None, :]
    weight_row = tl.load(commit_weight + col, col < d, 0.0)[None, :]
    sum_scale = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_gain = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    tl.assume(TILES > 0)
    for i in tl.range(TILES, num_stages=STAGES):
        first = (tl.program_id(1) * TILES + i).to(tl.int64) * ROWS
        place = first * d + row[:, None] * d + col[None, :]
        mask = (row < N - first)[:, None] & (col < d)[None, :]
        # x = D + λ ⊙ C, normalized = x / rms(x), u = normalized ⊙ gain, logit = uᵀ w_c
        D_tile = tl.load(D + place, mask, 0.0).to(tl.float32)
        C_tile = tl.load(C + place, mask, 0.0).to(tl.float32)
        x = D_tile + scale_row * C_tile
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / d + eps)[:, None]
        normalized = x * inverse_rms
        logit_rows = tl.load(grad_logit + first + row, row < N - first, 0.0)[:, None]
        grad_whole_u = tl.load(grad_u + place, mask, 0.0).to(tl.float32) + logit_rows * weight_row
        sum_weight += logit_rows * normalized
        sum_gain += grad_whole_u * normalized
        # grad x = (grad n − n · mean(grad n ⊙ n)) / rms(x), with n = normalized and grad n = grad u ⊙ gain
        grad_normalized = grad_whole_u * gain_row
        mean = (tl.sum(grad_normalized * normalized, 1) / d)[:, None]
        grad_x = inverse_rms * (grad_normalized - normalized * mean)
        sum_scale += grad_x * C_tile
        # C was handed on and read: its gradient is grad C + λ ⊙ grad x, and the same before the commit.
        grad_C_tile = tl.load(grad_C + place, mask, 0.0).to(tl.float32) + scale_row * grad_x
        tl.store(grad_old_C + place, grad_C_tile, mask)
        # c multiplied D, or Q D.
        committed = D_tile
        if rotated is not None:
            rotated_rows = rotated + first * rotated_stride
            committed = tl.load(rotated_rows + row[:, None] * rotated_stride + col[None, :], mask, 0.0).to(
                tl.float32
            )
        tl.store(grad_c + first + row, tl.sum(committed * grad_C_tile, 1), row < N - first)
        # D was handed on, read, and committed by c.
        if rotated is None:
            c_rows = tl.load(c + first + row, row < N - first, 0.0)[:, None]
            by_commit = c_rows * grad_C_tile
            target = grad_old_D + place
            grad_D_tile = tl.load(grad_D + place, mask, 0.0).to(tl.float32)
            tl.store(target, grad_D_tile + grad_x + by_commit, mask)
        else:
            grad_D_tile = tl.load(grad_D + place, mask, 0.0).to(tl.float32)
            tl.store(grad_old_D + place, grad_D_tile + grad_x, mask)
    sums += tl.program_id(1) * 3 * d + col
    tl.store(sums, tl.sum(sum_scale, 0), col < d)
    tl.store(sums + d, tl.sum(sum_gain, 0), col < d)
    tl.store(sums + 2 * d, tl.sum(sum_weight * gain_row, 0), col < d)


@triton.jit
def add_product_kernel(
    added,
    x,
    W,
    c,
    y,
    total,
    N,
    y_stride,
    d: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes total = added + x W, with x: (N, r) and W: (r, d); and + c · y where c: (N,) and y: (N, d)
    are given, not None."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    rank = tl.arange(0, r)
    first = tl.program_id(1).to(tl.int64) * ROWS
    col_mask = within(col, d, COLUMNS)
    place = first * d + row[:, None] * d + col[None, :]
    row_mask = row < N - first
    mask = row_mask[:, None] & col_mask[None, :]
    x_tile = tl.load(x + first * r + row[:, None] * r + rank[None, :], row_mask[:, None], 0.0)
    W_tile = tl.load(W + rank[:, None] * d + col[None, :], col_mask[None, :], 0.0)
    product = tl.dot(x_tile, W_tile)
    target = total + place
    sum_tile = tl.load(added + place, mask, 0.0).to(tl.float32) + product
    if y is not None:
        c_rows = tl.load(c + first + row, row_mask, 0.0)[:, None]
        y_tile = tl.load(y + first * y_stride + row[:, None] * y_stride + col[None, :], mask, 0.0)
        sum_tile += c_rows * y_tile.to(tl.float32)
    tl.store(target, sum_tile, mask)


# ---- How the kernels are launched


def grid(tile, N, columns=0):
    """Returns how many programs lie side by side, one where columns is 0 because each does whole rows,
    and how many share the N rows."""
    side_by_side = triton.cdiv(columns, tile['COLUMNS']) if columns else 1
    row_tiles = triton.cdiv(N, tile['ROWS'])
    if 'PROGRAMS' not in tile:
        return side_by_side, row_tiles
    return side_by_side, min(row_tiles, max(1, tile['PROGRAMS'] // side_by_side))


def launch(kernel, tile, N, columns, /, **arguments):
    """Launches a kernel over N rows and some columns, or whole rows where columns is 0, with its
    arguments by name."""
    programs = grid(tile, N, columns)
    options = {name: value for name, value in tile.items() if name != 'PROGRAMS'}
    if 'PROGRAMS' in tile:
        options['TILES'] = TILE_COUNT(triton.cdiv(N, tile['ROWS'] * programs[1]))
    kernel[programs](**arguments, N=N, **options)


# To the compiler each launch is one opaque operation. Beside every operation stands a function that makes
# its outputs, empty: the operation fills them, and the compiler's tracing calls the same function to learn
# their shapes.


def empty_direction(hidden, projected, gram):
    N = len(hidden)
    return hidden.new_empty(N, len(gram)), gram.new_empty(N), gram.new_empty(N)


@torch.library.custom_op('ledger::direction', mutates_args=())
def direction(
    hidden: torch.Tensor, projected: torch.Tensor, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns gram_hidden, length and overlap."""
    gram_hidden, length, overlap = empty_direction(hidden, projected, gram)
    launch(
        direction_kernel,
        DIRECTION_TILE,
        len(hidden),
        0,
        hidden=hidden,
        projected=projected,
        gram=gram,
        gram_hidden=gram_hidden,
        length=length,
        overlap=overlap,
        hidden_stride=hidden.stride(0),
        projected_stride=projected.stride(0),
        r=len(gram),
    )
    return gram_hidden, length, overlap


direction.register_fake(empty_direction)


def empty_deliberate(D, y, hidden, overlap, U, erase_bias, write_bias):
    return torch.empty_like(D)


@torch.library.custom_op('ledger::deliberate', mutates_args=())
def deliberate(
    D: torch.Tensor,
    y: torch.Tensor,
    hidden: torch.Tensor,
    overlap: torch.Tensor,
    U: torch.Tensor,
    erase_bias: torch.Tensor,
    write_bias: torch.Tensor,
) -> torch.Tensor:
    """Returns the new D."""
    new_D = torch.empty_like(D)
    N, d = y.shape
    launch(
        deliberate_kernel,
        DELIBERATE_TILE,
        N,
        d,
        D=D,
        y=y,
        hidden=hidden,
        overlap=overlap,
        U=U,
        erase_bias=erase_bias,
        write_bias=write_bias,
        new_D=new_D,
        hidden_stride=hidden.stride(0),
        d=d,
        r=U.shape[2],
    )
    return new_D


deliberate.register_fake(empty_deliberate)


def empty_gradient_hidden(
    grad_new_D, y, hidden, overlap, U, erase_bias, write_bias, projected, gram_hidden, length
):
    N, three_r = hidden.shape
    return hidden.new_empty(N, three_r), hidden.new_empty(N, three_r // 3), torch.empty_like(overlap)


@torch.library.custom_op('ledger::gradient_hidden', mutates_args=())
def gradient_hidden(
    grad_new_D: torch.Tensor,
    y: torch.Tensor,
    hidden: torch.Tensor,
    overlap: torch.Tensor,
    U: torch.Tensor,
    erase_bias: torch.Tensor,
    write_bias: torch.Tensor,
    projected: torch.Tensor,
    gram_hidden: torch.Tensor,
    length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of hidden and of projected, and shrink."""
    inputs = grad_new_D, y, hidden, overlap, U, erase_bias, write_bias, projected, gram_hidden, length
    grad_hidden, grad_projected, shrink = empty_gradient_hidden(*inputs)
    N, d = y.shape
    launch(
        gradient_hidden_kernel,
        GRADIENT_HIDDEN_TILE,
        N,
        0,
        grad_new_D=grad_new_D,
        y=y,
        hidden=hidden,
        overlap=overlap,
        U=U,
        erase_bias=erase_bias,
        write_bias=write_bias,
        projected=projected,
        gram_hidden=gram_hidden,
        length=length,
        grad_hidden=grad_hidden,
        grad_projected=grad_projected,
        shrink=shrink,
        hidden_stride=hidden.stride(0),
        projected_stride=projected.stride(0),
        d=d,
        r=U.shape[2],
    )
    return grad_hidden, grad_projected, shrink


gradient_hidden.register_fake(empty_gradient_hidden)


def empty_gradient_U(grad_new_D, y, hidden, overlap, shrink, U, erase_bias, write_bias):
    shares = grid(GRADIENT_U_TILE, *y.shape)[1]
    d = len(erase_bias)
    grad_U = erase_bias.new_empty(shares, *U.shape)
    return torch.empty_like(y), grad_U, erase_bias.new_empty(shares, 2, d)


@torch.library.custom_op('ledger::gradient_U', mutates_args=())
def gradient_U(
    grad_new_D: torch.Tensor,
    y: torch.Tensor,
    hidden: torch.Tensor,
    overlap: torch.Tensor,
    shrink: torch.Tensor,
    U: torch.Tensor,
    erase_bias: torch.Tensor,
    write_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradient of y, and the programs' shares of those of U and of the two biases."""
    inputs = grad_new_D, y, hidden, overlap, shrink, U, erase_bias, write_bias
    grad_y, grad_U, grad_bias = empty_gradient_U(*inputs)
    N, d = y.shape
    launch(
        gradient_U_kernel,
        GRADIENT_U_TILE,
        N,
        d,
        grad_new_D=grad_new_D,
        y=y,
        hidden=hidden,
        overlap=overlap,
        shrink=shrink,
        U=U,
        erase_bias=erase_bias,
        write_bias=write_bias,
        grad_y=grad_y,
        grad_U=grad_U,
        grad_bias=grad_bias,
        hidden_stride=hidden.stride(0),
        d=d,
        r=U.shape[2],
    )
    return grad_y, grad_U, grad_bias


gradient_U.register_fake(empty_gradient_U)


def empty_gradient_read(
    grad_u, grad_logit, grad_D, grad_C, D, C, c, scale, gain, commit_weight, rotated, eps
):
    d = len(gain)
    shares = grid(GRADIENT_READ_TILE, D.numel() // d)[1]
    return torch.empty_like(D), torch.empty_like(C), torch.empty_like(c), gain.new_empty(shares, 3, d)


@torch.library.custom_op('ledger::gradient_read', mutates_args=())
def gradient_read(
    grad_u: torch.Tensor,
    grad_logit: torch.Tensor,
    grad_D: torch.Tensor,
    grad_C: torch.Tensor,
    D: torch.Tensor,
    C: torch.Tensor,
    c: torch.Tensor,
    scale: torch.Tensor,
    gain: torch.Tensor,
    commit_weight: torch.Tensor,
    rotated: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of D, of C and of c, and the programs' shares of those of λ, of the gain and
    of w_c."""
    inputs = grad_u, grad_logit, grad_D, grad_C, D, C, c, scale, gain, commit_weight, rotated, eps
    grad_old_D, grad_old_C, grad_c, sums = empty_gradient_read(*inputs)
    d = len(gain)
    width = triton.next_power_of_2(d)
    launch(
        gradient_read_kernel,
        dict(GRADIENT_READ_TILE, num_warps=min(16, max(1, width // 256))),
        D.numel() // d,
        0,
        grad_u=grad_u,
        grad_logit=grad_logit,
        grad_D=grad_D,
        grad_C=grad_C,
        D=D,
        C=C,
        c=c,
        scale=scale,
        gain=gain,
        commit_weight=commit_weight,
        rotated=rotated,
        grad_old_D=grad_old_D,
        grad_old_C=grad_old_C,
        grad_c=grad_c,
        sums=sums,
        eps=eps,
        rotated_stride=None if rotated is None else rotated.stride(-2),
        d=d,
        WIDTH=width,
    )
    return grad_old_D, grad_old_C, grad_c, sums


gradient_read.register_fake(empty_gradient_read)


def empty_add_product(added, x, W, c, y):
    return torch.empty_like(added)


@torch.library.custom_op('ledger::add_product', mutates_args=())
def add_product(
    added: torch.Tensor, x: torch.Tensor, W: torch.Tensor, c: torch.Tensor | None, y: torch.Tensor | None
) -> torch.Tensor:
    """Returns added + x W, and + c · y where these are given."""
    total = torch.empty_like(added)
    r, d = W.shape
    launch(
        add_product_kernel,
        ADD_PRODUCT_TILE,
        len(x),
        d,
        added=added,
        x=x,
        W=W,
        c=c,
        y=y,
        total=total,
        y_stride=None if y is None else y.stride(-2),
        d=d,
        r=r,
    )
    return total


add_product.register_fake(empty_add_product)


# ---- The ledger's two steps, with their gradients


def half(x):
    """Returns x in bfloat16. In PyTorch 2.11, what an autograd.Function returns has no gradient under
    torch.compile if it was converted to the precision that it has: hence the condition."""
    return x if x.dtype == HALF else x.to(HALF)


def commit(committed, C, c, p, UP):
    """Returns the new C, C + c (D + U_P p), with committed = D; or, through a rotation Q, with committed
    = Q D and UP = Q U_P. committed, C: (B, T, d), any precision; c: (B, T, 1) float32; p = V_P D: (B, T,
    r), UP: (d, r), bfloat16."""
    # copy=True: see half()
    return (C + c * committed + (c * p).to(HALF) @ UP.T).to(C.dtype, copy=True)


class Read(torch.autograd.Function):
    """The commit of the sublayer before, then the read of this one.

    D, C: (B, T, d), any precision. Of the commit: c: (B, T, 1) float32; VP: (r, d), UP: (d, r), bfloat16;
    Q: (d, d) bfloat16, a constant, with UP = Q U_P, or None. Of the read: Uk = U_k: (d, r) bfloat16; scale
    = λ, gain, commit_weight = w_c: (d,) float32. Returns u: (B, T, d) bfloat16; uᵀw_c: (B, T, 1) float32;
    D; the new C; and projected = U_kᵀD: (B, T, r) bfloat16."""

    @staticmethod
    def forward(ctx, D, C, c, VP, UP, Q, Uk, scale, gain, commit_weight, eps):
        with torch.autocast(D.device.type, enabled=False):
            if Q is None:
                p, projected = (half(D) @ torch.cat([VP.T, Uk], 1)).chunk(2, -1)
                C = commit(D, C, c, p, UP)
                of_rotation = ()
            else:
                r, d = VP.shape
                p, projected, rotated = (half(D) @ torch.cat([VP.T, Uk, Q.T], 1)).split([r, r, d], -1)
                C = commit(rotated, C, c, p, UP)
                of_rotation = Q, rotated
        ctx.save_for_backward(D, C, c, p, VP, UP, Uk, scale, gain, commit_weight, *of_rotation)
        ctx.eps = eps
        x = D + scale * C
        u = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
        logit = (u * commit_weight).sum(-1, keepdim=True)
        return u.to(HALF, copy=True), logit, D.view_as(D), C, projected

    @staticmethod
    def backward(ctx, grad_u, grad_logit, grad_D, grad_C, grad_projected):
        D, C, c, p, VP, UP, Uk, scale, gain, commit_weight, *of_rotation = ctx.saved_tensors
        Q, rotated = of_rotation if of_rotation else (None, None)
        incoming = [grad.contiguous() for grad in (grad_u, grad_logit, grad_D, grad_C)]
        grad_D, grad_C, grad_c, sums = gradient_read(
            *incoming, D, C, c, scale, gain, commit_weight, rotated, ctx.eps
        )
        with torch.autocast(D.device.type, enabled=False):
            # C + c (… + UP p): what comes back to p by UP, before c multiplies it; and to D by Q likewise.
            if Q is None:
                grad_cp = half(grad_C) @ UP
                grad_rotated = None
            else:
                grad_cp, grad_rotated = (half(grad_C) @ torch.cat([UP, Q], 1)).split(UP.shape[::-1], -1)
            grad_p_and_projected = torch.cat([(c * grad_cp).to(HALF), grad_projected], -1).flatten(0, 1)
            grad_VP, grad_Uk = (grad_p_and_projected.T @ half(D).flatten(0, 1)).chunk(2)
            grad_UP = half(grad_C).flatten(0, 1).T @ (c * p).to(HALF).flatten(0, 1)
        # D: through p and projected, and where there is a rotation through it.
        grad_D = add_product(
            grad_D,
            grad_p_and_projected,
            torch.cat([VP, Uk.T]),
            None if Q is None else c,
            grad_rotated,
        )
        grad_c = grad_c + (grad_cp * p).sum(-1, keepdim=True, dtype=torch.float32)
        return grad_D, grad_C, grad_c, grad_VP, grad_UP, None, grad_Uk.T, *sums.sum(0), None


class Deliberate(torch.autograd.Function):
    """The new D. D: (N, d), any precision; y: (N, d), hidden: (N, 3r), projected: (N, r), U: (3, d, r),
    bfloat16; erase_bias, write_bias: (d,) float32. Returns (N, d)."""

    @staticmethod
    def forward(ctx, D, y, hidden, projected, U, erase_bias, write_bias):
        with torch.autocast(D.device.type, enabled=False):
            Uk = U[2].float()
            gram_hidden, length, overlap = direction(hidden, projected, Uk.T @ Uk)
        ctx.save_for_backward(y, hidden, projected, U, erase_bias, write_bias, gram_hidden, length, overlap)
        return deliberate(D, y, hidden, overlap, U, erase_bias, write_bias)

    @staticmethod
    def backward(ctx, grad):
        y, hidden, projected, U, erase_bias, write_bias, gram_hidden, length, overlap = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden, grad_projected, shrink = gradient_hidden(
            grad, y, hidden, overlap, U, erase_bias, write_bias, projected, gram_hidden, length
        )
        grad_y, grad_U, grad_bias = gradient_U(grad, y, hidden, overlap, shrink, U, erase_bias, write_bias)
        return grad, grad_y, grad_hidden, grad_projected, grad_U.sum(0).to(U.dtype), *grad_bias.sum(0)


# ---- The model


def padded_rank(rank):
    """Returns the size to which a gate's rank is padded with zeros."""
    return next(size for size in RANKS if rank <= size)


def padded_U(low_rank, r):
    """Returns U of a LowRank, (d, r), its missing columns zero."""
    weight = low_rank.U.weight
    return F.pad(weight, (0, r - weight.shape[1])).to(HALF)


def padded_V(low_rank, r):
    """Returns V of a LowRank, (r, d), its missing rows zero."""
    weight = low_rank.V.weight
    return F.pad(weight, (0, 0, 0, r - len(weight))).to(HALF)


class FastSublayer(Sublayer):
    """A ledger's sublayer that runs through the kernels. Beside D and C, its streams have what is still
    to be committed: c, VP and UP. The C that it returns is the one before that commit."""

    rotation = None  # Q, (d, d), where what is committed is rotated

    def forward(self, streams):
        residual, function = self.residual, self.function
        gates = residual.erase_gate, residual.write_gate, residual.erase_direction  # the order of U
        r = padded_rank(len(residual.commit_map.V.weight))
        rotation = None if self.rotation is None else self.rotation.to(HALF)
        U = torch.stack([padded_U(gate, r) for gate in gates])
        u, logit, D, C, projected = Read.apply(
            streams['D'],
            streams['C'],
            streams['c'],
            streams['VP'],
            streams['UP'],
            rotation,
            U[2],
            residual.read_scale,
            self.norm.weight,
            residual.commit_weight,
            self.norm.eps,
        )
        inner, hidden = self.inner_and_hidden(u, gates, r)
        W, b = function.proj.weight, function.proj.bias
        folded_W = W + residual.write_map(W.T).T
        folded_b = None if b is None else b + residual.write_map(b)
        y = F.linear(inner, folded_W, folded_b)
        D = Deliberate.apply(
            D.flatten(0, 1),
            y.flatten(0, 1),
            hidden.flatten(0, 1),
            projected.flatten(0, 1),
            U,
            residual.erase_gate.U.bias,
            residual.write_gate.U.bias,
        ).view(D.shape)
        c = torch.sigmoid(logit + residual.commit_bias)
        VP = padded_V(residual.commit_map, r)
        UP = padded_U(residual.commit_map, r)
        if rotation is not None:
            UP = rotation @ UP
        return {'D': D, 'C': C, 'c': c, 'VP': VP, 'UP': UP}, c

    def inner_and_hidden(self, u, gates, r):
        """Returns what the sublayer's last product takes, and hidden, (B, T, 3r): both from one product
        with u."""
        function = self.function
        inputs, parts = (function.qkv, 3) if self.kind == 'attn' else (function.fc, 1)
        W = torch.cat([inputs.weight.to(HALF), *(padded_V(gate, r) for gate in gates)])
        n = len(inputs.weight)
        bias = None if inputs.bias is None else F.pad(inputs.bias, (0, len(W) - n))
        *x, hidden = F.linear(u, W, bias).split([n // parts] * parts + [len(W) - n], -1)
        return function.inner(*x), hidden


class FastGPT(GPT):
    """A ledger that runs through the kernels."""

    def start(self, idx):
        streams = super().start(idx)
        # The first read finds an empty commit with a gradient to take: so to the compiler all sublayers are
        # the same.
        r = padded_rank(self.config.gate_rank)
        nothing = 0 * self.norm.weight
        return {
            'D': streams['D'],
            'C': streams['C'] + nothing.to(streams['C'].dtype),
            'c': streams['D'].new_zeros(*idx.shape, 1, dtype=torch.float32) + nothing[0],
            'VP': nothing.to(HALF).repeat(r, 1),
            'UP': nothing.to(HALF)[:, None].repeat(1, r),
        }

    def decode(self, streams):
        """Makes the last commit, then decodes."""
        D = streams['D']
        rotation = self.sublayers[-1].rotation
        committed = D if rotation is None else F.linear(half(D), rotation.to(HALF))
        p = F.linear(half(D), streams['VP'])
        return super().decode({'D': D, 'C': commit(committed, streams['C'], streams['c'], p, streams['UP'])})


def as_fast(model):
    """Returns a GPT with the parameters of `model` that runs through the kernels."""
    fast_model = twin(model)
    fast_model.__class__ = FastGPT
    for sublayer in fast_model.sublayers:
        sublayer.__class__ = FastSublayer
        sublayer.rotation = getattr(sublayer.residual, 'rotation', None)
    return fast_model


# ---- The check before the kernels are used


def random_twin(config):
    """Returns a plain model of one layer at the widths of config. Every term of its formulas counts: the
    gates are half open, and products neither vanish nor outgrow the rest."""
    model = GPT(replace(config, n_layer=1, vocab_size=64, block_size=64))
    for name, parameter in model.named_parameters():
        size = (32 / parameter.shape[-1]) ** 0.5 if parameter.dim() == 2 else 1
        parameter += 0.2 * size * torch.randn_like(parameter)
        if name.endswith('erase_gate.U.bias'):
            parameter += 3  # it starts at −3
        if name.endswith('commit_bias'):
            parameter.zero_()  # or the only read of a C that is not empty would find next to nothing
    return model


def outputs_and_gradients(model, idx):
    """Returns the logits and the gradients of the objective, each as one vector."""
    with sdpa_kernel(SDPBackend.MATH):  # cuDNN's attention takes seconds to set up, for these sizes alone
        logits = model(idx)
        gradients = torch.autograd.grad(model(idx, idx)[0], model.parameters())
    return logits.detach().flatten(), torch.cat([x.flatten() for x in gradients])


def agree(found, expected, tolerance):
    return (found - expected).norm() < tolerance * expected.norm()


def computes_the_same(config, device):
    """Returns whether the kernels agree with the plain formulas on a random model of these widths, on
    this device."""
    idx = torch.arange(64, device=device)[None]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        plain = random_twin(config).to(device)
    logits, gradients = outputs_and_gradients(plain, idx)
    with torch.autocast(device.type, HALF):
        fast_logits, fast_gradients = outputs_and_gradients(as_fast(plain), idx)
    # The plain formulas in bfloat16 differ from float32 by at most 0.014 and 0.037, at widths of 32 to 2,048.
    return bool(agree(fast_logits, logits, 0.03) and agree(fast_gradients, gradients, 0.08))


def is_known(sublayer):
    """Returns whether a sublayer has the parts that FastSublayer puts together: another norm would have
    gains of another shape, and of attention and MLP only `inner` is called."""
    is_ledger = isinstance(sublayer.residual, Ledger)
    has_plain_norm = type(sublayer.norm) is RMSNorm
    return (
        is_ledger and has_plain_norm and type(sublayer.function).forward in (Attention.forward, MLP.forward)
    )


def fast(model):
    """Returns as_fast(model); or None if the kernels cannot run at the model's widths or on its device,
    or if they do not compute the model's formulas: model.py is there to be changed."""
    config, device = model.config, model.head.weight.device
    has_known_parts = all(map(is_known, model.sublayers))
    if not has_known_parts or config.gate_rank > RANKS[-1] or config.n_embd % 16:
        return None
    # Errors of Python: the model has other parts. Errors of the device: it is too small for the tiles.
    errors = AttributeError, TypeError, ValueError, RuntimeError, triton.runtime.errors.OutOfResources
    try:
        return as_fast(model) if computes_the_same(config, device) else None
    except errors:
        return None
