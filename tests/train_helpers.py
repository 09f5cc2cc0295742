"""What tests of training share: a tiny stream, arguments that take a moment, and a trainer with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

import cllava_fast as cf

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
CONFIG = cf.IncrementConfig(rows_per_task=4, top_m=2, rank=2, a_std=0.1, scale=8.0)


def stream(tasks: int = 2, samples: int = 24) -> cf.Stream:
    """Task k asks in its own words for the colour of a plain image."""
    questions = ("what color is the shape?", "which color stands here?", "which color has the bar?")
    images = {name: Image.new("RGB", (64, 64), rgb) for name, rgb in COLORS.items()}
    names = [list(COLORS)[i % 3] for i in range(samples)]
    return cf.Stream(
        [
            cf.Task(
                f"task{k}",
                train=[cf.Sample(questions[k], name, images[name]) for name in names],
                test=[cf.Sample(questions[k], name, images[name]) for name in names[:6]],
                validation=[cf.Sample(questions[k], name, images[name]) for name in names[:3]],
            )
            for k in range(tasks)
        ]
    )


def arguments(output: Path, **values: Any) -> cf.ContinualArguments:
    defaults: dict[str, Any] = dict(
        output_dir=str(output), max_steps=6, align_steps=6, learning_rate=1e-2, lr_scheduler_type="linear",
        warmup_steps=1, per_device_train_batch_size=8, max_new_tokens=3, progress=False,
    )  # fmt: skip
    return cf.ContinualArguments(**{**defaults, **values})


def trainer(
    model: Any, processor: Any, output: Path, tasks: int = 2, config: Any = CONFIG, **values: Any
) -> cf.ContinualTrainer:
    cf.patch(model, config, processor=processor)
    return cf.ContinualTrainer(model, processor, stream(tasks), arguments(output, **values))
