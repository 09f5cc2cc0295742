"""Everything that a run decides, besides the model, the method and the stream."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cllava_fast.names import brief, check_types, nearest


def _option(default: Any, text: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=type(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


MAX_SEED = 429_496  # a task's is 10,000 * seed + its number, and numpy's are below 2**32

# Of trainer_options: what may not be set, and why.
_EVALUATES = "would evaluate within a task; the loop does so after each one"
_REENTRANT = "would cut the gradient to what the layers get by keyword; leave it out, or set activation_checkpointing"
_DIFFERS = "would have a resumed run end otherwise than one that was never stopped; leave it out"
_DEALS = "would deal samples out otherwise than a resumed run, or one process, does; leave it out"
REFUSED = {
    "use_liger_kernel": "would replace the forward that carries increments; use liger instead",
    "label_smoothing_factor": "transformers would apply to labels that are not shifted to the next token; leave it out",
    "auto_find_batch_size": "would begin a task again on what it has learned by then; set a smaller "
    "per_device_train_batch_size, and gradient_accumulation_steps for the same steps",
    "dataloader_drop_last": "would leave samples out, all of them where a task is smaller than a batch; leave it out",
    "dataloader_persistent_workers": _DIFFERS,
    "ignore_data_skip": _DIFFERS,
    "enable_jit_checkpoint": "would take SIGTERM from the run, and half a task would be committed; leave it out",
    "push_to_hub": "would upload each task's trainer, and not what was learned; use cllava_fast.push_to_hub afterwards",
    "resume_from_checkpoint": "has no effect; resume goes on with a run",
    "per_device_eval_batch_size": "has no effect; use eval_batch_size",
    "save_total_limit": "has no effect; use keep_increments",
    "do_train": "has no effect: train() learns every task; leave it out",
    "do_eval": "has no effect: every task is measured when it is learned; leave it out",
    "do_predict": "has no effect; cllava_fast.evaluate_stream measures a model as it is",
    "eval_steps": _EVALUATES,
    "eval_strategy": _EVALUATES,
    "eval_on_start": _EVALUATES,
    "load_best_model_at_end": _EVALUATES,
    "save_strategy": "would save beside the run's own checkpoints; use save_steps or save_minutes",
    "gradient_checkpointing_kwargs.use_reentrant": _REENTRANT,
    "activation_checkpointing_kwargs.use_reentrant": _REENTRANT,
    "accelerator_config.split_batches": _DEALS,
    "accelerator_config.dispatch_batches": _DEALS,
}


@dataclass(frozen=True)
class ContinualArguments:
    """Arguments of ``ContinualTrainer``; each field says what it is (``transformers.HfArgumentParser`` shows it).

    Defaults are those of the method's paper and its public ancestor at 7B.

    Raises:
        ValueError: a value that no run could work with.
    """

    output_dir: str = field(
        metadata={"help": "Receives run.json and the increments after every task; new or empty, unless resume is set."}
    )
    resume: bool = _option(False, "Go on where the same run was stopped or killed.")
    seed: int = _option(0, "Of everything random; a task's random state derives from it and the task's number alone.")

    align_epochs: float = _option(3.0, "Epochs of alignment for each task.")
    align_steps: int | None = _option(None, "Steps of alignment for each task; wins over align_epochs.")
    align_learning_rate: float = _option(1e-3, "Divided by 10 after each epoch (after each third of align_steps).")
    align_weight_decay: float = _option(0.01, "Weight decay of alignment.")
    align_max_grad_norm: float = _option(0.1, "Gradients of alignment are clipped to this norm; 0 turns that off.")
    align_batch_size: int = _option(32, "Instructions in a batch of alignment, on any number of processes.")

    num_train_epochs: float = _option(1.0, "Epochs of tuning for each task.")
    max_steps: int = _option(-1, "Steps of tuning for each task; wins over num_train_epochs unless it is -1.")
    learning_rate: float = _option(2e-5, "Highest learning rate of tuning.")
    lr_scheduler_type: str = _option("cosine", "Schedule of tuning's learning rate, by transformers' name.")
    warmup_steps: float = _option(0.03, "Steps of warm-up; below 1, a share of all steps.")
    weight_decay: float = _option(0.0, "Weight decay of tuning.")
    max_grad_norm: float = _option(1.0, "Gradients of tuning are clipped to this norm; 0 turns that off.")
    per_device_train_batch_size: int = _option(16, "Samples in a batch of tuning, on each process.")
    gradient_accumulation_steps: int = _option(1, "Batches of tuning that make one step.")
    bf16: bool = _option(False, "Tune in bfloat16 by autocast; increments stay float32.")
    fp16: bool = _option(False, "Tune in float16 by autocast, on a GPU with a gradient scaler.")
    activation_checkpointing: bool = _option(False, "Recompute activations in the backward pass, to save memory.")
    liger: bool = _option(False, "Tune with Liger's fused norms and SwiGLU in the language layers, on a GPU.")
    dataloader_num_workers: int = _option(
        0, "Processes that open images and make batches, beside each process that tunes and evaluates."
    )
    logging_steps: int = _option(10, "Steps of tuning between two logged losses.")
    report_to: list[str] = _option([], "Where transformers sends logs, such as wandb or tensorboard; none by default.")
    on_bad_numbers: Literal["stop", "skip"] = _option(
        "stop",
        "What NaN or Inf in tuning, samples without a label and a diverging loss do: stop ends the run before anything "
        "is committed; skip leaves those steps' updates and those samples out, and reports them.",
    )
    trainer_options: dict[str, Any] = _option(
        {}, "Further fields of transformers.TrainingArguments, which are no arguments here."
    )

    save_minutes: float = _option(10.0, "Minutes between two checkpoints within a task; 0 makes none by time.")
    save_steps: int = _option(0, "Steps of a stage between two checkpoints within a task; 0 makes none by steps.")
    keep_increments: int | None = _option(
        None, "How many of the newest increments stay on disk, 2 or more; each holds earlier tasks too. All by default."
    )

    eval_split: Literal["test", "validation"] = _option(
        "test", "What is measured after each task; validation while hyperparameters are being chosen."
    )
    eval_batch_size: int = _option(32, "Samples in a batch of evaluation, which generates greedily.")
    max_new_tokens: int = _option(16, "Longest answer of evaluation, in tokens.")
    eval_budget: int | None = _option(
        None,
        "Samples measured after each task, over all tasks: beyond it, all but the newest are measured on a fixed part "
        "of theirs, one sample each at least, except after the last task. By default everything is.",
    )
    eval_unseen: bool = _option(
        False, "Measure the tasks still to come after each task, too: what the stream transfers to them."
    )
    image_feature_bytes: int = _option(
        2 << 30, "Memory for projected image features, computed once; 0 opens images for every batch."
    )
    progress: bool = _option(True, "Show progress bars, on the main process.")

    def __post_init__(self) -> None:
        check_types(self)
        if not self.output_dir:
            raise ValueError("output_dir is empty; name the folder that receives the run")
        for name in (
            "align_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "eval_batch_size",
            "max_new_tokens", "logging_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps is {self.max_steps}; expected -1 (num_train_epochs decides) or at least 1")
        if self.eval_budget is not None and self.eval_budget < 1:
            raise ValueError(f"eval_budget is {self.eval_budget}; expected at least 1, or null for no limit")
        for name in ("learning_rate", "align_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; expected a positive number")
        for name in (
            "align_epochs", "align_steps", "align_weight_decay", "align_max_grad_norm", "num_train_epochs",
            "warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", "image_feature_bytes",
            "save_minutes", "save_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"seed is {self.seed}; expected 0 to {MAX_SEED - 1}")
        if self.keep_increments is not None and self.keep_increments < 2:
            raise ValueError(
                f"keep_increments is {self.keep_increments}; expected at least 2: the last, and one to fall back to"
            )
        self._check_trainer_options()
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both set; choose one of them")
        object.__setattr__(self, "report_to", [name for name in self.report_to if name != "none"])

    def _check_trainer_options(self) -> None:
        """Refuses what transformers would take and no task could be tuned with as it should be."""
        from transformers import SchedulerType  # half a second, for who only writes a configuration

        options = self.trainer_options
        for name in options:
            if name in self.__dataclass_fields__:
                raise ValueError(f"trainer_options has {name}, which is an argument of its own; set {name} itself")
        for name, why in REFUSED.items():
            option, _, part = name.partition(".")
            value = options.get(option)
            if part and isinstance(value, str):  # transformers would read JSON or a file
                raise ValueError(f"trainer_options has {option} as a text; expected a mapping")
            if part:
                value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
            if value and value != "no":
                raise ValueError(f"trainer_options has {name}, which {why}")
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"lr_scheduler_type is {self.lr_scheduler_type!r}, which {_EVALUATES}; expected a schedule by steps, "
                "such as cosine"
            )
        schedules = [schedule.value for schedule in SchedulerType]
        if self.lr_scheduler_type not in schedules:
            raise ValueError(
                f"lr_scheduler_type is {brief(self.lr_scheduler_type)}; {nearest(self.lr_scheduler_type, schedules)}"
            )
        sampling = options.get("train_sampling_strategy", "random")
        if sampling not in ("random", "sequential"):
            raise ValueError(
                f"trainer_options has train_sampling_strategy {sampling!r}; expected random or sequential, which give "
                "the same batches on any number of processes"
            )

    def identity(self) -> dict[str, Any]:
        """What makes a run that run: all but where it is written, how it is shown and how fast it is."""
        values = asdict(self)
        for name in (
            "output_dir", "resume", "progress", "image_feature_bytes", "dataloader_num_workers", "logging_steps",
            "report_to", "save_minutes", "save_steps", "keep_increments", "on_bad_numbers", "eval_unseen",
        ):  # fmt: skip
            del values[name]
        return values
