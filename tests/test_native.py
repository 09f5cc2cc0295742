"""The native libraries: they are built where they can be, refuse what does not fit, and say what is missing."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cllava_fast import ops
from cllava_fast.ops import native, native_table
from cllava_fast.ops.kernel_table import cuobjdump, problems

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = torch.ops.cllava_fast_native
can_build = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs Linux and g++"
)
on_cpu = pytest.mark.skipif(native.cpu_usable() is not None, reason=str(native.cpu_usable()))


def setup(*arguments: str, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    environment = {name: text for name, text in os.environ.items() if name not in ("NVCC", "CXX")} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@can_build
def test_the_cpu_library_and_the_emulated_kernels_are_built() -> None:
    """Or every test of theirs would be skipped. `make test` builds them."""
    assert native.cpu_usable() is None
    if not torch.cuda.is_available():
        assert native.EMULATED and native.cuda_usable() is None


@on_cpu
def test_native_kernels_are_chosen_on_the_cpu() -> None:
    """Where they were measured to be ahead (csrc/README.md)."""
    for op, sizes in (("select", {"N": 64}), ("aggregate", {}), ("mix_factors", {}), ("mix_factors_backward", {})):
        site = ops.dispatch.Site(torch.device("cpu"), torch.float32, tuple(sizes.items()))
        assert ops.dispatch.choose(op, site).backend == "cpu", op
    for dtype, backend in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "reference")):
        for tokens in (1, 577):
            site = ops.dispatch.Site(torch.device("cpu"), dtype, (("S", tokens), ("P", 4), ("N", 1000), ("R", 8)))
            for op in ("inject", "inject_add", "inject_backward"):
                assert ops.dispatch.choose(op, site).backend == backend


def compiles_for_levels() -> bool:
    """As csrc/cpu/rows.h: gcc from 12 on."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    version = re.search(r"__GNUC__ (\d+)", macros)
    return version is not None and int(version[1]) >= 12 and "__clang__" not in macros


# Sums of other widths, or without fused products, end on other bits.
BITS = """
import torch, cllava_fast as cf
query, keys = (torch.randn(8, 384, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
with cf.ops.backend("cpu"):
    print([tensor.tolist() for tensor in cf.ops.select(query, keys, 8)])
"""


