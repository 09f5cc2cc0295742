"""Launches the kernels of inject: outputs, tiles, grids; and every configuration there is, for compiling ahead of time.

Tile sizes come from arithmetic (fill the GPU, read activations once, no spilled registers), not from a search at run
time: a GPU that nobody has measured gets them as well. They are safe there: no configuration needs more shared memory
than the smallest supported chips have (99 KiB for a block: sm_86, sm_89, sm_120), which `kernel_table` checks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllava_fast.ops.inject import triton_kernels as kernels
from cllava_fast.ops.inject.reference import Acting
from cllava_fast.ops.triton_backend import Shipped

# Programs that fill a GPU: below, token tiles shrink or tokens are split into segments.
ENOUGH_PROGRAMS = 128
# Arguments of the kernels that are sizes or strides.
INTEGERS = frozenset(
    "tokens width pairs all_pairs columns pool_columns past_rows past_rank segments segment_tiles size x_stride_b"
    " x_stride_s f_stride_n f_stride_r base_stride_b base_stride_s right_stride_b right_stride_s".split()
)
# Elements of a row of a factor that one program of `sum_by_row` adds up.
SUM_BLOCK = 512


class Tiles(NamedTuple):
    tokens: int
    columns: int
    width: int
    warps: int
    stages: int


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


def shrink_tiles(dtype: torch.dtype, samples: int, tokens: int, columns: int) -> Tiles:
    exact = dtype == torch.float32
    if not exact and columns > 64 and samples * tokens >= 64 * ENOUGH_PROGRAMS:
        return Tiles(128, 128, 64, 8, 3)  # fewer column tiles: x is read less often
    k = 32 if columns <= 32 else 64
    enough = samples * _tiles(tokens, 64) * _tiles(columns, k) >= ENOUGH_PROGRAMS // 2
    if not enough or tokens <= 16:
        return Tiles(16, k, 32 if exact else 64, 4, 3)
    return Tiles(64, k, 32, 8, 3) if exact else Tiles(64, k, 64, 4, 3)


def beside(tiles: Tiles, dtype: torch.dtype, factor: torch.dtype) -> Tiles:
    """`tiles` for x in `dtype` and factors in `factor`: wider factors leave the largest tiles room for fewer stages."""
    return tiles._replace(stages=2) if tiles.columns == 128 and factor.itemsize > dtype.itemsize else tiles


def one_pass_tiles(dtype: torch.dtype) -> Tiles:
    return Tiles(32, 32, 32, 4, 3) if dtype == torch.float32 else Tiles(128, 32, 64, 8, 3)


def one_pass(dtype: torch.dtype, samples: int, tokens: int, columns: int) -> bool:
    """Whether `shrink` also writes what `outer` would: worth it while writing and reading its float32 sums for each
    token tile moves no more bytes than a second pass over the activations, and the larger tiles still fill the GPU.
    """
    tiles = one_pass_tiles(dtype)
    sums = 2 * 4 * columns * _tiles(tokens, tiles.tokens)  # for each channel
    fills = samples * _tiles(tokens, tiles.tokens) >= ENOUGH_PROGRAMS // 2
    return columns <= tiles.columns and sums <= tokens * dtype.itemsize and fills


def expand_tiles(dtype: torch.dtype, tokens: int, columns: int) -> Tiles:
    if tokens <= 16:
        return Tiles(16, 32, 64, 4, 3)
    if dtype == torch.float32:
        return Tiles(64, 32, 64, 8, 2)
    return Tiles(128, 32 if columns <= 32 else 64, 128, 8, 3)


def outer_tiles(dtype: torch.dtype, columns: int) -> Tiles:
    if dtype == torch.float32:
        return Tiles(32, 32, 64, 4, 3)
    return Tiles(64, 32, 128, 4, 3) if columns <= 32 else Tiles(64, 64, 128, 8, 3)


WEIGH_TILES = Tiles(32, 64, 0, 4, 3)
SUM_TILES = Tiles(0, 0, SUM_BLOCK, 4, 3)


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
    x, factor = _dense_rows(x), _dense_rows(factor)
    tiles = beside(tiles, x.dtype, factor.dtype)
    samples, tokens, width = x.shape
    rank = factor.shape[1]
    pairs = given.index.shape[1]
    columns = pairs * rank
    s_tiles = _tiles(tokens, tiles.tokens)
    single = torch.float32
    out = Shrunk(
        x.new_empty(samples, tokens, columns) if scaled else None,
        x.new_empty(samples, tokens, columns) if bare else None,
        None if other is None else x.new_empty(samples, s_tiles, columns, dtype=single),
        None if left is None else x.new_empty(samples, s_tiles, columns, width, dtype=single),
    )
    arguments = (x, factor, given.index, given.coefficient, *out[:2], other, out.products, left, out.outer)
    sizes = (tokens, width, pairs, *x.stride()[:2], *factor.stride()[:2], given.scale)
    programs = samples * s_tiles * _tiles(columns, tiles.columns)
    _launch(kernels.shrink, programs, tiles, *arguments, *sizes, R=rank, **_blocks(tiles))
    return out


def expand(
    low: Tensor,  # [B, S, K], contiguous
    factor: Tensor,  # [N, R, width]
    index: Tensor,  # [B, P], contiguous
    *,
    bias: Tensor | None = None,  # [width]
    base: Tensor | None = None,  # [B, S, width]
) -> Tensor:
    factor = _dense_rows(factor)
    samples, tokens, columns = low.shape
    _, rank, width = factor.shape
    tiles = expand_tiles(low.dtype, tokens, columns)
    bias = None if bias is None else bias.contiguous()
    base = None if base is None else _dense_rows(base)
    base_strides = (0, 0) if base is None else base.stride()[:2]
    out = low.new_empty(samples, tokens, width)
    sizes = (tokens, width, index.shape[1], *factor.stride()[:2], *base_strides)
    programs = samples * _tiles(tokens, tiles.tokens) * _tiles(width, tiles.width)
    _launch(kernels.expand, programs, tiles, low, factor, index, bias, base, out, *sizes, R=rank, **_blocks(tiles))
    return out


def outer(left: Tensor, right: Tensor) -> Tensor:
    """[B, S, K] contiguous and [B, S, d] -> float32 [B, segments, K, d], to be summed over segments."""
    right = _dense_rows(right)
    samples, tokens, columns = left.shape
    width = right.shape[2]
    tiles = outer_tiles(left.dtype, columns)
    s_tiles = _tiles(tokens, tiles.tokens)
    across = samples * _tiles(columns, tiles.columns) * _tiles(width, tiles.width)
    # As few as fill the GPU, so the sums stay small: beyond one segment a sample, a few MB.
    segment_tiles = _tiles(s_tiles, min(s_tiles, _tiles(2 * ENOUGH_PROGRAMS, across)))
    segments = _tiles(s_tiles, segment_tiles)
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
    programs = rows * _tiles(rank * width, SUM_BLOCK)
    _launch(kernels.sum_by_row, programs, SUM_TILES, partial, given.index, coefficient, out, *sizes, BLOCK=SUM_BLOCK)
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
    s_tiles = _tiles(tokens, tiles.tokens)
    out = Weighed(
        torch.empty_like(like) if scale_low else None,
        torch.empty_like(like) if scale_grad else None,
        like.new_empty(samples, s_tiles, columns, dtype=torch.float32) if multiply else None,
    )
    rows, rank, _ = given.A.shape
    pool_columns, pairs = (0, 0) if past_only else (rows * rank, given.index.shape[1])
    past_rows, past_rank = (0, 1) if given.past_A is None else given.past_A.shape[:2]
    sizes = (tokens, columns, pool_columns, pairs, past_rows, past_rank, given.scale)
    programs = samples * s_tiles * _tiles(columns, tiles.columns)
    constants = {"R": rank, "BLOCK_S": tiles.tokens, "BLOCK_K": tiles.columns}
    strengths = given.index, given.coefficient, given.past_coefficient
    _launch(kernels.weigh, programs, tiles, low, low_grad, *strengths, *out, *sizes, **constants)
    return out


def _launch(kernel: Any, programs: int, tiles: Tiles, *arguments: Any, **constants: int) -> None:
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    kernel[(programs,)](*arguments, **constants, **options)


def _blocks(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK_S": tiles.tokens, "BLOCK_K": tiles.columns, "BLOCK_D": tiles.width}


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def shipped() -> list[Shipped]:
    """Every kernel with every choice of tiles, in the largest of the variants that optional outputs make.

    Factors come in the activations' dtype, and in float32 under bfloat16; a pool has the usual rank of 8.
    """
    found = []
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        for factor in {"fp16": ("fp16",), "bf16": ("bf16", "fp32"), "fp32": ("fp32",)}[name]:
            types = {"factor": factor, "coefficient": "fp32", "past_coefficient": "fp32", "products": "fp32"}
            types |= {"outer": "fp32", "partial": "fp32", "index": "i64"}
            for tiles in _every(shrink_tiles(dtype, 16, s, k) for s in (1, 1024) for k in (32, 64, 128)):
                tiles = beside(tiles, dtype, dtypes[factor])
                found.append(_ship(kernels.shrink, tiles, name, types, "bare other products left outer"))
                found.append(_ship(kernels.shrink, tiles, name, types, "left outer"))
            found.append(_ship(kernels.shrink, one_pass_tiles(dtype), name, types))
            for tiles in _every(expand_tiles(dtype, s, k) for s in (1, 64) for k in (32, 64)):
                found.append(_ship(kernels.expand, tiles, name, types, "base"))
                found.append(_ship(kernels.expand, tiles, name, types, "bias"))
            if factor == name:
                for tiles in _every(outer_tiles(dtype, k) for k in (32, 64)):
                    found.append(_ship(kernels.outer, tiles, name, types))
                found.append(_ship(kernels.weigh, WEIGH_TILES, name, types))
                found.append(_ship(kernels.sum_by_row, SUM_TILES, name, types))
    return found


def _every(tiles: Iterable[Tiles]) -> list[Tiles]:
    return list(dict.fromkeys(tiles))


def _ship(kernel: Any, tiles: Tiles, dtype: str, types: dict[str, str], unused: str = "") -> Shipped:
    """`types` of the pointers that do not have the activations' `dtype`; pointers in `unused` are None."""
    known = {"R": 8, "BLOCK": SUM_BLOCK, **_blocks(tiles)} | dict.fromkeys(unused.split())
    constants = {argument: known[argument] for argument in kernel.arg_names if argument in known}
    signature = {}
    for argument in kernel.arg_names:
        if argument == "scale":
            signature[argument] = "fp32"
        elif argument in INTEGERS:
            signature[argument] = "i32"
        elif argument not in constants:
            signature[argument] = f"*{types.get(argument, dtype)}"
    dots = dtype != "fp32" and kernel not in (kernels.weigh, kernels.sum_by_row)
    return Shipped(kernel, signature, constants, tiles.warps, tiles.stages, dots)
