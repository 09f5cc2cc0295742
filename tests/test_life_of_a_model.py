"""A patched model in whatever order it is used: against a fresh base that reads what was saved, after every step."""

from __future__ import annotations

import copy
import functools
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import cllava_fast as cf
from cllava_fast.demo.base import new_base
from cllava_fast.demo.tokenizer import build_processor
from cllava_fast.methods import METHODS
from tests.helpers import QUESTIONS, inputs, learn, take
from tests.train_helpers import arguments, stream

BATCH = 3


def small(method: str, **options: Any) -> Any:
    kind, _ = METHODS[method]
    fields = {"rank": 2, "a_std": 0.1, "rows_per_task": 3, "top_m": 2, "experts": 4, "top_k": 2, **options}
    fields |= {} if method == "diki" else {"targets": ("self_attn.o_proj", "mlp.down_proj")}
    return kind(**{name: value for name, value in fields.items() if name in kind.__dataclass_fields__})


CONFIGS = {name: small(name, surrogate="sentence") for name in METHODS} | {
    "factor": small("continual_llava", context="factor"),
    "means": small("continual_llava", context_rank=2),
    "backbone": small("continual_llava", surrogate="backbone"),
    "text+image": small("continual_llava", surrogate="text+image", calibrate=True),
    "slm, sample": small("slm", reduce="sample", surrogate="backbone", groups=4),
}
ASKED = [{}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}]


def everything(model: Any) -> dict[str, Any]:
    """What no refused call may change, to the bit."""
    found: dict[str, Any] = {"configs": [model.generation_config.to_dict(), model.config.to_dict()]}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        bits = tensor.detach().flatten().view(torch.uint8).numpy().tobytes()
        found[name] = tensor.dtype, tensor.shape, tensor.requires_grad, bits
    for name, module in model.named_modules():
        hooks = [len(known) for kind, known in vars(module).items() if kind.endswith("hooks")]
        found[f"module {name}"] = type(module), hooks, sorted(vars(module)), module.training
    if hasattr(model, "increments"):
        pool = model.increments.pool
        found["learned"] = list(pool.task_names), pool.block_rows, sorted(model.increments.pristine)
    return found


def changed(model: Any, before: dict[str, Any], but: tuple[str, ...] = ()) -> list[str]:
    now = everything(model)
    names = [name for name in now.keys() | before.keys() if not name.startswith(but or "nothing")]
    return [name for name in names if now.get(name) != before.get(name)]


