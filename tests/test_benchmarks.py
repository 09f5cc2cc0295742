"""The benchmarks themselves: the gate, the clock, results files, the report; and the README shows what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, report, results
from benchmarks.measure import Measured, Point, Unavailable, Way, Wrong


def double(x: Any) -> Any:
    return 2 * x


def point(direction: str) -> Point:
    return Point("case", torch.float32, direction, measure.HOST)


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
def test_a_wrong_way_has_no_time(direction: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    ways = {
        "right": Way(double, double, (x,)),
        "wrong": Way(lambda x: 2.001 * x, double, (x,)),
        "no number": Way(lambda x: x * float("nan"), double, (x,)),
        "another shape": Way(lambda x: double(x)[:2] if direction == "forward" else double(x[:2]), double, (x,)),
        "absent": Unavailable("not here"),
    }
    if direction != "forward":
        del ways["another shape"]  # a gradient has its input's shape
    found = measure.compare(ways, point(direction), budget=0.0)
    right = found.pop("right")
    assert isinstance(right, Measured) and len(right.seconds) == 5 and 0 < right.median < 1 and right.error < 1e-6
    # 3 * 4 entries for the result, as many again for what autograd adds on its way
    assert right.extra_memory is not None and 48 <= right.extra_memory <= 1024
    assert isinstance(found.pop("absent"), Unavailable)
    assert found and all(isinstance(reason, Wrong) for reason in found.values())


def test_a_wrong_row_number_is_infinitely_wrong() -> None:
    wanted = (torch.ones(2).double(), torch.tensor([3, 4]))
    assert measure.error((torch.ones(2), torch.tensor([3, 4])), wanted) == 0
    assert measure.error((torch.ones(2), torch.tensor([4, 3])), wanted) == float("inf")


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
    clock = measure.DeviceClock.__new__(measure.DeviceClock)
    clock.flush, clock.cycles = torch.ones(8), 2**20
    assert clock.seconds(lambda: said.append("run"), wait=False) == 2e-3
    assert clock.cycles == behind and not clock.flush.any()
    assert said == [part for sleep in (2**20, 2**21, 2**22) for part in (sleep, "event", "run", "event", "end")]
    said.clear()
    clock.flush.fill_(1)
    assert clock.seconds(lambda: said.append("run"), wait=True) == 2e-3
    assert said == ["idle", "event", "run", "event", "end"] and not clock.flush.any()


def run_benchmarks(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_merge.py", "--quick"]
    return subprocess.run(
        [*command, *arguments], cwd=results.ROOT, env=os.environ | more, capture_output=True, text=True
    )


def test_a_wrong_op_is_red_and_a_wrong_rival_is_published_as_wrong(tmp_path: Path) -> None:
    broken = """
from benchmarks import baselines
from cllava_fast import ops
def a_little_off(right):
    return lambda *arguments: 1.001 * right(*arguments)
