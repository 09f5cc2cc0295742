"""The patched model on every backend: the same rows to the bit, the same numbers within rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cllava_fast as cf
from cllava_fast import ops
from cllava_fast.ops import triton_backend
from tests.helpers import QUESTIONS, inputs, learn
from tests.test_patch import selected

CONFIG = cf.IncrementConfig(a_std=0.1, rank=4)
FACTOR = cf.IncrementConfig(a_std=0.1, rank=4, context="factor")

pytestmark = pytest.mark.skipif(triton_backend.usable() is not None, reason=str(triton_backend.usable()))


@pytest.mark.parametrize("config", [CONFIG, FACTOR], ids=["product", "factor"])
def test_inference(config: Any, llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, config, processor=processor)
    learn(llava, 3, generator)
    batch = inputs(processor, QUESTIONS[:3], generator)
    found = {}
    for name in ("reference", "triton"):
        with ops.backend(name), torch.no_grad():
            found[name] = selected(llava, batch), llava(**batch).logits
    assert torch.equal(found["triton"][0], found["reference"][0])
    torch.testing.assert_close(found["triton"][1], found["reference"][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, FACTOR], ids=["product", "factor"])
def test_training(config: Any, llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, config, processor=processor)
    pool = learn(llava, 3, generator, commit_last=False).pool
    pool.train_keys(False)
    llava.train()
    batch = inputs(processor, QUESTIONS[:2], generator, side="right")
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("reference", "triton"):
        llava.zero_grad()
        with ops.backend(name):
            llava(**batch, labels=batch["input_ids"]).loss.backward()
        found[name] = {key: p.grad.clone() for key, p in pool.named_parameters() if p.grad is not None}
    assert found["reference"] and set(found["triton"]) == set(found["reference"])
    for key, wanted in found["reference"].items():
        torch.testing.assert_close(found["triton"][key], wanted, atol=1e-3 * wanted.abs().max().item(), rtol=1e-3)


@pytest.mark.skipif(not triton_backend.INTERPRETED, reason="kernels are compiled here")
def test_the_interpreter_never_volunteers() -> None:
    site = ops.dispatch.Site(torch.device("cpu"), torch.float32, (("B", 1),))
    assert ops.dispatch.choose("select", site).backend == "reference"
    with ops.backend("triton"):
        assert ops.dispatch.choose("select", site).backend == "triton"