@on_cpu
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the CPU has one level alone"
)
def test_lower_levels_of_the_cpus_vectors() -> None:
    """The kernels are compiled for three; all other tests see the highest that this CPU has."""
    if not compiles_for_levels():
        pytest.skip("this compiler compiles for one level alone")

    def run(level: int, *arguments: str) -> str:
        environment = os.environ | {"CLLAVA_CPU_LEVEL": str(level)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    lower = [1, 3] if torch.backends.cpu.get_cpu_capability() == "AVX512" else [1]
    assert len({run(level, "-c", BITS) for level in (*lower, 4)}) == len(lower) + 1
    for level in lower:
        run(level, *"-m pytest -q -p no:cacheprovider tests/test_ops.py tests/test_op_select.py -k cpu".split())


def select_arguments() -> dict[str, torch.Tensor | int | bool | None]:
    return {
        "query": torch.zeros(3, 8), "keys": torch.zeros(6, 8), "allowed": None, "groups": 1, "by_batch": False,
        "similarity": torch.zeros(3, 2), "weight": torch.zeros(3, 2), "index": torch.zeros(3, 2).long(),
    }  # fmt: skip


def inject_arguments() -> dict[str, torch.Tensor | float]:
    return {
        "x": torch.zeros(2, 3, 8), "A": torch.zeros(5, 2, 8), "B": torch.zeros(5, 2, 6),
        "index": torch.zeros(2, 4).long(), "coefficient": torch.zeros(2, 4), "scale": 1.0, "y": torch.zeros(2, 3, 6),
        "arrived": torch.zeros(2, dtype=torch.int32),
    }  # fmt: skip


@on_cpu
@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("select", {"query": torch.zeros(3, 8).half()}, r"query: expected Float \[3, 8\].*got Half \[3, 8\]"),
        ("select", {"keys": torch.zeros(6, 7)}, r"keys: expected Float \[6, 8\]"),
        ("select", {"keys": torch.zeros(6, 16)[:, ::2]}, r"keys: .* without gaps .*strides \[16, 2\]"),
        ("select", {"index": torch.zeros(3, 2).int()}, "index: expected Long"),
        ("select", {"weight": torch.zeros(2, 3).t()}, "weight: expected .* without gaps"),
        ("select", {"allowed": torch.zeros(1, 6, dtype=torch.uint8)}, r"allowed: expected Byte \[3, 6\]"),
        ("select", {"groups": 3}, "groups = 3, D = 8"),
        ("inject_add", {"index": torch.full((2, 4), 5)}, r"index: expected entries in \[0, N\) = \[0, 5\), got 5"),
        ("inject_add", {"x": torch.zeros(2, 3, 8).double()}, "x: expected Float, Half or BFloat16, got Double"),
        ("inject_add", {"B": torch.zeros(4, 2, 6)}, r"B: expected Float \[5, 2, 6\]"),
        ("inject_add", {"A": torch.zeros(5, 2, 8).half(), "B": torch.zeros(5, 2, 6).half()}, "A: expected Float or"),
        ("inject_add", {"y": torch.zeros(2, 6, 3).transpose(1, 2)}, "y: expected .* without gaps"),
        ("inject_add", {"coefficient": torch.zeros(2, 3)}, r"coefficient: expected Float \[2, 4\]"),
        ("inject_add", {"arrived": torch.zeros(2).long()}, r"arrived: expected Int \[2\]"),
    ],
)
def test_a_wrong_pointer_never_reaches_a_kernel(op: str, change: dict, message: str) -> None:
    arguments = {"select": select_arguments, "inject_add": inject_arguments}[op]()
    run = getattr(LIBRARY, op)
    run(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        run(*(arguments | change).values())


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_cpu_s_select_takes_no_keys_of_two_bytes(dtype: torch.dtype) -> None:
    arguments = select_arguments() | {"keys": torch.zeros(6, 8, dtype=dtype)}
    query, keys, _, groups, by_batch, similarity, _, index = arguments.values()
    with pytest.raises(RuntimeError, match="keys: expected Float on the CPU, got (Half|BFloat16)"):
        LIBRARY.select(*arguments.values())
    with pytest.raises(RuntimeError, match="keys: expected Float on the CPU, got (Half|BFloat16)"):
        LIBRARY.select_backward(similarity, query, keys, index, groups, by_batch, torch.zeros(6, 8, dtype=dtype))


@on_cpu
def test_an_index_out_of_range_is_an_error_where_nobody_checked_it() -> None:
    A, index = torch.ones(3, 2, 4), torch.tensor([[0, 3]])
    with ops.backend("cpu"):
        with pytest.raises(RuntimeError, match="index: expected entries"):
            ops.mix_factors(A, A, torch.ones(1, 2), index, check_values=False)
        with pytest.raises(RuntimeError, match="row_task: expected entries"):
            ops.aggregate(index[:, :1], torch.ones(1, 1), index[0], torch.ones(2), torch.ones(2, 2), check_values=False)


@pytest.mark.skipif(not native.EMULATED or native.cuda_usable() is not None, reason="needs the emulation")
def test_the_limits_of_the_cuda_kernels() -> None:
    library = torch.ops.cllava_fast_emulated
    outputs = torch.empty(1, 65), torch.empty(1, 65), torch.empty(1, 65).long()
    with pytest.raises(RuntimeError, match="M = 65 is above 64"):
        library.select(torch.ones(1, 8), torch.ones(70, 8), None, 1, False, *outputs)
    with pytest.raises(RuntimeError, match="S = 17 is above 16"):
        A, index = torch.ones(1, 1, 4), torch.zeros(1, 1).long()
        library.inject_add(torch.ones(1, 17, 4), A, A, index, torch.ones(1, 1), 1.0, torch.ones(1, 17, 4))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert "is not built: build it with a C++ compiler" in str(native.cpu_usable.__wrapped__())
    (tmp_path / "_native_cpu.so").write_text("no library")
    assert re.search(r"does not load \(.*file too short\): build it", str(native.cpu_usable.__wrapped__()))


@on_cpu
@can_build
@pytest.mark.parametrize("says", ["unsigned cllava_schemas() { return 1; }", ""])
def test_cuda_kernels_of_other_sources_than_the_cpu_s_are_not_used(
    says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_native_cpu.so").symlink_to(native.FOLDER / "_native_cpu.so")  # loaded once
    (tmp_path / "old.cpp").write_text(f'extern "C" {{ {says} }}')
    library = tmp_path / "_native_cuda_emulated.so"
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "old.cpp", "-o", library], check=True)
    monkeypatch.setattr(native, "EMULATED", True)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    why = "is of other sources than _native_cpu.so, and would misread arguments: python csrc/build.py emulated"
    assert why in str(native.cuda_usable.__wrapped__())


