"""Tuning: the second stage of a task, on transformers' ``Trainer``. The block's factors and ``w[t, :]`` train."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cllava_fast.data.encode import Collator, Example
from cllava_fast.model import get_increments
from cllava_fast.model.answers import answer_positions
from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.progress import Advance, stage


class ContinualCallback(TrainerCallback):
    """Shows the steps of a stage, and stops a run whose loss is no number."""

    def __init__(self, title: str, advance: Advance) -> None:
        self.title, self.advance, self.note, self.losses = title, advance, "", list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise FloatingPointError(f"{self.title}: the loss is {loss} at step {state.global_step}")
            self.losses.append(loss)
            self.note = f"loss {loss:.4f}"


class _TuneSet(Dataset[tuple[Example, "Tensor | None"]]):
    def __init__(self, examples: Sequence[Example], queries: Tensor | None) -> None:
        self.examples, self.queries = examples, queries

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[Example, Tensor | None]:
        return self.examples[i], None if self.queries is None else self.queries[i]


class _TuneCollator:
    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[tuple[Example, Tensor | None]]) -> dict[str, Tensor]:
        batch = self.collate([example for example, _ in items])
        # found here, where reading the labels waits for no device
        batch["answer_positions"] = answer_positions(batch["labels"])
        queries = [query for _, query in items if query is not None]
        return {**batch, "query": torch.stack(queries)} if queries else batch


def tune(
    model: Any,
    examples: Sequence[Example],
    queries: Tensor | None,
    collate: Collator,
    args: ContinualArguments,
    *,
    seed: int,
    title: str,
    steps_factor: int = 1,
) -> list[float]:
    """Tunes the open block of a patched model; next-token cross entropy on the answers.

    Args:
        queries: ``[n, D]``, one for each example, or None for methods without queries.
        steps_factor: multiplies ``args.max_steps`` (joint training takes the steps of all tasks).

    Returns:
        The logged losses.

    Raises:
        FloatingPointError: the loss is NaN or Inf.
    """
    increments = get_increments(model)
    increments.pool.train_keys(False)
    if increments.pool.block_keys is not None:
        increments.pool.block_keys.requires_grad_(False)
    device = increments.pool.row_task.device
    options: dict[str, Any] = dict(
        output_dir=args.output_dir,
        seed=seed,
        data_seed=seed,
        max_steps=args.max_steps * steps_factor if args.max_steps > 0 else -1,
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        bf16=args.bf16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        # a blocking copy would wait for the whole step before it
        accelerator_config={"non_blocking": device.type != "cpu"},
        save_strategy="no",
        logging_steps=10,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    if args.activation_checkpointing:
        # the reentrant form would cut the gradient to w, which reaches the layers as a keyword argument
        options.update(_checkpointing_options())
    options.update(args.trainer_options)
    with _quiet("transformers.trainer"), _keeps_forward(model), _counts_as_adapted(model):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**options),
            train_dataset=_TuneSet(examples, queries),
            data_collator=_TuneCollator(collate),
        )
        trainer.remove_callback(PrinterCallback)
        with stage(title, _steps(trainer, len(examples)), args.progress) as advance:
            callback = ContinualCallback(title, advance)
            trainer.add_callback(callback)
            model.train()
            trainer.train()
    trainer.accelerator.free_memory()
    model.eval()
    model.zero_grad(set_to_none=True)
    return callback.losses


def _steps(trainer: Trainer, examples: int) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(args.num_train_epochs * math.ceil(examples / per_step))


def _checkpointing_options() -> dict[str, Any]:
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


@contextmanager
def _keeps_forward(model: Any) -> Iterator[None]:
    """Takes off what mixed precision wraps around ``forward``: accelerate's own unwrapping would take off ours too."""
    forward = model.__dict__["forward"]
    try:
        yield
    finally:
        model.__dict__["forward"] = forward
        model.__dict__.pop("_original_forward", None)


@contextmanager
def _counts_as_adapted(model: Any) -> Iterator[None]:
    """The Trainer refuses a quantised base without adapters, and would know PEFT's alone."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a logger to errors for a while: the Trainer explains at length what is decided on purpose here."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
