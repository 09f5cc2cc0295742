"""Shapes of merge that tests and benchmarks share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    d_out: int
    d_in: int
    N: int
    R: int
    P: int

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in self._asdict().items())


CASES = (
    Case(d_out=1, d_in=1, N=1, R=1, P=1),
    Case(d_out=24, d_in=40, N=5, R=8, P=4),
    Case(d_out=33, d_in=17, N=3, R=3, P=11),
    Case(d_out=130, d_in=192, N=24, R=4, P=28),
    Case(d_out=8, d_in=8, N=4, R=2, P=0),
)
QUICK = (Case(d_out=512, d_in=512, N=32, R=8, P=36),)
BENCH = (*QUICK, Case(d_out=2048, d_in=2048, N=64, R=8, P=36))
BENCH_GPU = (Case(d_out=4096, d_in=4096, N=64, R=8, P=36),)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight, A, B, index, coefficient, of unit scale; rows may repeat."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = (normal(case.d_out, case.d_in) / case.d_in**0.5).to(dtype)
    A = (normal(case.N, case.R, case.d_in) / case.d_in**0.5).to(dtype)
    B = normal(case.N, case.R, case.d_out).to(dtype)
    index = torch.randint(case.N, (case.P,), generator=generator)
    return weight, A, B, index, normal(case.P).to(torch.float64 if dtype == torch.float64 else torch.float32)
