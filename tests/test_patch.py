"""What ``patch`` does to a model, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cllava_fast as cf
from cllava_fast.data import chat_template, pad_to_square
from cllava_fast.methods.diki import DikiConfig
from cllava_fast.methods.lora import LoraConfig
from cllava_fast.model import calls
from tests.helpers import QUESTIONS, inputs, last_logits, learn, selected

CONFIG = cf.IncrementConfig(a_std=0.1)
BACKBONE = cf.IncrementConfig(a_std=0.1, surrogate="backbone")


def test_bit_equal_until_a_task_is_learned(llava: Any, processor: Any, generator: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS, generator)
    before = last_logits(llava, batch)
    generated = llava.generate(**batch, max_new_tokens=4)
    cf.patch(llava, CONFIG, processor=processor)
    assert torch.equal(last_logits(llava, batch), before)
    assert torch.equal(llava.generate(**batch, max_new_tokens=4), generated)
    # an open block acts in training alone
    learn(llava, 1, generator, commit_last=False)
    assert torch.equal(last_logits(llava, batch), before)


def test_unpatch_restores_the_model_that_came_in(
    llava: Any, new_llava: Callable, processor: Any, generator: Any
) -> None:
    llava.model.vision_tower.requires_grad_(False)
    batch = inputs(processor, QUESTIONS, generator)
    before, state = last_logits(llava, batch), copy.deepcopy(llava.state_dict())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llava.modules()]
    attributes = {name: set(module.__dict__) for name, module in llava.named_modules()}
    grads = {name: p.requires_grad for name, p in llava.named_parameters()}
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator)
    assert not torch.equal(last_logits(llava, batch), before)
    assert not any(p.requires_grad for p in llava.parameters())
    cf.unpatch(llava)
    assert torch.equal(last_logits(llava, batch), before)
    assert {name: set(module.__dict__) for name, module in llava.named_modules()} == attributes
    assert {name: p.requires_grad for name, p in llava.named_parameters()} == grads
    assert all(torch.equal(tensor, state[name]) for name, tensor in llava.state_dict().items())
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llava.modules()] == hooks
    with pytest.raises(ValueError, match="not patched"):
        cf.unpatch(llava)
    cf.unpatch(cf.patch(llava, CONFIG, processor=processor))


def test_base_names_in_the_state_dict_stay(llava: Any, processor: Any) -> None:
    before = list(llava.state_dict())
    cf.patch(llava, CONFIG, processor=processor)
    assert [name for name in llava.state_dict() if not name.startswith("increments.")] == before


def test_other_instances_are_untouched(new_llava: Callable, processor: Any, generator: torch.Generator) -> None:
    patched, other = new_llava(), new_llava()
    batch = inputs(processor, QUESTIONS, generator)
    before = last_logits(other, batch)
    learn(cf.patch(patched, CONFIG, processor=processor), 1, generator)
    assert torch.equal(last_logits(other, batch), before)


def test_patch_is_idempotent_and_refuses_another_config(llava: Any, processor: Any) -> None:
    assert cf.patch(llava, CONFIG, processor=processor) is llava
    increments = llava.increments
    assert cf.patch(llava, CONFIG, processor=processor).increments is increments
    assert cf.patch(llava).increments is increments
    with pytest.raises(ValueError, match="is patched with .*unpatch"):
        cf.patch(llava, cf.IncrementConfig(rank=3), processor=processor)
    speaking, padding = copy.deepcopy(processor), copy.deepcopy(processor)
    speaking.chat_template = chat_template("vicuna_v1")
    pad_to_square(padding)
    for other, what in ((speaking, "chat template"), (padding, "do_pad of images")):
        with pytest.raises(ValueError, match=f"another {what} than the one .*; unpatch"):
            cf.patch(llava, CONFIG, processor=other)
    assert llava.increments is increments


def test_only_language_layers_are_adapted(llava: Any, processor: Any) -> None:
    config = cf.IncrementConfig(targets=("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
    cf.patch(llava, config, processor=processor)
    adapted = [name for name, module in llava.named_modules() if "_adapter" in module.__dict__]
    assert len(adapted) == 9 and all(name.startswith("model.language_model.layers.") for name in adapted)


def test_everything_but_the_block_is_frozen_in_training(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 2, generator, commit_last=False)
    increments.pool.train_keys(False)
    llava.train()
    batch = inputs(processor, QUESTIONS, generator, side="right")
    llava(**batch, labels=batch["input_ids"]).loss.backward()
    with_gradient = {name for name, p in llava.named_parameters() if p.grad is not None}
    assert {name.split(".")[-1] for name in with_gradient} == {"block_A", "block_B", "block_context"}
    assert all(name.startswith("increments.pool.") for name in with_gradient)
    assert not any(buffer.requires_grad for buffer in llava.buffers())
    assert all(float(p.grad.abs().sum()) > 0 for p in llava.parameters() if p.grad is not None)


def test_a_copied_model_is_a_model_of_its_own(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    batch = inputs(processor, QUESTIONS, generator)
    twin = copy.deepcopy(llava)
    before = last_logits(llava, batch)
    assert torch.equal(last_logits(twin, batch), before)
    for factors in twin.increments.pool.layers.values():
        factors.B.zero_()
    assert not torch.equal(last_logits(twin, batch), before) and torch.equal(last_logits(llava, batch), before)
    cf.unpatch(twin)
    assert torch.equal(last_logits(llava, batch), before)


@pytest.mark.parametrize("config", [CONFIG, BACKBONE, DikiConfig(), LoraConfig()])
def test_a_patched_model_is_not_pickled(llava: Any, processor: Any, config: Any) -> None:
    """It would come back as the frozen base."""
    cf.patch(llava, config, processor=processor)
    parts = (llava, llava.model, llava.model.language_model.layers[0].self_attn.o_proj)
    for part in parts:
        with pytest.raises(TypeError, match="cannot be pickled.*save_pretrained"):
            pickle.dumps(part)
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.save(llava, io.BytesIO())
    cf.unpatch(llava)
    assert [type(pickle.loads(pickle.dumps(part))) for part in parts] == [type(part) for part in parts]


def test_a_base_layer_that_is_no_plain_linear(llava: Any, processor: Any, generator: torch.Generator) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for layer in llava.model.language_model.layers:
        layer.self_attn.o_proj.__class__ = Doubled
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 1, generator)
    linear = llava.model.language_model.layers[0].self_attn.o_proj
    x = torch.randn(2, 3, 128, generator=generator)
    increments.call.active = increments.method.select(
        increments.pool, torch.randn(2, increments.pool.key_dim, generator=generator), 1, training=False
    )
    factors, pairs = (
        increments.pool.factors("model.language_model.layers.0.self_attn.o_proj"),
        increments.call.active.past,
    )
    zero = cf.ops.inject_add(torch.zeros(2, 3, 128), x, factors.A, factors.B, pairs.index, pairs.coefficient)
    torch.testing.assert_close(linear(x), 2 * x @ linear.weight.T + zero)


def test_a_model_cast_after_the_patch(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """Committed rows follow the model; keys, means and context keep their precision, and so does what trains."""
    cf.patch(llava, CONFIG, processor=processor)
    pool = learn(llava, 3, generator, commit_last=False).pool
    exact = {name: t.clone() for name, t in (*pool.named_buffers(), *pool.named_parameters())}
    batch = inputs(processor, QUESTIONS, generator)
    rows = selected(llava, batch)
    llava.to(torch.bfloat16)
    for name, tensor in (*pool.named_buffers(), *pool.named_parameters()):
        if name.endswith((".A", ".B")):
            assert tensor.dtype == torch.bfloat16
        else:
            assert torch.equal(tensor, exact[name]) and tensor.dtype == exact[name].dtype, name
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert torch.equal(selected(llava, batch), rows)
    assert last_logits(llava, batch).dtype == torch.bfloat16
    llava.train()
    pool.train_keys(False)
    llava(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in pool.parameters() if p is not pool.block_keys
    )


def test_what_others_put_on_a_linear_keeps_its_part(llava: Any, processor: Any, generator: torch.Generator) -> None:
    linear = llava.model.language_model.layers[0].self_attn.o_proj
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight)
    batch = inputs(processor, QUESTIONS, generator)
    before = last_logits(llava, batch)
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator, b_std=0.0)
    torch.testing.assert_close(last_logits(llava, batch), before)


def test_a_linear_that_was_replaced_is_missed(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """As tools that quantise a model do; one that stands around the linear leaves it where it is."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    batch = inputs(processor, QUESTIONS, generator)
    before = last_logits(llava, batch)
    attention = llava.model.language_model.layers[1].self_attn
    linear, other = attention.o_proj, nn.Linear(128, 128, bias=False)
    other.load_state_dict(linear.state_dict())
    attention.o_proj = other
    for model in (llava, copy.deepcopy(llava)):
        for call in (model, model.model, model.generate):
            with pytest.raises(RuntimeError, match="o_proj of a LlamaAttention was replaced after patch.. by a Linear"):
                call(**batch)
    attention.o_proj = nn.Sequential(linear)
    assert torch.equal(last_logits(llava, batch), before)


