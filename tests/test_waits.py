"""The host waits for the device nowhere in the loop's hot paths: nothing of ours reads a tensor's values there.

On a CPU nothing waits, but reads can be counted all the same: each is an op that a dispatch mode sees.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cllava_fast as cf
from cllava_fast.data.encode import IGNORE
from cllava_fast.model import answers
from cllava_fast.ops import checks
from cllava_fast.train import align
from cllava_fast.train.align import READ_EVERY
from cllava_fast.train.arguments import ContinualArguments
from tests.helpers import QUESTIONS, inputs, learn

PACKAGE = str(Path(cf.__file__).parent)
# reads that are known: a query that comes from outside is checked once a call, unless it lies on a GPU
KNOWN = {"_check_query"}


class Reads(TorchDispatchMode):
    """Functions of this package that read values, once for each read; what transformers reads is its own."""

    def __init__(self):
        super().__init__()
        self.by = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frame = sys._getframe(1)
            # an optimizer's count of steps lies on the CPU
            while frame is not None and "/torch/" in (file := frame.f_code.co_filename) and "/optim/" not in file:
                frame = frame.f_back
            if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
                self.by.append(frame.f_code.co_name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(checks, "can_read", lambda tensor, cuda: False)


@pytest.fixture
def model(new_llava, processor, rng):
    llava = cf.patch(new_llava(), cf.IncrementConfig(a_std=0.1, rank=4, rows_per_task=4, top_m=2), processor=processor)
    learn(llava, 2, rng, commit_last=False)
    llava.increments.pool.train_keys(False)
    return llava


def queries(model, count, rng):
    return torch.randn(count, model.increments.pool.key_dim, generator=rng)


def test_a_tune_step(model, processor, rng):
    batch = inputs(processor, QUESTIONS[:3], rng, side="right")
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) < 5, IGNORE)
    batch |= {"query": queries(model, 3, rng), "answer_positions": answers.answer_positions(batch["labels"])}
    with Reads() as reads:
        model.train()(**batch).loss.backward()
    assert set(reads.by) <= KNOWN
    del batch["answer_positions"]
    with Reads() as reads:
        model(**batch)
    assert "answer_positions" in reads.by, "the labels are read, and seen to be"


def test_generation(model, processor, rng):
    batch = {**inputs(processor, QUESTIONS[:3], rng), "query": queries(model, 3, rng)}
    with Reads() as reads:
        model.eval().generate(**batch, max_new_tokens=4, do_sample=False)
    assert set(reads.by) <= KNOWN and len(reads.by) <= 1


def test_alignment_reads_its_losses_now_and_then(model, tmp_path, rng, monkeypatch):
    args = ContinualArguments(output_dir=str(tmp_path), align_steps=2 * READ_EVERY, align_batch_size=8, progress=False)
    read = []
    monkeypatch.setattr(align, "_check", lambda losses, step, title: read.append((len(losses), step)) or 0.0)
    with Reads() as reads:
        align.align_keys(
            model.increments.pool, queries(model, 32, rng), 1, args, 0, "align", model.increments.method.alignment_loss
        )
    assert read == [(READ_EVERY, READ_EVERY), (READ_EVERY, 2 * READ_EVERY)]
    assert reads.by == ["align_keys"]  # their mean, at the end


def test_alignment_names_the_step_whose_loss_is_no_number():
    losses = [torch.tensor(value) for value in (1.0, float("nan"), float("nan"))]
    with pytest.raises(FloatingPointError, match="a: the loss is nan at step 19"):
        align._check(losses, 20, "a")
