"""Where the time of one run goes, by kernel on a GPU, by operator on a CPU, as torch's profiler tells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cllava_fast.ops.library import NAMESPACE

LINES = 12


def of(run: Callable[[], Any], device: str) -> dict[str, Any]:
    """Shares of the time spent: `lines` with the most first, the `rest`, and `ours`, all that happened inside this
    library's ops, frozen linears that they run included; `seconds` in all."""
    on_gpu = device != "cpu"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        results = run()
        if on_gpu:
            torch.cuda.synchronize()
    del results
    own_time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    whole_time = "device_time_total" if on_gpu else "cpu_time_total"
    # on a GPU an operator's time is that of its kernels, which are listed as well
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spent = [e for e in profiler.key_averages() if e.device_type == where and getattr(e, own_time) > 0]
    spent.sort(key=lambda event: -getattr(event, own_time))
    total = sum(getattr(event, own_time) for event in spent)
    ours = sum(getattr(event, whole_time) for event in profiler.events() if _outermost(event))
    lines = [{"name": e.key, "share": getattr(e, own_time) / total, "calls": e.count} for e in spent[:LINES]]
    rest = sum(getattr(event, own_time) for event in spent[LINES:]) / total
    # two sums of the same microseconds may differ in their last bit
    return {"lines": lines, "rest": rest, "ours": round(ours / total, 9), "seconds": total / 1e6}


def _outermost(event: Any) -> bool:
    """An op of ours that none of ours has called."""

    def own(event: Any) -> bool:
        return event.name.startswith(f"{NAMESPACE}::")

    parents, parent = [], event.cpu_parent
    while parent is not None:
        parents.append(parent)
        parent = parent.cpu_parent
    return event.device_type == DeviceType.CPU and own(event) and not any(map(own, parents))
