"""csrc/cuda compiled ahead of time by nvcc: registers, spills and shared memory of each kernel. Needs no GPU.

`python -m cllava_fast.ops.native_table` prints them, and exits with 1 if a kernel does not compile or spills.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cllava_fast.ops.kernel_table import Row, problems

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
TARGETS = {80: "80", 90: "90a"}  # number in a Row -> what nvcc is asked for
FLAGS = ("-O3", "-std=c++17", "-Xptxas", "-v")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def nvcc() -> str | None:
    return shutil.which("nvcc")


def rows(jobs: int = 1) -> list[Row]:
    """Every kernel of csrc/cuda for every target; about a minute on one core."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found: add the CUDA toolkit's bin folder to PATH")
    sources = sorted(SOURCES.glob("*.cu"))
    if not sources:
        raise RuntimeError(f"there are no kernels in {SOURCES}: run this in a checkout of the source tree")
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return [row for found in pool.map(lambda source: _compile(compiler, source), sources) for row in found]


def _compile(compiler: str, source: Path) -> list[Row]:
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in TARGETS.values()]
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *FLAGS, *targets, "-c", str(source), "-o", f"{folder}/object.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        error = f"does not compile: {done.stderr[-2000:]}"
        return [Row(source.stem, "", "", arch, 0, 0, 0, "-", error) for arch in TARGETS]
    return list(_parse(source.stem, done.stdout + done.stderr))


def _parse(op: str, text: str) -> Iterator[Row]:
    for found in KERNEL.finditer(text):
        kernel, configuration = _name(found["name"])
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        spilled = int(found["stack"]) or int(found["stores"]) + int(found["loads"])
        yield Row(
            op, kernel, configuration, int(found["arch"]), int(found["registers"]), spilled,
            int(shared[1]) if shared else 0, "-",
        )  # fmt: skip


def _name(mangled: str) -> tuple[str, str]:
    """Name and template arguments, from what the compiler calls the kernel."""
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    if demangler is None:
        return mangled, ""
    plain = subprocess.run([demangler, mangled], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+)(?:<([^(]*)>)?\((?!anonymous)", plain)
    if found is None:
        return mangled, ""
    arguments = (found[2] or "").replace("(int)", "")
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        arguments = arguments.replace(long, short)
    return found[1], arguments


def main() -> int:
    every = rows()
    for row in every:
        print(
            f"{row.op:16} {row.kernel:18} {row.configuration:16} sm_{row.arch} {row.registers:4} {row.shared:6}", end=""
        )
        print("  " + "; ".join(problems(row)))
    bad = sum(bool(problems(row)) for row in every)
    print(f"{len(every)} compiled for {', '.join(f'sm_{name}' for name in TARGETS.values())}, {bad} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