@on_cpu
@can_build
def test_kernels_that_this_gpu_cannot_run_are_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_native_cpu.so").symlink_to(native.FOLDER / "_native_cpu.so")  # loaded once
    monkeypatch.setattr(native, "EMULATED", True)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    schemas = native._says("_native_cpu.so", "cllava_schemas", ctypes.c_uint)
    (tmp_path / "other.cpp").write_text(
        f'extern "C" {{ unsigned cllava_schemas() {{ return {schemas}u; }}'
        'const char* cllava_cannot_run() { return "no kernel image is available"; } }'
    )
    library = tmp_path / "_native_cuda_emulated.so"
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "other.cpp", "-o", library], check=True)
    why = "does not run on this GPU (no kernel image is available): python csrc/build.py emulated"
    assert why in str(native.cuda_usable.__wrapped__())


@on_cpu
def test_a_library_of_older_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.cpu_usable.__wrapped__() is None
    monkeypatch.setattr(native, "OPS", (*native.OPS, "inject_tomorrow"))
    assert "is of older sources, without inject_tomorrow: build it" in str(native.cpu_usable.__wrapped__())


@on_cpu
def test_a_library_of_other_schemas_than_the_source_tree_s_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed = tmp_path / "schemas.h"
    monkeypatch.setattr(native, "SCHEMAS", changed)
    assert native.cpu_usable.__wrapped__() is None, "installed without sources"
    changed.write_bytes((native.FOLDER.parent / "csrc" / "schemas.h").read_bytes())
    assert native.cpu_usable.__wrapped__() is None
    changed.write_text(changed.read_text() + "// another argument")
    assert f"is of other sources than {changed}, and would misread" in str(native.cpu_usable.__wrapped__())


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strides", ["slice", "permuted", "step"])
def test_cpu_inject_of_nothing_is_the_frozen_product_of_torch(strides: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 10, 128, generator=rng).to(dtype)
    x = {"slice": wide[:, 1:, :64], "permuted": wide[..., :64].transpose(0, 1), "step": wide[..., ::2]}[strides]
    weight, bias = (torch.randn(size, generator=rng).to(dtype) for size in ((48, 64), (48,)))
    A, B = torch.ones(4, 2, 64, dtype=dtype), torch.ones(4, 2, 48, dtype=dtype)
    index, coefficient = torch.zeros(len(x), 3).long(), torch.zeros(len(x), 3)
    with ops.backend("cpu"):
        assert torch.equal(ops.inject(x, weight, A, B, index, coefficient, bias), F.linear(x, weight, bias))


@on_cpu
def test_what_torch_refuses_inside_is_said_by_torch() -> None:
    """By the reference, which may also be able to do it: the stable ABI keeps no text."""
    x, A, index, coefficient = torch.ones(1, 2, 3), torch.ones(1, 1, 3), torch.zeros(1, 1).long(), torch.ones(1, 1)
    weight = torch.eye(3).to_sparse_csr()
    A.requires_grad_()
    with ops.backend("cpu"):
        y = ops.inject(x.requires_grad_(), weight, A, A, index, coefficient)
        assert torch.equal(y, torch.full_like(y, 4.0))
        zeros = torch.zeros(2000, 1)
        tokens, wide = torch.ones(1, 1, 3).expand(2000, 2000, 3), torch.ones(1, 3).expand(3_000_000, 3)  # 48 TB of y
        with pytest.raises(RuntimeError, match="allocate"):
            ops.inject(tokens, wide, A, torch.ones(1, 1, 3_000_000), zeros.long(), zeros)
        with pytest.raises(RuntimeError, match="expected entries in"):
            ops.inject(x, torch.eye(3), A, A, index + 5, coefficient, check_values=False)


