"""Two sets of increments over one base in memory, and what acts replaced while calls are under way."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import cllava_fast as cf
from cllava_fast.model import get_increments
from tests.helpers import QUESTIONS, cached, inputs, learn, logits

CONFIG = cf.IncrementConfig(a_std=0.1, rank=4)


def base_of(model: Any) -> dict[str, torch.Tensor]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in tensors if not name.startswith("increments.")}


@pytest.fixture
def learned(new_llava: Callable[[], Any], processor: Any, generator: torch.Generator) -> Callable[[int], Any]:
    """A model of so many tasks."""

    def new(tasks: int) -> Any:
        model = cf.patch(new_llava(), CONFIG, processor=processor)
        learn(model, tasks, generator, b_std=0.1)
        return model

    return new


@pytest.mark.parametrize("merged", [False, True])
def test_each_model_acts_by_its_own_over_one_base(
    learned: Callable[[int], Any], processor: Any, generator: torch.Generator, tmp_path: Path, merged: bool
) -> None:
    model, batch = learned(2), inputs(processor, QUESTIONS[:3], generator)
    newer = cf.save_pretrained(learned(3), tmp_path / "newer")
    before = logits(model, batch)
    if merged:
        cf.merge(model, task="task0")
    now = logits(model, batch)
    other = cf.share(model)
    assert torch.equal(logits(other, batch), now)
    mine, theirs = base_of(model), base_of(other)
    assert all(theirs[name].data_ptr() == tensor.data_ptr() for name, tensor in mine.items()) and mine
    assert not any(theirs[name] is tensor for name, tensor in model.named_parameters() if name in mine)
    rows = [{t.data_ptr() for t in m.increments.pool.state().values() if t.numel()} for m in (model, other)]
    assert rows[0].isdisjoint(rows[1]), "what one learns in place, the other would have learned"
    pristine = {path: weight.data_ptr() for path, weight in model.increments.pristine.items()}
    cf.unmerge(other)
    assert all(other.get_submodule(path).weight.data_ptr() == where for path, where in pristine.items())
    cf.load_pretrained(other, newer)
    after = logits(other, batch)
    assert not torch.allclose(after, before) and torch.equal(logits(model, batch), now)
    cf.merge(other, task="task2")
    assert torch.equal(logits(model, batch), now)
    cf.unmerge(model)
    assert torch.equal(logits(model, batch), before)
    cf.unmerge(other)
    cf.unpatch(model)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(other, batch), after)
    with cf.learning(other, "task3", QUESTIONS) as parameters:
        for parameter in parameters:
            parameter.data += 0.1
    assert "task3" in get_increments(other).pool.task_names and not hasattr(model, "increments")


def test_a_plain_model_is_shared_too(llava: Any, processor: Any, generator: torch.Generator) -> None:
    other, batch = cf.share(llava), inputs(processor, QUESTIONS[:2], generator)
    frozen = logits(llava, batch)
    learn(cf.patch(other, CONFIG, processor=processor), 2, generator, b_std=0.1)
    assert not torch.allclose(logits(other, batch), frozen) and torch.equal(logits(llava, batch), frozen)
    assert not hasattr(llava, "increments")


def test_what_was_shared_in_inference_mode_learns(
    learned: Callable[[int], Any], processor: Any, rng: torch.Generator
) -> None:
    model = learned(1)
    with torch.inference_mode():
        other = cf.share(model)
    batch = inputs(processor, QUESTIONS[:2], rng)
    with cf.learning(other, "task1", QUESTIONS) as parameters:
        other(**batch, labels=batch["input_ids"]).loss.backward()
        assert any(parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("wrapped", ["dispatched", "prepared"])
def test_a_copy_asks_its_own_layers(
    new_llava: Callable[[], Any], processor: Any, generator: torch.Generator, tmp_path: Path, accelerator: Any,
    wrapped: str,
) -> None:  # fmt: skip
    """What accelerate put on a model before the patch is copied with it."""
    model, batch = new_llava(), inputs(processor, QUESTIONS[:2], generator)
    if wrapped == "dispatched":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        accelerator.prepare(model)
    under = dict(model.__dict__)
    learn(cf.patch(model, CONFIG, processor=processor), 2, generator, b_std=0.1)
    before, other = logits(model, batch), cf.share(model)
    if wrapped == "prepared":
        assert accelerator.unwrap_model(model, keep_fp32_wrapper=False) is model
        assert torch.equal(logits(model, batch), before)
    asked: list[str] = []
    model.model.register_forward_hook(lambda *_: asked.append("the original"))
    learn(other, 1, generator, b_std=0.1)
    after = logits(other, batch)
    assert not torch.allclose(after, before) and not asked
    alone = cf.load_pretrained(new_llava(), cf.save_pretrained(other, tmp_path / "out"), processor=processor)
    torch.testing.assert_close(after, logits(alone, batch), atol=1e-5 if wrapped == "dispatched" else 0.1, rtol=0)
    cf.unpatch(other)
    logits(other, batch)
    assert not asked and other.forward != model.forward
    cf.unpatch(model)
    assert {name: value for name, value in model.__dict__.items() if "forward" in name or name.startswith("_is")} == {
        name: value for name, value in under.items() if "forward" in name or name.startswith("_is")
    }


def test_a_method_of_an_instance_may_bear_its_classes_signature(llava: Any, processor: Any) -> None:
    linear, kind = llava.model.language_model.layers[0].self_attn.o_proj, torch.nn.Linear
    linear.forward = functools.wraps(kind.forward)(lambda x: kind.forward(linear, x))
    with torch.no_grad():
        cf.patch(llava, CONFIG, processor=processor)
        assert linear(torch.zeros(1, 1, linear.in_features)).shape == (1, 1, linear.out_features)
        assert list(inspect.signature(linear.forward).parameters) == ["input"]


def test_what_cannot_be_shared(llava: Any) -> None:
    with pytest.raises(TypeError, match="expected transformers.LlavaForConditionalGeneration"):
        cf.share(torch.nn.Linear(2, 2))
    head = llava.lm_head.weight
    llava.lm_head.to("meta")
    with pytest.raises(ValueError, match="lm_head.weight is offloaded"):
        cf.share(llava)

    class Int8Params(torch.nn.Parameter):
        pass

    llava.lm_head.weight = Int8Params(head)
    with pytest.raises(ValueError, match="lm_head.weight is a Int8Params; a quantised model keeps more"):
        cf.share(llava)


class Swaps:
    """A streamer that does something behind the prompt and the first token."""

    def __init__(self, swap: Callable[[], Any]) -> None:
        self.swap, self.puts = swap, 0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.swap()

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    "how",
    ["load newer", "load older", "merge", "unmerge", "merge and unmerge", "scale", "scale and undo", "undo", "unpatch"],
)
def test_a_call_under_way_gives_no_answer_of_two_models(
    how: str, learned: Callable[[int], Any], processor: Any, generator: torch.Generator, tmp_path: Path
) -> None:
    model, batch = learned(2), inputs(processor, QUESTIONS[:1], generator)
    newer = cf.save_pretrained(learned(3), tmp_path / "newer")
    older = cf.save_pretrained(learned(1), tmp_path / "older")
    if how == "unmerge":
        cf.merge(model, task="task0")
    scaled = cf.scale_layers(model, alpha=0.5, beta=0.5) if how == "undo" else None
    swap = {
        "load newer": lambda: cf.load_pretrained(model, newer),
        "load older": lambda: cf.load_pretrained(model, older),
        "merge": lambda: cf.merge(model, task="task1"),
        "unmerge": lambda: cf.unmerge(model),
        "merge and unmerge": lambda: cf.unmerge(cf.merge(model, task="task1") and model),
        "scale": lambda: cf.scale_layers(model, alpha=0.5, beta=0.5),
        "scale and undo": lambda: cf.scale_layers(model, alpha=0.5, beta=0.5).undo(),
        "undo": lambda: scaled and scaled.undo(),
        "unpatch": lambda: cf.unpatch(model),
    }[how]
    ask = {**batch, "max_new_tokens": 4, "min_new_tokens": 4}
    with pytest.raises(RuntimeError, match=r"was replaced .* while generate was under way; ask again"):
        model.generate(**ask, streamer=Swaps(swap))
    if how != "unpatch":
        assert get_increments(model).call.pending is None
        if how == "merge":
            cf.unmerge(model)
    assert torch.equal(model.generate(**ask), model.generate(**ask, streamer=Swaps(lambda: None)))


def test_what_is_unpatched_is_freed_at_once(
    learned: Callable[[int], Any], processor: Any, generator: torch.Generator
) -> None:
    """Not when the garbage collector comes by, which on a GPU may be too late."""
    model, batch = learned(2), inputs(processor, QUESTIONS[:1], generator)
    twin = cf.share(model)
    gc.collect()
    gc.disable()
    try:
        for each in (twin, model):
            logits(each, batch)
            rows = ref(each.increments.pool)
            cf.unpatch(each)
            assert rows() is None
        weights = ref(twin.lm_head.weight)
        del twin, each
        assert weights() is None
    finally:
        gc.enable()


def test_a_call_within_a_swap_gives_no_answer(
    learned: Callable[[int], Any], processor: Any, generator: torch.Generator
) -> None:
    model, batch = learned(2), inputs(processor, QUESTIONS[:1], generator)
    increments, cache = get_increments(model), DynamicCache(config=model.config.get_text_config())
    with increments.swapping():
        with pytest.raises(RuntimeError, match="was replaced"):
            model.generate(**batch, max_new_tokens=2, **cached(cache))
        twin = cf.share(model)
    assert twin.generate(**batch, max_new_tokens=2).shape == model.generate(**batch, max_new_tokens=2).shape
    swaps = Swaps(lambda: cf.unmerge(cf.merge(model, task="task0") and model))
    cache = DynamicCache(config=model.config.get_text_config())
    with pytest.raises(RuntimeError, match="was replaced"):
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, streamer=swaps, **cached(cache))
    with pytest.raises(ValueError, match="the cache was not filled by this patched model"):
        model(input_ids=batch["input_ids"][:, -1:], **cached(cache))


def test_another_failure_keeps_its_name(learned: Callable[[int], Any], processor: Any, rng: torch.Generator) -> None:
    def fail() -> None:
        raise KeyError("mine")

    batch = inputs(processor, QUESTIONS[:1], rng)
    with pytest.raises(KeyError, match="mine"):
        learned(1).generate(**batch, max_new_tokens=4, min_new_tokens=4, streamer=Swaps(fail))


def test_adapters_put_over_a_patch_are_neither_saved_nor_loaded_over(
    learned: Callable[[int], Any], tmp_path: Path
) -> None:
    model = learned(1)
    saved = cf.save_pretrained(model, tmp_path / "before")
    over = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for call in (lambda: cf.save_pretrained(model, tmp_path / "out"), lambda: cf.load_pretrained(model, saved)):
        with pytest.raises(ValueError, match="q_proj carries adapters of another library, put over the patch"):
            call()
    assert not (tmp_path / "out").exists()
    over.unload()
    cf.load_pretrained(model, cf.save_pretrained(model, tmp_path / "out"))


def test_pixels_are_not_taken_for_features(learned: Callable[[int], Any], processor: Any, rng: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS[:1], rng)
    with pytest.raises(ValueError, match=r"pixel_values is \[3, 64, 64\]; expected \[images, 3, H, W\]"):
        learned(1).generate(**{**batch, "pixel_values": batch["pixel_values"][0]})
