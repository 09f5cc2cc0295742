"""Tuned tables: launchers and the dispatch go by them, and by arithmetic and order where they say nothing."""

from __future__ import annotations

import fnmatch
import importlib
import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from cllava_fast import environment, ops
from cllava_fast.ops import dispatch, triton_backend, tuned
from cllava_fast.ops.inject import cases, tiling
from cllava_fast.ops.inject.tiling import Tiles
from tests.ops_helpers import INJECT, close, inject_inputs, run

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(triton_backend.usable() is not None, reason=str(triton_backend.usable()))


def tiles_row(kernel: str, tiles: Tiles, dtype: str = "float32", columns: int = 32, tokens: int = 64) -> dict[str, Any]:
    row = {"kernel": kernel, "dtype": dtype, "columns": columns, "tokens": tokens, "tiles": tiles._asdict()}
    return row | {"microseconds": 20.0, "default_microseconds": 25}


def avoid_row(backend: str, instead: str, op: str = "inject", **sizes: list[int]) -> dict[str, Any]:
    row = {"op": op, "backend": backend, "dtype": "float32", "instead": instead, "ratio": 1.5}
    return row | {"sizes": sizes or {"S": [1, 16]}}


def content(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "kind": tuned.KIND, "architecture": "sm_90", "device": "NVIDIA H200", "commit": None, "complete": True,
        "environment": {"date": "2026-01-02T03:04:05+00:00"},
        "tiles": [row for row in rows if "kernel" in row], "avoid": [row for row in rows if "op" in row],
    } | changes  # fmt: skip


def a_table(*rows: dict[str, Any]) -> tuned.Table:
    return tuned.parse(content(*rows))


# Neither is what arithmetic chooses for the sizes below.
OTHER = {"shrink": Tiles(32, 32, 32, 4, 3), "expand": Tiles(32, 32, 64, 4, 2), "outer": Tiles(32, 32, 128, 4, 3)}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Tiles]]:
    """The tiles that each kernel was launched with."""
    launch = importlib.import_module("cllava_fast.ops.inject.triton_launch")
    found: dict[str, set[Tiles]] = {}
    plain = launch._launch

    def noting(kernel: Any, programs: int, tiles: Tiles, *arguments: Any, **constants: int) -> None:
        found.setdefault(kernel.__name__, set()).add(tiles)
        sizes = {"BLOCK_S": tiles.tokens, "BLOCK_K": tiles.columns, "BLOCK_D": tiles.width}
        assert all(constants.get(name, size) == size for name, size in sizes.items())
        plain(kernel, programs, tiles, *arguments, **constants)

    monkeypatch.setattr(launch, "_launch", noting)
    monkeypatch.setattr(importlib.import_module(INJECT), "plan", lambda *sizes: "gather")
    return found


@needs_triton
def test_launchers_take_the_tables_tiles_and_are_right(launched: Any, generator: torch.Generator) -> None:
    case = cases.Case(B=2, S=20, d_in=40, d_out=72, N=5, R=8, P=3)
    device = "cpu" if triton_backend.INTERPRETED else "cuda"
    inputs = inject_inputs(case, torch.float32, generator, device)
    upstream = torch.randn(case.B, case.S, case.d_out, generator=generator).to(device)
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    with ops.backend("reference"):
        exact = [t.detach().requires_grad_(a.requires_grad) for t, a in zip(exact, inputs, strict=True)]
        y, grads = run(ops.inject, exact, upstream.double())
    for table, wanted in ((None, {}), (a_table(*itertools.starmap(tiles_row, OTHER.items())), OTHER)):
        launched.clear()
        with tuned.using(table), ops.backend("triton"):
            found, found_grads = run(ops.inject, inputs, upstream)
        for result, right in zip((found, *found_grads), (y, *grads), strict=True):
            close(result, right, 1e-5)
        sizes = torch.float32, case.B, case.S, case.P * case.R
        for kernel, default in tiling.DEFAULTS.items():
            assert default(*sizes) != OTHER[kernel]
            assert launched[kernel] == {wanted.get(kernel, default(*sizes))}


