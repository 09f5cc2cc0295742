"""`make tune` without a GPU: what it measures, keeps and writes, with times that are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clocks, measure, tune, tune_backends, tune_tiles
from benchmarks.tune_tiles import AHEAD, Found, Point
from cllava_fast.ops import dispatch, triton_backend, tuned
from cllava_fast.ops.aggregate import cases as aggregate_cases
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.inject import tiling
from cllava_fast.ops.select import cases as select_cases

interpreted = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="kernels are compiled here")
SHRINK, EXPAND, OUTER = (
    Point(kernel, torch.float32, samples=2, tokens=20, pairs=3, width=40) for kernel in ("shrink", "expand", "outer")
)
SMALL = {
    "select": (select_cases.Case(B=3, N=7, D=5, M=2),),
    "aggregate": (aggregate_cases.Case(B=3, M=2, N=7, T=3),),
    "mix_factors": (aggregate_cases.MixCase(B=2, P=3, N=4, R=2, d_in=8, d_out=6),),
    "inject": (
        inject_cases.Case(B=2, S=1, d_in=8, d_out=6, N=4, R=2, P=3),
        inject_cases.Case(B=2, S=20, d_in=8, d_out=6, N=4, R=2, P=3, past=2, Q=2),
    ),
}


@pytest.fixture
def h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The CPU passes for one; the folder where the library looks for tables, which does not exist yet."""
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tables")
    tuned.forget()
    yield tuned.FOLDER
    monkeypatch.undo()
    tuned.forget()


def never() -> bool:
    return False


def fastest_last(runs: Any, launch: str) -> dict[Any, float]:
    """The last one takes half the time of the others."""
    return {name: 1e-5 if name == list(runs)[-1] else 2e-5 for name in runs}


def all_alike(runs: Any, launch: str) -> dict[Any, float]:
    return dict.fromkeys(runs, 1e-5)


def test_a_candidate_must_be_three_percent_ahead() -> None:
    default, other = tune_tiles.fitting(SHRINK)[:2]
    assert AHEAD == 1.03
    assert tune_tiles.faster({default: 1.029e-5, other: 1e-5}, default, SHRINK) is None
    assert tune_tiles.faster({default: 1e-5, other: 2e-5}, default, SHRINK) is None
    assert tune_tiles.faster({default: 1.031e-5, other: 1e-5}, default, SHRINK) == {
        "kernel": "shrink", "dtype": "float32", "columns": 32, "tokens": 64, "tiles": other._asdict(),
        "microseconds": 10.0, "default_microseconds": 10.31,
    }  # fmt: skip


def test_what_is_wrong_or_fails_is_out() -> None:
    def fail() -> Any:
        raise RuntimeError("out of resources")

    right = torch.randn(3, 4)
    runs = {
        "default": lambda: (right,), "same": lambda: (right.clone(),), "off": lambda: (1.001 * right,),
        "nan": lambda: (right * torch.nan,), "short": lambda: (right[:2],), "broken": fail,
    }  # fmt: skip
    kept, out = tune_tiles.sound(runs, "default", torch.float32)
    assert list(kept) == ["default", "same"]
    assert [reason.split()[0] for reason in out] == ["off", "nan", "short", "broken"]
    assert "relative error 1.0e-03 exceeds 2.0e-05" in out[0] and "RuntimeError: out of resources" in out[3]


def test_a_size_that_fails_is_out_and_the_others_have_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def runner(point: Point, device: str) -> Any:
        def run(tiles: Any) -> Any:
            if point == SHRINK:
                raise RuntimeError("out of resources")
            return (torch.ones(1),)

        return run

    timed: list[str] = []

    def timer(runs: Any, launch: str) -> dict[Any, float]:
        timed.append(launch)
        if len(timed) == 1:
            raise torch.OutOfMemoryError("full")
        return fastest_last(runs, launch)

    monkeypatch.setattr(tune_tiles, "runner", runner)
    kept: list[Found] = []
    found = tune_tiles.find([SHRINK, EXPAND, OUTER], "cpu", timer, never, kept.append)
    assert [row["kernel"] for row in found.rows] == ["outer"] and found.complete and found.measured == 1
    assert [reason.split(",")[0] for reason in found.out] == ["shrink", "expand"]
    assert "RuntimeError: out of resources" in found.out[0] and "OutOfMemoryError: full" in found.out[1]
    assert kept == [found._replace(complete=False)]


