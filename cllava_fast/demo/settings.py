"""COAST's three settings (arXiv 2411.02564) in small: what changes from task to task, and in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from cllava_fast.data.stream import Stream
from cllava_fast.demo import capability, dataset
from cllava_fast.demo.stream import TASKS, build_stream


@dataclass(frozen=True)
class Setting:
    """``build(seed, train=..., validation=..., test=...)`` makes the stream of ``tasks``."""

    build: Callable[..., Stream]
    tasks: tuple[str, ...]
    max_new_tokens: int = 8


SETTINGS = {
    "domain": Setting(build_stream, TASKS),
    "capability": Setting(capability.build_capability_stream, tuple(capability.TASKS), max_new_tokens=16),
    "dataset": Setting(dataset.build_dataset_stream, tuple(dataset.TASKS)),
}


def task_orders(tasks: Sequence[str], count: int) -> list[list[str]]:
    """``count`` different orders, always the same: the first as given, further ones drawn.

    Of several draws the one is taken that repeats least of the earlier orders, places and successors: so few orders
    tell much.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    if not 1 <= count <= math.factorial(len(tasks)):
        raise ValueError(f"orders is {count}; expected 1 to {math.factorial(len(tasks))}, of {len(tasks)} tasks")
    orders, rng = [list(tasks)], Random("orders")
    while len(orders) < count:
        drawn = [rng.sample(list(tasks), len(tasks)) for _ in range(50)]
        fresh = [order for order in drawn if order not in orders]
        if fresh:
            orders.append(min(fresh, key=lambda order: sum(_repeated(order, other) for other in orders)))
    return orders


def _repeated(order: Sequence[str], other: Sequence[str]) -> int:
    same_places = sum(a == b for a, b in zip(order, other, strict=True))
    return same_places + len(set(pairwise(order)) & set(pairwise(other)))


def in_order(stream: Stream, order: Sequence[str]) -> Stream:
    tasks = {task.name: task for task in stream}
    return Stream([tasks[name] for name in order], name=stream.name)
