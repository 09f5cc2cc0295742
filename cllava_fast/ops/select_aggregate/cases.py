"""Shapes of select_aggregate that tests and benchmarks share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cllava_fast.ops.aggregate import cases as aggregate_cases
from cllava_fast.ops.select import cases as select_cases


class Case(NamedTuple):
    B: int
    N: int
    D: int
    M: int
    T: int
    groups: int = 1
    allowed: str = "none"  # none, row, sample
    reduce: str = "sample"

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" if isinstance(value, int) else value for name, value in self._asdict().items())


CASES = (
    Case(B=1, N=1, D=1, M=1, T=1),
    Case(B=4, N=32, D=40, M=4, T=3),
    Case(B=5, N=33, D=48, M=3, T=9, groups=4, allowed="row"),
    Case(B=4, N=7, D=36, M=2, T=7, groups=3, allowed="sample"),
    Case(B=6, N=24, D=32, M=4, T=5, groups=4, reduce="batch"),
    Case(B=0, N=8, D=16, M=2, T=2),
    Case(B=2, N=600, D=40, M=64, T=7),
    Case(B=5, N=65, D=4096, M=4, T=6),
    Case(B=3, N=400, D=350, M=40, T=33, allowed="sample", reduce="batch"),
    Case(B=2, N=2100, D=20, M=5, T=4, groups=2),
)


def make(
    case: Case, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """query, keys, allowed, row_task, row_mean, context; the last two float32."""
    sizes = case._asdict()
    tasks = aggregate_cases.Case(case.B, case.M, case.N, sizes.pop("T"))
    selection = select_cases.make(select_cases.Case(**sizes), dtype, generator)
    return *selection, *aggregate_cases.make(tasks, torch.float32, generator)[2:]