ops.merge, baselines.merge_by_gather = a_little_off(ops.merge), a_little_off(baselines.merge_by_gather)
"""
    (tmp_path / "broken.py").write_text(broken)
    file = tmp_path / "here.json"
    done = run_benchmarks("-p", "broken", "-rfx", "--results", str(file), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "2 failed, 1 xfailed" in done.stdout, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["way"] for row in rows} == {"merge", "reference", "gather, addmm"}
    assert all("a wrong result has no time" in row["wrong"] and "median" not in row for row in rows)


def test_a_quick_run_from_the_command_line_to_the_report(tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    done = run_benchmarks("--results", str(file), "--threads", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    assert content["quick"] and not content["complete"]  # one op of five
    assert content["device"] == results.device_name() and content["sources"] == results.sources_digest()
    rows = {row["way"]: row for row in content["rows"]}
    assert rows.keys() >= {"merge", "gather, addmm", "reference"}
    assert all(row["median"] > 0 and row["error"] < 1e-5 and row["bytes"] > 0 for row in rows.values())
    assert [way for way, row in rows.items() if row["ours"]] == ["merge"]
    assert [way for way, row in rows.items() if row["rival"]] == ["gather, addmm"]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- end -->\nafter\n")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "**Quick run**" in text and "**Incomplete**" in text and report.STALE not in text
    for picture in report.pictures(content):
        assert f"results/here-{picture[0]}.png" in text
        assert (tmp_path / f"here-{picture[0]}.png").read_bytes().startswith(b"\x89PNG")


def made_up(device: str, **changes: Any) -> dict[str, Any]:
    def row(way: str, milliseconds: float, **more: Any) -> dict[str, Any]:
        common = {"op": "inject", "case": "small", "dtype": "bfloat16", "direction": "both", "launch": "queued"}
        timed = {"median": milliseconds / 1e3, "iqr": 1e-5, "error": 3e-3, "rounds": 9, "extra_memory": 2**20}
        return (
            common
            | {"way": way, "ours": False, "rival": False, "note": "", "bytes": 10**8, "flops": 10**9}
            | (timed | more)
        )

    rows = [
        row("frozen linear", 2.0, note="the floor"),
        row("inject", 2.5, ours=True),
        row("smart eager", 2.4, rival=True, iqr=1e-3),
        row("dense", 1.0, note="other semantics"),
    ]
    rows.append({name: rows[0][name] for name in ("op", "case", "dtype", "direction", "launch")})
    rows[-1] |= {"way": "broken", "wrong": "relative error 1"}
    where = {"date": "2026-01-02T03:04:05+00:00", "torch": "2.13.0", "cpu_threads": 1, "cpus": 2}
    return {
        "kind": results.KIND, "device": device, "commit": "0123456789abcdef", "sources": "now", "quick": False,
        "complete": True, "load": 0.1, "environment": where, "rows": rows,
    } | changes  # fmt: skip


def test_what_the_report_says() -> None:
    text = report.render({"nvidia-h200": made_up("NVIDIA H200")}, "now")
    assert "No GPU has" not in text and "NVIDIA H100 80GB HBM3" in text.split("\n\n")[0]
    assert report.STALE not in text and "Incomplete" not in text
    assert "**1 wrong results**" in text and "loses 1 of 1" in text and "1 of 4 times vary" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| small")]
    cells = [part.strip() for part in line.strip("|").split("|")]
    # against the rival that does the same, not against one that does something else
    assert cells[:2] == ["small<br>bfloat16, both, queued", "**~1.04 loses**"]
    assert cells[2:5] == ["2,500", "40", "0.4"]  # 1e8 bytes and 1e9 FLOPs in 2.5 ms
    assert [c.partition("<br>")[0] for c in cells[5:]] == ["1.00", "1.25", "~1.20", "0.50", "wrong"]
    assert cells[6].endswith("<sub>3e-03</sub>")
    assert "*dense*: other semantics." in text


def test_a_cpu_has_ratios_only_and_old_files_say_so() -> None:
    content = made_up("CPU x86_64", sources="then", complete=False)
    text = report.render({"cpu-x86-64": content}, "now")
    assert text.startswith("**No GPU has a results file") and report.STALE in text and "Incomplete" in text
    assert "2,500" not in text and "GB/s" not in text and "roofline" not in text
    assert "No device has one" in report.render({}, "now")


def test_pictures(tmp_path: Path) -> None:
    report.draw("gpu", made_up("NVIDIA H200"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "gpu-inject-time.png", "gpu-inject-memory.png", "gpu-roofline.png",
    }  # fmt: skip


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "native_cpu.json").write_text('{"rows": []}')
    results.write(made_up("NVIDIA H200"), tmp_path / results.file_name("NVIDIA H200"))
    results.write(made_up("CPU x86_64"), tmp_path / results.file_name("CPU x86_64"))
    assert list(results.read_all(tmp_path)) == ["nvidia-h200", "cpu-x86-64"]


def test_the_readme_shows_the_results_files() -> None:
    found = results.read_all(results.FOLDER)
    text = report.README.read_text(encoding="utf-8")

    def settled(text: str) -> str:
        return text.replace(f"{report.STALE}\n\n", "")  # which every change of the ops brings about

    filled = report.fill(text, report.render(found, results.sources_digest()))
    assert settled(text) == settled(filled), "run: make report"
    for stem, content in found.items():
        for name, _ in report.pictures(content):
            assert (results.FOLDER / f"{stem}-{name}.png").is_file(), "run: make report"
