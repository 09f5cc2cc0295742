"""Every Triton kernel as it is launched, compiled ahead of time: `python -m cllava_fast.ops.kernel_table`.

Needs no GPU. Exits with 1 if a kernel does not compile, spills, needs more shared memory than the smallest chip has, or
claims tensor cores that its code does not use.

Pointers and sizes are taken to be multiples of 16, as those of large models are; `--odd` takes them to be anything.
`--quick`, for the tests, compiles each for one chip alone. `--arch` may name any of `ARCHS`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from cllava_fast import ops
from cllava_fast.ops import triton_backend
from cllava_fast.ops.triton_backend import Shipped

ARCHS = (80, 86, 89, 90, 100, 120)  # of each generation from LOWEST_CAPABILITY on
# Bytes of shared memory that one block may have on the smallest of them (86, 89, 120). No configuration needs more, on
# any chip, so that a GPU that nobody has tried can launch them all; 80 itself has 163 KiB, 90 and 100 have 227.
SHARED_LIMIT = 99 * 1024
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
ALIGNED = [["tt.divisibility", 16]]


class Task(NamedTuple):
    op: str
    module: str
    position: int  # in the module's shipped()
    arch: int
    odd: bool


class Row(NamedTuple):
    op: str
    kernel: str
    configuration: str
    arch: int
    registers: int
    spilled: int  # bytes of each thread's local memory: spills and whatever else did not fit its registers
    shared: int  # bytes
    tensor_cores: str  # "yes" or "no" where the kernel claims them, else "-"
    error: str = ""


def problems(row: Row) -> list[str]:
    found = [row.error] if row.error else []
    if row.spilled:
        found.append(f"spills {row.spilled} bytes")
    if row.shared > SHARED_LIMIT:
        found.append(f"needs {row.shared} bytes of shared memory, the smallest chips have {SHARED_LIMIT}")
    if row.tensor_cores == "no":
        found.append("claims tensor cores, but has no mma instruction")
    return found


def shipping_modules() -> dict[str, str]:
    """Name of each module that has a `shipped()` -> its op."""
    found = {}
    for folder in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        if not folder.ispkg:
            continue
        package = importlib.import_module(folder.name)
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if info.name.rpartition(".")[2].startswith("triton"):
                if hasattr(importlib.import_module(info.name), "shipped"):
                    found[info.name] = folder.name.rpartition(".")[2]
    return found


def tasks(archs: Sequence[int], odd: bool = False, quick: bool = False) -> list[Task]:
    found = []
    for module, op in shipping_modules().items():
        seen = set()
        for i, shipped in enumerate(importlib.import_module(module).shipped()):
            key = repr((shipped.kernel.__name__, *shipped[1:]))
            if key not in seen:
                # the same chip in every run, but not the same one for all neighbours
                wanted = [archs[zlib.crc32(key.encode()) % len(archs)]] if quick else archs
                found += [Task(op, module, i, arch, odd) for arch in wanted]
            seen.add(key)
    return found


def compile_one(task: Task) -> Row:
    shipped = importlib.import_module(task.module).shipped()[task.position]
    name, configuration = shipped.kernel.__name__, _describe(shipped)
    try:
        compiled = _compile(shipped, task.arch, task.odd)
        registers, spilled = _resources(compiled.asm["cubin"])
    except Exception as e:
        return Row(task.op, name, configuration, task.arch, 0, 0, 0, "-", f"does not compile: {e!r}")
    used = "yes" if TENSOR_CORES.search(compiled.asm["ptx"]) else "no"
    claimed = used if shipped.tensor_cores else "-"
    return Row(task.op, name, configuration, task.arch, registers, spilled, compiled.metadata.shared, claimed)


def _compile(shipped: Shipped, arch: int, odd: bool) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = shipped.kernel.arg_names
    known = shipped.signature.keys() | shipped.constants.keys()
    if known != set(names):
        raise TypeError(f"shipped() gives {sorted(known)}, the kernel takes {sorted(names)}")
    signature = {name: shipped.signature.get(name, "constexpr") for name in names}
    whole = [i for i, name in enumerate(names) if signature[name].startswith(("*", "i"))]
    source = ASTSource(
        fn=shipped.kernel,
        signature=signature,
        constexprs=shipped.constants,
        attrs={} if odd else {(i,): ALIGNED for i in whole},
    )
    options = {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages, **shipped.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of each thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def cuobjdump() -> str:
    """The CUDA toolkit's, or the one that triton brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        from triton import knobs

        found = str(knobs.nvidia.cuobjdump.path)
    return found


def _describe(shipped: Shipped) -> str:
    types = [kind.strip("*") for kind in shipped.signature.values() if kind.startswith(("*fp", "*bf"))]
    constants = [
        f"no {name}" if value is None else f"{name}={int(value) if isinstance(value, bool) else value}"
        for name, value in shipped.constants.items()
    ]
    kinds = "/".join(dict.fromkeys(types))
    return " ".join([kinds, *constants, f"warps={shipped.num_warps}", f"stages={shipped.num_stages}"])


def print_table(rows: Sequence[Row]) -> None:
    """A plain table: what compiles kernels needs no more than torch and triton."""
    head = ("op", "kernel", "arch", "registers", "spill bytes", "shared bytes", "tensor cores", "configuration")
    lines = [head]
    for row in rows:
        figures = (f"{row.registers:,}", f"{row.spilled:,}", f"{row.shared:,}", row.tensor_cores)
        lines.append((row.op, row.kernel, f"sm_{row.arch}", *figures, row.configuration))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    for line in lines:
        texts, figures = line[:3], line[3:-1]
        cells = [text.ljust(width) for text, width in zip(texts, widths, strict=False)]
        cells += [figure.rjust(width) for figure, width in zip(figures, widths[3:], strict=True)]
        print("  ".join([*cells, line[-1]]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cllava_fast.ops.kernel_table", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=ARCHS)
    parser.add_argument("--odd", action="store_true", help="pointers and sizes of any alignment")
    parser.add_argument("--quick", action="store_true", help="each configuration for one of the chips only")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)"
    )
    chosen = parser.parse_args(arguments)
    if triton_backend.INTERPRETED:
        print("kernel_table compiles kernels: unset TRITON_INTERPRET, which replaces them", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed (pip install triton)", file=sys.stderr)
        return 2
    every = tasks(chosen.arch, chosen.odd, chosen.quick)
    # forked, so that no worker imports torch again
    with ProcessPoolExecutor(max(1, chosen.jobs), mp_context=multiprocessing.get_context("fork")) as pool:
        rows = list(pool.map(compile_one, every))
    print_table(rows)
    bad = [(row, problem) for row in rows for problem in problems(row)]
    for row, problem in bad:
        print(f"{row.op} {row.kernel} [{row.configuration}] sm_{row.arch}: {problem}", file=sys.stderr)
    print(f"{len(rows)} compiled for {', '.join(f'sm_{arch}' for arch in chosen.arch)}, {len(bad)} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
