"""Answer-only logits: the loss and every gradient of transformers' own path, without the prompt's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cllava_fast as cf
from benchmarks import models
from benchmarks.measure import peak_memory
from cllava_fast.data.encode import IGNORE
from cllava_fast.model import answers
from tests.helpers import QUESTIONS, inputs, learn

ALL = {"logits_to_keep": 0}  # transformers' own path


@pytest.fixture
def training(new_llava, processor, rng) -> Any:
    """A patched model in the middle of its second task."""
    model = cf.patch(new_llava(), cf.IncrementConfig(a_std=0.1, rank=4, rows_per_task=4, top_m=2), processor=processor)
    learn(model, 2, rng, commit_last=False)
    model.increments.pool.train_keys(False)
    model.increments.pool.block_keys.requires_grad_(False)
    return model.train()


@pytest.fixture(params=["right", "left"])
def batch(request, processor, rng) -> dict[str, Any]:
    return labelled(inputs(processor, QUESTIONS[:3], rng, side=request.param), rng)


def labelled(batch: dict[str, Any], rng: torch.Generator) -> dict[str, Any]:
    """Answers of one, three and two tokens at the end of each row, and a label that no position predicts."""
    labels = torch.full_like(batch["input_ids"], IGNORE)
    for i, count in enumerate((1, 3, 2)):
        last = batch["attention_mask"][i].nonzero().max()
        labels[i, last + 1 - count : last + 1] = torch.randint(5, 100, (count,), generator=rng)
    labels[0, 0] = 7
    return {**batch, "labels": labels}


def step(model: Any, batch: dict[str, Any], **options: Any) -> list[Tensor]:
    """The loss and the gradient of everything that trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch, **options).loss
    return [loss, *torch.autograd.grad(loss, trained)]


def same(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    assert len(found) == len(wanted) > 6 and all(grad.any() for grad in wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= limit * b.abs().max()


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("known", [False, True], ids=["labels", "positions"])
def test_loss_and_gradients_are_those_of_all_logits(training, batch, known, items):
    training.double()
    options = {} if items is None else {"num_items_in_batch": items}
    known = {"answer_positions": answers.answer_positions(batch["labels"])} if known else {}
    same(
        step(training, batch, **options, **known), step(training, batch, **options, **ALL), 1e-6
    )  # float32 in the loss
    assert training(**batch, **known).logits.shape[1] == 3


def test_float32_errs_no_more_than_with_all_logits(training, batch):
    found, wanted = step(training, batch), step(training, batch, **ALL)
    exact = step(training.double(), batch, **ALL)
    for a, b, c in zip(found, wanted, exact, strict=True):
        scale = c.abs().max()
        assert (a - c).abs().max() <= 3 * (b - c).abs().max() + 1e-6 * scale


def test_under_autocast_and_checkpointing(training, batch):
    with torch.autocast("cpu", torch.bfloat16):
        same(step(training, batch), step(training, batch, **ALL), 2e-2)
    wanted = step(training, batch)
    models.checkpoint(training, True)
    same(step(training, batch), wanted, 0.0)


def test_no_label_gives_what_transformers_gives(training, batch):
    batch["labels"].fill_(IGNORE)
    assert training(**batch).loss.isnan() and training(**batch, **ALL).loss.isnan()
    for options in ({}, ALL):
        assert training(**batch, **options, num_items_in_batch=torch.tensor(4)).loss == 0


OF_EARLIER_TASKS = pytest.mark.filterwarnings("ignore:a task is being learned, and in evaluation mode")


@OF_EARLIER_TASKS
def test_evaluation_and_whoever_asks_get_all_logits(training, batch):
    size = batch["labels"].shape[1]
    assert training(**batch, **ALL).logits.shape[1] == size
    positions = answers.answer_positions(batch["labels"])
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    assert training(**unlabelled, answer_positions=positions).logits.shape[1] == size  # a Trainer with its own loss
    training.loss_function = lambda logits, labels, **_: logits.sum()
    assert training(**batch).logits.shape[1] == size
    del training._loss_function
    assert training.eval()(**batch).logits.shape[1] == size
    assert training.train()(**batch).logits.shape[1] == 3


@OF_EARLIER_TASKS
def test_a_failed_forward_leaves_nothing_behind(training, batch):
    with pytest.raises(Exception, match="."):
        training(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    assert training.eval()(**batch).logits.shape[1] == batch["labels"].shape[1]


def test_positions_that_miss_a_label_are_refused(training, batch):
    positions = answers.answer_positions(batch["labels"])
    first_twice = positions.clone()
    first_twice[1, 1] = first_twice[1, 0]  # as many labels as there are
    for wrong in (positions[:, :1], positions[:2], positions[0], first_twice):
        with pytest.raises(ValueError, match="answer_positions"):
            training(**batch, answer_positions=wrong)


@pytest.mark.filterwarnings("error:Dynamo detected a call to a .functools.lru_cache")
def test_compiles(training, batch):
    batch["answer_positions"] = answers.answer_positions(batch["labels"])
    wanted = training(**batch).loss
    torch._dynamo.reset()
    compiled = torch.compile(training, backend="aot_eager")
    assert torch.allclose(compiled(**batch).loss, wanted, atol=1e-5)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wanted, language = step(training, batch), training.model.language_model
    language.compile(backend="aot_eager", fullgraph=True)  # increments break no graph
    same(step(training, batch), wanted, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_step_takes_less_memory(training, processor, rng):
    """By the prompt's logits: in the model's dtype, in float32 for the loss, and their gradients."""
    training.resize_token_embeddings(8000)
    training.requires_grad_(False)
    training.increments.pool.train_keys(False)
    batch = labelled(inputs(processor, QUESTIONS[:3], rng, side="right"), rng)
    ours, theirs = (peak_memory(lambda o=o: step(training, batch, **o), False)[0] for o in ({}, ALL))
    samples, tokens = batch["labels"].shape
    saved = samples * (tokens - 3) * 8000 * 4  # one tensor of them
    assert theirs.peak - ours.peak >= 2 * saved
    assert theirs.largest >= samples * tokens * 8000 * 4 > ours.largest