def test_it_runs_without_native_code(tmp_path: Path) -> None:
    """A pure Python installation: the same package without its libraries."""
    package = shutil.copytree(ROOT / "cllava_fast", tmp_path / "cllava_fast", ignore=shutil.ignore_patterns("*.so"))
    code = (
        f"import torch, cllava_fast as cf; assert cf.__file__.startswith({str(package)!r}), cf.__file__;"
        "print(cf.ops.select(torch.eye(3), torch.eye(3), 1)[0].flatten().tolist());"
        "print([r.reason for r in cf.ops.dispatch.table() if (r.op, r.backend) == ('select', 'cpu')][0]);"
        "x, A = torch.ones(1, 1, 3), torch.ones(1, 1, 3);"
        "print(cf.ops.inject(x, torch.eye(3), A, A, torch.zeros(1, 1).long(), torch.ones(1, 1)).tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert (
        found[0] == "[0, 1, 2]" and "pip install --no-build-isolation" in found[1] and found[2] == "[[[4.0, 4.0, 4.0]]]"
    )


def test_setup_refuses_what_it_cannot_build() -> None:
    done = setup("--version", CLLAVA_BUILD_CUDA="yes")
    assert done.returncode != 0 and "CLLAVA_BUILD_CUDA: expected auto, 0 or 1, got 'yes'" in done.stderr
    done = setup("--version", CLLAVA_BUILD_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode != 0 and "'/nowhere/bin/nvcc' is not found" in done.stderr
    done = setup("--version", CLLAVA_BUILD_CUDA="0", CXX="no-such-compiler")
    assert done.returncode == 0 and "the C++ compiler 'no-such-compiler'" in done.stderr


@can_build
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_the_cuda_library_builds_for_every_chip_without_a_gpu(tmp_path: Path) -> None:
    done = setup("build_ext", "--build-lib", str(tmp_path), CLLAVA_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0+PTX;9.0a")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    library = tmp_path / "cllava_fast" / "_native_cuda.so"
    listed = subprocess.run([cuobjdump(), "-lelf", "-lptx", str(library)], capture_output=True, text=True).stdout
    assert "sm_80.cubin" in listed and re.search(r"sm_90a?\.cubin", listed) and "sm_80.ptx" in listed
    rows = native_table.rows(library)
    assert {(row.kernel, problem) for row in rows for problem in problems(row)} == set()
    kernels = {row.kernel for row in rows}
    declared = r"__global__ void __launch_bounds__\(.*\) (\w+)\("
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    assert kernels == {name for text in sources for name in re.findall(declared, text)}
    assert {row.arch for row in rows} == {80, 90} and len(rows) > 2 * len(kernels)
    code = f"import ctypes, torch; says = ctypes.CDLL('{library}').cllava_cannot_run; print(bool(says()))"
    cannot_run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert cannot_run == f"{not torch.cuda.is_available()}\n"
    # what a torch without CUDA lacks is looked up when a kernel is called: the library links against any
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True).stdout
    assert "aoti_torch_get_current_cuda_stream" not in symbols and "libtorch_cuda" not in symbols


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_the_table_shows_a_kernel_that_spills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spilling.cu").write_text(
        """__global__ void spilling(const float* x, float* out, int n) {
            float y[64];
            for (int i = 0; i < 64; i++) y[i] = x[i * n + threadIdx.x];
            for (int i = 0; i < n; i++)
                for (int j = 0; j < 64; j++) y[j] = y[j] * y[(j + 1) % 64] + 1.0f;
            for (int i = 0; i < 64; i++) out[i * n + threadIdx.x] = y[i];
        }"""
    )
    command = ["nvcc", "-arch=sm_90", "-maxrregcount=24", "-shared", "-Xcompiler=-fPIC", "spilling.cu", "-o", "it.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert native_table.main([str(tmp_path / "it.so")]) == 1
    assert re.search(r"native +spilling +sm_90 +24 +[1-9]", capsys.readouterr().out)
    assert native_table.main([str(tmp_path / "none.so")]) == 2


@can_build
def test_it_builds_without_ninja(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "cllava_fast").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(copy)!r}); import build; build.ninja = lambda: None; build.main(['cpu'])"
    )
    refused = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MAX_JOBS": "0"}, capture_output=True, text=True
    )
    assert refused.stderr == "MAX_JOBS: expected a number from 1 on, got '0'\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "cllava_fast" / "_native_cpu.so").exists(), done.stderr


