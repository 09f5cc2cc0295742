"""Builds the native libraries; everything else is declared in pyproject.toml.

Two plain shared libraries, free of Python's version, on torch's stable ABI (2.11 or newer):
`_native_cpu.so` (schemas and CPU kernels, by the C++ compiler) and `_native_cuda.so` (CUDA kernels, by nvcc). Without
a compiler, ninja or torch they are left out, and the library runs without them; `cllava-fast env` says so.

    CLLAVA_BUILD_CUDA      auto (default): where nvcc is found and torch has CUDA; 1: or fail; 0: never;
                           emulated: the CUDA kernels for the CPU, which is how tests run them without a GPU
    TORCH_CUDA_ARCH_LIST   such as "8.0;9.0a+PTX" (default: "8.0+PTX;9.0a")
    MAX_JOBS, CXX, NVCC    processes at once, the compilers
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "native"  # kept, so that a second build compiles what changed
CPU, CUDA = "cllava_fast._native_cpu", "cllava_fast._native_cuda"
EMULATED = "cllava_fast._native_cuda_emulated"
ARCHITECTURES = "8.0+PTX;9.0a"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11


def main() -> None:
    extensions = []
    missing = missing_for_cpu()
    wanted = os.environ.get("CLLAVA_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1", "emulated"):
        sys.exit(f"CLLAVA_BUILD_CUDA: expected auto, 0, 1 or emulated, got {wanted!r}")
    if missing is None:
        # optional: where a compiler fails, the pure Python installation still works
        extensions.append(Extension(CPU, sources("cpu"), optional=wanted in ("auto", "0")))
    else:
        print(f"cllava_fast: no native library is built: {missing}", file=sys.stderr)
    if wanted in ("auto", "1"):
        missing = missing or missing_for_cuda(wanted)
    if missing and wanted == "1":
        sys.exit(f"CLLAVA_BUILD_CUDA=1, but {missing}")
    if wanted != "0" and missing is None:
        extensions.append(Extension(EMULATED if wanted == "emulated" else CUDA, sources("cuda")))
    elif wanted != "0":
        print(f"cllava_fast: the CUDA library is not built: {missing}", file=sys.stderr)
    setup(ext_modules=extensions, cmdclass={"build_ext": NativeBuild, "bdist_wheel": AnyPython})


def sources(device: str) -> list[str]:
    folder = ROOT / "csrc" / device
    return sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.c*") if path.suffix in (".cpp", ".cu"))


def missing_for_cpu() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} is not Linux"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch cannot be imported: install it first, and run pip with --no-build-isolation"
    if ninja() is None:
        return "ninja is missing (pip install ninja)"
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    return None if shutil.which(compiler) else f"the C++ compiler {compiler!r} is missing (or name one with CXX=...)"


def missing_for_cuda(wanted: str) -> str | None:
    if shutil.which(nvcc()) is None:
        return f"{nvcc()!r} is not found: put the CUDA toolkit's bin folder on PATH, or set NVCC or CUDA_HOME"
    import torch

    if wanted == "auto" and torch.version.cuda is None:
        return "this torch has no CUDA (CLLAVA_BUILD_CUDA=1 builds all the same)"
    return None


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")


def ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")


def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST."""
    flags = []
    for name in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES):
        found = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if found is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 8.6+PTX, got {name!r}")
        number = found[1] + found[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def command(words: Sequence[object]) -> str:
    return shlex.join(str(word) for word in words).replace("$", "$$")


def path(name: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(name))


class NativeBuild(build_ext):
    """Each extension is a plain shared library, made by ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        import torch

        headers = Path(torch.__file__).parent / "include"
        libraries = Path(torch.__file__).parent / "lib"
        host = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
        compilers = {
            "cxx": [*shlex.split(os.environ.get("CXX", "g++")), *host, "-Wall", "-Wno-psabi"],
            "nvcc": [nvcc(), "-O3", "-std=c++17", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden"],
        }
        rule = "nvcc" if ext.name == CUDA else "cxx"
        if rule == "nvcc":
            compilers["nvcc"] += ["-x", "cu", *architectures()]
        elif ext.name == EMULATED:
            compilers["cxx"] += ["-Wno-unknown-pragmas", "-Wno-unused-variable", "-DCLLAVA_EMULATED", "-x", "c++"]
            compilers["cxx"] += ["-fno-strict-aliasing", "-ffp-contract=off"]  # as nvcc reads the same code
            compilers["cxx"] += ["-I", ROOT / "tests" / "cuda_emulator"]
        name = ext.name.rpartition(".")[2]
        flags = [*compilers[rule], STABLE_ABI, "-isystem", headers]
        link = [f"-L{libraries}", "-ltorch_cpu", "-ldl"]
        linker = compilers[rule][0]
        objects = {source: f"{name}/{Path(source).stem}.o" for source in ext.sources}
        lines = [
            f"rule compile\n  command = {command(flags)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {command([linker, '-shared'])} $in {command(link)} -o $out",
            *(f"build {made}: compile {path(ROOT / source)}" for source, made in objects.items()),
            f"build {name}.so: link {' '.join(objects.values())}",
        ]
        (BUILD / name).mkdir(parents=True, exist_ok=True)
        plan = BUILD / f"{name}.ninja"
        plan.write_text("\n".join(lines) + "\n", encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        tool = ninja()
        assert tool is not None
        done = subprocess.run([tool, *jobs, "-C", str(BUILD), "-f", plan.name])
        if done.returncode:
            raise CompileError(f"{name}.so: the compiler failed; its messages are above (pip shows them with -v)")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(BUILD / f"{name}.so", target)


class AnyPython(bdist_wheel):
    """The libraries bind to torch, not to Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


main()