class Life(RuleBasedStateMachine):
    processor, base, batch = None, None, {}  # of the fixture below

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.rng = torch.Generator().manual_seed(0)
        self.model, self.dtype = copy.deepcopy(self.base), torch.float32
        self.pristine: dict[str, Any] | None = None  # of the linears, while one selection is merged
        self.runs, self.saved = 0, False

    @property
    def increments(self) -> Any:
        return getattr(self.model, "increments", None)

    @property
    def can_be_saved(self) -> bool:
        return not self.pristine and not (self.increments and self.increments.is_within_a_task)

    def fresh(self) -> Any:
        return copy.deepcopy(self.base).to(self.dtype)

    def reborn(self) -> Any:
        if not self.increments:
            return self.fresh()
        cf.save_pretrained(self.model, self.folder / "reborn")
        return cf.load_pretrained(self.fresh(), self.folder / "reborn", processor=self.processor)

    def asked(self, model: Any, call: Callable[..., Any], samples: Any = slice(None), **options: Any) -> Any:
        batch = {**self.batch, "pixel_values": self.batch["pixel_values"].to(self.dtype)}
        if isinstance(samples, int):
            batch = take(batch, samples)
        known = getattr(model, "increments", None)
        if known is not None and known.method.uses_task and not known.pristine:
            batch["query"] = (torch.arange(BATCH)[samples].reshape(-1, 1) % max(1, known.pool.num_tasks)).float()
        training = model.training
        model.eval()
        torch.manual_seed(0)
        with torch.no_grad():
            found = call(**batch, **options)
        model.train(training)
        return found

    def logits(self, model: Any, samples: Any = slice(None)) -> Tensor:
        return self.asked(model, model, samples).logits

    def accepted(self, call: Callable[[], Any], message: str = "") -> bool:
        """False where it is refused, which changes nothing."""
        before = everything(self.model)
        try:
            call()
        except ValueError as error:
            assert re.search(message, str(error)) and not changed(self.model, before)
            return False
        return True

    @initialize(name=st.sampled_from(sorted(CONFIGS)), tasks=st.integers(0, 2))
    def begin(self, name: str, tasks: int) -> None:
        self.patch(name)
        learn(self.model, tasks, self.rng, b_std=0.1)

    @rule(name=st.sampled_from(sorted(CONFIGS)))
    def patch(self, name: str) -> None:
        if self.increments:
            assert not self.accepted(lambda: cf.patch(self.model, cf.LoraConfig(rank=7)), "unpatch")
            return
        self.came, before = everything(self.model), self.logits(self.model)
        cf.patch(self.model, CONFIGS[name], processor=self.processor)
        assert torch.equal(self.logits(self.model), before)

    @precondition(lambda self: self.increments)
    @rule(copied=st.booleans())
    def unpatch(self, copied: bool) -> None:
        if self.pristine:
            assert not self.accepted(lambda: cf.unpatch(self.model), "unmerge")
            return
        before, model = everything(self.model), copy.deepcopy(self.model) if copied else self.model
        cf.unpatch(model.train(self.came["module "][-1]))
        assert not changed(model, self.came)
        assert torch.equal(self.logits(model), self.logits(self.fresh()))
        assert not copied or not changed(self.model, before)

    @precondition(lambda self: self.increments and not self.pristine)
    @rule(part=st.booleans())
    def learn(self, part: bool) -> None:
        pool = self.increments.pool
        before = {name: tensor.clone() for name, tensor in pool.committed(pool.num_rows, pool.num_tasks).items()}
        rows, tasks = pool.num_rows, pool.num_tasks
        if self.increments.is_within_a_task:
            pool.drop_block()
        else:
            learn(self.model, 1, self.rng, b_std=0.1, commit_last=not part)
        now = pool.committed(rows, min(tasks, pool.num_tasks))
        assert all(torch.equal(now[name], before[name]) for name in before) or not pool.num_tasks

    @precondition(lambda self: self.increments)
    @rule(fails=st.booleans(), checkpointing=st.booleans())
    def train(self, fails: bool, checkpointing: bool) -> None:
        self.runs += 1
        tasks = cf.Stream([replace(task, name=f"run{self.runs}") for task in stream(1, samples=2)])
        steps = {"max_steps": 1, "align_steps": 1, "max_new_tokens": 1, "activation_checkpointing": checkpointing}
        args = arguments(self.folder / f"run{self.runs}", **steps)
        known, before = self.increments, everything(self.model)
        if self.pristine or known.is_within_a_task or (known.method.joint and known.pool.block_rows):
            make = functools.partial(cf.ContinualTrainer, self.model, self.processor, tasks, args)
            assert not self.accepted(make, "unmerge|part of a task|all tasks at once")
            return
        trainer = cf.ContinualTrainer(self.model, self.processor, tasks, args)
        says = Mock(side_effect=KeyboardInterrupt if fails else None, return_value=None)
        hook = self.model.lm_head.register_forward_pre_hook(says)
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
            trainer.train()
        hook.remove()
        self.model.train(before["module "][-1])  # a run leaves it in evaluation mode
        # a block that all tasks share is lost with the one that fails
        learns = not fails or known.method.shared_rows or known.pool.block_rows != before["learned"][1]
        assert not changed(self.model, before, ("increments", "learned") if learns else ())

    @precondition(lambda self: self.increments)
    @rule(which=st.sampled_from(["task", "instruction", "query", "none", "unmerge"]))
    def merge(self, which: str) -> None:
        if self.pristine and which == "unmerge":
            cf.unmerge(self.model.train(self.pristine["module "][-1]))
            assert not changed(self.model, self.pristine)
            self.pristine = None
            return
        known, before = self.increments, everything(self.model)
        query = torch.ones(known.surrogate.dim if known.surrogate else 1) * (7 if known.method.uses_task else 1)
        what = {"task": {"task": "task0"}, "instruction": {"instruction": QUESTIONS[0]}, "query": {"query": query}}
        wanted, compares = self.logits(self.model, 0), not self.pristine and which in ("instruction", "none")
        if not self.accepted(lambda: cf.merge(self.model, **what.get(which, {}))):
            return
        if not self.pristine:
            cf.unmerge(self.model)
            assert not changed(self.model, before)
            cf.merge(self.model, **what.get(which, {}))
        self.pristine = self.pristine or before
        if compares and self.dtype == torch.float32:
            torch.testing.assert_close(self.logits(self.model, 0), wanted, atol=1e-3, rtol=1e-3)

    @precondition(lambda self: self.increments)
    @rule(alpha=st.sampled_from([0.0, 0.5, 1 / 3]))
    def scale(self, alpha: float) -> None:
        call = functools.partial(cf.scale_layers, self.model, alpha=alpha, beta=0.7)
        if not self.accepted(lambda: call().undo(), "unmerge|being learned|nothing has been learned"):
            return
        before = everything(self.model)
        with call():
            self.saved = self.saved or bool(cf.save_pretrained(self.model, self.folder / "scaled"))
        assert not changed(self.model, before)
        call()

    @precondition(lambda self: self.saved)
    @rule()
    def load(self) -> None:
        if not self.increments:
            self.came = everything(self.model)
        load = functools.partial(cf.load_pretrained, self.model, self.folder / "scaled", processor=self.processor)
        self.accepted(load, "unmerge|unpatch|another base")

    @precondition(lambda self: not self.pristine and self.dtype == torch.float32)
    @rule()
    def cast(self) -> None:
        self.dtype = torch.bfloat16
        self.model.to(self.dtype)
        self.came |= {name: value for name, value in everything(self.fresh()).items() if "module" not in name}

    @rule(how=st.sampled_from(ASKED), sample=st.integers(0, BATCH - 1), training=st.booleans())
    def ask(self, how: dict[str, Any], sample: int, training: bool) -> None:
        self.model.train(training)
        before = everything(self.model)
        models = [self.model, copy.deepcopy(self.model), *([self.reborn()] if self.can_be_saved else [])]
        options = {"max_new_tokens": 3, "suppress_tokens": [self.base.config.image_token_id], **how}
        first, *others = [self.asked(model, model.generate, **options) for model in models]
        assert all(torch.equal(first, other) for other in others)
        assert not changed(self.model, before)
        if self.dtype == torch.float32 and not (self.increments and self.increments.method.by_batch):
            whole, alone = self.logits(self.model)[sample], self.logits(self.model, sample)[0]
            torch.testing.assert_close(alone, whole[self.batch["attention_mask"][sample].bool()], atol=1e-3, rtol=1e-3)

    @invariant()
    def nothing_is_hidden(self) -> None:
        if self.can_be_saved:
            assert torch.equal(self.logits(self.model), self.logits(self.reborn()))
        else:
            assert not self.accepted(self.reborn, "unmerge|being learned")


@pytest.mark.filterwarnings("ignore")
def test_the_life_of_a_model() -> None:
    Life.processor = build_processor()
    Life.base = new_base(Life.processor, seed=0).eval()
    Life.batch = inputs(Life.processor, QUESTIONS[:BATCH], torch.Generator().manual_seed(1))
    Life.base(**Life.batch)  # transformers puts hooks of its own where a model first runs
    Life.TestCase.settings = settings(
        max_examples=int(os.environ.get("CLLAVA_EXAMPLES", "8")), stateful_step_count=16, deadline=None,
        derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    Life.TestCase().runTest()