def test_without_a_compiler_a_build_says_so_and_may_be_left_out() -> None:
    command = [sys.executable, "csrc/build.py", "cpu"]
    environment = os.environ | {"CXX": "no-such-compiler"}
    for options, code in (([], 1), (["--if-possible"], 0)):
        done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == code and "_native_cpu.so is not built: the C++ compiler" in done.stderr


@can_build
def test_a_compiler_that_fails_costs_its_library_alone(tmp_path: Path) -> None:
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    build = ("build_ext", "--build-lib", str(tmp_path))
    done = setup(*build, CLLAVA_BUILD_CUDA="1", NVCC=str(tmp_path / "nvcc"))
    assert done.returncode != 0 and "_native_cuda.so: the compiler failed" in done.stderr
    code = (
        "import torch, runpy, sys; torch.version.cuda = '13.0'; sys.argv = ['setup.py', *sys.argv[1:]];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = os.environ | {"CLLAVA_BUILD_CUDA": "auto", "NVCC": str(tmp_path / "nvcc")}
    command = [sys.executable, "-c", code, "--quiet", *build]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "_native_cuda.so: the compiler failed" in done.stderr
    assert (tmp_path / "cllava_fast" / "_native_cpu.so").exists()


@can_build
def test_a_wheel_is_free_of_the_python_version(tmp_path: Path) -> None:
    done = setup(
        "bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "tree"), CLLAVA_BUILD_CUDA="0"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    assert "cllava_fast/_native_cpu.so" in zipfile.ZipFile(wheel).namelist()


def test_a_build_ships_nothing_that_the_one_before_left(tmp_path: Path) -> None:
    left = [tmp_path / "cllava_fast" / name for name in ("_native_cpu.so", "_native_cuda.so", "renamed.py")]
    left[0].parent.mkdir()
    for file in left:
        file.write_text("of an earlier build")
    done = setup("build", "--build-lib", str(tmp_path), CLLAVA_BUILD_CUDA="0", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "cllava_fast" / "pool.py").exists() and not [file for file in left if file.exists()]


def test_an_editable_install_uses_no_library_that_it_does_not_build(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "cllava_fast/__init__.py"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    left = [tree / "cllava_fast" / name for name in ("_native_cpu.so", "_native_cuda.so")]
    for file in left:
        file.write_text("of an earlier build")

    def setup_there(*arguments: str) -> None:
        command = [sys.executable, "setup.py", "--quiet", *arguments]
        environment = os.environ | {"CXX": "no-such-compiler"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    setup_there("build", "--build-lib", ".")
    assert all(file.exists() for file in (tree / "cllava_fast" / "__init__.py", *left))  # a build is no clean-up of it
    setup_there("editable_wheel", "--dist-dir", str(tmp_path))
    assert list(tmp_path.glob("*.whl")) and not [file for file in left if file.exists()]


def test_the_source_distribution_has_what_the_readme_speaks_of_and_no_tests(tmp_path: Path) -> None:
    done = setup("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md", "csrc/build.py", "cllava_fast/cli/init.py"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_import_is_cheap_and_touches_no_gpu() -> None:
    code = (
        "import time, torch; begin = time.perf_counter(); import cllava_fast; took = time.perf_counter() - begin;"
        "assert not torch.cuda.is_initialized(); print(took)"
    )
    took = [float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout) for _ in range(3)]
    assert min(took) < 0.05


def test_the_page_of_native_kernels_shows_what_was_measured() -> None:
    from benchmarks import native_cpu

    page = (ROOT / "csrc" / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- native table of (\S+) -->\n\n(.*?)\n\n<!-- end -->", page, re.DOTALL)
    assert len(tables) == 2
    for file, table in tables:
        rows = json.loads((ROOT / file).read_text(encoding="utf-8"))["rows"]
        assert table == native_cpu.table(rows)