def test_a_row_counts_in_its_bucket_alone() -> None:
    def chosen(samples: int, tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Tiles:
        return tiling.choose("shrink", torch.empty(samples, tokens, 8, dtype=dtype), columns)

    other = OTHER["shrink"]
    with tuned.using(a_table(tiles_row("shrink", other), tiles_row("expand", OTHER["expand"], tokens=16))):
        assert chosen(1, 64, 32) == chosen(2, 20, 8) == chosen(1, 33, 17) == other
        for samples, tokens, columns in ((1, 65, 32), (1, 32, 32), (1, 64, 33), (1, 64, 300)):
            default = tiling.shrink_tiles(torch.float32, samples, tokens, columns)
            assert chosen(samples, tokens, columns) == default != other
        assert chosen(1, 64, 32, torch.bfloat16) == tiling.shrink_tiles(torch.bfloat16, 1, 64, 32)
        assert chosen(4, 16, 32) != other  # taller than a sample
        assert chosen(4, 17, 32) != other and chosen(3, 17, 32) == other
    assert chosen(1, 64, 32) != other


def test_buckets() -> None:
    columns = {1: 32, 32: 32, 33: 64, 64: 64, 65: 128, 128: 128, 480: 128}
    assert {size: tuned.columns_bucket(size) for size in columns} == columns
    tokens = {0: 16, 1: 16, 16: 16, 17: 32, 1024: 1024, 1025: 2048}
    assert {size: tuned.bucket(size) for size in tokens} == tokens
    bounds = {0: [0, 0], 1: [1, 1], 2: [2, 2], 3: [3, 4], 4: [3, 4], 5: [5, 8], 16: [9, 16]}
    assert {size: tuned.bounds(size) for size in bounds} == bounds


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty folder of tables, on a machine whose every device is an H100."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    yield tmp_path
    monkeypatch.undo()
    tuned.forget()


def test_the_file_of_the_architecture_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sm_80.json").write_text("not read here")
    x = torch.empty(1, 64, 8)
    assert tiling.choose("shrink", x, 32) == tiling.shrink_tiles(torch.float32, 1, 64, 32)
    (folder / "sm_90.json").write_text(json.dumps(content(tiles_row("shrink", OTHER["shrink"]))))
    tuned.forget()
    assert tiling.choose("shrink", x, 32) == OTHER["shrink"]
    monkeypatch.setenv(tuned.VARIABLE, "0")
    tuned.forget()
    assert tiling.choose("shrink", x, 32) == tiling.shrink_tiles(torch.float32, 1, 64, 32)
    monkeypatch.setenv(tuned.VARIABLE, "off")
    tuned.forget()
    with pytest.raises(tuned.TableError, match="CLLAVA_TUNED: expected 0 .* or 1, got 'off'"):
        tiling.choose("shrink", x, 32)


def test_there_is_no_table_for_a_cpu() -> None:
    assert tuned.architecture(CPU) is None and tuned.current(CPU) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "sm_90.json: is no JSON"),
        ("[]", "sm_90.json: the table: expected an object"),
        (json.dumps(content(architecture="sm_80")), "sm_90.json: is of sm_80, expected sm_90"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "sm_90.json").write_text(text)
    for _ in range(2):
        with pytest.raises(tuned.TableError, match=message + ".*make tune.*delete it.*CLLAVA_TUNED=0"):
            tiling.choose("shrink", torch.empty(1, 64, 8), 32)
        with pytest.raises(tuned.TableError):
            dispatch.choose("inject", site(S=1, P=1, R=1))


