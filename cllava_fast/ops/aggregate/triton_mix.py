"""mix_factors in Triton: weighted sums of rows of A and B at the speed of memory.

One kernel adds up rows for the forward (each sample's pairs) and for the gradients to A and B (each pool row's
samples); both factors go in one launch. Rows of weight 0 are not loaded: 0 is padding, and aggregate pads much.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllava_fast.ops.aggregate.native import adjacent
from cllava_fast.ops.triton_backend import Shipped

COLUMNS = 1024  # of a flattened row [R * d]: 16 bytes a thread in half precision
UNROLL = 4  # rows in flight together
SLICE = 8192  # columns that one program of the coefficients' gradient takes, DOT_COLUMNS at a time
DOT_COLUMNS = 2048
ROWS, PAIRS = 64, 32  # tile of the comparison of pool rows with pairs


@triton.jit
def _add_up(
    source, apart, index, weight, out, tile, row, size, terms,
    GATHER: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    column = tile * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, terms, UNROLL):
        for step in tl.static_range(UNROLL):
            term = first + step
            strength = tl.load(weight + row * terms + term, mask=term < terms, other=0)
            if GATHER:
                where = tl.load(index + row * terms + term, mask=term < terms, other=0)
            else:
                where = term.to(tl.int64)
            end = tl.where(strength != 0, size, 0)
            value = tl.load(source + where * apart + column, mask=column < end, other=0)
            total += strength * value.to(tl.float32)
    tl.store(out + row * size + column, total.to(out.dtype.element_ty), mask=column < size)


@triton.jit
def add_up_kernel(
    first, second, index, weight, first_out, second_out,
    first_apart, second_apart, first_size, second_size, first_tiles, rows, terms,
    GATHER: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out[row] = sum_t weight[row, t] * source[index[row, t] or t], for two sources."""
    tile = tl.program_id(0) // rows
    row = (tl.program_id(0) % rows).to(tl.int64)  # fastest: rows that share a source share the cache
    if tile < first_tiles:
        _add_up(first, first_apart, index, weight, first_out, tile, row, first_size, terms, GATHER, BLOCK, UNROLL)
    else:
        tile -= first_tiles
        _add_up(second, second_apart, index, weight, second_out, tile, row, second_size, terms, GATHER, BLOCK, UNROLL)


