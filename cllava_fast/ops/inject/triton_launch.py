"""Launches the kernels of inject: outputs, grids; and every configuration there is, for compiling ahead of time.

Which tiles they are launched with says `tiling.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllava_fast.ops.inject import tiling
from cllava_fast.ops.inject import triton_kernels as kernels
from cllava_fast.ops.inject.reference import Acting
from cllava_fast.ops.inject.tiling import (
    WEIGH_TILES,
    Tiles,
    beside,
    candidates,
    cdiv,
    choose,
    defaults,
    one_pass_tiles,
)
from cllava_fast.ops.native import dense_rows
from cllava_fast.ops.triton_backend import Shipped
from cllava_fast.ops.tuned import power_of_two

# Arguments of the kernels that are sizes or strides.
INTEGERS = frozenset(
    "tokens width pairs all_pairs columns low_columns pool_columns past_rows past_rank segments segment_tiles size"
    " tiles first"
    " x_stride_b x_stride_s f_stride_n f_stride_r base_stride_b base_stride_s right_stride_b right_stride_s".split()
)
# Elements of a row of a factor that one program of `sum_by_row` adds up, and what it looks at in one go.
SUM_BLOCK, SUM_PAIRS, SUM_SEGMENTS = 512, 32, 4
# Elements that one program of `weigh_pairs` has.
PAIRS_BLOCK = 1024
# Token tiles that `sum_products` adds up in one go.
PRODUCTS_BLOCK = 32
# Elements that one program of `of_tokens` has at a time.
TOKENS_BLOCK = 512


class Shrunk(NamedTuple):
    """What `shrink` was asked for."""

    scaled: Tensor | None = None  # [B, S, K]
    bare: Tensor | None = None  # [B, S, K]
    products: Tensor | None = None  # float32 [B, token tiles, K]
    outer: Tensor | None = None  # float32 [B, token tiles, K, width]


class Weighed(NamedTuple):
    """What `weigh` was asked for."""

    low: Tensor | None  # [B, S, C]
    grad: Tensor | None  # [B, S, C]
    products: Tensor | None  # float32 [B, token tiles, C]


SUM_TILES = Tiles(0, 0, SUM_BLOCK, 4, 3)
PRODUCTS_TILES = Tiles(0, 8, 0, 1, 3)
PAIRS_TILES = Tiles(0, 0, PAIRS_BLOCK, 4, 3)


def shrink(
    x: Tensor,  # [B, S, width]
    factor: Tensor,  # [N, R, width]
    given: Acting,
    tiles: Tiles,
    *,
    scaled: bool = False,
    bare: bool = False,
    other: Tensor | None = None,  # [B, S, K]: asks for products
    left: Tensor | None = None,  # [B, S, K]: asks for outer
) -> Shrunk:
    x, factor = dense_rows(x), dense_rows(factor)
    tiles = beside(tiles, x.dtype, factor.dtype)
    samples, tokens, width = x.shape
    rank = factor.shape[1]
    pairs = given.index.shape[1]
    columns = pairs * rank
    s_tiles = cdiv(tokens, tiles.tokens)
    single = torch.float32
    out = Shrunk(
        x.new_empty(samples, tokens, columns) if scaled else None,
        x.new_empty(samples, tokens, columns) if bare else None,
        None if other is None else x.new_empty(samples, s_tiles, columns, dtype=single),
        None if left is None else x.new_empty(samples, s_tiles, columns, width, dtype=single),
    )
    arguments = (x, factor, given.index, given.coefficient, *out[:2], other, out.products, left, out.outer)
    sizes = (tokens, width, pairs, *x.stride()[:2], *factor.stride()[:2], given.scale)
    programs = samples * s_tiles * cdiv(columns, tiles.columns)
    constants = {"PER_TOKEN": given.per_token, "R": rank, **_blocks(tiles)}
    _launch(kernels.shrink, programs, tiles, *arguments, *sizes, **constants)
    return out


def expand(
    low: Tensor,  # [B, S, K], contiguous
    factor: Tensor,  # [N, R, width]
    index: Tensor,  # [B, P], contiguous
    *,
    bias: Tensor | None = None,  # [width]
    base: Tensor | None = None,  # [B, S, width]
    tiles: Tiles | None = None,
) -> Tensor:
    factor = dense_rows(factor)
    samples, tokens, columns = low.shape
    _, rank, width = factor.shape
    tiles = tiles or choose("expand", low, columns)
    bias = None if bias is None else bias.contiguous()
    base = None if base is None else dense_rows(base)
    base_strides = (0, 0) if base is None else base.stride()[:2]
    out = low.new_empty(samples, tokens, width)
    sizes = (tokens, width, index.shape[1], *factor.stride()[:2], *base_strides)
    programs = samples * cdiv(tokens, tiles.tokens) * cdiv(width, tiles.width)
    arguments = (low, factor, index, bias, base, out)
    _launch(kernels.expand, programs, tiles, *arguments, *sizes, R=rank, **_blocks(tiles))
    return out


def outer(
    left: Tensor,  # [B, S, K], contiguous
    right: Tensor,  # [B, S, d]
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """float32 [B, segments, K, d], to be summed over segments."""
    right = dense_rows(right)
    samples, tokens, columns = left.shape
    width = right.shape[2]
    tiles = tiles or choose("outer", left, columns)
    s_tiles = cdiv(tokens, tiles.tokens)
    across = samples * cdiv(columns, tiles.columns) * cdiv(width, tiles.width)
    # As few as fill the GPU, so the sums stay small: beyond one segment a sample, a few MB.
    segment_tiles = cdiv(s_tiles, min(s_tiles, cdiv(2 * tiling.ENOUGH_PROGRAMS, across)))
    segments = cdiv(s_tiles, segment_tiles)
    partial = left.new_empty(samples, segments, columns, width, dtype=torch.float32)
    sizes = (tokens, width, columns, segments, segment_tiles, *right.stride()[:2])
    _launch(kernels.outer, across * segments, tiles, left, right, partial, *sizes, **_blocks(tiles))
    return partial


def sum_by_row(partial: Tensor, factor: Tensor, given: Acting, *, scaled: bool) -> Tensor:
    """float32 [B, segments, K, d] -> [N, R, d] like `factor`: rows that no pair names are 0. `scaled`: `partial` holds
    the coefficients already."""
    rows, rank, width = factor.shape
    out = factor.new_empty(factor.shape)
    coefficient = None if scaled else given.coefficient
    sizes = (rank * width, given.index.shape[1], given.index.numel(), partial.shape[1], given.scale)
    programs = rows * cdiv(rank * width, SUM_BLOCK)
    constants = {"BLOCK": SUM_BLOCK, "PAIRS": SUM_PAIRS, "SEGMENTS": SUM_SEGMENTS}
    _launch(kernels.sum_by_row, programs, SUM_TILES, partial, given.index, coefficient, out, *sizes, **constants)
    return out


def sum_products(
    products: Tensor,  # float32 [B, token tiles, C]
    index: Tensor | None,  # [B, P], contiguous: which of the rows; or None: all of them, in order
    rank: int,
    scale: float,
    first: int = 0,  # column of the rows
) -> Tensor:
    """float32 [B, P], the coefficients' gradient."""
    samples, s_tiles, columns = products.shape
    pairs = (columns - first) // rank if index is None else index.shape[1]
    out = products.new_empty(samples, pairs)
    constants = {"R": rank, "BLOCK_T": PRODUCTS_BLOCK, "BLOCK_R": power_of_two(rank)}
    sizes = (s_tiles, columns, pairs, first, scale)
    _launch(kernels.sum_products, samples * pairs, PRODUCTS_TILES, products, index, out, *sizes, **constants)
    return out


