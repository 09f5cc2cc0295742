"""Shapes of aggregate and mix_factors that tests and benchmarks share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    B: int
    M: int
    N: int
    T: int

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in self._asdict().items())


class MixCase(NamedTuple):
    B: int
    P: int
    N: int
    R: int
    d_in: int
    d_out: int

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in self._asdict().items())


CASES = (
    Case(B=1, M=1, N=1, T=1),
    Case(B=4, M=4, N=24, T=3),
    Case(B=3, M=2, N=7, T=7),
    Case(B=5, M=3, N=13, T=9),
    Case(B=0, M=4, N=8, T=2),
    Case(B=18, M=5, N=40, T=33),
    Case(B=2, M=64, N=257, T=5),
)
MIX_CASES = (
    MixCase(B=1, P=1, N=1, R=1, d_in=1, d_out=1),
    MixCase(B=3, P=5, N=4, R=8, d_in=40, d_out=24),
    MixCase(B=2, P=36, N=32, R=3, d_in=17, d_out=33),
    MixCase(B=2, P=3, N=66, R=1, d_in=1025, d_out=7),
    MixCase(B=2, P=6, N=3, R=3, d_in=8, d_out=2736),
    MixCase(B=2, P=64, N=5, R=16, d_in=40, d_out=192),
    MixCase(B=2, P=2, N=3, R=64, d_in=40, d_out=17),
    MixCase(B=3, P=4, N=2, R=4, d_in=4096, d_out=192),
    MixCase(B=2, P=3, N=130, R=1, d_in=5, d_out=4),
    MixCase(B=25, P=2, N=2, R=2, d_in=24, d_out=17),
    MixCase(B=0, P=4, N=8, R=2, d_in=8, d_out=8),
    MixCase(B=3, P=0, N=8, R=2, d_in=8, d_out=8),
)
QUICK = (Case(B=16, M=4, N=64, T=8),)
BENCH = (*QUICK, Case(B=64, M=4, N=512, T=64))
MIX_QUICK = (MixCase(B=4, P=36, N=32, R=8, d_in=256, d_out=256),)
MIX_BENCH = (*MIX_QUICK, MixCase(B=16, P=36, N=64, R=8, d_in=1024, d_out=1024))
MIX_BENCH_GPU = (MixCase(B=16, P=36, N=64, R=8, d_in=4096, d_out=4096),)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """index, weight, row_task, row_mean, context. Tasks are of unequal size and not sorted by row."""
    index = torch.randint(case.N, (case.B, case.M), generator=generator)
    weight = torch.rand(case.B, case.M, generator=generator, dtype=dtype)
    row_task = torch.randint(case.T, (case.N,), generator=generator)
    row_mean = torch.rand(case.N, generator=generator, dtype=dtype)
    context = torch.randn(case.T, case.T, generator=generator, dtype=dtype)
    return index, weight, row_task, row_mean, context


def make_mix(case: MixCase, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, coefficient, index; rows may repeat within a sample."""
    A = torch.randn(case.N, case.R, case.d_in, generator=generator, dtype=torch.float64).to(dtype)
    B = torch.randn(case.N, case.R, case.d_out, generator=generator, dtype=torch.float64).to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    coefficient = torch.randn(case.B, case.P, generator=generator, dtype=torch.float64).to(exact)
    return A, B, coefficient, torch.randint(case.N, (case.B, case.P), generator=generator)
