"""Shapes of select that tests and benchmarks share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    B: int
    N: int
    D: int
    M: int
    groups: int = 1
    allowed: str = "none"  # none, row, sample
    reduce: str = "sample"

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" if isinstance(value, int) else value for name, value in self._asdict().items())


CASES = (
    Case(B=1, N=1, D=1, M=1),
    Case(B=3, N=7, D=5, M=7),
    Case(B=4, N=32, D=40, M=4),
    Case(B=5, N=33, D=48, M=3, groups=4, allowed="row"),
    Case(B=4, N=19, D=36, M=2, groups=3, allowed="sample"),
    Case(B=6, N=24, D=32, M=4, groups=4, reduce="batch"),
    Case(B=3, N=24, D=32, M=4, allowed="sample", reduce="batch"),
    Case(B=0, N=8, D=16, M=2),
    Case(B=0, N=8, D=16, M=2, allowed="sample", reduce="batch"),
    Case(B=1, N=80, D=40, M=64),
    Case(B=2, N=300, D=192, M=8, groups=2),
    Case(B=2, N=65, D=4096, M=4),
    Case(B=9, N=100, D=20, M=5, groups=2, allowed="sample"),
    Case(B=2, N=70, D=15, M=37, allowed="row", reduce="batch"),
)
QUICK = (Case(B=16, N=64, D=384, M=4), Case(B=16, N=2048, D=384, M=4))
BENCH = (*QUICK, Case(B=16, N=64, D=384, M=4, groups=4, reduce="batch"), Case(B=16, N=20000, D=384, M=4))
BENCH_GPU = (
    Case(B=16, N=64, D=768, M=4),
    Case(B=16, N=2048, D=768, M=4),
    Case(B=16, N=64, D=768, M=4, groups=4, reduce="batch"),
    Case(B=16, N=100_000, D=768, M=4),
)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """query `[B, D]`, keys `[N, D]`, allowed. At least M rows are allowed."""
    query = torch.randn(case.B, case.D, generator=generator, dtype=torch.float64).to(dtype)
    keys = torch.randn(case.N, case.D, generator=generator, dtype=torch.float64).to(dtype)
    if case.allowed == "none":
        return query, keys, None
    always = torch.randperm(case.N, generator=generator)[: case.M]
    shape = (case.N,) if case.allowed == "row" else (case.B, case.N)
    allowed = torch.rand(shape, generator=generator) < 0.5
    allowed[..., always] = True
    return query, keys, allowed
