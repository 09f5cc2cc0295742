"""``merge`` puts one selection into the frozen weights, says what rounding cost, and ``unmerge`` takes it out again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cllava_fast as cf
from cllava_fast.methods.per_task_lora import PerTaskLoraConfig
from cllava_fast.model import get_increments, paths
from tests.helpers import QUESTIONS, inputs, learn, logits

CONFIG = cf.IncrementConfig(a_std=0.1, rank=4)


@pytest.fixture(params=["product", "factor"])
def patched(request: pytest.FixtureRequest, llava: Any, processor: Any, generator: torch.Generator) -> Any:
    config = cf.IncrementConfig(a_std=0.1, rank=4, context=request.param)
    cf.patch(llava, config, processor=processor)
    learn(llava, 3, generator, b_std=0.1)
    return llava


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        path: linear.weight.data
        for path, linear in paths.adapted_linears(model, model.increments.config.targets).items()
    }


def test_merged_is_unmerged(patched: Any, processor: Any, generator: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS[:1] * 2, generator)
    before, frozen = weights(patched), logits(patched, batch, instructions=["something else entirely"] * 2)
    wanted = logits(patched, batch)
    report = cf.merge(patched, instruction=QUESTIONS[0])
    found = logits(patched, batch)
    assert patched.increments.call.active is None
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - frozen).abs().max() > 1e-2
    assert set(report.output_error) == set(before) and max(report.output_error.values()) < 1e-6
    assert cf.unmerge(patched) is patched
    assert all(weight.data_ptr() == before[path].data_ptr() for path, weight in weights(patched).items())
    assert torch.equal(logits(patched, batch), wanted)


def test_a_task_merges_as_the_mean_over_its_samples(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    pool = learn(llava, 3, generator, b_std=0.1).pool
    before = weights(llava)
    report = cf.merge(llava, task="task1")
    context = pool.context_matrix()
    for path, weight in weights(llava).items():
        factors = pool.factors(path)
        increments = torch.einsum("nro,nri->noi", factors.B.double(), factors.A.double())
        means = [
            (pool.row_mean.double()[:, None, None] * increments)[pool.row_task == task].sum(0) for task in range(3)
        ]
        exact = (
            before[path].double()
            + means[1]
            + context[1, 0].double() * pool.row_mean.double()[pool.row_task == 1].sum() * means[0]
        )
        torch.testing.assert_close(weight.double(), exact, atol=1e-6, rtol=1e-5)
        assert not torch.equal(weight, before[path])
    assert "linears merged" in str(report)


def test_merging_starts_from_the_pristine_weights(patched: Any) -> None:
    before = weights(patched)
    cf.merge(patched, instruction=QUESTIONS[0])
    once = weights(patched)
    cf.merge(patched, instruction=QUESTIONS[1])
    assert any(not torch.equal(weight, once[path]) for path, weight in weights(patched).items())
    cf.merge(patched, instruction=QUESTIONS[0])
    assert all(torch.equal(weight, once[path]) for path, weight in weights(patched).items())
    cf.unmerge(cf.unmerge(patched))
    assert all(weight.data_ptr() == before[path].data_ptr() for path, weight in weights(patched).items())


def test_the_report_says_what_a_coarse_dtype_loses(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava.bfloat16(), CONFIG, processor=processor)
    learn(llava, 1, generator, b_std=0.1)
    report = cf.merge(llava, instruction=QUESTIONS[0])
    assert all(1e-4 < error < 1e-2 for error in report.output_error.values())
    assert max(report.increment_error.values()) < 0.5
    cf.unmerge(llava)
    for factors in llava.increments.pool.layers.values():
        factors.B *= 1e-4
    report = cf.merge(llava, instruction=QUESTIONS[0])
    assert min(report.increment_error.values()) > 0.5  # most of so small an increment is rounded away


def test_a_method_that_does_not_select_merges_what_it_learned(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, cf.LoraConfig(rank=4, a_std=0.1), processor=processor)
    learn(llava, 1, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS[:2], generator)
    wanted = logits(llava, batch)
    cf.merge(llava)
    torch.testing.assert_close(logits(llava, batch), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="does not select; give none"):
        cf.merge(llava, task="task0")


def test_what_needs_the_pristine_weights_is_refused_while_merged(
    patched: Any, processor: Any, generator: torch.Generator, tmp_path: Any
) -> None:
    cf.merge(patched, instruction=QUESTIONS[0])
    batch = inputs(processor, QUESTIONS[:1], generator)
    for act in (
        lambda: cf.unpatch(patched),
        lambda: cf.save_pretrained(patched, tmp_path / "saved"),
        lambda: patched(**batch, instructions=[QUESTIONS[1]]),
        lambda: patched.generate(**batch, instructions=[QUESTIONS[1]]),
    ):
        with pytest.raises(ValueError, match=r"unmerge\(model\)"):
            act()
    assert not (tmp_path / "saved").exists()
    assert patched.generate(**batch, max_new_tokens=2).shape[0] == 1


def test_merge_refuses(llava: Any, processor: Any, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="not patched"):
        cf.merge(llava, instruction="x")
    cf.patch(llava, CONFIG, processor=processor)
    with pytest.raises(ValueError, match="nothing has been learned"):
        cf.merge(llava, instruction="x")
    learn(llava, 1, generator)
    for arguments, message in (
        ({}, "one of instruction=, task= and query=, got none"),
        ({"instruction": "x", "task": "task0"}, "expected one of"),
        ({"task": "task7"}, r"'task7' was not learned; expected one of \['task0'\]"),
        ({"query": torch.zeros(1, 3)}, "query is"),
        ({"query": torch.tensor(1.0)}, r"query is \[1\]; expected \[1, 384\]"),
        ({"query": "x"}, r"query is 'x'; expected a tensor \[D\]"),
        ({"instruction": 5}, "instruction is 5; expected a text"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            cf.merge(llava, **arguments)
    linear = llava.get_submodule(next(iter(weights(llava))))
    linear.__class__ = type("Quantised", (nn.Linear,), {})
    with pytest.raises(TypeError, match="Quantised; only a plain nn.Linear"):
        cf.merge(llava, instruction="x")
    assert not get_increments(llava).pristine


def test_an_instruction_alone_says_no_selection_where_images_count(
    llava: Any, processor: Any, generator: torch.Generator, tmp_path: Path
) -> None:
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, surrogate="text+image"), processor=processor)
    learn(llava, 1, generator)
    for act in (cf.merge, partial(cf.export_peft, path=tmp_path / "lora")):
        with pytest.raises(ValueError, match=r"looks at an image, too; give task= or query= \[D\]"):
            act(llava, instruction=QUESTIONS[0])
    assert not (tmp_path / "lora").exists() and not get_increments(llava).pristine
    cf.merge(llava, query=get_increments(llava).pool.keys[0])
    cf.merge(llava, task="task0")


def test_a_refused_merge_leaves_the_one_before(
    llava: Any, processor: Any, generator: torch.Generator, tmp_path: Path
) -> None:
    cf.patch(llava, PerTaskLoraConfig(rank=4, a_std=0.1), processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    cf.merge(llava, task="task1")
    merged = weights(llava)
    for act in (cf.merge, partial(cf.export_peft, path=tmp_path / "lora")):
        with pytest.raises(ValueError, match="no row acts on this query"):
            act(llava, query=torch.tensor([7.0]))
    assert all(torch.equal(weight, merged[path]) for path, weight in weights(llava).items())
    assert set(get_increments(llava).pristine) == set(merged) and not (tmp_path / "lora").exists()


def test_a_merge_that_fails_midway_changes_nothing(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: weight.clone() for path, weight in weights(patched).items()}
    merge, calls = cf.ops.merge, []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory")
        return merge(*args, **options)

    monkeypatch.setattr(cf.ops, "merge", fails)
    with pytest.raises(torch.OutOfMemoryError):
        cf.merge(patched, instruction=QUESTIONS[0])
    assert all(torch.equal(weight, before[path]) for path, weight in weights(patched).items())
    cf.unpatch(patched)


def test_a_merge_in_inference_mode_leaves_a_model_that_can_train(
    patched: Any, processor: Any, generator: torch.Generator
) -> None:
    with torch.inference_mode():
        cf.merge(patched, instruction=QUESTIONS[0])
    embeds = patched.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach().requires_grad_()
    patched(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
