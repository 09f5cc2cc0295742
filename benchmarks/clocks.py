"""How long something takes, on the host or on a device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

# How work reaches a device. host: there is none. queued: behind other work, so that only the device's own time counts,
# as in training. idle: the device waits for each launch, as in decoding without graphs. graph: a CUDA graph's replay.
HOST, QUEUED, IDLE, GRAPH = "host", "queued", "idle", "graph"


def seconds(run: Callable[[], Any], launch: str) -> float:
    """Of one call."""
    return host().seconds(run) if launch == HOST else device().seconds(run, wait=launch == IDLE)


@functools.cache
def host() -> HostClock:
    return HostClock()


@functools.cache
def device() -> DeviceClock:
    return DeviceClock()


class HostClock:
    """Time on the host, taken again where the machine was disturbed.

    Who shares a machine has parts of a second in which everything takes longer. A small product, always the same, is
    timed before and after a call: where it takes longer than in peace, that call does not count. Its own time has no
    say in this. Calls of microseconds follow one another, with warm caches, and are looked at together.
    """

    SLOWER = 1.25  # than in peace
    TOGETHER = 0.01  # seconds between two looks
    PATIENCE = 0.5  # seconds for peace to come back
    MOST = 3  # calls
    LONG = 0.5  # seconds: so long a call sees peace and disturbance alike, and counts at once

    def __init__(self) -> None:
        self.factor, self.product = torch.rand(128, 128), torch.empty(128, 128)
        self.peace, self.looked = float("inf"), float("-inf")
        for _ in range(100):
            self.disturbed()

    def seconds(self, run: Callable[[], Any]) -> float:
        for _ in range(self.MOST):
            if self.due():
                self.wait_for_peace()
            start = time.perf_counter()
            results = run()  # kept, so that freeing them is not timed
            took = time.perf_counter() - start
            del results
            if took > self.LONG or not self.due() or not self.disturbed():
                break
        return took

    def due(self) -> bool:
        return time.perf_counter() > self.looked + self.TOGETHER

    def wait_for_peace(self) -> None:
        end = time.perf_counter() + self.PATIENCE
        while self.disturbed():
            if time.perf_counter() > end:
                self.peace *= 1.05  # a machine that is slower from now on is at peace, too
                return

    def disturbed(self) -> bool:
        self.multiply()  # fetches what the last call has pushed out of the caches
        start = time.perf_counter()
        for _ in range(8):
            self.multiply()
        took = time.perf_counter() - start
        self.peace = min(self.peace, took)
        disturbed = took > self.SLOWER * self.peace
        self.looked = float("-inf") if disturbed else start + took
        return disturbed

    def multiply(self) -> None:
        torch.mm(self.factor, self.factor, out=self.product)


class DeviceClock:
    """Time on the device, from events before and after, with nothing of the last round left in its L2 cache."""

    MOST_CYCLES = 2**26  # some 40 ms

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(4 * max(size, 2**25), dtype=torch.int8, device="cuda")
        self.cycles = 2**20  # of the wait behind which the host queues the work

    def seconds(self, run: Callable[[], Any], wait: bool) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if not wait:
                torch.cuda._sleep(self.cycles)
            self.flush.zero_()
            if wait:
                torch.cuda.synchronize()
            start.record()
            results = run()
            end.record()
            late = not wait and start.query()  # the device was ahead of the host: launches would be timed too
            end.synchronize()
            del results
            if not late or self.cycles >= self.MOST_CYCLES:
                return start.elapsed_time(end) / 1e3
            self.cycles *= 2
