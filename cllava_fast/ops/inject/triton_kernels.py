"""The kernels of inject: thin products whose factor rows are gathered by `index` inside.

Everywhere K = pairs * R columns of a sample, column k being rank k % R of row index[b, k // R]. Sums are float32 and
in one order: each output has one writer. Rows of activations and factors are contiguous; their other strides are free.
Coefficients are those of samples, [B, P], or of tokens, [B, S, P]: PER_TOKEN. Where rows share one A, x is projected on
[B, S, R]: column k of K is column k % R of those.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from cllava_fast.ops.triton_backend import INTERPRETED

# numpy has no bfloat16, so the interpreter's products of such tiles are wrong; in float32 they are the exact ones that
# tensor cores add up in float32.
UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, total):
    """total + a @ b; `total` is float32, or None."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _factor_rows(factor, index, k, columns, stride_n, stride_r, R: tl.constexpr):
    """Pointers to where the rows of columns `k` begin; `index` points at the sample's first pair."""
    row = tl.load(index + k // R, mask=k < columns, other=0)  # int64
    return factor + row * stride_n + (k % R).to(tl.int64) * stride_r


@triton.jit
def _weighed(tile, strength):
    """tile * strength in float32; an overflow in a row that does not act stays there."""
    return tl.where(strength != 0.0, tile.to(tl.float32) * strength, 0.0)


@triton.jit
def shrink(
    x,  # [B, S, width]
    factor,  # [N, R, width]
    index,  # [B, P]
    coefficient,  # [B, P] or [B, S, P]
    scaled,  # out [B, S, K]: product * coefficient * scale, or None
    bare,  # out [B, S, K]: product, or None
    other,  # [B, S, K], or None
    products,  # out float32 [B, token tiles, K]: sum over the tile's tokens of product * other
    left,  # [B, S, K], or None
    outer,  # out float32 [B, token tiles, K, width]: sum over the tile's tokens of left * x, PER_TOKEN weighed
    tokens,
    width,
    pairs,
    x_stride_b,
    x_stride_s,
    f_stride_n,
    f_stride_r,
    scale,
    PER_TOKEN: tl.constexpr,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """product[b, s, k] = sum_d x[b, s, d] * factor row of k; and, in the same pass over x, sums with what is given."""
    columns = pairs * R
    k_tiles = tl.cdiv(columns, BLOCK_K)
    s_tiles = tl.cdiv(tokens, BLOCK_S)
    pid = tl.program_id(0)  # the column tiles of one token tile are neighbours, so that x is read from L2 again
    k = (pid % k_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = (pid // k_tiles).to(tl.int64)
    b = tile // s_tiles
    s = (tile % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_k = k < columns
    in_s = s < tokens
    index += b * pairs
    x_rows = x + b * x_stride_b + s * x_stride_s
    f_rows = _factor_rows(factor, index, k, columns, f_stride_n, f_stride_r, R)
    at = (b * tokens + s)[:, None] * columns + k[None, :]  # [BLOCK_S, BLOCK_K]
    inside = in_s[:, None] & in_k[None, :]
    if left is not None:
        left_tile = tl.load(left + at, mask=inside, other=0.0)
        if PER_TOKEN:
            of_token = coefficient + (b * tokens + s)[:, None] * pairs + (k // R)[None, :]
            left_tile = _weighed(left_tile, tl.load(of_token, mask=inside, other=0.0) * scale).to(left.dtype.element_ty)
    total = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < width
        x_tile = tl.load(x_rows[:, None] + d[None, :], mask=in_s[:, None] & in_d[None, :], other=0.0)
        f_tile = tl.load(f_rows[None, :] + d[:, None], mask=in_k[None, :] & in_d[:, None], other=0.0)
        total = _dot(x_tile, f_tile.to(x_tile.dtype), total)
        if left is not None:
            part = _dot(tl.trans(left_tile), x_tile, None)  # [BLOCK_K, BLOCK_D]
            outer_at = (tile * columns + k)[:, None] * width + d[None, :]
            tl.store(outer + outer_at, part, mask=in_k[:, None] & in_d[None, :])
    if bare is not None:
        tl.store(bare + at, total.to(bare.dtype.element_ty), mask=inside)
    if scaled is not None:
        if PER_TOKEN:
            of_token = coefficient + (b * tokens + s)[:, None] * pairs + (k // R)[None, :]
            each = total * (tl.load(of_token, mask=inside, other=0.0) * scale)
            tl.store(scaled + at, each.to(scaled.dtype.element_ty), mask=inside)
        else:
            strength = tl.load(coefficient + b * pairs + k // R, mask=in_k, other=0.0) * scale
            tl.store(scaled + at, (total * strength[None, :]).to(scaled.dtype.element_ty), mask=inside)
    if other is not None:
        product = total * tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(products + tile * columns + k, tl.sum(product, 0), mask=in_k)


@triton.jit
def expand(
    low,  # [B, S, K]
    factor,  # [N, R, width]
    index,  # [B, P]
    bias,  # [width], or None
    base,  # [B, S, width], or None
    out,  # [B, S, width]
    tokens,
    width,
    pairs,
    f_stride_n,
    f_stride_r,
    base_stride_b,
    base_stride_s,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b, s, d] = bias + base + sum_k low[b, s, k] * factor row of k."""
    columns = pairs * R
    d_tiles = tl.cdiv(width, BLOCK_D)
    s_tiles = tl.cdiv(tokens, BLOCK_S)
    pid = tl.program_id(0)
    d = (pid % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = (pid // d_tiles).to(tl.int64)
    b = tile // s_tiles
    s = (tile % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_d = d < width
    in_s = s < tokens
    inside = in_s[:, None] & in_d[None, :]
    index += b * pairs
    low_rows = low + (b * tokens + s) * columns
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < columns
        low_tile = tl.load(low_rows[:, None] + k[None, :], mask=in_s[:, None] & in_k[None, :], other=0.0)
        f_rows = _factor_rows(factor, index, k, columns, f_stride_n, f_stride_r, R)
        f_tile = tl.load(f_rows[:, None] + d[None, :], mask=in_k[:, None] & in_d[None, :], other=0.0)
        total = _dot(low_tile, f_tile.to(low_tile.dtype), total)
    if bias is not None:
        total += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    if base is not None:
        base_at = (b * base_stride_b + s * base_stride_s)[:, None] + d[None, :]
        total += tl.load(base + base_at, mask=inside, other=0.0).to(tl.float32)
    out_at = (b * tokens + s)[:, None] * width + d[None, :]
    tl.store(out + out_at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def outer(
    left,  # [B, S, K]
    right,  # [B, S, width]
    partial,  # out float32 [B, segments, K, width]
    tokens,
    width,
    columns,
    segments,
    segment_tiles,
    right_stride_b,
    right_stride_s,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial[b, g, k, d] = sum over the tokens of segment g of left[b, s, k] * right[b, s, d]."""
    d_tiles = tl.cdiv(width, BLOCK_D)
    k_tiles = tl.cdiv(columns, BLOCK_K)
    pid = tl.program_id(0)
    d = ((pid // k_tiles) % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = (pid % k_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    segment = (pid // (k_tiles * d_tiles)).to(tl.int64)  # of all samples' segments
    b = segment // segments
    in_d = d < width
    in_k = k < columns
    left += b * tokens * columns
    right += b * right_stride_b
    first = (segment % segments) * segment_tiles * BLOCK_S
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for step in range(0, segment_tiles):
        s = first + step * BLOCK_S + tl.arange(0, BLOCK_S)
        in_s = s < tokens
        acts = in_s[None, :] & in_k[:, None]
        left_tile = tl.load(left + s[None, :] * columns + k[:, None], mask=acts, other=0.0)
        right_at = s[:, None] * right_stride_s + d[None, :]
        right_tile = tl.load(right + right_at, mask=in_s[:, None] & in_d[None, :], other=0.0)
        total = _dot(left_tile, right_tile, total)
    at = (segment * columns + k)[:, None] * width + d[None, :]
    tl.store(partial + at, total, mask=in_k[:, None] & in_d[None, :])


@triton.jit
def sum_by_row(
    partial,  # float32 [B, segments, P, size]
    index,  # [B, P]
    coefficient,  # [B, P], or None: all 1
    out,  # [N, size]
    size,  # of a row: R * d
    pairs,
    all_pairs,  # B * P
    segments,
    scale,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """out[n] = sum of what the pairs with row n left in `partial`, times coefficients: samples, then pairs in order."""
    tiles = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    at = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    j = tl.arange(0, PAIRS)
    g = tl.arange(0, SEGMENTS)
    # loads that do not wait for each other: of a block of pairs at once which are the row's, and of segments their sums
    for start in range(0, all_pairs, PAIRS):
        here = tl.load(index + start + j, mask=start + j < all_pairs, other=-1) == row
        for _ in range(0, tl.sum(here.to(tl.int32), 0)):
            next_one = tl.min(tl.where(here, j, PAIRS), 0)
            here = here & (j != next_one)
            pair = start + next_one
            of_pair = tl.zeros([BLOCK], tl.float32)
            for segment in range(0, segments, SEGMENTS):
                part = (pair // pairs * segments + segment + g) * pairs + pair % pairs
                mask = inside[None, :] & (segment + g < segments)[:, None]
                tile = tl.load(partial + part.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)
                of_pair += tl.sum(tile, 0)
            if coefficient is not None:
                strength = tl.load(coefficient + pair) * scale
                of_pair = tl.where(strength != 0.0, of_pair * strength, 0.0)
            total += of_pair
    tl.store(out + row * size + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def weigh(
    low,  # [B, S, C]: one column for each row and rank of the pool, then of the past; or None
    low_grad,  # [B, S, C], or None
    index,  # [B, P]
    coefficient,  # [B, P] or [B, S, P]
    past_coefficient,  # [B, past rows], or None
    scaled_low,  # out [B, S, C], or None
    scaled_grad,  # out [B, S, C], or None
    products,  # out float32 [B, token tiles, C]: sum over the tile's tokens of low * low_grad, or None
    tokens,
    columns,
    pool_columns,  # N * R
    pairs,
    past_rows,
    past_rank,
    scale,
    PER_TOKEN: tl.constexpr,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Projections on all rows times each sample's strength of the row, which is 0 for rows not selected."""
    k_tiles = tl.cdiv(columns, BLOCK_K)
    s_tiles = tl.cdiv(tokens, BLOCK_S)
    pid = tl.program_id(0)
    k = (pid % k_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = (pid // k_tiles).to(tl.int64)
    b = tile // s_tiles
    s = (tile % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_k = k < columns
    inside = (s < tokens)[:, None] & in_k[None, :]
    at = (b * tokens + s)[:, None] * columns + k[None, :]
    strength = tl.zeros([BLOCK_S if PER_TOKEN else 1, BLOCK_K], tl.float32)
    for pair in range(0, pairs):  # a row that appears twice counts twice
        row = tl.load(index + b * pairs + pair)
        here = ((k // R == row) & (k < pool_columns))[None, :]
        if PER_TOKEN:
            of_pair = tl.load(coefficient + (b * tokens + s) * pairs + pair, mask=s < tokens, other=0.0)[:, None]
        else:
            of_pair = tl.load(coefficient + b * pairs + pair)
        strength += tl.where(here, of_pair, 0.0)
    if past_coefficient is not None:
        past_row = (k - pool_columns) // past_rank
        of_past = in_k & (k >= pool_columns)
        strength += tl.load(past_coefficient + b * past_rows + past_row, mask=of_past, other=0.0)[None, :]
    strength *= scale
    if low is not None:
        low_tile = tl.load(low + at, mask=inside, other=0.0).to(tl.float32)
    if low_grad is not None:
        grad_tile = tl.load(low_grad + at, mask=inside, other=0.0).to(tl.float32)
    if scaled_low is not None:
        value = _weighed(low_tile, strength)
        tl.store(scaled_low + at, value.to(scaled_low.dtype.element_ty), mask=inside)
    if scaled_grad is not None:
        value = _weighed(grad_tile, strength)
        tl.store(scaled_grad + at, value.to(scaled_grad.dtype.element_ty), mask=inside)
    if products is not None:
        tl.store(products + tile * columns + k, tl.sum(low_tile * grad_tile, 0), mask=in_k)


@triton.jit
def sum_products(
    products,  # float32 [B, token tiles, C]
    index,  # [B, P]: pair p has the R columns from first + index * R on; or None: from first + p * R on
    out,  # float32 [B, P]
    tiles,  # of tokens
    columns,
    pairs,
    first,
    scale,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A pair's sum over tokens and ranks: the gradient of its coefficient."""
    at = tl.program_id(0).to(tl.int64)
    row = at % pairs
    if index is not None:
        row = tl.load(index + at)
    products += at // pairs * tiles * columns + first + row * R
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        inside = (tile < tiles)[:, None] & (r < R)[None, :]
        total += tl.load(products + tile[:, None] * columns + r[None, :], mask=inside, other=0.0)
    tl.store(out + at, tl.sum(tl.sum(total, 1), 0) * scale)


@triton.jit
def weigh_pairs(
    low,  # [B, S, K]; [B, S, R] if SHARED
    coefficient,  # [B, S, P]
    out,  # [B, S, K]
    size,  # B * S * K
    pairs,
    scale,
    SHARED: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Projections times their pair's coefficient for the token."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    low_at = at // (pairs * R) * R + at % R if SHARED else at
    strength = tl.load(coefficient + at // R, mask=inside, other=0.0) * scale
    value = _weighed(tl.load(low + low_at, mask=inside, other=0.0), strength)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def of_tokens(
    low,  # [B, S, low_columns]
    low_grad,  # [B, S, columns]
    index,  # [B, P]: pair p has the R columns from index * R on; or None: from p * R on
    coefficient,  # [B, S, P]
    to_coefficient,  # out float32 [B, S, P]: low * low_grad summed over a pair's columns, times scale; or None
    folded,  # out [B, S, R]: low_grad * coefficient * scale summed over pairs, or None
    tokens,
    pairs,
    low_columns,
    columns,
    scale,
    SHARED: tl.constexpr,  # low has the R columns that all rows share
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Each token's sums over the columns of a pair, which may lie in two tiles of `shrink`, or over pairs in order."""
    s_tiles = tl.cdiv(tokens, BLOCK_S)
    tile = tl.program_id(0).to(tl.int64)
    b = tile // s_tiles
    s = (tile % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    r = tl.arange(0, BLOCK_R)
    in_s = s < tokens
    inside = in_s[:, None] & (r < R)[None, :]
    token = b * tokens + s
    total = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    for pair in range(0, pairs):
        first = pair * R
        if index is not None:
            first = tl.load(index + b * pairs + pair) * R
        at = (first + r)[None, :]
        grad_tile = tl.load(low_grad + token[:, None] * columns + at, mask=inside, other=0.0).to(tl.float32)
        if to_coefficient is not None:
            low_at = token[:, None] * low_columns + (r[None, :] if SHARED else at)
            product = grad_tile * tl.load(low + low_at, mask=inside, other=0.0).to(tl.float32)
            tl.store(to_coefficient + token * pairs + pair, tl.sum(product, 1) * scale, mask=in_s)
        if folded is not None:
            strength = tl.load(coefficient + token * pairs + pair, mask=in_s, other=0.0) * scale
            total += _weighed(grad_tile, strength[:, None])
    if folded is not None:
        folded_at = token[:, None] * R + r[None, :]
        tl.store(folded + folded_at, total.to(folded.dtype.element_ty), mask=inside)
