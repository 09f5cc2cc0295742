"""The native CPU kernels beside the fastest formulation in PyTorch: `python benchmarks/native_cpu.py`.

Writes results/native_cpu-LEVEL.json, LEVEL being the vectors that torch uses on this CPU, such as avx512. A kernel
earns its place by a ratio of 1.2; what was tried and lost stays in the table.
Rivals have no fixed order of summation and other rules for ties, which makes them faster, not slower.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cllava_fast.atomic import write_json
from cllava_fast.environment import environment
from cllava_fast.ops import native
from cllava_fast.ops.aggregate import cases as aggregate_cases
from cllava_fast.ops.aggregate import mix
from cllava_fast.ops.aggregate import native as aggregate_native
from cllava_fast.ops.aggregate import reference as aggregate_reference
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.inject import native as inject_native
from cllava_fast.ops.inject import reference as inject_reference
from cllava_fast.ops.select import cases as select_cases
from cllava_fast.ops.select import native as select_native
from cllava_fast.ops.select import reference as select_reference

LEVEL = torch.backends.cpu.get_cpu_capability().lower()
# Variables that keep a CPU from its widest vectors: PyTorch's, oneDNN's, MKL's and ours.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "CLLAVA_CPU_LEVEL")
RESULTS = Path(__file__).parent / "results" / f"native_cpu-{LEVEL}.json"
EARNED = 1.2
LIBRARY = torch.ops.cllava_fast_native
Ways = dict[str, Callable[[], Any]]


def select(case: select_cases.Case, rng: torch.Generator) -> tuple[Ways, Ways]:
    query, keys, _ = select_cases.make(case, torch.float32, rng)
    arguments = query, keys, case.M, None, case.groups, False

    def cosines() -> tuple[Tensor, Tensor, Tensor]:
        norms = torch.linalg.vector_norm(keys, dim=1) * torch.linalg.vector_norm(query, dim=1, keepdim=True)
        similarity, index = ((query @ keys.t()) / norms).topk(case.M)
        positive = similarity.clamp(min=0)
        return similarity, positive / positive.sum(1, keepdim=True), index

    index = cosines()[2]
    backward = torch.randn(case.B, case.M, generator=rng), query, keys, index, case.groups, False
    return (
        {"native": lambda: select_native.select(LIBRARY, *arguments), "matmul, topk": cosines},
        {
            "native": lambda: select_native.select_backward(LIBRARY, *backward),
            "float32": lambda: select_reference.select_backward(*backward, compute_dtype=torch.float32),
        },
    )


def aggregate(case: aggregate_cases.Case, rng: torch.Generator) -> tuple[Ways, Ways]:
    inputs = aggregate_cases.make(case, torch.float32, rng)
    backward = torch.randn(case.B, case.M + case.N, generator=rng), *inputs, [True, True]
    return (
        {
            "native": lambda: aggregate_native.aggregate(LIBRARY, *inputs),
            "by task": lambda: aggregate_reference.aggregate(*inputs),
        },
        {
            "native": lambda: aggregate_native.aggregate_backward(LIBRARY, *backward),
            "by task": lambda: aggregate_reference.aggregate_backward(*backward),
        },
    )


def mix_factors(case: aggregate_cases.MixCase, dtype: torch.dtype, rng: torch.Generator) -> tuple[Ways, Ways]:
    A, B, coefficient, index = aggregate_cases.make_mix(case, dtype, rng)
    rows = torch.arange(case.N)

    def strength() -> Tensor:  # [B, N]
        return (coefficient.unsqueeze(2) * (index.unsqueeze(2) == rows)).sum(1)

    def whole() -> tuple[Tensor, ...]:
        return tuple((strength() @ f.flatten(1).float()).view(case.B, *f.shape[1:]).to(dtype) for f in (A, B))

    def whole_backward() -> tuple[Tensor, ...]:
        flat = [grad.flatten(1).float() for grad in grads]
        to_rows = [(strength().t() @ grad).view(f.shape).to(dtype) for grad, f in zip(flat, (A, B), strict=True)]
        along = flat[0] @ A.flatten(1).float().t() + flat[1] @ B.flatten(1).float().t()  # [B, N]
        return *to_rows, along.gather(1, index)

    grads = whole()
    backward = *grads, A, B, coefficient, index, [True, True, True]
    return (
        {
            "native": lambda: aggregate_native.mix_factors(LIBRARY, A, B, coefficient, index),
            "gather, bmm": lambda: mix.mix_factors(A, B, coefficient, index),
            "whole pool": whole,
        },
        {
            "native": lambda: aggregate_native.mix_factors_backward(LIBRARY, *backward),
            "gather, bmm": lambda: mix.mix_factors_backward(*backward),
            "whole pool": whole_backward,
        },
    )


def inject(case: inject_cases.Case, dtype: torch.dtype, rng: torch.Generator) -> tuple[Ways, Ways]:
    """inject, and inject_add: the increments alone, all that the native code computes."""
    x, weight, A, B, index, coefficient, _ = inject_cases.make(case, dtype, rng)
    gather, whole = (
        inject_reference.Acting(A, B, index, coefficient, None, None, None, 1.0, whole) for whole in (False, True)
    )
    y = torch.nn.functional.linear(x, weight)
    return (
        {
            "native": lambda: inject_native.inject(LIBRARY, x, weight, None, gather, False),
            "one call": lambda: inject_native.many(LIBRARY, x, weight, None, None, gather, False),
            "gather, baddbmm": lambda: inject_reference.inject(x, weight, None, gather, False),
            "whole pool": lambda: inject_reference.inject(x, weight, None, whole, False),
        },
        {
            "native": lambda: inject_native.inject_add(LIBRARY, y, x, gather, False),
            "one call": lambda: inject_native.many(LIBRARY, x, None, None, y, gather, False),
            "gather, baddbmm": lambda: inject_reference.inject_add(y, x, gather, False),
            "whole pool": lambda: inject_reference.inject_add(y, x, whole, False),
        },
    )


def benchmarks(quick: bool, rng: torch.Generator) -> list[tuple[str, str, str, Ways]]:
    """op, dtype, case, ways."""
    found: list[tuple[str, str, str, Ways]] = []
    half = torch.bfloat16
    for case in select_cases.QUICK if quick else (*select_cases.QUICK, select_cases.Case(16, 20000, 384, 4)):
        forward, backward = select(case, rng)
        found += [("select", "float32", str(case), forward), ("select backward", "float32", str(case), backward)]
    for task_case in aggregate_cases.QUICK if quick else aggregate_cases.BENCH:
        forward, backward = aggregate(task_case, rng)
        found += [("aggregate", "float32", str(task_case), forward)]
        found += [("aggregate backward", "float32", str(task_case), backward)]
    for mix_case in aggregate_cases.MIX_QUICK if quick else aggregate_cases.MIX_BENCH:
        for dtype in (torch.float32, half):
            forward, backward = mix_factors(mix_case, dtype, rng)
            name = str(dtype).removeprefix("torch.")
            found += [("mix_factors", name, str(mix_case), forward)]
            found += [("mix_factors backward", name, str(mix_case), backward)]
    tokens = (1,) if quick else (1, 4, 16, 64)
    for inject_case in [inject_cases.Case(4, s, 1024, 1024, 64, 8, p) for s in tokens for p in (4, 36)]:
        for dtype in (torch.float32, half):
            name = str(dtype).removeprefix("torch.")
            with_product, alone = inject(inject_case, dtype, rng)
            found += [("inject", name, str(inject_case), with_product)]
            if inject_case.S == 1:
                found += [("inject_add", name, str(inject_case), alone)]
    return found


def times(ways: Ways, rounds: int) -> dict[str, float]:
    """Median microseconds of each, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                taken[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(values) for name, values in taken.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, as csrc/README.md shows it."""
    lines = [
        "| op | dtype | shape | native, us | ratio | fastest otherwise |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] >= EARNED else f"*{row['ratio']:.2f}*"
        shape = row["case"].removesuffix("-groups1-none-sample")
        ours = row["microseconds"]["native"]
        lines.append(f"| {row['op']} | {row['dtype']} | {shape} | {ours:,.0f} | {ratio} | {row['rival']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    refusal = native.cpu_usable()
    if refusal is not None:
        print(refusal, file=sys.stderr)
        return 2
    torch.set_num_threads(chosen.threads)
    rows = []
    for op, dtype, case, ways in benchmarks(chosen.quick, torch.Generator().manual_seed(0)):
        found = times(ways, 5 if chosen.quick else 25)
        ours = found.pop("native")
        rival = min(found, key=lambda name: found[name])
        ratio = found[rival] / ours
        rows.append(
            {
                "op": op,
                "dtype": dtype,
                "case": case,
                "rival": rival,
                "ratio": round(ratio, 2),
                "microseconds": found | {"native": ours},
            }
        )
        print(f"{op:<22} {dtype:<9} {case:<44} {ours:>10.1f} us  {ratio:>6.2f}x  over {rival}", flush=True)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    held_to = {name: os.environ[name] for name in LIMITS if name in os.environ}
    write_json(chosen.output, {"vectors": LEVEL, "held_to": held_to, "environment": environment(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
