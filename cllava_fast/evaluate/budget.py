"""Which samples of the other tasks are measured once measuring all of them has become too much."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch


def within_budget(sizes: Mapping[str, int], newest: str, budget: int | None) -> dict[str, list[int]]:
    """Positions of the samples to measure, in order, by task: all of them while they are at most ``budget``.

    Beyond it the newest task stays whole, and the others share what is left evenly, one sample each at least.
    A task's samples are drawn once, by its name: a smaller share is a part of a larger one.

    Args:
        sizes: samples of every task to measure, by name.
        budget: None for no limit.
    """
    if budget is None or sum(sizes.values()) <= budget:
        return {name: list(range(size)) for name, size in sizes.items()}
    left = max(0, budget - sizes[newest])
    chosen: dict[str, list[int]] = {newest: list(range(sizes[newest]))}
    # small tasks first: what they do not need goes to the others
    waiting = sorted((name for name in sizes if name != newest), key=lambda name: sizes[name])
    for number, name in enumerate(waiting):
        count = min(sizes[name], max(1, left // (len(waiting) - number)))
        left = max(0, left - count)
        drawn = torch.randperm(sizes[name], generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        chosen[name] = sorted(drawn[:count].tolist())
    return {name: chosen[name] for name in sizes}
