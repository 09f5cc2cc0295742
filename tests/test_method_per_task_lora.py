"""A LoRA for each task, and the task is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cllava_fast as cf
from cllava_fast.cli.ask import _told
from cllava_fast.evaluate.wording import explanations
from cllava_fast.methods.per_task_lora import PerTaskLoraConfig
from cllava_fast.model import get_increments, paths
from tests.helpers import QUESTIONS, inputs, learn
from tests.method_helpers import check_layers, check_life_cycle, dense
from tests.train_helpers import arguments, stream

CONFIG = PerTaskLoraConfig(rank=4, a_std=0.1, scale=2.0)


@pytest.fixture
def told(llava: Any, processor: Any, rng: torch.Generator) -> Any:
    """Three tasks learned."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, rng, b_std=0.1)
    return llava


def logits(model: Any, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


def test_each_sample_gets_its_own_tasks_row(told: Any, rng: torch.Generator) -> None:
    increments = get_increments(told)
    query = torch.tensor([[2.0], [0.0], [1.0], [3.0], [-1.0], [99.0], [1e30]])
    alpha = torch.zeros(7, 3, dtype=torch.float64)
    for b, task in enumerate((2, 0, 1)):
        alpha[b, task] = 1.0  # and nothing for a task that was not learned
    selection = increments.method.select(increments.pool, query, 1, False)
    assert torch.equal(dense(selection, increments.pool, 7), alpha)
    check_layers(told, selection, alpha, rng)


def test_in_training_the_open_task_acts_alone(llava: Any, processor: Any, rng: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 3, rng, b_std=0.1, commit_last=False)
    selection = increments.method.select(increments.pool, torch.tensor([[2.0], [2.0], [1.0]]), 1, True)
    alpha = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.float64)
    assert torch.equal(dense(selection, increments.pool, 3), alpha)
    check_layers(llava, selection, alpha, rng)
    # and once the model is in evaluation mode, what is committed
    selection = increments.method.select(increments.pool, torch.tensor([[2.0], [1.0]]), 1, False)
    assert dense(selection, increments.pool, 2).tolist() == [[0, 0, 0], [0, 1, 0]]


def test_a_batch_may_mix_tasks(told: Any, new_llava: Callable, processor: Any, rng: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS[:3], rng)
    together = logits(told, batch, query=torch.tensor([[2.0], [0.0], [7.0]]))
    for sample, task in enumerate((2.0, 0.0)):
        alone = logits(told, batch, query=torch.full((3, 1), task))
        torch.testing.assert_close(together[sample], alone[sample], atol=1e-5, rtol=1e-5)
    frozen = logits(new_llava(), batch)
    assert torch.equal(together[2], frozen[2]), "a task that was not learned gets the frozen model"
    assert (together[:2] - frozen[:2]).abs().amax((1, 2)).min() > 1e-3
    images = [told.config.image_token_id]  # a random model may write one, which no picture comes with
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "suppress_tokens": images}
    found = told.generate(**batch, query=torch.tensor([[2.0], [0.0], [1.0]]), **options)
    assert torch.equal(
        found, told.generate(**batch, query=torch.tensor([[2.0], [0.0], [1.0]]), use_cache=False, **options)
    )


def test_life_cycle(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    result, model = check_life_cycle(new_llava, processor, CONFIG, tmp_path)
    assert get_increments(model).pool.num_rows == 3 and result.selection_accuracy is None
    matrix = result.accuracy_matrix
    assert matrix[2][:2] == [matrix[0][0], matrix[1][1]], "what is told the task forgets nothing"


def test_evaluation_tells_the_task(told: Any, processor: Any, tmp_path: Path) -> None:
    """Whatever tasks share a batch, each sample's query is its own task's number."""
    batches: list[torch.Tensor] = []
    select = get_increments(told).method.select

    def spy(pool: Any, query: torch.Tensor, groups: int, training: bool) -> Any:
        batches.append(query)
        return select(pool, query, groups, training)

    get_increments(told).method.select = spy
    results = cf.evaluate_stream(told, processor, stream(2), tmp_path / "eval", batch_size=12, max_new_tokens=2)
    assert sorted(batches[0].flatten().tolist()) == [0.0] * 6 + [1.0] * 6
    assert any("told each question's task" in text for _, text in explanations(results))


def test_merge_and_export_by_task(told: Any, processor: Any, rng: torch.Generator, tmp_path: Path) -> None:
    pool, batch = get_increments(told).pool, inputs(processor, QUESTIONS[:2], rng)
    wanted = logits(told, batch, query=torch.ones(2, 1))
    linears = paths.adapted_linears(told, CONFIG.targets)
    before = {path: linear.weight.double() for path, linear in linears.items()}
    cf.merge(told, task="task1")
    for path, linear in linears.items():
        factors = pool.factors(path)
        exact = before[path] + CONFIG.scale * factors.B[1].double().t() @ factors.A[1].double()
        torch.testing.assert_close(linear.weight.double(), exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits(told, batch), wanted, atol=1e-4, rtol=1e-4)
    cf.unmerge(told)
    assert cf.export_peft(told, tmp_path / "lora", task="task1").rank == CONFIG.rank
    with pytest.raises(ValueError, match="task 'forms' was not learned; expected one of"):
        cf.merge(told, task="forms")
    with pytest.raises(ValueError, match="must be told the task"):
        cf.merge(told, instruction=QUESTIONS[0])
    with pytest.raises(ValueError, match="nothing of it was learned"):
        cf.merge(told, query=torch.tensor([5.0]))


def test_refusals(told: Any, processor: Any, rng: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS[:2], rng)
    with pytest.raises(ValueError, match=r"query is \[0.5, 1.0\]; expected whole numbers, of tasks \['task0'"):
        told(**batch, query=torch.tensor([[0.5], [1.0]]))
    with pytest.raises(ValueError, match=r"must be told the task: pass query= \[B, 1\].*learned: {0: 'task0'"):
        told(**batch)
    with pytest.raises(ValueError, match=r"query is \[2, 384\]; expected \[2, 1\]"):
        told(**batch, query=torch.zeros(2, 384))
    with pytest.raises(ValueError, match="rank is 0"):
        PerTaskLoraConfig(rank=0)


def test_what_ask_is_told(told: Any, new_llava: Callable, processor: Any) -> None:
    assert _told(told, "task2").tolist() == [[2.0]]
    for task in (None, "forms"):
        with pytest.raises(ValueError, match="must be told the question's task, one of task0, task1, task2"):
            _told(told, task)
    other = cf.patch(new_llava(), cf.LoraConfig(rank=2), processor=processor)
    assert _told(other, None) is None
    with pytest.raises(ValueError, match="sequential_lora is told no task"):
        _told(other, "task2")


def test_it_learns(llava: Any, processor: Any, tmp_path: Path) -> None:
    cf.patch(llava, PerTaskLoraConfig(rank=4, a_std=0.1, scale=8.0), processor=processor)
    result = cf.ContinualTrainer(llava, processor, stream(2), arguments(tmp_path / "run", max_steps=60)).train()
    assert all(loss[-1] < 0.7 * loss[0] for loss in result.losses.values())
