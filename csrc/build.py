"""Builds the native libraries into cllava_fast/: `python csrc/build.py [--if-possible] [cpu] [cuda] [emulated]`.

Plain shared libraries on torch's stable ABI (2.11 or newer), free of Python's version: `_native_cpu.so` (schemas and
CPU kernels, by the C++ compiler), `_native_cuda.so` (CUDA kernels, by nvcc), and `_native_cuda_emulated.so` (the same
kernels for the CPU, by the C++ compiler, which is how tests run them without a GPU). Needs torch and the compilers
alone; with ninja only what changed is compiled again. Without a compiler that is an error, or with --if-possible a line
that says so; a compiler that fails is an error always. setup.py calls this.

    TORCH_CUDA_ARCH_LIST         such as "8.0;9.0a+PTX" (default: "8.0+PTX;9.0a")
    MAX_JOBS                     processes at once
    CXX, NVCC or CUDA_HOME       the compilers, where they are not on PATH
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "native"  # kept, so that a second build compiles what changed
LIBRARIES = {"cpu": "_native_cpu", "cuda": "_native_cuda", "emulated": "_native_cuda_emulated"}
ARCHITECTURES = "8.0+PTX;9.0a"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
HOST = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# as nvcc reads the same code: no alias rules, no products fused but those that say so
EMULATION = [
    "-Wno-unknown-pragmas", "-Wno-unused-variable", "-DCLLAVA_EMULATED", "-x", "c++", "-fno-strict-aliasing",
    "-ffp-contract=off", "-I", str(ROOT / "tests" / "cuda_emulator"),
]  # fmt: skip


class BuildError(RuntimeError):
    """A compiler failed, or is not there."""


def sources(kind: str) -> list[Path]:
    folder = ROOT / "csrc" / ("cpu" if kind == "cpu" else "cuda")
    return sorted(path for path in folder.glob("*.c*") if path.suffix in (".cpp", ".cu"))


def missing(kind: str) -> str | None:
    """Why a library cannot be built here, or None."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} is not Linux"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch cannot be imported: install it first, and run pip with --no-build-isolation"
    if shutil.which(cxx()[0]) is None:
        return f"the C++ compiler {cxx()[0]!r} is missing (or name one with CXX=...)"
    if kind == "cuda" and shutil.which(nvcc()) is None:
        return f"{nvcc()!r} is not found: put the CUDA toolkit's bin folder on PATH, or set NVCC or CUDA_HOME"
    return None


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else None)
    usual = "/usr/local/cuda/bin/nvcc"
    return named or (usual if shutil.which("nvcc") is None and shutil.which(usual) else "nvcc")


def ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")


def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST."""
    flags = []
    for name in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES):
        found = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if found is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 8.6+PTX, got {name!r}")
        number = found[1] + found[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def most_jobs() -> int | None:
    """MAX_JOBS, or None."""
    given = os.environ.get("MAX_JOBS")
    if not given:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise BuildError(f"MAX_JOBS: expected a number from 1 on, got {given!r}")
    return int(given)


def build(kind: str) -> Path:
    """Compiles what changed and links; the library's path, under build/native."""
    import torch

    reason = missing(kind)
    if reason is not None:
        raise BuildError(f"{LIBRARIES[kind]}.so is not built: {reason}")
    installed = Path(torch.__file__).parent
    if kind == "cuda":
        compiler = [nvcc(), "-O3", "-std=c++17", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "-x", "cu"]
        compiler += architectures()
        linker = [nvcc(), "-shared", *architectures()]
    else:
        compiler = [*cxx(), *HOST, *(EMULATION if kind == "emulated" else [])]
        linker = [*cxx(), "-shared"]
    schemas = zlib.crc32((ROOT / "csrc" / "schemas.h").read_bytes())
    compiler += [STABLE_ABI, f"-DCLLAVA_SCHEMAS={schemas}u", "-isystem", str(installed / "include")]
    libraries = [f"-L{installed / 'lib'}", "-ltorch_cpu", "-ldl"]
    name = LIBRARIES[kind]
    (BUILD / name).mkdir(parents=True, exist_ok=True)
    objects = {source: f"{name}/{source.stem}.o" for source in sources(kind)}
    if ninja():
        _with_ninja(name, compiler, linker, libraries, objects)
    else:
        _without_ninja(name, compiler, linker, libraries, objects)
    return BUILD / f"{name}.so"


def _with_ninja(
    name: str, compiler: list[str], linker: list[str], libraries: list[str], objects: dict[Path, str]
) -> None:
    def path(text: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(text))

    def command(words: Sequence[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [
        f"rule compile\n  command = {command(compiler)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {command(linker)} $in {command(libraries)} -o $out",
        *(f"build {made}: compile {path(source)}" for source, made in objects.items()),
        f"build {name}.so: link {' '.join(objects.values())}",
    ]
    (BUILD / f"{name}.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    most = most_jobs()
    jobs = [] if most is None else ["-j", str(most)]
    tool = ninja()
    assert tool is not None
    if subprocess.run([tool, *jobs, "-C", str(BUILD), "-f", f"{name}.ninja"]).returncode:
        raise BuildError(f"{name}.so: the compiler failed; its messages are above (pip shows them with -v)")


def _without_ninja(
    name: str, compiler: list[str], linker: list[str], libraries: list[str], objects: dict[Path, str]
) -> None:
    def run(words: Sequence[str]) -> None:
        done = subprocess.run(words, cwd=BUILD, capture_output=True, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            raise BuildError(f"{name}.so: the compiler failed; its messages are above (pip shows them with -v)")

    with ThreadPoolExecutor(most_jobs() or os.cpu_count() or 1) as pool:
        list(pool.map(lambda item: run([*compiler, "-c", str(item[0]), "-o", item[1]]), objects.items()))
    run([*linker, *objects.values(), *libraries, "-o", f"{name}.so"])


def main(arguments: Sequence[str]) -> int:
    kinds = [name for name in arguments if name != "--if-possible"]
    unknown = set(kinds) - LIBRARIES.keys()
    if unknown:
        print(f"unknown {', '.join(sorted(unknown))}: expected some of {', '.join(LIBRARIES)}", file=sys.stderr)
        return 2
    for kind in kinds or ("cpu",):
        reason = missing(kind)
        if reason is not None and "--if-possible" in arguments:
            print(f"{LIBRARIES[kind]}.so is not built: {reason}", file=sys.stderr)
            continue
        try:
            target = ROOT / "cllava_fast" / f"{LIBRARIES[kind]}.so"
            # a new file, not the old one's bytes: a process may have that one mapped
            shutil.copy2(build(kind), f"{target}.new")
            os.replace(f"{target}.new", target)
        except BuildError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
