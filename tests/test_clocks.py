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


class Words(clocks.HostClock):
    """A clock whose machine is disturbed as the words say; peace when they have all been said."""

    def __init__(self, *words: bool) -> None:
        self.words, self.peace, self.looked = list(words), 1.0, float("-inf")

    def disturbed(self) -> bool:
        disturbed = self.words.pop(0) if self.words else False
        self.looked = float("-inf") if disturbed else time.perf_counter()
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
def test_the_host_clock_takes_what_was_disturbed_again(words: list[bool], calls: int) -> None:
    clock, ran = Words(*words), list[float]()
    took = clock.seconds(lambda: ran.append(time.perf_counter()) or time.sleep(0.015 if len(ran) < calls else 0.1))
    assert len(ran) == calls and 0.1 <= took < 0.4, "the last one counts"
    assert clock.peace == 1.0


def test_the_host_clock_does_not_come_between_short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Words, "TOGETHER", 60.0)
    clock = Words(True, False, True)
    for _ in range(9):
        assert clock.seconds(lambda: None) < 1
    assert clock.words == [True], "one look in a minute"


def test_the_host_clock_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Words, "PATIENCE", 0.01)
    monkeypatch.setattr(Words, "LONG", 0.0)
    clock, ran = Words(*[True] * 10**6), list[str]()
    clock.seconds(lambda: ran.append("long"))
    assert ran == ["long"] and clock.peace > 1.0


def test_the_host_clock_knows_a_disturbed_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clocks.HostClock()
    clock.peace = 1.0
    for took, disturbed in ((1.2, False), (1.3, True), (0.9, False), (1.2, True)):
        times = iter((5.0, 5.0 + took))
        monkeypatch.setattr(time, "perf_counter", lambda times=times: next(times))
        assert clock.disturbed() is disturbed, took
        assert clock.looked == (float("-inf") if disturbed else 5.0 + took)
    assert clock.peace == pytest.approx(0.9)