def weigh_pairs(low: Tensor, given: Acting) -> Tensor:
    """[B, S, K], or [B, S, R] of rows that share one A, contiguous -> [B, S, K]: times the coefficients of tokens."""
    samples, tokens, pairs = given.coefficient.shape
    rank = given.A.shape[1]
    out = low.new_empty(samples, tokens, pairs * rank)
    constants = {"SHARED": given.shared, "R": rank, "BLOCK": PAIRS_BLOCK}
    sizes = (out.numel(), pairs, given.scale)
    programs = cdiv(out.numel(), PAIRS_BLOCK)
    _launch(kernels.weigh_pairs, programs, PAIRS_TILES, low, given.coefficient, out, *sizes, **constants)
    return out


def weigh(
    low: Tensor | None,  # [B, S, C], contiguous
    low_grad: Tensor | None,  # [B, S, C], contiguous
    given: Acting,
    *,
    past_only: bool = False,  # whether the C columns are those of the past, or those of the pool and then of the past
    scale_low: bool = False,
    scale_grad: bool = False,
    multiply: bool = False,
) -> Weighed:
    like = low if low is not None else low_grad
    assert like is not None
    samples, tokens, columns = like.shape
    tiles = WEIGH_TILES
    s_tiles = cdiv(tokens, tiles.tokens)
    out = Weighed(
        torch.empty_like(like) if scale_low else None,
        torch.empty_like(like) if scale_grad else None,
        like.new_empty(samples, s_tiles, columns, dtype=torch.float32) if multiply else None,
    )
    rows, rank, _ = given.A.shape
    pool_columns, pairs = (0, 0) if past_only else (rows * rank, given.index.shape[1])
    past_rows, past_rank = (0, 1) if given.past_A is None else given.past_A.shape[:2]
    sizes = (tokens, columns, pool_columns, pairs, past_rows, past_rank, given.scale)
    programs = samples * s_tiles * cdiv(columns, tiles.columns)
    per_token = given.per_token and not past_only
    constants = {"PER_TOKEN": per_token, "R": rank, "BLOCK_S": tiles.tokens, "BLOCK_K": tiles.columns}
    strengths = given.index, given.coefficient, given.past_coefficient
    _launch(kernels.weigh, programs, tiles, low, low_grad, *strengths, *out, *sizes, **constants)
    return out


