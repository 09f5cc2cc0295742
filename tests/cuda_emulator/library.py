"""csrc/cuda compiled by g++ against the headers in this folder, and called through ctypes."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
# undefined behaviour aborts with a message: a misaligned vector load is one
FLAGS = (
    "-std=c++17 -O2 -fPIC -fno-strict-aliasing -ffp-contract=off -fsanitize=undefined -fno-sanitize-recover=all"
    " -U_FORTIFY_SOURCE"
).split()
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KINDS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "bool": ctypes.c_bool, "Type": ctypes.c_int}


def compiler() -> str | None:
    return shutil.which("g++")


def build(folder: Path) -> ctypes.CDLL:
    """Compiles and loads; about 20 seconds on one core."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run([compiler(), "-x", "c++", *FLAGS, f"-I{HERE}", "-c", source, "-o", target])
        return target

    def run(command: list[Any]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*(SOURCES / "cuda").glob("*.cu"), *HERE.glob("*.cpp")]))
    path = folder / "cuda_emulated.so"
    run([compiler(), *FLAGS, "-shared", *objects, "-o", path])
    library = ctypes.CDLL(str(path))
    for name in STRUCTS:
        getattr(library, name).restype = ctypes.c_char_p
        if hasattr(library, f"{name}_workspace"):
            getattr(library, f"{name}_workspace").restype = ctypes.c_int64
    return library


def _structs() -> dict[str, type[ctypes.Structure]]:
    """The structs of csrc/ops.h: its fields, one declaration a line."""
    found = {}
    text = re.sub(r"//.*", "", (SOURCES / "ops.h").read_text())
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.S):
        fields = []
        for kind, names in re.findall(r"^\s*((?:const )?\w+\*?) ([\w, ]+);", body, re.M):
            ctype = ctypes.c_void_p if kind.endswith("*") else KINDS[kind]
            fields += [(field.strip(), ctype) for field in names.split(",")]
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


STRUCTS = _structs()


class Guarded:
    """Memory for one tensor between stretches of NaN bytes: reads beyond it spread NaN, writes beyond it are seen."""

    GUARD = 256  # bytes

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0):
        self.size = torch.Size(shape).numel() * dtype.itemsize
        self.bytes = torch.full((self.size + 2 * self.GUARD + 64,), 255, dtype=torch.uint8)
        address = self.bytes.data_ptr() + self.GUARD
        self.begin = self.GUARD + (-address) % 64 + offset * dtype.itemsize
        self.tensor = self.bytes[self.begin : self.begin + self.size].view(dtype).view(shape)

    def check(self) -> None:
        before, after = self.bytes[: self.begin], self.bytes[self.begin + self.size :]
        assert bool((before == 255).all()) and bool((after == 255).all()), "a kernel wrote outside its output"


def guarded(tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
    memory = Guarded(tuple(tensor.shape), tensor.dtype, offset).tensor
    return memory.copy_(tensor)


def call(library: ctypes.CDLL, struct: str, outputs: dict[str, Guarded], **fields: Any) -> None:
    """Runs the op of `struct`; tensors become pointers, dtypes become Type, a workspace full of NaN is made."""
    op = STRUCTS[struct]()
    keep: list[Any] = []
    known = {name for name, _ in op._fields_}
    for name, value in (fields | outputs).items():
        if name not in known:
            raise TypeError(f"{struct} has no field {name!r}")
        if isinstance(value, Guarded):
            value = value.tensor.data_ptr()
        elif isinstance(value, torch.Tensor):
            keep.append(value)
            value = value.data_ptr()
        elif isinstance(value, torch.dtype):
            value = TYPES[value]
        setattr(op, name, value)
    workspace = None
    if "workspace" in known:
        size = getattr(library, f"{struct}_workspace")(ctypes.byref(op))
        workspace = Guarded((size,), torch.uint8)
        workspace.tensor.fill_(255)
        op.workspace = workspace.tensor.data_ptr()
    error = getattr(library, struct)(ctypes.byref(op))
    if error is not None:
        raise RuntimeError(error.decode())
    for memory in (*outputs.values(), *([workspace] if workspace else [])):
        memory.check()