GOOD = tiles_row("shrink", OTHER["shrink"])
HUGE = Tiles(256, 256, 128, 8, 5)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {"kind": "results"}, "is of kind 'results'"),
        ([], {"tiles": None}, "the table: tiles: expected list"),
        ([], {"complete": 1}, "complete: expected bool"),
        ([GOOD | {"kernel": "sum_by_row"}], {}, r"tiles\[0\]: kernel: expected one of shrink, expand, outer"),
        ([GOOD, GOOD | {"dtype": "float64"}], {}, r"tiles\[1\]: dtype: expected one of"),
        ([GOOD | {"columns": 48}], {}, "columns: expected one of 32, 64, 128, got 48"),
        ([GOOD | {"tokens": 100}], {}, "tokens: expected a power of two from 16 on, got 100"),
        ([GOOD | {"tokens": 8}], {}, "tokens: expected a power of two from 16 on, got 8"),
        (
            [tiles_row("shrink", HUGE)],
            {},
            "none of the configurations of shrink in float32 .* shared memory and spills",
        ),
        ([tiles_row("shrink", OTHER["expand"])], {}, "none of the configurations of shrink"),
        ([GOOD | {"tiles": {"tokens": 32}}], {}, "none of the configurations of shrink"),
        ([GOOD | {"microseconds": 0}], {}, "microseconds: expected a number above 0"),
        ([GOOD | {"microseconds": "fast"}], {}, "microseconds: expected a number above 0"),
        ([GOOD | {"note": "?"}], {}, "missing or unknown: note"),
        ([{"kernel": "shrink"}], {}, "missing or unknown: dtype"),
        ([GOOD, GOOD], {}, "two rows of tiles for one kernel"),
        ([avoid_row("cuda", "triton", op="injection")], {}, r"avoid\[0\]: op: expected one of"),
        ([avoid_row("metal", "triton")], {}, "backend: expected one of cuda"),
        ([avoid_row("triton", "cuda")], {}, "instead of triton: expected one of cpu, reference, got 'cuda'"),
        ([avoid_row("reference", "reference")], {}, "instead of reference"),
        ([avoid_row("cuda", "triton", S=[4, 1])], {}, r"S: expected \[least, most\]"),
        ([avoid_row("cuda", "triton", S=[1])], {}, r"S: expected \[least, most\]"),
        ([avoid_row("cuda", "triton") | {"sizes": {}}], {}, "expected bounds, got none"),
        ([avoid_row("cuda", "triton") | {"ratio": -1.0}], {}, "ratio: expected a number above 0"),
    ],
)
def test_what_a_table_may_not_say(rows: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(tuned.TableError, match=message):
        tuned.parse(content(*rows, **changes))
    assert tuned.parse(content(GOOD)).tiles


def site(device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int) -> dispatch.Site:
    return dispatch.Site(torch.device(device), dtype, tuple(sizes.items()))


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Any:
    """inject on three backends; Triton's takes up to 64 tokens."""
    monkeypatch.setattr(dispatch, "_asked", [dispatch.AUTO])
    monkeypatch.setattr(dispatch, "_kernels", {"inject": {"reference": dispatch._kernels["inject"]["reference"]}})
    dispatch.register("cuda", {"inject": lambda *arguments: None})
    few = lambda op, where, asked: dispatch.above(where, {"S": 64})  # noqa: E731
    dispatch.register("triton", {"inject": lambda *arguments: None}, accepts=few)
    yield
    monkeypatch.undo()
    dispatch.forget()


def test_a_loser_is_left_out_and_the_reason_said(backends: Any) -> None:
    assert dispatch.choose("inject", site(S=16, B=4, P=7)).backend == "cuda"
    with tuned.using(a_table(avoid_row("cuda", "triton", S=[1, 16], B=[3, 4]))):
        choice = dispatch.choose("inject", site(S=16, B=4, P=7))
        assert choice.backend == "triton" and "cuda: slower than triton here: tuned table of sm_90" in choice.reason
        for outside in (site(S=17, B=4), site(S=1, B=2), site(S=1, B=5), site(S=1), site(dtype=torch.half, S=1, B=4)):
            assert dispatch.choose("inject", outside).backend == "cuda"
        with ops.backend("cuda"):
            assert dispatch.choose("inject", site(S=16, B=4))[::2] == ("cuda", "asked for by name")
    assert dispatch.choose("inject", site(S=16, B=4, P=7)).backend == "cuda"


def test_a_loser_runs_where_the_winner_cannot(backends: Any) -> None:
    with tuned.using(a_table(avoid_row("cuda", "triton", S=[1, 999]))):
        assert dispatch.choose("inject", site(S=64)).backend == "triton"
        assert dispatch.choose("inject", site(S=65)).backend == "cuda"


def test_the_last_one_always_runs(backends: Any) -> None:
    with tuned.using(a_table(avoid_row("cuda", "triton"), avoid_row("triton", "reference"))):
        choice = dispatch.choose("inject", site(S=1))
        assert choice.backend == "reference" and choice.reason.count("tuned table of sm_90") == 2


def test_the_environment_names_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available() or environment.environment()["tuned"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert tuned.describe() is None
    rows = [
        GOOD,
        avoid_row("cuda", "triton"),
        avoid_row("cuda", "triton", S=[17, 32]),
        avoid_row("triton", "reference"),
    ]
    (folder / "sm_90.json").write_text(json.dumps(content(*rows)))
    tuned.forget()
    assert tuned.describe() == (
        "sm_90 (NVIDIA H200, 2026-01-02): 1 tiles; no inject on cuda where triton is faster (2); "
        "no inject on triton where reference is faster (1)"
    )
    monkeypatch.setenv(tuned.VARIABLE, "0")
    tuned.forget()
    assert tuned.describe() == "CLLAVA_TUNED=0"
    monkeypatch.delenv(tuned.VARIABLE)
    (folder / "sm_90.json").write_text("{")
    tuned.forget()
    assert str(tuned.describe()).startswith("refused: sm_90.json: is no JSON")


def test_tables_that_are_shipped_fit_and_are_packaged() -> None:
    root = Path(tuned.__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cllava_fast"]
    file = (tuned.FOLDER / "sm_90.json").relative_to(root / "cllava_fast")
    assert any(fnmatch.fnmatch(file.as_posix(), pattern) for pattern in patterns)
    for path in tuned.FOLDER.glob("*"):
        assert tuned.read(path, path.stem).architecture == path.stem


@needs_triton
def test_every_candidate_is_shipped() -> None:
    shipped = set()
    for one in importlib.import_module("cllava_fast.ops.inject.triton_launch").shipped():
        if "BLOCK_D" in one.constants:
            blocks = [one.constants[f"BLOCK_{axis}"] for axis in "SKD"]
            types = one.signature[one.kernel.arg_names[0]], one.signature.get("factor")
            shipped.add((one.kernel.__name__, *types, Tiles(*blocks, one.num_warps, one.num_stages)))
    pairs = (("fp16", "fp16"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"))
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    for kernel, (name, factor) in itertools.product(tiling.DEFAULTS, pairs):
        for tiles in tiling.candidates(kernel, dtypes[name]):
            if kernel == "shrink":
                tiles = tiling.beside(tiles, dtypes[name], dtypes[factor])
            assert (kernel, f"*{name}", None if kernel == "outer" else f"*{factor}", tiles) in shipped