def of_tokens(
    low: Tensor | None,  # [B, S, .]; asks for the coefficients' gradient
    low_grad: Tensor,  # [B, S, .]; both contiguous
    given: Acting,  # whose coefficients are those of tokens
    *,
    fold: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """float32 [B, S, P] and, of rows that share one A, what of low_grad comes to its columns: [B, S, R]."""
    samples, tokens, columns = low_grad.shape
    pairs, rank = given.index.shape[1], given.A.shape[1]
    tiles = tokens_tiles(rank)
    to_coefficient = None if low is None else torch.empty_like(given.coefficient, dtype=torch.float32)
    folded = low_grad.new_empty(samples, tokens, rank) if fold else None
    sizes = (tokens, pairs, 0 if low is None else low.shape[2], columns, given.scale)
    constants = {"SHARED": given.shared, "R": rank, "BLOCK_S": tiles.tokens, "BLOCK_R": tiles.columns}
    index = given.index if given.whole and not given.shared else None
    arguments = low, low_grad, index, given.coefficient, to_coefficient, folded
    _launch(kernels.of_tokens, samples * cdiv(tokens, tiles.tokens), tiles, *arguments, *sizes, **constants)
    return to_coefficient, folded


def tokens_tiles(rank: int) -> Tiles:
    width = power_of_two(rank)
    return Tiles(max(1, TOKENS_BLOCK // width), width, 0, 4, 3)


def _launch(kernel: Any, programs: int, tiles: Tiles, *arguments: Any, **constants: int) -> None:
    # Fused into a product, the first addition of lanes' sums would round differently in each of them, and whichever
    # wrote last would win: seen in of_tokens by compute-sanitizer's racecheck.
    fused = kernel is not kernels.of_tokens
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": fused}
    kernel[(programs,)](*arguments, **constants, **options)


def _blocks(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK_S": tiles.tokens, "BLOCK_K": tiles.columns, "BLOCK_D": tiles.width}


def shipped() -> list[Shipped]:
    """Every kernel with every choice of tiles, in the largest of the variants that optional outputs make.

    Factors come in the activations' dtype, and in float32 under bfloat16; a pool has the usual rank of 8.
    """
    found = []
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        for factor in {"fp16": ("fp16",), "bf16": ("bf16", "fp32"), "fp32": ("fp32",)}[name]:
            types = {"factor": factor, "coefficient": "fp32", "past_coefficient": "fp32", "products": "fp32"}
            types |= {"outer": "fp32", "partial": "fp32", "index": "i64", "to_coefficient": "fp32"}
            for tiles in candidates("shrink", dtype):
                fitting = beside(tiles, dtype, dtypes[factor])
                if tiles in defaults("shrink", dtype):
                    found.append(_ship(kernels.shrink, fitting, name, types, "bare other products left outer"))
                found.append(_ship(kernels.shrink, fitting, name, types, "left outer"))
                found.append(_ship(kernels.shrink, fitting, name, types, "other products left outer", PER_TOKEN=True))
            found.append(_ship(kernels.shrink, one_pass_tiles(dtype), name, types))
            found.append(_ship(kernels.shrink, one_pass_tiles(dtype), name, types, "other products", PER_TOKEN=True))
            for tiles in candidates("expand", dtype):
                if tiles in defaults("expand", dtype):
                    found.append(_ship(kernels.expand, tiles, name, types, "base"))
                found.append(_ship(kernels.expand, tiles, name, types, "bias"))
            if factor == name:
                found += [_ship(kernels.outer, tiles, name, types) for tiles in candidates("outer", dtype)]
                found += [_ship(kernels.weigh, WEIGH_TILES, name, types, PER_TOKEN=own) for own in (False, True)]
                found.append(_ship(kernels.of_tokens, tokens_tiles(8), name, types, "folded"))
                found.append(_ship(kernels.of_tokens, tokens_tiles(8), name, types, "index", SHARED=True))
                found += [_ship(kernels.weigh_pairs, PAIRS_TILES, name, types, SHARED=one) for one in (False, True)]
                found.append(_ship(kernels.sum_by_row, SUM_TILES, name, types))
    rows = {"products": "fp32", "index": "i64", "out": "fp32"}
    found += [_ship(kernels.sum_products, PRODUCTS_TILES, "fp32", rows, unused) for unused in ("", "index")]
    return found


def _ship(kernel: Any, tiles: Tiles, dtype: str, types: dict[str, str], unused: str = "", **variant: bool) -> Shipped:
    """`types` of the pointers that do not have the activations' `dtype`; pointers in `unused` are None."""
    known = {"R": 8, "BLOCK": tiles.width, "BLOCK_R": tiles.columns, **_blocks(tiles)} | dict.fromkeys(unused.split())
    known |= {"PAIRS": SUM_PAIRS, "SEGMENTS": SUM_SEGMENTS, "BLOCK_T": PRODUCTS_BLOCK}
    known |= {"PER_TOKEN": False, "SHARED": False} | variant
    constants = {argument: known[argument] for argument in kernel.arg_names if argument in known}
    signature = {}
    for argument in kernel.arg_names:
        if argument == "scale":
            signature[argument] = "fp32"
        elif argument in INTEGERS:
            signature[argument] = "i32"
        elif argument not in constants:
            signature[argument] = f"*{types.get(argument, dtype)}"
    dots = dtype != "fp32" and kernel in (kernels.shrink, kernels.expand, kernels.outer)
    return Shipped(kernel, signature, constants, tiles.warps, tiles.stages, dots)
