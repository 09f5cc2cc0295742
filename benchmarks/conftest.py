"""What the benchmarks share: `--quick`, fresh data, and the gate that keeps a wrong result from having a time."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the smallest shapes and three rounds each")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.QUICK if metafunc.config.getoption("quick") else metafunc.module.BENCH
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def timed(benchmark, case, pytestconfig):
    """`timed(run, exact, limit)`: check every result of run() against float64, then time it."""
    benchmark.group = str(case)
    rounds = 3 if pytestconfig.getoption("quick") else 20

    def gate(run, exact, limit):
        worst = 0.0
        for found, wanted in zip(run(), exact, strict=True):
            assert found.shape == wanted.shape
            worst = max(worst, ((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item())
        assert worst <= limit, f"relative error {worst:.1e} exceeds {limit:.1e}: no time is reported for a wrong result"
        benchmark.extra_info["error"] = worst
        benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=2)

    return gate
