"""Tuning: the second stage of a task, on transformers' ``Trainer``. The block's factors and ``w[t, :]`` train."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer import TRAINER_STATE_NAME

from cllava_fast import distributed
from cllava_fast.data.encode import Collator, Example
from cllava_fast.model import get_increments, paths
from cllava_fast.model.liger import fused
from cllava_fast.surrogate import BackboneSurrogate
from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.as_it_was import as_it_was
from cllava_fast.train.bad_numbers import BadNumbers, NumberWatch
from cllava_fast.train.batches import GlobalOrder, TuneCollator, TuneSet
from cllava_fast.train.checkpoint import GO_ON, STOP, TaskSaver
from cllava_fast.train.progress import Advance, stage


class Tuned(NamedTuple):
    """What tuning leaves: the logged losses, the way to the loggers of ``report_to``, and what went wrong."""

    losses: list[float]
    trainer: TaskTrainer
    bad_numbers: BadNumbers


def tune(
    model: Any,
    examples: Sequence[Example],
    queries: Tensor | None,
    collate: Collator,
    args: ContinualArguments,
    *,
    seed: int,
    title: str,
    steps_factor: int,
    callbacks: Sequence[TrainerCallback],
    saver: TaskSaver,
) -> Tuned:
    """Tunes the open block of a patched model; next-token cross entropy on the answers.

    Args:
        queries: ``[n, D]``, one for each example, or None for methods without queries.
        title: the task's name; what is logged begins with it.
        steps_factor: multiplies ``args.max_steps`` (joint training takes the steps of all tasks).
        callbacks: of the caller, for transformers' ``Trainer``.
        saver: keeps the stage on disk, and says from which step it goes on.

    Raises:
        FloatingPointError: NaN or Inf in the loss or the gradients, or a loss that diverges, unless
            ``args.on_bad_numbers`` is "skip". Nothing is committed then.
        ValueError: a sample has no label, likewise.
    """
    increments = get_increments(model)
    increments.pool.train_keys(False)
    if not any(parameter.requires_grad for parameter in increments.pool.parameters()):
        raise RuntimeError(f"{increments.config.method} opened no block for task {title!r}; its open_task has to")
    options = TrainingArguments(**training_options(args, increments.pool.row_task.device, seed, steps_factor))
    # one process with several GPUs in sight would copy the model onto each for every batch (DataParallel)
    options._n_gpu = min(options.n_gpu, 1)
    with as_it_was(model):
        trainer = TaskTrainer(
            title,
            NumberWatch(f"{title}: tune", args.on_bad_numbers, args.logging_steps),
            model=model,
            args=options,
            train_dataset=TuneSet(examples, queries),
            data_collator=TuneCollator(collate),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        with stage(f"{title}: tune", _steps(trainer, len(examples)), args.progress) as advance:
            callback = _Losses(title, advance)
            trainer.add_callback(callback)
            model.train()
            try:
                with fused(model) if args.liger else nullcontext():
                    trainer.train_with(saver, callback)
            finally:
                model.eval()
            bad_numbers = trainer.numbers.finish()
    trainer.release()
    model.zero_grad(set_to_none=True)
    return Tuned(callback.losses, trainer, bad_numbers)


def training_options(
    args: ContinualArguments, device: torch.device, seed: int, steps_factor: int = 1
) -> dict[str, Any]:
    """Fields of ``transformers.TrainingArguments``; ``args.trainer_options`` have the last word."""
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
        fp16=args.fp16,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=args.dataloader_num_workers,
        dataloader_pin_memory=device.type != "cpu",
        # a blocking copy would wait for the whole step before it
        accelerator_config={"non_blocking": device.type != "cpu"},
        # every step uses all that trains, and what is frozen never changes: nothing to search, nothing to send
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        save_strategy="no",
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        report_to=args.report_to or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    if args.activation_checkpointing:
        options.update(_checkpointing_options())
    options.update(args.trainer_options)
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if isinstance(options.get(name), dict):
            # the reentrant form would cut the gradient to w, which reaches the layers as a keyword argument
            options[name] = {"use_reentrant": False, **options[name]}
    return options


def check_engine(args: ContinualArguments, device: torch.device) -> None:
    """What transformers would refuse when the first task is tuned.

    Raises:
        ValueError: of a field of ``TrainingArguments``, fp16 on a CPU, or an unknown name in ``report_to``.
        TypeError: ``trainer_options`` has what is no such field.
        ImportError: the package of a name in ``report_to``, or of the optimizer, is not installed; some optimizers'
            is a ValueError.
    """
    arguments = TrainingArguments(**training_options(args, device, 0))
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ValueError as error:
        if "need to pass a" not in str(error):  # the model, which is not there yet
            raise
    if args.fp16 and device.type == "cpu":
        raise ValueError("fp16 is set, which takes a GPU; on a CPU set bf16, or neither")
    try:
        for callback in get_reporting_integration_callbacks("all" if args.report_to == ["all"] else args.report_to):
            callback()
    except ValueError as error:
        raise ValueError(f"report_to: {error}") from error
    except (RuntimeError, ImportError) as error:
        raise ImportError(f"report_to: {error}") from error


def kept_whole(model: Any) -> list[nn.Module]:
    """What stays whole on every process under FSDP: increments, which are small and grow by every task, and what is
    called outside of the model's ``forward``, when FSDP has not gathered it: what sees images, and a surrogate."""
    increments = get_increments(model)
    embeddings = [paths.input_embedding(model)] if isinstance(increments.surrogate, BackboneSurrogate) else []
    return [increments, *paths.beside_language_model(model), *embeddings]


