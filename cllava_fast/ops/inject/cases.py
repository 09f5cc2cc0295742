"""Shapes of inject that tests and benchmarks share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllava_fast.ops.inject import Past


class Case(NamedTuple):
    B: int
    S: int
    d_in: int
    d_out: int
    N: int
    R: int
    P: int
    selection: str = "repeats"  # how samples choose their rows: see `select_rows`
    past: int = 0  # C: frozen rows of earlier tasks that act on every sample too, in `make_past`
    Q: int = 8  # their rank
    alike: bool = False  # whether they act on all samples alike
    per_token: bool = False  # whether each token has coefficients of its own
    shared: bool = False  # whether all rows have one A

    def __str__(self) -> str:
        said = {name: value for name, value in self._asdict().items() if value != self._field_defaults.get(name)}
        return "-".join(_said(name, value) for name, value in said.items())


def _said(name: str, value: Any) -> str:
    return name if value is True else str(value) if name == "selection" else f"{name}{value}"


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


CASES = (
    Case(B=1, S=1, d_in=1, d_out=1, N=1, R=1, P=1),
    Case(B=2, S=3, d_in=40, d_out=24, N=5, R=8, P=4),
    Case(B=4, S=1, d_in=192, d_out=40, N=16, R=4, P=4),
    Case(B=3, S=7, d_in=17, d_out=33, N=3, R=3, P=11),
    Case(B=1, S=577, d_in=40, d_out=40, N=8, R=8, P=4),
    Case(B=2, S=5, d_in=48, d_out=32, N=24, R=16, P=28),
    Case(B=0, S=3, d_in=8, d_out=8, N=4, R=2, P=3),
    Case(B=2, S=0, d_in=8, d_out=12, N=4, R=2, P=3),
    Case(B=2, S=3, d_in=8, d_out=12, N=4, R=2, P=0),
    Case(B=2, S=5, d_in=24, d_out=40, N=5, R=4, P=3, past=6, Q=4),
    Case(B=3, S=35, d_in=40, d_out=17, N=3, R=8, P=2, past=3, Q=32),
    Case(B=3, S=35, d_in=40, d_out=17, N=3, R=8, P=2, past=2, Q=4, alike=True),
    Case(B=3, S=35, d_in=24, d_out=17, N=3, R=8, P=2, past=5, Q=8, alike=True),  # added up
    Case(B=1, S=60, d_in=33, d_out=24, N=3, R=4, P=3, past=4, Q=4, alike=True),  # added up in float32 alone
    Case(B=2, S=3, d_in=8, d_out=12, N=4, R=0, P=3, past=2, Q=4),
    Case(B=2, S=3, d_in=8, d_out=12, N=4, R=2, P=3, past=2, Q=0),
)
# Routers: coefficients of each token, rows that share one A, both.
ROUTED = (
    Case(B=2, S=5, d_in=24, d_out=40, N=4, R=8, P=4, per_token=True),
    Case(B=2, S=7, d_in=17, d_out=33, N=5, R=3, P=6, past=3, Q=4, per_token=True),
    Case(B=2, S=5, d_in=40, d_out=24, N=5, R=4, P=3, shared=True),
    Case(B=1, S=6, d_in=17, d_out=33, N=3, R=3, P=4, past=2, Q=5, shared=True),
    Case(B=2, S=6, d_in=33, d_out=20, N=4, R=8, P=3, per_token=True, shared=True),
    Case(B=2, S=18, d_in=40, d_out=70, N=3, R=3, P=12, past=3, Q=4, per_token=True, shared=True),
    Case(B=2, S=1, d_in=24, d_out=24, N=4, R=2, P=3, per_token=True),
    Case(B=2, S=1, d_in=24, d_out=24, N=4, R=2, P=3, past=2, shared=True),
    Case(B=0, S=3, d_in=8, d_out=8, N=4, R=2, P=3, per_token=True, shared=True),
    Case(B=2, S=0, d_in=8, d_out=12, N=4, R=2, P=3, per_token=True),
    Case(B=2, S=3, d_in=8, d_out=12, N=4, R=2, P=0, past=2, per_token=True, shared=True),
    Case(B=2, S=4, d_in=24, d_out=40, N=4, R=8, P=4, selection="every", per_token=True),
    Case(B=3, S=4, d_in=24, d_out=17, N=4, R=2, P=4, selection="every", shared=True),
    Case(B=2, S=48, d_in=17, d_out=33, N=5, R=3, P=6, past=6, Q=4, alike=True, per_token=True),
)
# Sizes that no tile divides: several column tiles, the widest and the longest.
ODD = (
    Case(B=2, S=66, d_in=70, d_out=130, N=40, R=1, P=64),
    Case(B=1, S=3, d_in=4096, d_out=192, N=3, R=8, P=2),
    Case(B=2, S=17, d_in=65, d_out=129, N=3, R=64, P=2),
    Case(B=3, S=65, d_in=192, d_out=40, N=4, R=4, P=1),
    Case(B=1, S=3, d_in=40, d_out=24, N=16, R=8, P=64),
    Case(B=1, S=3, d_in=40, d_out=4096, N=2, R=1, P=1),
    Case(B=2, S=1, d_in=40, d_out=40, N=130, R=1, P=3),
    Case(B=2, S=1, d_in=192, d_out=40, N=16, R=8, P=4, past=9),
    Case(B=2, S=3, d_in=8, d_out=12, N=4, R=2, P=0, past=2, Q=1),
    Case(B=0, S=3, d_in=8, d_out=12, N=4, R=2, P=2, past=2),
    Case(B=2, S=66, d_in=70, d_out=130, N=4, R=1, P=3, past=40, Q=3),
)
# Routers over eight experts: MoELoRA, BranchLoRA with one choice a token or a sample.
_ROUTER = Case(B=4, S=64, d_in=512, d_out=512, N=8, R=8, P=8, selection="every")
ROUTER_QUICK = (
    _ROUTER._replace(per_token=True),
    _ROUTER._replace(per_token=True, shared=True),
    _ROUTER._replace(shared=True),
)
QUICK = (
    Case(B=4, S=64, d_in=512, d_out=512, N=8, R=8, P=4, selection="uniform"),
    Case(B=4, S=64, d_in=512, d_out=512, N=8, R=8, P=4, selection="uniform", past=56),
    Case(B=4, S=1, d_in=512, d_out=512, N=64, R=8, P=4, selection="uniform"),
    *ROUTER_QUICK,
)
BENCH = (
    *QUICK,
    *(case._replace(S=577, d_in=1024, d_out=1024) for case in ROUTER_QUICK),
    Case(B=4, S=577, d_in=1024, d_out=1024, N=8, R=8, P=4, selection="uniform", shared=True),
    Case(B=4, S=577, d_in=1024, d_out=1024, N=8, R=8, P=4, selection="uniform"),
    Case(B=4, S=577, d_in=1024, d_out=1024, N=8, R=8, P=4, selection="uniform", past=56),
    Case(B=16, S=64, d_in=1024, d_out=1024, N=64, R=8, P=4, selection="distinct"),
    Case(B=4, S=256, d_in=1024, d_out=1024, N=64, R=8, P=4, selection="identical"),
    Case(B=1, S=1000, d_in=2048, d_out=2048, N=64, R=8, P=4, selection="zipf"),
    Case(B=16, S=1, d_in=2048, d_out=2048, N=64, R=8, P=4, selection="zipf"),
)
# As many columns as seven earlier tasks' mean increments, shortened to 32 each.
SHORTENED = Case(B=16, S=1024, d_in=4096, d_out=4096, N=8, R=8, P=4, selection="uniform", past=28)
# One sample of a 7B model's training step, where a GPU waits for Python.
ONE_SAMPLE = Case(B=1, S=656, d_in=4096, d_out=4096, N=8, R=8, P=4, selection="identical", past=56, alike=True)
# A 7B model's attention output: the training step, with seven earlier tasks in context, other selections, decoding.
BENCH_GPU = (
    Case(B=16, S=1024, d_in=4096, d_out=4096, N=8, R=8, P=4, selection="uniform"),
    Case(B=16, S=1024, d_in=4096, d_out=4096, N=8, R=8, P=4, selection="uniform", past=56),
    Case(B=16, S=577, d_in=4096, d_out=4096, N=64, R=8, P=4, selection="distinct"),
    Case(B=4, S=1000, d_in=4096, d_out=4096, N=64, R=8, P=4, selection="zipf"),
    Case(B=1, S=2048, d_in=4096, d_out=4096, N=8, R=8, P=4, selection="identical"),
    SHORTENED,
    ONE_SAMPLE,
    *(case._replace(B=16, S=1024, d_in=4096, d_out=4096) for case in ROUTER_QUICK),
    Case(B=16, S=1, d_in=4096, d_out=4096, N=64, R=8, P=4, selection="uniform"),
    Case(B=1, S=1, d_in=4096, d_out=4096, N=64, R=8, P=4, selection="identical"),
)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """x, weight, A, B, index, coefficient, bias, of unit scale, on the generator's device."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x = normal(case.B, case.S, case.d_in).to(dtype)
    weight = (normal(case.d_out, case.d_in) / case.d_in**0.5).to(dtype)
    A = (normal(1 if case.shared else case.N, case.R, case.d_in) / case.d_in**0.5).to(dtype)
    B = normal(case.N, case.R, case.d_out).to(dtype)
    index = select_rows(case, generator)
    coefficient = normal(case.B, *(case.S,) * case.per_token, case.P).to(exact)
    return x, weight, A, B, index, coefficient, normal(case.d_out).to(dtype)


