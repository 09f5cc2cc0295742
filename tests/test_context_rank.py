"""Earlier tasks' mean increments shortened to a low rank (``IncrementConfig.context_rank``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cllava_fast as cf
from cllava_fast import lowrank
from cllava_fast.model import get_increments
from cllava_fast.model.merging import acting_rows
from tests.helpers import QUESTIONS, inputs, learn
from tests.train_helpers import arguments, stream

SHAPE: dict[str, Any] = dict(rows_per_task=4, top_m=2, rank=2, a_std=0.1, scale=8.0)
SHORT = cf.IncrementConfig(**SHAPE, context_rank=3)


def product(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """``[d_out, d_in]`` float64: ``sum_n weight_n B_n^T A_n``."""
    return torch.einsum("n,nro,nri->oi", weight.double(), B.double(), A.double())


def learned(llava: Any, processor: Any, rng: torch.Generator, config: Any = SHORT, tasks: int = 4) -> Any:
    return learn(cf.patch(llava, config, processor=processor), tasks, rng, b_std=0.3)


def test_norms_and_truncation_are_those_of_the_dense_product(rng: torch.Generator) -> None:
    A, B = torch.randn(6, 9, generator=rng).double(), torch.randn(6, 5, generator=rng).double()
    U, S, V = torch.linalg.svd(B.t() @ A, full_matrices=False)
    short_A, short_B, error = lowrank.truncate(A, B, 3)
    best = (U[:, :3] * S[:3]) @ V[:3]
    assert torch.allclose(short_B.t() @ short_A, best, atol=1e-10)
    expected = (S[3:].norm() / S.norm()).item()
    assert error == pytest.approx(expected, rel=1e-9)
    assert lowrank.relative_error(short_A, short_B, A, B).item() == pytest.approx(expected, rel=1e-6)
    assert lowrank.relative_error(short_A, short_B, A, 0 * B).item() == 0.0


def test_what_acts_is_the_best_short_mean_of_each_earlier_task(
    llava: Any, processor: Any, rng: torch.Generator
) -> None:
    increments = learned(llava, processor, rng)
    pool, method = increments.pool, increments.method
    query = torch.randn(3, pool.key_dim, generator=rng)
    selection = method.select(pool, query, increments.groups, training=False)
    assert selection.context.shape == (3, 3), "a column for each earlier task"
    worst = torch.zeros(4, dtype=torch.float64)
    for factors in pool.layers.values():
        means = []
        for task in range(4):
            own = pool.row_task == task
            exact = product(factors.A[own], factors.B[own], pool.row_mean[own])
            U, S, V = torch.linalg.svd(exact)
            means.append((U[:, :3] * S[:3]) @ V[:3])
            worst[task] = max(worst[task], S[3:].norm() / S.norm())
        for sample in range(3):
            expected = torch.zeros(factors.shape.d_out, factors.shape.d_in, dtype=torch.float64)
            for row, weight in zip(selection.index[sample], selection.weight[sample], strict=True):
                expected += product(factors.A[row][None], factors.B[row][None], weight[None])
                task = pool.row_task[row]
                for earlier in range(task):
                    expected += (weight * pool.context[task, earlier]).double() * means[earlier]
            one = method.select(pool, query[sample : sample + 1], increments.groups, training=False)
            found = product(*acting_rows(one, factors))
            assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item()), sample
    assert torch.allclose(pool.context_error.double(), worst, atol=1e-5) and worst.min() > 0.01


def logits(llava: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return llava.eval()(**batch).logits


def test_the_layers_do_what_merged_weights_do(llava: Any, processor: Any, rng: torch.Generator) -> None:
    learned(llava, processor, rng)
    batch = inputs(processor, QUESTIONS[:1], rng)
    layers = logits(llava, batch)
    cf.merge(llava, instruction=QUESTIONS[0])
    assert torch.allclose(logits(llava, batch), layers, atol=1e-4 * layers.abs().max().item())


def low_rank_tasks(llava: Any, processor: Any, rng: torch.Generator, config: Any, open_last: bool = False) -> Any:
    """Means of rank 2 at most: one row of each closed task has increments."""
    increments = get_increments(cf.patch(llava, config, processor=processor))
    pool = increments.pool
    for task in range(3):
        queries = increments.surrogate.query([increments.reader.canonical(q) for q in QUESTIONS])
        queries = queries + 0.02 * torch.randn(queries.shape, generator=rng)
        increments.method.open_task(pool, queries, rng)
        if pool.block_context is not None:
            torch.nn.init.normal_(pool.block_context, generator=rng)
        closes = task < 2 or not open_last
        for factors in pool.layers.values():
            rows = factors.block_B.data
            torch.nn.init.normal_(rows[task : task + 1] if closes else rows, std=0.3, generator=rng)
        if closes:
            increments.method.close_task(pool, f"task{task}", queries, increments.groups)
    return increments


@pytest.mark.parametrize("training", [False, True])
def test_a_rank_that_is_enough_changes_nothing(
    training: bool, new_llava: Callable, processor: Any, rng: torch.Generator
) -> None:
    """Not in answers, nor in the gradients of the block and of w."""
    state = rng.get_state()
    batch = inputs(processor, QUESTIONS[:3], rng, side="right")
    batch["labels"] = batch["input_ids"]
    found = []
    after = rng.get_state()
    for config in (cf.IncrementConfig(**SHAPE), cf.IncrementConfig(**SHAPE, context_rank=2)):
        rng.set_state(after)
        llava = new_llava()
        increments = low_rank_tasks(llava, processor, rng, config, open_last=training)
        pool = increments.pool
        if config.context_rank:
            assert pool.context_error.max() < 1e-6
        pool.train_keys(False)
        output = llava.train(training)(**batch)
        gradients = []
        if training:
            names = sorted(name for name, p in pool.named_parameters() if p.requires_grad)
            parameters = dict(pool.named_parameters())
            gradients = torch.autograd.grad(output.loss, [parameters[name] for name in names])
            assert "block_context" in names
        found.append([output.loss.detach(), *([] if training else [output.logits.detach()]), *gradients])
    assert not torch.equal(state, after)
    for exact, short in zip(*found, strict=True):
        assert exact.abs().max() > 0
        assert torch.allclose(exact, short, atol=2e-4 * exact.abs().max().item())


def test_it_is_saved_and_read_to_the_bit(
    new_llava: Callable, processor: Any, rng: torch.Generator, tmp_path: Path
) -> None:
    llava = new_llava()
    increments = learned(llava, processor, rng)
    batch = inputs(processor, QUESTIONS[:3], rng)
    expected = logits(llava, batch)
    cf.save_pretrained(llava, tmp_path / "saved")
    other = cf.load_pretrained(new_llava(), tmp_path / "saved", processor=processor)
    assert torch.equal(logits(other, batch), expected)
    pool = get_increments(other).pool
    assert torch.equal(pool.context_error, increments.pool.context_error) and len(pool.context_error) == 4
    state = increments.pool.state()
    name = next(name for name in state if name.endswith("mean_A"))
    with pytest.raises(ValueError, match="mean_A"):
        pool.load_state({**state, name: state[name][:-1]}, increments.pool.task_names)
    with pytest.raises(ValueError, match="do not|does not fit"):
        pool.load_state({n: t for n, t in state.items() if n != name}, increments.pool.task_names)


def test_the_loop_learns_with_it_and_goes_on(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    class Errors(cf.ContinualCallback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_task_end(self, task: str, number: int, metrics: dict[str, float], **kwargs: Any) -> None:
            self.seen.append(metrics["commit/context_error"])

    errors = Errors()
    llava = cf.patch(new_llava(), SHORT, processor=processor)
    result = cf.ContinualTrainer(llava, processor, stream(3), arguments(tmp_path / "run"), callbacks=[errors]).train()
    pool = get_increments(llava).pool
    assert errors.seen == pool.context_error.tolist() and all(0 < error < 1 for error in errors.seen)
    assert pool.context[2, 0] != 0.25, "w is learned through the means"
    matrix = result.accuracy_matrix
    assert matrix[0][0] == matrix[2][0], "later tasks leave earlier ones alone"
    other = cf.patch(new_llava(), SHORT, processor=processor)
    again = cf.ContinualTrainer(other, processor, stream(3), arguments(tmp_path / "run", resume=True))
    assert again.train().accuracy_matrix == matrix
    assert all(torch.equal(t, pool.state()[n]) for n, t in get_increments(other).pool.state().items())


def test_a_commit_that_fails_changes_nothing(
    llava: Any, processor: Any, rng: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    increments = learned(llava, processor, rng, tasks=2)
    before = {name: tensor.clone() for name, tensor in increments.pool.state().items()}
    monkeypatch.setattr(lowrank, "truncate", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        learned(llava, processor, rng, tasks=1)
    increments.drop_task()
    after = increments.pool.state()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    cf.save_pretrained(llava, tmp_path / "out")


def test_the_exact_option_keeps_no_means(llava: Any, processor: Any, rng: torch.Generator) -> None:
    pool = learned(llava, processor, rng, cf.IncrementConfig(**SHAPE)).pool
    assert not [name for name in pool.state() if "mean_" in name or name == "context_error"]


@pytest.mark.parametrize("values", [{"context_rank": 0}, {"context_rank": 8}, {"context_rank": 2, "context": "factor"}])
def test_refusals(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="context_rank is"):
        cf.IncrementConfig(**{**SHAPE, **values})
