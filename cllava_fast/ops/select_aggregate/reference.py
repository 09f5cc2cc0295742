"""select_aggregate in plain PyTorch: one op after the other, which is the definition of right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cllava_fast.ops.aggregate.reference import aggregate
from cllava_fast.ops.select.reference import select


def one_after_the_other(
    select: Callable[..., tuple[Tensor, Tensor, Tensor]], aggregate: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """select_aggregate of a backend that has the two."""

    def select_aggregate(
        query: Tensor,  # [B, D]
        keys: Tensor,  # [N, D]
        top_m: int,
        allowed: Tensor | None,  # [N] or [B, N]
        groups: int,
        by_batch: bool,
        *tasks: Any,  # row_task [N], row_mean [N], context [T, T]
    ) -> tuple[Tensor, Tensor]:
        """coefficient, index, each [B, M + N]."""
        _, weight, index = select(query, keys, top_m, allowed, groups, by_batch)
        return aggregate(index, weight, *tasks)

    return select_aggregate


select_aggregate = one_after_the_other(select, aggregate)
