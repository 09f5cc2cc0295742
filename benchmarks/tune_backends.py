"""Backends of the ops beside each other: at which sizes one that would run a call loses to one that comes after it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.tune_tiles import AHEAD, Found, Keep, Timer, failed, sound
from cllava_fast import ops
from cllava_fast.ops import dispatch, tuned
from cllava_fast.ops.aggregate import cases as aggregate_cases
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.select import cases as select_cases

# A loser loses whichever way its work reaches the device.
LAUNCHES = (measure.IDLE, measure.QUEUED)
INJECT = inject_cases.Case(B=16, S=1, d_in=4096, d_out=4096, N=64, R=8, P=4, selection="uniform")
DECODING = tuple(INJECT._replace(B=samples, S=tokens) for samples in (1, 4, 16) for tokens in (1, 4, 16))
CASES = {
    "select": select_cases.BENCH_GPU,
    "aggregate": aggregate_cases.BENCH,
    "mix_factors": aggregate_cases.MIX_BENCH_GPU,
    "inject": (*DECODING, INJECT._replace(past=56), *inject_cases.BENCH_GPU[:5]),
}
QUICK = {
    "select": CASES["select"][:1],
    "aggregate": CASES["aggregate"][:1],
    "mix_factors": (),
    "inject": DECODING[-3:-2],
}


class Call(NamedTuple):
    """One call of an op, as the dispatch saw it."""

    op: str
    site: dispatch.Site
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}{size}" for name, size in self.site.sizes)
        return f"{self.op}, {measure.dtype_name(self.site.dtype)}, {sizes}"


def work(cases: Mapping[str, Iterable[Any]], device: str) -> Iterator[Callable[[], Any]]:
    """Each runs some ops, forward and, where there is training, backward."""
    half, single = torch.bfloat16, torch.float32
    for case in cases["select"]:
        for dtype in (single, half) if case.N > 64 else (single,):
            yield partial(select, case, dtype, device)
    for case in cases["aggregate"]:
        yield partial(aggregate, case, device)
    for case in cases["mix_factors"]:
        yield partial(mix_factors, case, half, device)
    for case in cases["inject"]:
        yield partial(inject, case, half, device)


def select(case: select_cases.Case, dtype: torch.dtype, device: str) -> None:
    query, keys, _ = _on(device, select_cases.make(case, dtype, _rng()))
    keys.requires_grad_(case.N <= 64)  # a task's block is aligned
    query = query.float()
    options = {"groups": case.groups, "reduce": case.reduce, "check_values": False}
    _, _, similarity = ops.select(query, keys, case.M, None, **options)
    if keys.requires_grad:
        _backward(similarity, keys)
    tasks = torch.zeros(case.N, dtype=torch.int64, device=device), torch.ones(case.N, device=device)
    ops.select_aggregate(query, keys.detach(), case.M, *tasks, torch.ones(1, 1, device=device), None, **options)


def aggregate(case: aggregate_cases.Case, device: str) -> None:
    index, weight, row_task, row_mean, context = _on(device, aggregate_cases.make(case, torch.float32, _rng()))
    trained = weight.requires_grad_(), context.requires_grad_()
    _backward(ops.aggregate(index, weight, row_task, row_mean, context, check_values=False)[1], *trained)


def mix_factors(case: aggregate_cases.MixCase, dtype: torch.dtype, device: str) -> None:
    A, B, coefficient, index = _on(device, aggregate_cases.make_mix(case, dtype, _rng()))
    trained = [tensor.requires_grad_() for tensor in (A, B, coefficient)]
    _backward(torch.cat(ops.mix_factors(*trained, index, check_values=False), 2), *trained)


def inject(case: inject_cases.Case, dtype: torch.dtype, device: str) -> None:
    x, weight, A, B, index, coefficient, _ = _on(device, inject_cases.make(case, dtype, _rng()))
    past = inject_cases.make_past(case, dtype, _rng())
    past = past and ops.Past(*_on(device, past))
    trained = [tensor.requires_grad_(case.S > 16) for tensor in (x, A, B, coefficient)]  # fewer are decoding
    pairs = A, B, index, coefficient
    y = ops.inject(x, weight, *pairs, past=past, check_values=False)
    if y.requires_grad:
        _backward(y, *trained)
    ops.inject_add(y.detach(), x, *pairs, past=past, check_values=False)


def _backward(output: Tensor, *trained: Tensor) -> None:
    torch.autograd.grad(output, trained, torch.randn_like(output))


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _on(device: str, tensors: Iterable[Tensor | None]) -> list[Any]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls that ops make inside the block."""
    calls: list[Call] = []
    choose = dispatch.choose

    def noting(op: str, site: dispatch.Site) -> dispatch.Choice:
        choice = choose(op, site)

        def run(*arguments: Any) -> Any:
            calls.append(Call(op, site, arguments))
            return choice.run(*arguments)

        return choice._replace(run=run)

    dispatch.choose = noting
    try:
        yield calls
    finally:
        dispatch.choose = choose


def find(
    jobs: Iterable[Callable[[], Any]], timer: Timer, over: Callable[[], bool], keep: Keep = lambda found: None
) -> Found:
    """Rows of a tuned table: the losers. Calls that one row would stand for must agree."""
    alike: dict[Any, list[dict[str, float]]] = defaultdict(list)
    found = Found([], [], 0, False)
    for job in jobs:
        if over():
            return found
        with recorded() as calls:
            try:
                job()
            except Exception as reason:  # what it had called by then, and the others, have their times
                found.out.append(failed(job, reason))
        for call in calls:
            backends = dispatch.volunteers(call.op, call.site)
            runs = {name: partial(_below_autograd, run, call.arguments) for name, run in backends.items()}
            try:
                runs, out = sound(runs, "reference", call.site.dtype)
                found.out.extend(f"{call}: {reason}" for reason in out)
                times = [timer(runs, launch) for launch in LAUNCHES] if len(runs) > 1 else []
            except Exception as reason:
                found.out.append(failed(call, reason))
                continue
            key = call.op, call.site.dtype, tuple((name, *tuned.bounds(size)) for name, size in call.site.sizes)
            alike[key] += times
            found = found._replace(measured=found.measured + 1)
        found = found._replace(rows=list(itertools.chain.from_iterable(map(_rows, alike, alike.values()))))
        keep(found)
    return found._replace(complete=True)


def _below_autograd(run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """As `ops/library.py` calls it."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return run(*arguments)


def losers(times: Sequence[Mapping[str, float]]) -> list[tuple[str, str, float]]:
    """Backend, the later one that beats it in all of `times`, and by how much at least."""
    common = [name for name in dispatch.ORDER if times and all(name in seconds for seconds in times)]
    found = []
    for i, name in enumerate(common[:-1]):
        ratios = {other: min(seconds[name] / seconds[other] for seconds in times) for other in common[i + 1 :]}
        instead = max(ratios, key=lambda other: ratios[other])
        if ratios[instead] >= AHEAD:
            found.append((name, instead, ratios[instead]))
    return found


def _rows(key: Any, times: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    op, dtype, sizes = key
    bounds = {name: [least, most] for name, least, most in sizes}
    common = {"op": op, "dtype": measure.dtype_name(dtype), "sizes": bounds}
    return [
        common | {"backend": name, "instead": instead, "ratio": round(ratio, 2)}
        for name, instead, ratio in losers(times)
    ]
