"""Which tiles the kernels of inject are launched with: those of arithmetic, or what a tuned table has (`ops/tuned.py`).

Arithmetic: fill the GPU, read activations once, no spilled registers. A GPU that nobody has measured gets these; they
are safe there: no configuration needs more shared memory than the smallest supported chips have (99 KiB for a block:
sm_86, sm_89, sm_120), which `kernel_table` checks, of the other candidates of `make tune` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cllava_fast.ops import tuned

# Programs that fill a GPU: below, token tiles shrink or tokens are split into segments.
ENOUGH_PROGRAMS = 128
# Bytes of shared memory for the tiles that one block has on its way in.
ROOM = 96 * 1024


class Tiles(NamedTuple):
    tokens: int
    columns: int
    width: int
    warps: int
    stages: int


def shrink_tiles(dtype: torch.dtype, samples: int, tokens: int, columns: int) -> Tiles:
    exact = dtype == torch.float32
    if not exact and columns > 64 and samples * tokens >= 64 * ENOUGH_PROGRAMS:
        return Tiles(128, 128, 64, 8, 3)  # fewer column tiles: x is read less often
    k = 32 if columns <= 32 else 64
    enough = samples * cdiv(tokens, 64) * cdiv(columns, k) >= ENOUGH_PROGRAMS // 2
    if not enough or tokens <= 16:
        return Tiles(16, k, 32 if exact else 64, 4, 3)
    if exact:
        return Tiles(64, k, 32, 8, 3)
    return Tiles(64, k, 128, 4, 4 if k == 32 else 3)


def expand_tiles(dtype: torch.dtype, samples: int, tokens: int, columns: int) -> Tiles:
    if tokens <= 16:
        return Tiles(16, 32, 64, 4, 3)
    if dtype == torch.float32:
        return Tiles(64, 32, 64, 8, 2)
    if columns <= 64:
        return Tiles(64, 32, 128, 4, 3) if columns <= 32 else Tiles(64, 64, 64, 4, 2)
    return Tiles(128, 64, 128, 8, 3)


def outer_tiles(dtype: torch.dtype, samples: int, tokens: int, columns: int) -> Tiles:
    if dtype == torch.float32:
        return Tiles(32, 32, 64, 4, 3)
    return Tiles(64, 32, 128, 4, 3) if columns <= 32 else Tiles(64, 64, 64, 4, 5)


def one_pass_tiles(dtype: torch.dtype) -> Tiles:
    return Tiles(32, 32, 32, 4, 3) if dtype == torch.float32 else Tiles(128, 32, 64, 8, 3)


def one_pass(dtype: torch.dtype, samples: int, tokens: int, columns: int) -> bool:
    """Whether `shrink` also writes what `outer` would: worth it while writing and reading its float32 sums for each
    token tile moves no more bytes than a second pass over the activations, and the larger tiles still fill the GPU.
    """
    tiles = one_pass_tiles(dtype)
    sums = 2 * 4 * columns * cdiv(tokens, tiles.tokens)  # for each channel
    fills = samples * cdiv(tokens, tiles.tokens) >= ENOUGH_PROGRAMS // 2
    return columns <= tiles.columns and sums <= tokens * dtype.itemsize and fills


def beside(tiles: Tiles, dtype: torch.dtype, factor: torch.dtype) -> Tiles:
    """`tiles` for x in `dtype` and factors in `factor`: wider factors leave room for fewer stages."""
    stage = tiles.width * (tiles.tokens * dtype.itemsize + tiles.columns * factor.itemsize)
    return _fewer_stages(tiles, stage) if factor.itemsize > dtype.itemsize else tiles


def _fewer_stages(tiles: Tiles, stage: int) -> Tiles:
    """As many as there is room for, of so many bytes each."""
    return tiles._replace(stages=max(1, min(tiles.stages, ROOM // stage)))


WEIGH_TILES = Tiles(32, 64, 0, 4, 3)

Arithmetic = Callable[[torch.dtype, int, int, int], Tiles]
DEFAULTS: dict[str, Arithmetic] = {"shrink": shrink_tiles, "expand": expand_tiles, "outer": outer_tiles}
# What `make tune` tries beside them, in half precision and in float32.
ALTERNATIVES = {
    ("shrink", 2): (
        Tiles(16, 32, 128, 4, 4),
        Tiles(32, 32, 128, 4, 4),
        Tiles(64, 32, 64, 4, 3),
        Tiles(128, 32, 64, 4, 4),
        Tiles(128, 64, 64, 8, 3),
        Tiles(64, 128, 64, 4, 3),
    ),
    ("shrink", 4): (Tiles(32, 32, 32, 4, 3), Tiles(64, 64, 32, 8, 2)),
    ("expand", 2): (
        Tiles(16, 32, 128, 4, 3),
        Tiles(128, 32, 128, 8, 3),
        Tiles(64, 32, 256, 8, 3),
        Tiles(64, 64, 128, 4, 3),
    ),
    ("expand", 4): (Tiles(32, 32, 64, 4, 2), Tiles(64, 32, 128, 8, 2)),
    ("outer", 2): (
        Tiles(128, 32, 128, 8, 2),
        Tiles(64, 64, 128, 8, 3),
        Tiles(64, 64, 256, 8, 2),
    ),
    ("outer", 4): (Tiles(32, 32, 128, 4, 3), Tiles(32, 64, 64, 4, 3)),
}


def choose(kernel: str, x: Tensor, columns: int) -> Tiles:
    """For tokens like x's, [B, S, ...]."""
    samples, tokens = x.shape[:2]
    found: Tiles | None = tuned.tiles(kernel, x.device, x.dtype, samples * tokens, columns)
    if found is None or found.tokens > tuned.bucket(tokens):  # taller than a sample: much of it would be empty
        return DEFAULTS[kernel](x.dtype, samples, tokens, columns)
    return found


def defaults(kernel: str, dtype: torch.dtype) -> list[Tiles]:
    """Every choice of arithmetic."""
    sizes = [(samples, tokens, k) for samples, tokens in ((16, 1), (1, 64), (16, 1024)) for k in tuned.COLUMNS]
    return _unique(DEFAULTS[kernel](dtype, *size) for size in sizes)


def candidates(kernel: str, dtype: torch.dtype) -> list[Tiles]:
    """What a tuned table may say."""
    return _unique([*defaults(kernel, dtype), *ALTERNATIVES[kernel, dtype.itemsize]])


def cdiv(size: int, tile: int) -> int:
    return -(-size // tile)


def _unique(tiles: Iterable[Tiles]) -> list[Tiles]:
    return list(dict.fromkeys(tiles))
