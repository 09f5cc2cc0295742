"""Runs every kernel once or twice on small sizes that no tile divides: what compute-sanitizer looks at."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cllava_fast import ops  # noqa: E402
from cllava_fast.ops import native  # noqa: E402
from cllava_fast.ops.aggregate import cases as aggregate_cases  # noqa: E402
from cllava_fast.ops.inject import cases as inject_cases  # noqa: E402
from cllava_fast.ops.inject.native import decode  # noqa: E402
from cllava_fast.ops.select import cases as select_cases  # noqa: E402

INJECT = inject_cases.Case(B=3, S=7, d_in=17, d_out=33, N=3, R=3, P=11)
ROUTED = [INJECT._replace(per_token=True), INJECT._replace(shared=True), INJECT._replace(per_token=True, shared=True)]
SELECT = (
    select_cases.Case(B=5, N=33, D=48, M=3, groups=4, allowed="row"),
    select_cases.Case(B=3, N=24, D=32, M=4, allowed="sample", reduce="batch"),
    select_cases.Case(B=2, N=2100, D=20, M=5, groups=2),  # a scan and a merge
    select_cases.Case(B=2, N=400, D=400, M=5),  # the same, of few rows
)
AGGREGATE = aggregate_cases.Case(B=3, M=2, N=7, T=7)
MIX = aggregate_cases.MixCase(B=2, P=5, N=4, R=3, d_in=17, d_out=33)


def backward(outputs, *trained):
    torch.autograd.grad(sum(output.float().sum() for output in outputs), trained)


def run_all(device, backend, dtypes=(torch.float32, torch.float16, torch.bfloat16)):
    """`backend`: "triton", or "cuda,triton" for the native kernels, which leave training's inject to Triton."""
    generator = torch.Generator().manual_seed(0)

    def moved(tensors):
        tensors = [None if t is None else t.to(device) for t in tensors]
        return [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]

    with ops.backend(backend):
        for dtype in dtypes:
            for case in SELECT:
                query, keys, allowed = moved(select_cases.make(case, dtype, generator))
                _, _, similarity = ops.select(query.detach(), keys, case.M, allowed, case.groups, case.reduce)
                backward([similarity], keys)
                context = torch.ones(3, 3, device=device, requires_grad=True)
                tasks = torch.arange(case.N, device=device) % 3, torch.ones(case.N, device=device), context
                joined = ops.select_aggregate(query, keys, case.M, *tasks, allowed, case.groups, case.reduce)
                backward(joined[1:], context)
            A, B, coefficient, index = moved(aggregate_cases.make_mix(MIX, dtype, generator))
            backward(ops.mix_factors(A, B, coefficient, index), A, B, coefficient)
            x, weight, A, B, index, coefficient, bias = moved(inject_cases.make(INJECT, dtype, generator))
            pairs = A, B, index, coefficient
            past_A, past_B, past_coefficient = moved(inject_cases.make_past(INJECT._replace(past=5), dtype, generator))
            past = past_A.detach(), past_B.detach(), past_coefficient
            routed = [moved(inject_cases.make(case, dtype, generator)) for case in ROUTED]
            for way in ways(backend):
                y = ops.inject(x, weight.detach(), *pairs, bias.detach(), past=past)
                backward([ops.inject_add(y, x, *pairs)], x, A, B, coefficient, past_coefficient)
                for own, frozen, *rows, free in routed if way != "whole" else routed[:1]:  # a shared A is gathered
                    y = ops.inject(own, frozen.detach(), *rows, free.detach(), past=past)
                    backward([y], own, rows[0], rows[1], rows[3])
        if backend != "triton":
            decode_all(device, dtypes, generator)
        index, weight, row_task, row_mean, context = moved(aggregate_cases.make(AGGREGATE, torch.float32, generator))
        backward(ops.aggregate(index, weight, row_task, row_mean.detach(), context)[1:], weight, context)


def decode_all(device, dtypes, generator):
    """Few rows, which one block has, and many."""
    for dtype in dtypes:
        for case in (INJECT._replace(S=1, P=2), INJECT._replace(S=1, P=50)):
            tensors = [tensor.to(device) for tensor in inject_cases.make(case, dtype, generator)]
            x, weight, A, B, index, coefficient, bias = tensors
            arrived = torch.zeros(case.B, dtype=torch.int32, device=device)
            with torch.no_grad():
                decode(x, weight, bias, A, B, index, coefficient, 1.0, arrived)


def ways(backend):
    """Triton's inject has two; a plan that is not replaced chooses by size."""
    if backend != "triton":
        yield "native"
        return
    inject = importlib.import_module("cllava_fast.ops.inject")
    plan = inject.plan
    try:
        for way in ("gather", "whole"):
            inject.plan = lambda *sizes, way=way: way
            yield way
    finally:
        inject.plan = plan


if __name__ == "__main__":
    every = ["triton"] if native.cuda_usable() else ["cuda,triton", "triton"]
    for name in every:
        run_all("cuda", name)
    torch.cuda.synchronize()
    print(f"every kernel of {' and '.join(every)} ran")