def test_linears_are_looked_for_once_an_answer(
    llava: Any, processor: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    looked: list[Any] = []
    monkeypatch.setattr(calls, "_check_in_place", looked.append)
    llava.generate(**inputs(processor, QUESTIONS, generator), min_new_tokens=3, max_new_tokens=3)
    assert looked == [llava]


def test_the_base_is_not_saved_by_mistake(
    llava: Any, processor: Any, tmp_path: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    with pytest.raises(ValueError, match="cllava_fast.save_pretrained"):
        llava.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    cf.unpatch(llava)
    llava.save_pretrained(tmp_path / "out")
    assert type(llava).from_pretrained(tmp_path / "out") is not None


def test_continuous_batching_takes_one_selection_for_all(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    ids = inputs(processor, QUESTIONS[:1], generator)["input_ids"]
    for model in (llava, copy.deepcopy(llava)):
        for pack in (
            model.init_continuous_batching,
            model.continuous_batching_context_manager().__enter__,
            lambda model=model: model.generate_batch(ids.tolist()),
            lambda model=model: model.generate(ids, cache_implementation="paged", max_new_tokens=1),
        ):
            with pytest.raises(ValueError, match="one selection alone; call model.generate, or .*merge"):
                pack()
    cf.merge(llava, task="task0")
    assert llava.init_continuous_batching() is not None
    cf.unmerge(llava)
    cf.unpatch(llava)
    assert llava.init_continuous_batching() is not None


def test_bfloat16_model(llava: Any, processor: Any, generator: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS, generator)
    llava.to(torch.bfloat16)
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 2, generator)
    assert increments.pool.factors("model.language_model.layers.0.self_attn.o_proj").A.dtype == torch.bfloat16
    assert increments.pool.keys.dtype == torch.float32
    assert torch.isfinite(last_logits(llava, {**batch, "pixel_values": batch["pixel_values"].bfloat16()})).all()


class TestRefusals:
    def test_a_model_that_is_no_llava(self, processor: Any) -> None:
        with pytest.raises(TypeError, match="model is a Linear; expected transformers.LlavaFor.*LlamaFor"):
            cf.patch(nn.Linear(2, 2), processor=processor)
        for wrapped in (nn.DataParallel(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2))):
            with pytest.raises(TypeError, match="pass the unwrapped model"):
                cf.patch(wrapped, processor=processor)

    def test_a_model_with_adapters_of_another_library(self, llava: Any, processor: Any) -> None:
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(llava, peft.LoraConfig(target_modules=["o_proj"]))
        with pytest.raises(TypeError, match="PEFT"):
            cf.patch(wrapped, CONFIG, processor=processor)
        with pytest.raises(ValueError, match="adapters of another patch"):
            cf.patch(llava, CONFIG, processor=processor)
        assert not hasattr(llava, "increments")

    def test_a_tokenizer_in_place_of_a_processor(self, llava: Any, processor: Any) -> None:
        for _ in range(2):  # and of a patched model
            with pytest.raises(TypeError, match="no image_processor; expected the whole processor of the LlavaFor"):
                cf.patch(llava, processor=processor.tokenizer)
            cf.patch(llava, processor=processor)

    def test_no_processor_anywhere(self, llava: Any) -> None:
        with pytest.raises(ValueError, match='needs a processor.*surrogate="backbone"'):
            cf.patch(llava)
        assert not hasattr(llava, "increments") and "forward" not in llava.__dict__
        cf.patch(llava, BACKBONE)

    def test_an_unknown_target_or_surrogate(self, llava: Any, processor: Any) -> None:
        with pytest.raises(ValueError, match="'out_proj' is not in .* expected one of .*self_attn.o_proj"):
            cf.patch(llava, cf.IncrementConfig(targets=("out_proj",)), processor=processor)
        with pytest.raises(FileNotFoundError, match="surrogate 'nobody' was not found"):
            cf.patch(llava, cf.IncrementConfig(surrogate="nobody"), processor=processor)
        assert not hasattr(llava, "increments")

    def test_a_processor_that_comes_later(self, llava: Any, processor: Any) -> None:
        cf.patch(llava, BACKBONE)
        with pytest.raises(ValueError, match="is patched without a processor; unpatch"):
            cf.patch(llava, processor=processor)
