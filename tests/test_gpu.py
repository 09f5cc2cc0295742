"""`make gpu` itself, with steps that need no GPU: verdicts, time limits, what it leaves behind, when it refuses."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cllava_fast.ops import triton_backend
from cllava_fast.ops.kernel_table import shipping_modules
from tests import every_kernel, gpu

PYTHON = [sys.executable, "-c"]


def test_environment_of_this_machine(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/gpu.py", "--steps", "environment", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=gpu.ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "env.json").read_text())
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"gpu", "capability", "cuda", "triton", "commit"} < found.keys()
    assert {row["op"] for row in found["backends"]} >= {"select", "aggregate", "inject"}
    (step,) = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert step["step"] == "environment" and step["verdict"] == "passed"
    assert "passed" in done.stdout and str(tmp_path / "out") in done.stdout


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "test_it.py").write_text("def test_good(): pass\n\ndef test_bad(): assert 0\n")
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wanted = [
        gpu.Step("fails", [*PYTHON, "print('the reason'); raise SystemExit(3)"], 60),
        gpu.Step("hangs", [*PYTHON, "import time; print('begun', flush=True); time.sleep(600)"], 6),
        gpu.Step("absent", ["/nowhere"], 60, missing="not here"),
        gpu.Step(
            "tests", [*pytest_command, str(tmp_path / "test_it.py"), f"--junitxml={tmp_path / 'tests.xml'}"], 60,
            junit="tests.xml",
        ),
        gpu.Step("passes", [*PYTHON, "import os; print(os.environ['A'], os.environ.get('TRITON_INTERPRET'))"], 60,
                 variables={"A": "b"}),
    ]  # fmt: skip
    begin = time.monotonic()
    assert gpu.run(wanted, tmp_path, minutes=1) == 1
    assert time.monotonic() - begin < 60
    steps = {step["step"]: step for step in json.loads((tmp_path / "summary.json").read_text())["steps"]}
    assert {name: step["verdict"] for name, step in steps.items()} == {
        "fails": "failed", "hangs": "timed out", "absent": "not run", "tests": "failed", "passes": "passed",
    }  # fmt: skip
    assert steps["fails"]["detail"] == "exit 3, the reason" and "begun" in steps["hangs"]["detail"]
    assert steps["tests"]["detail"] == "1 passed, 1 failed, 0 skipped, test_bad"
    assert steps["passes"]["detail"] == "b None"
    assert (tmp_path / "passes.log").read_text() == "b None\n"
    assert "test_bad" in capsys.readouterr().out


def test_a_step_runs_as_if_nobody_had_set_anything_but_the_seed(tmp_path: Path, monkeypatch) -> None:
    for name in ("CLLAVA_BACKEND", "CLLAVA_EMULATE_CUDA", "CLLAVA_TUNED", "CLLAVA_CPU_LEVEL", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CLLAVA_TEST_SEED", "7")
    said = "import os; print(*sorted(name for name in os.environ if name.startswith(('CLLAVA_', 'TRITON_INT'))))"
    assert gpu.run([gpu.Step("tells", [*PYTHON, said], 60)], tmp_path, minutes=1) == 0
    assert (tmp_path / "tells.log").read_text() == "CLLAVA_TEST_SEED\n"


def test_a_step_hears_that_its_time_is_over_in_the_background_too(tmp_path: Path) -> None:
    hears = """import time
try:
    time.sleep(99)
except KeyboardInterrupt:
    print("heard", flush=True)"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has what it starts with &
    try:
        assert gpu.run([gpu.Step("hears", [*PYTHON, hears], 5)], tmp_path, minutes=1) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "hears.log").read_text() == "heard\n"


def test_tuning_is_told_how_long_there_is(tmp_path: Path) -> None:
    (tune,) = (step for step in gpu.steps(tmp_path) if step.name == "tune")
    step = tune._replace(command=[*PYTHON, "import sys; print(*sys.argv[1:])"], missing="")
    for minutes in (20, 8):
        assert gpu.run([step], tmp_path, minutes) == 0
        told = float((tmp_path / "tune.log").read_text().removeprefix("--minutes="))
        assert minutes - 3 < told < minutes - 1
    assert gpu.run([step], tmp_path, minutes=1) == 1