def select_rows(case: Case, generator: torch.Generator) -> Tensor:  # int64 [B, P]
    """repeats: any rows, also twice; uniform, zipf: without repeats within a sample, some rows as likely as others or
    not; identical: the same for all samples; distinct: no two samples share one; every: all rows, in order."""
    device = generator.device
    if case.selection == "repeats":
        return torch.randint(case.N, (case.B, case.P), generator=generator, device=device)
    if case.selection == "every":
        return torch.arange(case.P, device=device).expand(case.B, -1).contiguous()
    if case.selection == "distinct":
        order = torch.randperm(case.N, generator=generator, device=device)
        return order[: case.B * case.P].view(case.B, case.P)
    numbers = torch.arange(1, case.N + 1, dtype=torch.float64, device=device)
    likely = numbers ** (-1.0 if case.selection == "zipf" else 0.0)
    samples = 1 if case.selection == "identical" else case.B
    index = torch.multinomial(likely.expand(samples, -1), case.P, generator=generator)
    return index.expand(case.B, -1).contiguous()


def make_past(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Past | None:
    """The earlier tasks' rows."""
    if not case.past:
        return None
    one = Case(case.B, 0, case.d_in, case.d_out, case.past, case.Q, case.past)
    one = one._replace(B=1) if case.alike else one
    _, _, A, B, _, coefficient, _ = make(one, dtype, generator)
    return Past(A, B, coefficient / case.past**0.5)
