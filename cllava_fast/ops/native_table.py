"""The built CUDA library's kernels: registers, spills and shared memory of each, for every chip that it was built for.

`python -m cllava_fast.ops.native_table [LIBRARY]`; needs no GPU. Exits with 1 if a kernel spills.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cllava_fast.ops.kernel_table import Row, cuobjdump, print_table, problems

LIBRARY = Path(__file__).resolve().parents[1] / "_native_cuda.so"
ARCH = re.compile(r"^arch = sm_(\d+)", re.M)
KERNEL = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def rows(library: Path) -> list[Row]:
    command = [cuobjdump(), "--dump-resource-usage", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = []
    for part in re.split(r"^Fatbin elf code:", text, flags=re.M)[1:]:
        arch = ARCH.search(part)
        assert arch is not None
        for name, registers, stack, shared, local in KERNEL.findall(part):
            kernel, configuration = _plain(name)
            spilled = int(stack) + int(local)
            found.append(Row("native", kernel, configuration, int(arch[1]), int(registers), spilled, int(shared), "-"))
    return sorted(found)


def _plain(mangled: str) -> tuple[str, str]:
    """Name and template arguments, from what the compiler calls the kernel."""
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    if demangler is None:
        return mangled, ""
    plain = subprocess.run([demangler, mangled], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+)(?:<([^(]*(?:\(int\)[^(]*)*)>)?\((?!anonymous)", plain)
    if found is None:
        return mangled, ""
    arguments = (found[2] or "").replace("(int)", "")
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        arguments = arguments.replace(long, short)
    return found[1], arguments


def main(arguments: Sequence[str]) -> int:
    library = Path(arguments[0]) if arguments else LIBRARY
    if not library.exists():
        print(f"{library} is not built: python csrc/build.py cuda", file=sys.stderr)
        return 2
    every = rows(library)
    print_table(every)
    bad = [row for row in every if problems(row)]
    chips = ", ".join(f"sm_{arch}" for arch in sorted({row.arch for row in every}))
    print(f"{len(every)} compiled for {chips}, {len(bad)} problems")
    return 1 if bad or not every else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