@triton.jit
def strength_kernel(
    index, coefficient, strength,
    B, P, N,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """strength[n, b] = sum of coefficient[b, p] over the pairs p that name row n."""
    sample = (tl.program_id(0) % B).to(tl.int64)
    n = (tl.program_id(0) // B) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    for first in range(0, P, PAIRS):
        p = first + tl.arange(0, PAIRS)
        row = tl.load(index + sample * P + p, mask=p < P, other=-1)
        value = tl.load(coefficient + sample * P + p, mask=p < P, other=0)
        total += tl.where(row[None, :] == n[:, None], value[None, :], 0)
    tl.store(strength + n.to(tl.int64) * B + sample, tl.sum(total, axis=1), mask=n < N)


@triton.jit
def _dot(grad, grad_apart, factor, factor_apart, sample, row, tile, size, SLICE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(tile * SLICE, tl.minimum(tile * SLICE + SLICE, size), BLOCK):
        column = first + tl.arange(0, BLOCK)
        upstream = tl.load(grad + sample * grad_apart + column, mask=column < size, other=0)
        value = tl.load(factor + row * factor_apart + column, mask=column < size, other=0)
        total += upstream.to(tl.float32) * value.to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def dot_kernel(
    grad_A, grad_B, A, B, index, partial,
    grad_A_apart, grad_B_apart, A_apart, B_apart, A_size, B_size, A_tiles, pairs, P,
    SLICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[tile, pair] = the part of one slice in <grad_A[b], A[row]> + <grad_B[b], B[row]>."""
    tile = tl.program_id(0) // pairs
    pair = (tl.program_id(0) % pairs).to(tl.int64)
    row = tl.load(index + pair)
    place = partial + tile.to(tl.int64) * pairs + pair
    if tile < A_tiles:
        part = _dot(grad_A, grad_A_apart, A, A_apart, pair // P, row, tile, A_size, SLICE, BLOCK)
        tl.store(place, part)
    else:
        tile -= A_tiles
        part = _dot(grad_B, grad_B_apart, B, B_apart, pair // P, row, tile, B_size, SLICE, BLOCK)
        tl.store(place, part)


def mix_factors(A: Tensor, B: Tensor, coefficient: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    samples = len(index)
    A_mix, B_mix = A.new_empty(samples, *A.shape[1:]), B.new_empty(samples, *B.shape[1:])
    _add_up_rows([A, B], [A_mix, B_mix], coefficient.contiguous(), index.contiguous())
    return A_mix, B_mix


def mix_factors_backward(
    grad_A: Tensor, grad_B: Tensor, A: Tensor, B: Tensor, coefficient: Tensor, index: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    coefficient, index = coefficient.contiguous(), index.contiguous()
    to_A, to_B = (factor.new_empty(factor.shape if need else 0) for factor, need in zip((A, B), needed, strict=False))
    wanted = [(grad, to) for grad, to, need in zip((grad_A, grad_B), (to_A, to_B), needed, strict=False) if need]
    if wanted:
        _add_up_rows([grad for grad, _ in wanted], [to for _, to in wanted], _strength(A, coefficient, index))
    if not needed[2]:
        return to_A, to_B, coefficient.new_empty(0)
    return to_A, to_B, _along_rows(grad_A, grad_B, A, B, index).to(coefficient.dtype)


def _add_up_rows(sources: list[Tensor], outs: list[Tensor], weight: Tensor, index: Tensor | None = None) -> None:
    """outs[i][row] = sum_t weight[row, t] * sources[i][index[row, t]], without an index `sources[i][t]`."""
    rows, terms = weight.shape
    flat, apart = zip(*map(_flatten, sources), strict=True)
    sizes = [out[0].numel() if rows else 0 for out in outs]
    tiles = [triton.cdiv(size, COLUMNS) for size in sizes]
    if sum(tiles) * rows == 0:
        return
    add_up_kernel[(sum(tiles) * rows,)](
        flat[0], flat[-1], weight if index is None else index, weight, outs[0], outs[-1],
        apart[0], apart[-1], sizes[0], sizes[-1], tiles[0], rows, terms,
        GATHER=index is not None, BLOCK=COLUMNS, UNROLL=UNROLL, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _strength(A: Tensor, coefficient: Tensor, index: Tensor) -> Tensor:  # -> [N, B]
    (samples, pairs), pool = index.shape, len(A)
    strength = coefficient.new_empty(pool, samples, dtype=torch.float32)
    if strength.numel():
        strength_kernel[(samples * triton.cdiv(pool, ROWS),)](
            index, coefficient, strength,
            samples, pairs, pool,
            ROWS=ROWS, PAIRS=PAIRS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return strength


def _along_rows(grad_A: Tensor, grad_B: Tensor, A: Tensor, B: Tensor, index: Tensor) -> Tensor:  # -> [B, P]
    flat, apart = zip(*map(_flatten, (grad_A, grad_B, A, B)), strict=True)
    sizes = [factor.shape[1] * factor.shape[2] for factor in (A, B)]
    tiles = [triton.cdiv(size, SLICE) for size in sizes]
    partial = A.new_empty(sum(tiles), *index.shape, dtype=torch.float32)
    if partial.numel():
        dot_kernel[(partial.numel(),)](
            *flat, index, partial, *apart, *sizes, tiles[0], index.numel(), index.shape[1],
            SLICE=SLICE, BLOCK=DOT_COLUMNS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return partial.sum(0)


def _flatten(tensor: Tensor) -> tuple[Tensor, int]:
    """[n, R, d] with the R * d entries of each row adjacent, and how far apart rows are."""
    tensor = adjacent(tensor)
    return tensor, tensor.stride(0)


def shipped() -> list[Shipped]:
    found = [
        Shipped(
            strength_kernel,
            {"index": "*i64", "coefficient": "*fp32", "strength": "*fp32", "B": "i32", "P": "i32", "N": "i32"},
            {"ROWS": ROWS, "PAIRS": PAIRS},
        )
    ]
    for factor in ("*fp16", "*bf16", "*fp32"):
        types = dict.fromkeys(("first", "second", "first_out", "second_out", "grad_A", "grad_B", "A", "B"), factor)
        types |= {"index": "*i64", "weight": "*fp32", "partial": "*fp32"}
        blocks = {"SLICE": SLICE, "BLOCK": DOT_COLUMNS}
        found.append(_shipped(dot_kernel, types, blocks))
        for gather in (True, False):
            blocks = {"GATHER": gather, "BLOCK": COLUMNS, "UNROLL": UNROLL}
            found.append(_shipped(add_up_kernel, types if gather else types | {"index": "*fp32"}, blocks))
    return found


def _shipped(kernel: Any, types: dict[str, str], blocks: dict[str, Any]) -> Shipped:
    names = [name for name in kernel.arg_names if name not in blocks]
    return Shipped(kernel, {name: types.get(name, "i32") for name in names}, blocks)
