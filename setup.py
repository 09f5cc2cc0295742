"""Builds the native libraries by csrc/build.py; everything else is declared in pyproject.toml.

    CLLAVA_BUILD_CUDA   auto (default): the CUDA library where nvcc is found and torch has CUDA; 1: or fail; 0: never

Where something is missing or a compiler fails, the installation goes on without that library, but for
CLLAVA_BUILD_CUDA=1; `cllava-fast env` says what is not there and how to get it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def load_builder() -> Any:
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()


def main() -> None:
    wanted = os.environ.get("CLLAVA_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"CLLAVA_BUILD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    kinds = ["cpu"] if wanted == "0" else ["cpu", "cuda"]
    extensions = []
    for kind in kinds:
        reason = builder.missing(kind) or (no_cuda() if kind == "cuda" and wanted == "auto" else None)
        if reason is None:
            name = f"cllava_fast.{builder.LIBRARIES[kind]}"
            files = [str(path.relative_to(ROOT)) for path in builder.sources(kind)]
            extensions.append(Extension(name, files, optional=wanted != "1"))
        elif wanted == "1":
            sys.exit(f"CLLAVA_BUILD_CUDA=1, but {reason}")
        else:
            print(f"cllava_fast: {builder.LIBRARIES[kind]}.so is not built: {reason}", file=sys.stderr)
    commands = {"build": FreshBuild, "editable_wheel": FreshEditable}
    setup(ext_modules=extensions, cmdclass={**commands, "build_ext": NativeBuild, "bdist_wheel": AnyPython})


def no_cuda() -> str | None:
    import torch

    return "this torch has no CUDA (CLLAVA_BUILD_CUDA=1 builds all the same)" if torch.version.cuda is None else None


class FreshBuild(build):
    """A wheel would ship what an earlier build left: a library that this one leaves out or failed to make, a module
    that is gone."""

    def run(self) -> None:
        built = Path(self.build_lib, "cllava_fast").resolve()
        if built != ROOT / "cllava_fast":  # --build-lib . is the source tree
            shutil.rmtree(built, ignore_errors=True)
        super().run()


class FreshEditable(editable_wheel):
    """The same of the source tree: a library of older sources reads the arguments of newer ones wrongly."""

    def run(self) -> None:
        for kind in ("cpu", "cuda"):
            (ROOT / "cllava_fast" / f"{builder.LIBRARIES[kind]}.so").unlink(missing_ok=True)
        super().run()


class NativeBuild(build_ext):
    """Each extension is a plain shared library of csrc/build.py."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        kind = next(kind for kind, name in builder.LIBRARIES.items() if ext.name.endswith(f".{name}"))
        try:
            built = builder.build(kind)
        except builder.BuildError as error:
            raise CompileError(str(error)) from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


class AnyPython(bdist_wheel):
    """The libraries bind to torch, not to Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


main()