def test_what_has_no_time_left_is_no_pass(tmp_path: Path) -> None:
    assert gpu.run([gpu.Step("late", [*PYTHON, "pass"], 60)], tmp_path, minutes=0.01) == 1
    assert gpu.run([gpu.Step("in time", [*PYTHON, "pass"], 60)], tmp_path, minutes=1) == 0


def test_it_ends_in_time_whatever_its_steps_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "PATIENCE", 1)
    monkeypatch.setattr(gpu, "GRACE", 4)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    )
    wanted = [gpu.Step(name, [*PYTHON, deaf], 60, beside=True) for name in ("one", "two")]
    begin = time.monotonic()
    assert gpu.run([*wanted, gpu.Step("late", [*PYTHON, "pass"], 60)], tmp_path, minutes=12 / 60) == 1
    assert time.monotonic() - begin < 12
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [step["verdict"] for step in steps] == ["timed out"] * 3 and steps[2]["detail"] == "no time was left for it"


def test_some_steps_run_only_when_they_are_named(tmp_path: Path, monkeypatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run", lambda steps, out, minutes: ran.extend(step.name for step in steps) or 0)
    assert gpu.main(["--out", str(tmp_path)]) == 0 and len(ran) > 8 and not {"initcheck", "tune", "cpu"} & set(ran)
    ran.clear()
    assert gpu.main(["--out", str(tmp_path), "--steps", "tune"]) == 0 and ran == ["tune"]
    assert gpu.MINUTES == 8 and gpu.GRACE > gpu.PATIENCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so(tmp_path: Path, capsys) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no CUDA device" in said and "--steps build environment" in said
    assert not (tmp_path / "out").exists()


def collected(step: gpu.Step, *more: str) -> list[str]:
    """The tests that a step would run, in order."""
    done = subprocess.run([*step.command, "--collect-only", "-qq", *more], cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_benchmarks_measure_whole_work_first(tmp_path: Path) -> None:
    (step,) = (step for step in gpu.steps(tmp_path) if step.name == "benchmarks")
    tests = collected(step, "--quick")
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    assert [Path(file).stem for file in files[:3]] == ["test_generate", "test_step", "test_inject"]
    assert len(files) == 8 and len(set(tests)) == len(tests)
    assert tests == sorted(tests, key=lambda test: files.index(test.partition("::")[0])), "a file at a time"


def test_decoding_in_a_graph_is_a_step_of_its_own(tmp_path: Path) -> None:
    steps = {step.name: step for step in gpu.steps(tmp_path)}
    graph, others = collected(steps["graph"]), collected(steps["model"])
    assert graph == [gpu.CAPTURED] and gpu.CAPTURED not in others and len(others) > 10


def test_every_step_that_it_names_exists(tmp_path: Path) -> None:
    for step in gpu.steps(tmp_path):
        files = [part for part in step.command[1:] if part.endswith(".py")]
        assert all((gpu.ROOT / file).is_file() for file in files), step


class Seen:
    """Stands for a kernel and notes that it was launched."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched, self.arg_names = kernel, launched, kernel.arg_names

    def __getitem__(self, grid):
        self.launched.add(self.kernel.__name__)
        return self.kernel[grid]


@pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on the CPU only under TRITON_INTERPRET=1")
def test_the_sanitizer_sees_every_kernel(monkeypatch) -> None:
    pytest.importorskip("triton")
    shipped, launched = set(), set()
    for name in shipping_modules():
        module = importlib.import_module(name)
        kernels = {id(configuration.kernel): configuration.kernel for configuration in module.shipped()}
        shipped |= {kernel.__name__ for kernel in kernels.values()}
        for place in (module, getattr(module, "kernels", None)):
            for attribute, value in list(vars(place).items()) if place else ():
                if id(value) in kernels:
                    monkeypatch.setattr(place, attribute, Seen(value, launched))
    every_kernel.run_all("cpu", "triton", dtypes=(torch.float32,))
    assert launched == shipped