class TaskTrainer(Trainer):
    """Transformers' ``Trainer`` for one task: the same samples in each step on any number of processes, and logs that
    name the task."""

    def __init__(self, task: str, numbers: NumberWatch, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # a Qwen-VL says that it takes no count of a step's labels, and hands it to its loss as the others do
        self.model_accepts_loss_kwargs |= kwargs["model"].loss_function is ForCausalLMLoss
        self.task, self.numbers = task, numbers
        self._hooks: list[Any] = []  # on parameters and the embedding, which outlive the trainer
        self._check_launcher()

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """An offloaded model stays: its hooks bring each layer to where it computes."""
        if any(parameter.is_meta for parameter in model.parameters()):
            self.accelerator.device_placement = False
        else:
            super()._move_model_to_device(model, device)

    def _check_launcher(self) -> None:
        """Refuses what would give other results than one process does: settings of DeepSpeed and FSDP."""
        state, precision = self.accelerator.state, self.accelerator.mixed_precision
        if self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed ZeRO 3 would leave the model in pieces after a task; FSDP 2 shards the base as well "
                "(examples/accelerate/fsdp2.yaml), and ZeRO 2 works"
            )
        if self.is_deepspeed_enabled and self.numbers.policy == "skip":
            raise ValueError(
                'on_bad_numbers is "skip", but DeepSpeed owns gradients and steps; expected "stop" with it'
            )
        if (self.is_deepspeed_enabled or self.is_fsdp_enabled) and precision != "no":
            raise ValueError(
                f"mixed precision is {precision}; FSDP and DeepSpeed would round queries or increments: load the base "
                "in that dtype and turn mixed precision (bf16, fp16) off"
            )
        if self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(
                f"fsdp_version is {state.fsdp_plugin.fsdp_version}; expected 2, which can leave increments out"
            )
        if self.is_fsdp_enabled and state.fsdp_plugin.cpu_ram_efficient_loading:
            raise ValueError("fsdp_cpu_ram_efficient_loading is on and would empty the increments; turn it off")

    def train_with(self, saver: TaskSaver, losses: _Losses) -> None:
        """``train`` from where ``saver`` has it, saved on the way.

        Raises:
            RunStopped: a signal came, and the step it came in is saved.
        """
        saving = self._saving = _Saving(self, saver, losses)
        self.add_callback(saving)
        try:
            self.train(resume_from_checkpoint=saver.folder if saving.saved else None)
        finally:
            if "neftune_hook_handle" in vars(self):  # which a training that fails leaves on the embedding
                self._hooks.append(self.neftune_hook_handle)
            for hook in self._hooks:
                hook.remove()
        if saving.stopped:
            saver.watch.check()
        optimizer = _without_wrapper(self.optimizer)
        if hasattr(optimizer, "eval"):  # one without a schedule: its weights so far are not those that it has learned
            optimizer.eval()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._saving.save()

    def _load_from_checkpoint(self, *args: Any) -> None:
        """The saver has brought back the block."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            for name in ("optimizer", "lr_scheduler"):
                getattr(self, name).load_state_dict(self._saving.saved[name])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._saving.saved["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._saving.saver.restore_random_state()

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        samples = inputs.pop("samples")
        step = self.state.global_step + 1
        loss = self.numbers.after_batch(step, samples, super().training_step(model, inputs, *args, **kwargs))
        if self.accelerator.sync_gradients:
            self.numbers.end_step(step, _without_wrapper(self.optimizer), self.accelerator.scaler)
            increments = get_increments(self.model)
            increments.method.end_step(increments.pool)
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        together = self.args.train_batch_size * self.args.world_size if self.args.world_size > 1 else 1
        assert isinstance(self.train_dataset, TuneSet)
        shuffled = getattr(self.args, "train_sampling_strategy", "random") == "random"
        self._order = GlobalOrder(len(self.train_dataset), together, self.args.data_seed or 0, shuffled)
        return self._order

    def go_on_behind(self, step: int) -> None:
        """The order of the epoch that holds the next step. With several processes, nobody else sets it: accelerate does
        not reach the sampler below the batches that transformers skips."""
        batches = math.ceil(len(self._order) / (self.args.train_batch_size * self.args.world_size))
        self._order.set_epoch(step // math.ceil(batches / self.args.gradient_accumulation_steps))

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            self._shard_base_alone(model, self.accelerator.state.fsdp_plugin)
        return super()._wrap_model(model, *args, **kwargs)

    def _shard_base_alone(self, model: Any, plugin: Any) -> None:
        """FSDP shards the frozen language model, once."""
        plugin.ignored_modules = kept_whole(model)
        if plugin.transformer_cls_names_to_wrap is None:
            present = {type(module).__name__ for module in paths.language_model(model).modules()}
            plugin.transformer_cls_names_to_wrap = sorted(present & set(model._no_split_modules or ()))
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._average_gradient))

    def _average_gradient(self, parameter: Tensor) -> None:
        if self.accelerator.sync_gradients:
            distributed.average(parameter.grad)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        increments = get_increments(self.model)
        penalty = increments.method.penalty(increments.pool)
        if penalty is None:
            return found
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:  # the Trainer does not divide then
            penalty = penalty / self.current_gradient_accumulation_steps
        if return_outputs:
            return found[0] + penalty, found[1]
        return found + penalty

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({f"{self.task}/{name}": value for name, value in logs.items()}, start_time)

    def release(self) -> None:
        """Lets go of what tuning needed; ``log`` still works."""
        self.accelerator.free_memory()
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            # each task's rows have another shape, and torch compiles a function for eight of them at most
            torch.compiler.reset()
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model  # type: ignore[assignment]
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.callback_handler.train_dataloader = None


class _Losses(TrainerCallback):
    """Shows the steps and keeps the losses."""

    def __init__(self, task: str, advance: Advance) -> None:
        self.task, self.advance, self.note, self.losses = task, advance, "", list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(self.note)
        ends = state.epoch.is_integer() if args.logging_strategy == "epoch" else state.global_step >= state.max_steps
        if ends and args.logging_strategy != "no":
            # what the last steps have come to, too; and an epoch's loss before a checkpoint is written, not behind it
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get(f"{self.task}/loss")
        if loss is None:
            return
        self.losses.append(loss)
        self.note = f"loss {loss:.4f}"
        self.advance(self.note, steps=0)


class _Saving(TrainerCallback):
    """Keeps the state of a ``TaskTrainer`` by a ``TaskSaver``, and brings back what transformers would not."""

    def __init__(self, trainer: TaskTrainer, saver: TaskSaver, losses: _Losses) -> None:
        self.trainer, self.saver, self.losses, self.stopped = trainer, saver, losses, False
        self.saved: dict[str, Any] = saver.saved("tune") or {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.saved:
            return
        self.losses.losses += self.saved["losses"]
        self.trainer.numbers.load_state(self.saved["numbers"])
        self.trainer.go_on_behind(self.saved["step"])
        self.losses.advance("", steps=self.saved["step"])
        # the loss of steps that are not logged yet
        own = self.saver.own()
        mine = own[distributed.rank()] if len(own) == distributed.count() else sum(own) / len(own)
        self.trainer._tr_loss = mine.to(args.device)
        self.trainer._globalstep_last_logged = self.saved["logged"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            return  # the task is about to be saved as a whole
        action = self.saver.due(state.global_step)
        control.should_save |= action != GO_ON
        if action == STOP:
            self.stopped = control.should_training_stop = True

    def save(self) -> None:
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            return  # its optimizer is in pieces; the task begins anew
        scaler = trainer.accelerator.scaler
        self.saver.save(
            "tune", trainer.state.global_step,
            {
                **{name: getattr(trainer, name).state_dict() for name in ("optimizer", "lr_scheduler")},
                "scaler": None if scaler is None else scaler.state_dict(), "losses": self.losses.losses,
                "logged": trainer._globalstep_last_logged, "numbers": trainer.numbers.state(),
            },
            own=trainer._tr_loss.cpu(),
            files={TRAINER_STATE_NAME: json.dumps(dataclasses.asdict(trainer.state), indent=2)},
        )  # fmt: skip


def _without_wrapper(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's


def _steps(trainer: Trainer, examples: int) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(args.num_train_epochs * math.ceil(examples / per_step))


def _checkpointing_options() -> dict[str, Any]:
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {}}
