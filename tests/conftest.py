"""Fixtures that several tests share."""

from __future__ import annotations

import importlib.util
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# nothing in the tests may reach for a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from PIL import Image

from cllava_fast.train.garbage import nothing_old_collected

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; read when the first kernel is decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("CLLAVA_EMULATE_CUDA", "1")  # and native ones in an emulation
    if importlib.util.find_spec("triton"):
        from tests.interpreter import patch_the_language_once

        patch_the_language_once()
# without it cuBLAS complains of torch's deterministic mode, which the tests of the ops use to fill empty memory
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# a shell has what it starts in the background ignore Ctrl-C, which tests send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# the models of the tests are too small to share between threads
torch.set_num_threads(1)
# cuBLAS sums in float32, as the kernels do and as the bounds on their errors presume
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

# fresh data in every run; the variable repeats one, and tells it to processes that share the tests
SEED = int(os.environ.setdefault("CLLAVA_TEST_SEED", str(int.from_bytes(os.urandom(3), "big"))))


def pytest_report_header() -> str:
    return f"CLLAVA_TEST_SEED={SEED}"


@pytest.fixture(autouse=True, scope="module")
def collections_of_what_the_module_makes() -> Iterator[None]:
    """The Trainer asks for two a run, which would go through all that pytest has collected, too."""
    with nothing_old_collected():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@pytest.fixture(scope="session")
def processor() -> Any:
    pytest.importorskip("PIL", reason="the processor needs Pillow", exc_type=ImportError)
    from cllava_fast.demo.tokenizer import build_processor

    return build_processor()


@pytest.fixture
def new_llava(processor: Any) -> Callable[[], Any]:
    """Makes equal tiny LLaVAs with random weights."""
    from cllava_fast.demo.base import new_base

    return lambda: new_base(processor, seed=0).eval()


@pytest.fixture
def llava(new_llava: Callable[[], Any]) -> Any:
    return new_llava()


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """accelerate's, for bfloat16 on a CPU; a process has one precision, which other tests have chosen or will."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Data of its own for each test."""
    return torch.Generator().manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend that a test of the ops runs on, `ops_helpers.Backend`; skips what it cannot run."""
    from tests.ops_helpers import running_on

    chosen, op = request.param
    parameters = request.node.callspec.params
    sizes = parameters["case"]._asdict() if "case" in parameters else {}
    refusal = chosen.refusal(op, parameters.get("dtype", torch.float32), sizes)
    if refusal is not None:
        pytest.skip(f"{chosen.name}: {refusal}")
    with running_on(chosen, op, monkeypatch):
        yield chosen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images/a.png, images/coco/b.png."""
    (tmp_path / "images" / "coco").mkdir(parents=True)
    for name, rgb in (("a.png", (255, 0, 0)), ("coco/b.png", (0, 0, 255))):
        Image.new("RGB", (64, 64), rgb).save(tmp_path / "images" / name)
    return tmp_path
