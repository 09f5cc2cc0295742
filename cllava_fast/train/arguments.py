"""Everything that a run decides, besides the model, the method and the stream."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ContinualArguments:
    """Arguments of ``ContinualTrainer``; defaults are those of the method's paper and its public ancestor at 7B.

    Args:
        output_dir: receives ``run.json`` and the increments after every task; must be new or empty, unless ``resume``.
        resume: go on behind the last finished task of the same run.
        seed: of everything random; the random state of each task derives from it and the task's number alone.
        align_epochs, align_steps: length of alignment; ``align_steps`` wins if it is set.
        align_learning_rate: divided by 10 after each epoch (each third of ``align_steps``).
        align_weight_decay, align_max_grad_norm, align_batch_size: of alignment.
        num_train_epochs, max_steps: length of tuning for each task; ``max_steps`` wins if it is positive.
        learning_rate, lr_scheduler_type, warmup_steps, weight_decay, max_grad_norm: of tuning; ``warmup_steps`` below 1
            is a share of all steps.
        per_device_train_batch_size, gradient_accumulation_steps, bf16, activation_checkpointing: of tuning.
        trainer_options: further fields of ``transformers.TrainingArguments``.
        eval_split: ``"validation"`` while hyperparameters are being chosen.
        eval_batch_size, max_new_tokens: of evaluation, by greedy generation.
        image_feature_bytes: memory for projected image features, computed once; 0 opens images for every batch.
        progress: show progress bars.
    """

    output_dir: str
    resume: bool = False
    seed: int = 0
    align_epochs: float = 3.0
    align_steps: int | None = None
    align_learning_rate: float = 1e-3
    align_weight_decay: float = 0.01
    align_max_grad_norm: float = 0.1
    align_batch_size: int = 32
    num_train_epochs: float = 1.0
    max_steps: int = -1
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    bf16: bool = False
    activation_checkpointing: bool = False
    trainer_options: dict[str, Any] = field(default_factory=dict)
    eval_split: Literal["test", "validation"] = "test"
    eval_batch_size: int = 32
    max_new_tokens: int = 16
    image_feature_bytes: int = 2 << 30
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is empty; name the folder that receives the run")
        if self.eval_split not in ("test", "validation"):
            raise ValueError(f"eval_split is {self.eval_split!r}; expected 'test' or 'validation'")
        for name in (
            "align_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "eval_batch_size",
            "max_new_tokens",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("learning_rate", "align_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; expected a positive number")

    def identity(self) -> dict[str, Any]:
        """What makes a run that run: all but where it is written and how it is shown."""
        values = asdict(self)
        for name in ("output_dir", "resume", "progress", "image_feature_bytes"):
            del values[name]
        return values
