"""Everything that can be checked on a machine with a GPU, in one go: ``make gpu PY=python3 OUT=runs/gpu``.

Needs that machine's own Python with torch >= 2.11, triton >= 3.6, transformers and pytest; installs nothing. Each step
runs in a process of its own under a time limit, and one that fails or hangs does not stop the others; the tests run
side by side, and with pytest-xdist on several cores each, since most of their time goes into compiling. The benchmarks
have the machine to themselves, and time whole models before the ops. OUT gets a log for each step, env.json, the JUnit
files of the tests, and summary.json.
All of it ends within eight minutes: no step runs longer than what is left of them, whatever its own limit. Three run
only when named (--steps build tune cpu): `tune` (`make tune`), which takes what is left, `cpu`, the native kernels of
that machine's CPU beside PyTorch's, and `initcheck`, whose log is to be looked at.

Exits with 1 if a step failed, with 2 if there is no CUDA device and a step that was asked for needs one.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from csrc import build as csrc_build  # noqa: E402

MINUTES = 8  # for all steps together
PATIENCE = 10  # seconds that a step has to write down what it has once its time is over
GRACE = 10 + PATIENCE  # seconds of those minutes that no step gets: to start, to stop the last one, to print the table
GOOD = ("passed", "not run")
CAPTURED = "tests/test_gpu_model.py::test_decoding_is_replayed_as_a_graph"  # compiles, which takes longest


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: int  # at most
    gpu: bool = True
    missing: str = ""  # why it cannot run here
    junit: str = ""  # file in OUT
    variables: dict[str, str] = {}
    beside: bool = False  # runs beside its neighbours that do
    named: bool = False  # runs only if named
    spare: int = 0  # seconds before its limit after which it begins nothing, as --minutes tells it


class Verdict(NamedTuple):
    step: str
    verdict: str  # passed, failed, timed out, not run
    seconds: float
    detail: str  # what failed, or counts


def steps(out: Path, soak_minutes: float = 1.5) -> list[Step]:
    def installed(module: str) -> bool:
        return importlib.util.find_spec(module) is not None

    python = sys.executable
    pytest = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    # of each of the five largest steps, which run beside each other
    workers = min(3, (os.cpu_count() or 1) // 5) if installed("xdist") else 0
    no_pytest = "" if installed("pytest") else "pytest is not installed"
    op_tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_op*.py")}
    op_tests = sorted(op_tests - {"tests/test_ops_gpu.py"} | {"tests/test_few_calls.py", "tests/test_memory.py"})

    def test(name: str, *tests: str, workers: int = workers) -> Step:
        junit = f"{name}.xml"
        command = [*pytest, *tests, f"--junitxml={out / junit}", *(["-n", str(workers)] if workers > 1 else [])]
        return Step(name, command, 240, missing=no_pytest, junit=junit, beside=True)

    found = [
        Step(
            "build", [python, "csrc/build.py", "cpu", "cuda"], 180, gpu=False,
            missing=csrc_build.missing("cuda") or "",
        ),
        Step("environment", [python, "tests/gpu.py", "--environment", str(out / "env.json")], 60, gpu=False),
        # graphs, streams, memory: what only a GPU shows
        test("gpu-only", "tests/test_ops_gpu.py", workers=0),
        test("model", "tests/test_gpu_model.py", f"--deselect={CAPTURED}", workers=0),
        test("graph", CAPTURED, workers=0),
        # a kernel that breaks the device's context must not take the other backends with it
        test("native", *op_tests, "-k", "cuda or cpu"),
        test("select", *op_tests, "-k", "triton and select"),
        test("aggregate", *op_tests, "-k", "triton and (aggregate or mix) and not select"),
        test("inject", *op_tests, "-k", "triton and not (select or aggregate or mix)"),
        test("reference", *op_tests, "-k", "not (triton or cuda or cpu)"),
        Step(
            "soak",
            [python, "-m", "benchmarks.soak", f"--minutes={soak_minutes}", f"--out={out / 'soak.json'}", "--docs="],
            int(60 * soak_minutes) + 60, beside=True,
        ),
    ]  # fmt: skip
    sanitizer = shutil.which("compute-sanitizer")
    missing = "" if sanitizer else "compute-sanitizer is not on PATH"
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", "1", python, "tests/every_kernel.py"]
        # without torch's cache every tensor is an allocation of its own, whose bounds the tools can see
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Step(tool, command, 180, missing=missing, variables=variables, beside=True))
    # libraries other than ours read uninitialised memory now and then: a log to look at, no verdict
    command = [sanitizer or "", "--tool", "initcheck", python, "tests/every_kernel.py"]
    found.append(Step("initcheck", command, 180, missing=missing, beside=True, named=True))
    found.append(
        Step(
            "benchmarks",
            [
                # what the ops bring to a whole model first: the time may not last
                *pytest, "benchmarks", "--first=generate", "--first=step",
                f"--junitxml={out / 'benchmarks.xml'}", f"--results={out / 'benchmarks.json'}",
            ],
            340, missing=no_pytest, junit="benchmarks.xml",
        )
    )  # fmt: skip
    command = [python, "benchmarks/native_cpu.py", f"--output={out / 'native_cpu.json'}"]
    found.append(Step("cpu", command, 120, gpu=False, named=True))
    command = [python, "-m", "benchmarks.tune", f"--out={out / 'tuned.json'}"]
    no_triton = "" if installed("triton") else "triton is not installed"
    found.append(Step("tune", command, 3600, missing=no_triton, named=True, spare=90))
    return found


def changes_what_runs(variable: str) -> bool:
    return variable == "TRITON_INTERPRET" or (variable.startswith("CLLAVA_") and variable != "CLLAVA_TEST_SEED")


def run_step(step: Step, out: Path, seconds: float) -> Verdict:
    if step.missing:
        return Verdict(step.name, "not run", 0.0, step.missing)
    limit = min(step.seconds, seconds)
    if limit < 5 + step.spare:
        return Verdict(step.name, "timed out", 0.0, "no time was left for it")
    command = [*step.command, f"--minutes={(limit - step.spare) / 60:.2f}"] if step.spare else step.command
    if step.junit:
        (out / step.junit).unlink(missing_ok=True)
    variables = {
        **{name: value for name, value in os.environ.items() if not changes_what_runs(name)},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **step.variables,
    }  # fmt: skip
    log = out / f"{step.name}.log"
    begin = time.monotonic()
    said = ""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code, said = None, last_line(log)
        finally:  # and all that it started
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)  # pytest writes down what it has
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    took = time.monotonic() - begin
    counts, failed = read_junit(out / step.junit) if step.junit and (out / step.junit).is_file() else ("", [])
    if code is None:
        detail = ", ".join([counts, *failed[:3]] if counts else [said])
        return Verdict(step.name, "timed out", took, f"stopped after {limit:.0f} s: {detail}")
    if code != 0:
        detail = ", ".join([counts, *failed[:3]] if counts else [f"exit {code}", last_line(log)])
        return Verdict(step.name, "failed", took, detail)
    return Verdict(step.name, "passed", took, counts or last_line(log))


def read_junit(path: Path) -> tuple[str, list[str]]:
    """ "12 passed, 1 failed, 3 skipped", and the names of what failed."""
    failed, skipped, every = [], 0, 0
    for case in ElementTree.parse(path).iter("testcase"):
        every += 1
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(str(case.get("name")))
        elif case.find("skipped") is not None:
            skipped += 1
    return f"{every - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped", failed


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1])[:160] if lines else "it printed nothing"


def run(chosen: Sequence[Step], out: Path, minutes: float) -> int:
    out.mkdir(parents=True, exist_ok=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background, and then in each step
        signal.signal(signal.SIGINT, signal.default_int_handler)
    deadline = time.monotonic() + 60 * minutes - GRACE
    verdicts: list[Verdict] = []
    for _, group in itertools.groupby(enumerate(chosen), lambda item: -1 if item[1].beside else item[0]):
        together = [step for _, step in group]
        print(f"{', '.join(step.name for step in together)} ...", flush=True)
        with ThreadPoolExecutor(len(together)) as pool:
            verdicts += pool.map(lambda step: run_step(step, out, deadline - time.monotonic()), together)
        # after each step, so that a machine that is taken away leaves what was found
        summary = [verdict._asdict() | {"log": f"{verdict.step}.log"} for verdict in verdicts]
        (out / "summary.json").write_text(json.dumps({"steps": summary}, indent=1) + "\n")
    print(f"\n{'step':<12} {'verdict':<10} {'seconds':>7}  what")
    for verdict in verdicts:
        print(f"{verdict.step:<12} {verdict.verdict:<10} {verdict.seconds:>7.1f}  {verdict.detail}")
    print(f"logs and results: {out}")
    return 0 if all(verdict.verdict in GOOD for verdict in verdicts) else 1


def write_environment(path: Path) -> int:
    """Versions, the device, and which backend runs each op; 1 where there is a GPU that the kernels cannot use."""
    import torch

    from cllava_fast.environment import environment
    from cllava_fast.ops import dispatch, native, triton_backend

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    rows = [row._asdict() for row in dispatch.table()]
    found = {**environment(), "commit": commit or None, "backends": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        if name != "backends":
            print(f"{name}: {value}")
    for row in rows:
        print(f"{row['op']} on {row['backend']}: {row['reason']}")
    refusal = triton_backend.usable()
    device = found["gpu"] or "no CUDA device"
    print(f"native CUDA kernels: {native.cuda_usable() or 'usable'}")
    print(f"{device}, torch {found['torch']}, triton {found['triton']}; kernels: {refusal or 'usable'}")
    return 1 if torch.cuda.is_available() and (refusal or native.cuda_usable()) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these (default: all but initcheck, tune, cpu)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of them (default: %(default)s)")
    parser.add_argument("--soak-minutes", type=float, default=1.5, help="of the step soak (default: %(default)s)")
    parser.add_argument("--environment", type=Path, metavar="FILE", help="only write versions and device to FILE")
    given = parser.parse_args(arguments)
    if given.environment:
        return write_environment(given.environment)
    out = given.out.resolve()
    every = steps(out, given.soak_minutes)
    names = [step.name for step in every]
    unknown = set(given.steps or ()) - set(names)
    if unknown:
        parser.error(f"unknown steps {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    chosen = [step for step in every if (step.name in given.steps if given.steps else not step.named)]
    import torch

    if any(step.gpu for step in chosen) and not torch.cuda.is_available():
        bare = " ".join(step.name for step in every if not step.gpu)
        print(
            f"there is no CUDA device that torch {torch.__version__} can use; without one: --steps {bare}",
            file=sys.stderr,
        )
        return 2
    return run(chosen, out, given.minutes)


if __name__ == "__main__":
    sys.exit(main())