@interpreted
@pytest.mark.parametrize("point", [SHRINK, EXPAND, OUTER], ids=lambda point: point.kernel)
def test_every_candidate_of_a_kernel_gives_the_same(point: Point, h100: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cllava_fast.ops.inject import triton_launch as launch

    launched, plain = [], launch._launch

    def noting(kernel: Any, programs: int, tiles: Any, *arguments: Any, **constants: int) -> None:
        launched.extend([tiles] if kernel.__name__ == point.kernel else [])
        plain(kernel, programs, tiles, *arguments, **constants)

    monkeypatch.setattr(launch, "_launch", noting)
    found = tune_tiles.find([point], "cpu", fastest_last, never)
    assert set(launched) == set(tune_tiles.fitting(point))
    assert found.out == [] and found.complete and found.measured == 1
    candidates = tune_tiles.fitting(point)
    assert candidates[0] == tune_tiles.default_of(point) and len(candidates) > 1
    (row,) = found.rows
    assert row["tiles"] == candidates[-1]._asdict() and row["microseconds"] == 10 and row["kernel"] == point.kernel
    table = tuned.parse(tune.table(found, Found([], [], 0, True)))
    with tuned.using(table):  # the row is found again by the sizes that it was measured at
        x = torch.empty(point.samples, point.tokens, 1)
        assert tiling.choose(point.kernel, x, point.pairs * tune_tiles.RANK) == candidates[-1]


@interpreted
def test_a_wrong_candidate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cllava_fast.ops.inject import triton_launch as launch

    plain, wrong = launch.expand, tune_tiles.fitting(EXPAND)[-1]
    monkeypatch.setattr(launch, "expand", lambda *given, tiles: plain(*given, tiles=tiles) * (1 + (tiles == wrong)))
    timed: list[Any] = []
    found = tune_tiles.find([EXPAND], "cpu", lambda runs, launch: timed.extend(runs) or all_alike(runs, launch), never)
    assert found.rows == [] and wrong not in timed and len(timed) == len(tune_tiles.fitting(EXPAND)) - 1
    assert len(found.out) == 1 and str(wrong) in found.out[0] and found.out[0].startswith("expand, float32, 24 columns")


def test_candidates_are_no_larger_than_what_the_row_stands_for() -> None:
    for point in tune_tiles.points(quick=False):
        candidates = tune_tiles.fitting(point)
        assert len(candidates) > 1
        for tiles in candidates[1:]:
            assert tiles.columns <= tuned.columns_bucket(point.pairs * tune_tiles.RANK)
            assert tiles.tokens <= tuned.bucket(point.tokens)
            assert tiles in tiling.candidates(point.kernel, point.dtype)


def test_no_two_points_share_a_row() -> None:
    points = tune_tiles.points(quick=False)
    keys = {
        (p.kernel, p.dtype, tuned.columns_bucket(p.pairs * tune_tiles.RANK), tuned.bucket(p.samples * p.tokens))
        for p in points
    }
    assert len(keys) == len(points) and set(tune_tiles.points(quick=True)) < set(points)


def test_when_time_is_over_nothing_new_begins() -> None:
    begun: list[int] = []
    jobs = [partial(begun.append, i) for i in range(3)]
    found = tune_backends.find(jobs, all_alike, lambda: len(begun) == 2)
    assert begun == [0, 1] and not found.complete
    assert tune_tiles.find([SHRINK], "cpu", all_alike, lambda: True) == Found([], [], 0, False)


def test_calls_are_recorded_as_the_dispatch_sees_them() -> None:
    with tune_backends.recorded() as calls:
        for job in tune_backends.work(SMALL, "cpu"):
            job()
    seen = [call.op for call in calls]
    assert seen == [
        "select", "select_backward", "select_aggregate", "aggregate", "aggregate_backward", "mix_factors",
        "mix_factors_backward", "inject", "inject_add", "inject", "inject_backward", "inject_add",
    ]  # fmt: skip
    again = [dispatch._kernels[call.op]["reference"].run(*call.arguments) for call in calls]
    assert len(again) == len(calls) and str(calls[0]) == "select, float32, B3 D5 N7 M2 groups1"
    with tune_backends.recorded() as later:
        pass
    next(tune_backends.work(SMALL, "cpu"))()
    assert later == []


def test_losers() -> None:
    cuda = {"cuda": 2.0, "triton": 1.0, "reference": 1.5}
    assert tune_backends.losers([cuda]) == [("cuda", "triton", 2.0)]
    # by another one each time: neither beats it both times
    assert tune_backends.losers([cuda, {"cuda": 2.0, "triton": 2.5, "reference": 1.9}]) == [
        ("cuda", "reference", 2 / 1.9)
    ]
    assert tune_backends.losers([cuda, {"cuda": 1.0, "triton": 2.0, "reference": 3.0}]) == []
    assert tune_backends.losers([{"cuda": 1.02, "triton": 1.0}]) == []
    assert tune_backends.losers([cuda, {"triton": 1.0, "reference": 0.5}]) == []
    assert tune_backends.losers([{"triton": 1.0, "reference": 0.5}]) == [("triton", "reference", 2.0)]
    assert tune_backends.losers([]) == []


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op has three: cuda's and the reference are right, triton's is not."""

    def volunteers(op: str, site: dispatch.Site) -> dict[str, Any]:
        right = dispatch._kernels[op]["reference"].run

        def wrong(*arguments: Any) -> Any:
            return tuple(tensor + 1 for tensor in right(*arguments))

        return {"cuda": right, "triton": wrong, "reference": right}

    monkeypatch.setattr(dispatch, "volunteers", volunteers)


def test_backends_that_lose_are_written_down(backends: None, h100: Path) -> None:
    launches: set[str] = set()

    def timer(runs: Any, launch: str) -> dict[Any, float]:
        launches.add(launch)
        assert list(runs) == ["reference", "cuda"]
        assert not any(tensor.requires_grad for run in runs.values() for tensor in run())  # below autograd
        return {"cuda": 3.0, "reference": 2.0}

    found = tune_backends.find(tune_backends.work(SMALL, "cpu"), timer, never)
    assert launches == {measure.IDLE, measure.QUEUED} and found.measured == 12
    assert len(found.out) == 12 and all("triton is wrong" in reason for reason in found.out)
    ops = [row["op"] for row in found.rows]
    assert len(ops) == 12 and set(ops) >= {"select", "select_backward", "mix_factors", "inject_add", "inject_backward"}
    row = found.rows[0]
    assert row["sizes"] == {"B": [3, 4], "D": [5, 8], "N": [5, 8], "M": [2, 2], "groups": [1, 1]}
    assert (row["backend"], row["instead"], row["ratio"], row["dtype"]) == ("cuda", "reference", 1.5, "float32")
    tuned.parse(tune.table(Found([], [], 0, True), found))


def test_calls_of_one_bucket_must_agree(backends: None) -> None:
    times = iter([2.0, 2.0, 0.5, 2.0])
    cases = [select_cases.Case(B=3, N=7, D=5, M=2), select_cases.Case(B=4, N=8, D=6, M=2)]
    jobs = [partial(_only_select, case) for case in cases]
    found = tune_backends.find(jobs, lambda runs, launch: {"cuda": next(times), "reference": 1.0}, never)
    assert found.rows == [] and found.measured == 2


def _only_select(case: select_cases.Case) -> None:
    query, keys, _ = select_cases.make(case, torch.float32, torch.Generator().manual_seed(0))
    tune_backends.ops.select(query, keys, case.M)


def test_a_job_that_fails_is_out_and_the_others_have_their_times(backends: None) -> None:
    case, timed = select_cases.Case(B=3, N=7, D=5, M=2), []

    def full() -> None:
        _only_select(case)
        raise torch.OutOfMemoryError("full")

    def timer(runs: Any, launch: str) -> dict[Any, float]:
        timed.append(launch)
        if len(timed) == 1:
            raise RuntimeError("not launched")
        return {"cuda": 2.0, "reference": 1.0}

    kept: list[Found] = []
    found = tune_backends.find([full, partial(_only_select, case), full], timer, never, kept.append)
    assert found.complete and found.measured == 2 and [row["instead"] for row in found.rows] == ["reference"]
    reasons = [reason for reason in found.out if " failed: " in reason]
    assert [reason.partition(" failed: ")[2] for reason in reasons] == [
        "OutOfMemoryError: full", "RuntimeError: not launched", "OutOfMemoryError: full",
    ]  # fmt: skip
    assert [(len(each.rows), each.complete) for each in kept] == [(0, False), (1, False), (1, False)]


@pytest.fixture
def pretended(h100: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With sizes that the interpreter can do, and times that are made up."""
    monkeypatch.setattr(tune, "missing", lambda: None)
    monkeypatch.setattr(tune_tiles, "points", lambda quick: [SHRINK, OUTER])
    monkeypatch.setattr(tune_backends, "CASES", SMALL)
    monkeypatch.setattr(tune_backends, "QUICK", SMALL | {"inject": ()})
    monkeypatch.setattr(measure, "turns", lambda runs, launch, budget: fastest_last(runs, launch))
    return h100


@interpreted
def test_from_the_command_to_the_table_in_use(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.empty(2, 20, 1)
    before = tiling.choose("shrink", x, 24)
    assert tune.main([]) == 0
    (path,) = pretended.iterdir()  # and nothing half written beside it
    table = tuned.read(path, "sm_90")
    assert path.name == "sm_90.json" and len(table.tiles) == 2
    content = json.loads(path.read_text())
    assert content["complete"] and content["environment"].keys() > {"torch", "triton", "date"}
    assert "tuned" not in content["environment"]
    lines = path.read_text().splitlines()
    assert sum('"kernel": ' in line for line in lines) == 2 and max(map(len, lines[:-8])) < 1000
    assert tiling.choose("shrink", x, 24) == tune_tiles.fitting(SHRINK)[-1] != before
    said = capsys.readouterr().out
    assert "sm_90" in said and "2 of 2 sizes have faster ones" in said and "2.00x" in said
    assert said.splitlines()[-1] == f"written to {path}"


@interpreted
def test_an_older_table_has_no_part_in_a_new_one(pretended: Path) -> None:
    assert tune.main([]) == 0
    (path,) = pretended.iterdir()
    first = path.read_text()
    tuned.forget()
    assert tune.main([]) == 0
    rows = [json.loads(text)["tiles"] for text in (first, path.read_text())]
    assert rows[0] == rows[1]
    path.write_text("{")  # nor can it stand in the way
    tuned.forget()
    assert tune.main([]) == 0 and json.loads(path.read_text())["tiles"] == rows[0]


@interpreted
def test_quick_and_interrupted_runs_leave_the_folder_alone(
    pretended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(["--quick"]) == 0 and not pretended.exists()
    assert "nothing written" in capsys.readouterr().out
    assert tune.main(["--quick", "--out", str(tmp_path / "mine.json")]) == 0
    assert tuned.read(tmp_path / "mine.json").tiles and not pretended.exists()

    def interrupted(runs: Any, launch: str, budget: float) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "turns", interrupted)
    before = (tmp_path / "mine.json").read_text()
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--out", str(tmp_path / "mine.json")])
    assert (tmp_path / "mine.json").read_text() == before


@interpreted
@pytest.mark.parametrize("comparisons", [1, 2, 5])  # of tiles two, then of backends
def test_what_is_cut_off_leaves_what_it_found(
    comparisons: int, pretended: Path, backends: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def turns(runs: Any, launch: str, budget: float) -> dict[Any, float]:
        if len(done) == comparisons:
            raise KeyboardInterrupt
        done.append(launch)
        return {name: 2.0 for name in runs} | {list(runs)[0 if "cuda" in runs else -1]: 1.0}

    monkeypatch.setattr(measure, "turns", turns)
    monkeypatch.setattr(tune_backends, "work", lambda cases, device: [partial(_only_select, SMALL["select"][0])] * 2)
    with pytest.raises(KeyboardInterrupt):
        tune.main([])
    (path,) = pretended.iterdir()
    table = tuned.read(path, "sm_90")
    assert len(table.tiles) == min(comparisons, 2) and len(table.avoid) == (comparisons == 5)
    assert not json.loads(path.read_text())["complete"]


@interpreted
def test_what_is_cut_off_leaves_a_complete_table_alone(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.main([]) == 0
    (path,) = pretended.iterdir()
    before, done = path.read_text(), []

    def turns(runs: Any, launch: str, budget: float) -> dict[Any, float]:
        if done:
            raise KeyboardInterrupt
        done.append(launch)
        return fastest_last(runs, launch)

    with monkeypatch.context() as cut_off:
        cut_off.setattr(measure, "turns", turns)
        with pytest.raises(KeyboardInterrupt):
            tune.main([])
    assert done and list(pretended.iterdir()) == [path] and path.read_text() == before
    assert tune.main(["--minutes", "0"]) == 0  # one that came to its end is another matter
    assert not json.loads(path.read_text())["complete"]


@interpreted
def test_what_is_wrong_ends_with_1_and_is_named(
    pretended: Path, backends: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(["--minutes", "9"]) == 1
    table = tuned.read(pretended / "sm_90.json")
    assert not any(row.backend == "triton" for row in table.avoid)
    assert capsys.readouterr().out.count("triton is wrong") == 12


def test_a_run_out_of_time_says_so(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--minutes", "0"]) == 0
    content = json.loads((pretended / "sm_90.json").read_text())
    assert not content["complete"] and content["tiles"] == content["avoid"] == []
    assert "NOT complete" in capsys.readouterr().out


def test_a_table_that_would_be_refused_is_not_written(h100: Path, tmp_path: Path) -> None:
    content = tune.table(Found([{"kernel": "shrink"}], [], 1, True), Found([], [], 0, True))
    with pytest.raises(tuned.TableError, match="mine.json"):
        tune.write(content, tmp_path / "mine.json")
    assert not (tmp_path / "mine.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "there is no CUDA device" in said
    assert not tuned.FOLDER.exists() or not list(tuned.FOLDER.glob(".*"))


def test_the_interpreter_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_backend, "INTERPRETED", True)
    assert "unset TRITON_INTERPRET" in str(tune.missing())


def test_turns_gives_medians_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks.HostClock, "disturbed", lambda self: False)
    ran: list[str] = []
    found = measure.turns({name: partial(ran.append, name) for name in "ab"}, measure.HOST, 0.0)
    assert found.keys() == {"a", "b"} and all(0 < seconds < 1 for seconds in found.values())
    assert ran.count("a") == ran.count("b") == 5  # one to warm up, four that count
