"""The clocks of the benchmarks, with machines and devices made of words."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks import clocks


def test_the_device_clock_queues_until_the_host_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device made of words: `behind` says how long a wait hides the launches."""
    said: list[Any] = []
    behind = 2**22

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def query(self) -> bool:
            return max((word for word in said if isinstance(word, int)), default=0) < behind

        def synchronize(self) -> None:
            said.append("end")

        def elapsed_time(self, other: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", said.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("idle"))
    clock = clocks.DeviceClock.__new__(clocks.DeviceClock)
    clock.flush, clock.cycles = torch.ones(8), 2**20
    assert clock.seconds(lambda: said.append("run"), wait=False) == 2e-3
    assert clock.cycles == behind and not clock.flush.any()
    assert said == [part for sleep in (2**20, 2**21, 2**22) for part in (sleep, "event", "run", "event", "end")]
    said.clear()
    clock.flush.fill_(1)
    assert clock.seconds(lambda: said.append("run"), wait=True) == 2e-3
    assert said == ["idle", "event", "run", "event", "end"] and not clock.flush.any()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in one entry."""
    found = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: found[0])
    return found


class Words(clocks.HostClock):
    """A clock whose machine is disturbed as the words say, each in a millisecond; peace when all have been said."""

    def __init__(self, now: list[float], *words: bool) -> None:
        self.words, self.now, self.peace, self.looked = list(words), now, 1.0, float("-inf")

    def disturbed(self) -> bool:
        disturbed = self.words.pop(0) if self.words else False
        self.now[0] += 1e-3
        self.looked = float("-inf") if disturbed else self.now[0]
        return disturbed


@pytest.mark.parametrize(
    ("words", "calls"),
    [
        ([], 1),
        ([True, True, False, False], 1),  # waits for peace
        ([False, True, True, False, False], 2),  # and calls again where it did not last
        ([False, True] * 9, clocks.HostClock.MOST),
    ],
)
def test_the_host_clock_takes_what_was_disturbed_again(words: list[bool], calls: int, now: list[float]) -> None:
    clock, ran = Words(now, *words), list[float]()

    def run() -> None:
        ran.append(0.1 * (1 + len(ran)))
        now[0] += ran[-1]

    assert clock.seconds(run) == pytest.approx(0.1 * calls), "the last one counts"
    assert len(ran) == calls and clock.peace == 1.0


def test_the_host_clock_looks_at_short_calls_together(now: list[float]) -> None:
    clock = Words(now, *[False] * 9)
    for _ in range(25):
        now[0] += 1e-3
        assert clock.seconds(lambda: None) == 0.0
    assert len(clock.words) == 9 - 3, "in 25 milliseconds"


def test_the_host_clock_does_not_wait_for_ever(now: list[float]) -> None:
    clock, ran = Words(now, *[True] * 9999), list[str]()

    def long() -> None:
        ran.append("long")
        now[0] += 1.0

    assert clock.seconds(long) == pytest.approx(1.0) and ran == ["long"]
    assert clock.peace > 1.0 and now[0] < 1.0 + 2 * clock.PATIENCE


def test_the_host_clock_knows_a_disturbed_machine(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clocks.HostClock()
    clock.peace = 1.0
    for took, disturbed in ((1.2, False), (1.3, True), (0.9, False), (1.2, True)):
        products = [0.0, *[took / 8] * 8]  # the first one is not timed
        monkeypatch.setattr(clock, "multiply", lambda products=products: now.append(now.pop() + products.pop(0)))
        assert clock.disturbed() is disturbed, took
        assert clock.looked == (float("-inf") if disturbed else pytest.approx(now[0]))
    assert clock.peace == pytest.approx(0.9)
