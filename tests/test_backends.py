"""The patched model and the whole loop on every backend: the same rows to the bit, the same numbers within rounding."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cllava_fast as cf
from cllava_fast import ops
from cllava_fast.ops import native, select, select_aggregate, triton_backend
from tests.helpers import QUESTIONS, inputs, learn, selected
from tests.train_helpers import CONFIG as TRAIN_CONFIG
from tests.train_helpers import arguments, stream

CONFIG = cf.IncrementConfig(a_std=0.1, rank=4)
FACTOR = cf.IncrementConfig(a_std=0.1, rank=4, context="factor")

# native kernels leave what they lack to plain PyTorch, as the automatic choice does; the model is on the CPU
BACKENDS = {
    "triton": triton_backend.usable() or (None if triton_backend.INTERPRETED else "kernels are compiled here"),
    "cpu,reference": native.cpu_usable(),
    "cuda,reference": native.cuda_usable() or (None if native.EMULATED else "kernels are compiled here"),
}


def parameters() -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.skipif(refusal is not None, reason=str(refusal)))
        for name, refusal in BACKENDS.items()
    ]


every_backend = pytest.mark.parametrize("backend", parameters())


@every_backend
@pytest.mark.parametrize("config", [CONFIG, FACTOR], ids=["product", "factor"])
def test_inference(config: Any, backend: str, llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, config, processor=processor)
    learn(llava, 3, generator)
    batch = inputs(processor, QUESTIONS[:3], generator)
    found = {}
    for name in ("reference", backend):
        with ops.backend(name), torch.no_grad():
            found[name] = selected(llava, batch), llava(**batch).logits, llava.generate(**batch, max_new_tokens=3)
    assert torch.equal(found[backend][0], found["reference"][0])
    torch.testing.assert_close(found[backend][1], found["reference"][1], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[backend][2], found["reference"][2])


@every_backend
@pytest.mark.parametrize("config", [CONFIG, FACTOR], ids=["product", "factor"])
def test_training(config: Any, backend: str, llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, config, processor=processor)
    pool = learn(llava, 3, generator, commit_last=False).pool
    pool.train_keys(False)
    llava.train()
    batch = inputs(processor, QUESTIONS[:2], generator, side="right")
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("reference", backend):
        llava.zero_grad()
        with ops.backend(name):
            llava(**batch, labels=batch["input_ids"]).loss.backward()
        found[name] = {key: p.grad.clone() for key, p in pool.named_parameters() if p.grad is not None}
    assert found["reference"] and set(found[backend]) == set(found["reference"])
    for key, wanted in found["reference"].items():
        torch.testing.assert_close(found[backend][key], wanted, atol=1e-3 * wanted.abs().max().item(), rtol=1e-3)


def own_words(tasks: cf.Stream) -> cf.Stream:
    words = itertools.cycle(("today", "in spring", "on the left", "for a child", "behind the house", "of the two"))

    def reworded(samples: Sequence[cf.Sample]) -> list[cf.Sample]:
        return [replace(sample, instruction=f"{next(words)}, {sample.instruction}") for sample in samples]

    return cf.Stream(
        [replace(task, train=reworded(task.train), test=reworded(task.test), validation=[]) for task in tasks]
    )


@every_backend
def test_the_loop_selects_the_same_rows(
    backend: str, new_llava: Callable[[], Any], processor: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Alignment, tuning, commit and evaluation of two tasks, a few steps each.

    Every sample asks in words of its own: one instruction for all would give keys that differ by less than what
    float32 makes of their similarities.
    """
    found: dict[str, list[Tensor]] = {}
    matrices = []
    for name in ("reference", backend):
        model = cf.patch(new_llava(), TRAIN_CONFIG, processor=processor)
        seen = found.setdefault(name, [])

        def spy(op: Callable[..., Any], *args: Any, seen: list[Tensor] = seen, **options: Any) -> Any:
            result = op(*args, **options)
            seen.append(result[0].clone())
            return result

        for op in (select, select_aggregate):
            monkeypatch.setattr(ops, op.__name__, functools.partial(spy, op))
        few = arguments(tmp_path / name.replace(",", "-"), max_steps=2, align_steps=2, per_device_train_batch_size=4)
        with ops.backend(name):
            result = cf.ContinualTrainer(model, processor, own_words(stream(2, samples=6)), few).train()
        matrices.append(result.accuracy_matrix)
    assert len(found["reference"]) > 8
    assert [rows.tolist() for rows in found[backend]] == [rows.tolist() for rows in found["reference"]]
    assert matrices[0] == matrices[1]


@pytest.mark.skipif(not triton_backend.INTERPRETED, reason="kernels are compiled here")
def test_the_interpreter_and_the_emulation_never_volunteer() -> None:
    site = ops.dispatch.Site(torch.device("cpu"), torch.float16, (("B", 1),))  # which the CPU's kernel does not take
    assert ops.dispatch.choose("select", site).backend == "reference"
    for name, usable in (("triton", triton_backend.usable), ("cuda", native.cuda_usable)):
        if usable() is None:
            with ops.backend(name):
                assert ops.dispatch.choose("select", site).backend == name


def test_triton_runs_only_where_it_can_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU in a small container lacks most often is a C compiler."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops.dispatch, "too_old", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert triton_backend.usable.__wrapped__() == "the kernels are for NVIDIA's GPUs"

    def driver(_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(driver))
    assert "needs a C compiler and Python's headers: Failed to find" in str(triton_backend.usable.__wrapped__())
    monkeypatch.setattr(type(triton.runtime.driver), "active", None)
    assert triton_backend.usable.__wrapped__() is None


def test_an_old_gpu_beside_a_new_one_is_left_to_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(native, "EMULATED", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[getattr(device, "index", device)]
    )
    assert ops.dispatch.too_old() is None
    for accepts in (triton_backend.accepts, functools.partial(native.accepts_on, "cuda", lambda *_: None)):
        old, new = (
            accepts("select", ops.dispatch.Site(torch.device("cuda", i), torch.float32, ()), False) for i in (0, 1)
        )
        assert old == "compute capability (7, 5) is below (8, 0)" and new is None
    del capabilities[1]
    assert ops.dispatch.too_old() == old
