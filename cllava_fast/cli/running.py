"""What commands share: a run from its configuration, and a finished run opened again from its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils import logging

import cllava_fast as cf
from cllava_fast.cli.base import check_base, load_base
from cllava_fast.config import CONFIG, RunConfig, load_config
from cllava_fast.surrogate import check_surrogate

INCREMENTS = "increments"  # of a run's folder: one subfolder for the state after each task


def train(config: RunConfig) -> cf.ContinualResult:
    """Learns the configuration's stream, with everything that can be refused refused before a weight is loaded."""
    from cllava_fast.data import load_stream

    check_base(config.model)
    if getattr(config.method, "surrogate", None) is not None:
        check_surrogate(config.method.surrogate)  # type: ignore[attr-defined]
    stream = load_stream(config.stream, base=config.base)
    check_output(config)
    logging.disable_progress_bar()
    model, processor = load_base(config.model)
    model = cf.patch(model, config.method, processor=processor)
    trainer = cf.ContinualTrainer(model, processor, stream, config.training)
    if PartialState().is_main_process:
        trainer.output_dir.mkdir(parents=True, exist_ok=True)
        config.save(trainer.output_dir)
    return trainer.train()


def check_output(config: RunConfig) -> None:
    """Raises FileExistsError where the trainer would refuse the output folder, whatever it holds."""


def open_run(path: str | os.PathLike[str], after: str | None = None) -> tuple[Any, Any, RunConfig]:
    """The patched model of a run with what it has learned, its processor and its configuration.

    Args:
        after: the state after this task; by default after the last one.
    """
    folder = Path(path)
    config = run_config(folder)
    saved = increments_of(folder, after)
    check_base(config.model)
    logging.disable_progress_bar()
    model, processor = load_base(config.model)
    return cf.load_pretrained(model, saved, processor=processor), processor, config


def run_config(folder: Path) -> RunConfig:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG} does not exist; expected the folder of a cllava-fast train run")
    return load_config(folder / CONFIG, {"training.output_dir": str(folder)})


def increments_of(folder: Path, after: str | None) -> Path:
    """Where a run saved its state after a task."""
    saved = sorted(entry for entry in (folder / INCREMENTS).glob("[0-9][0-9]-*") if entry.is_dir())
    if not saved:
        raise FileNotFoundError(f"{folder} has finished no task yet; cllava-fast train ... --resume goes on")
    if after is None:
        return saved[-1]
    names = [entry.name.partition("-")[2] for entry in saved]
    if after not in names:
        raise ValueError(f"{folder} has no state after task {after!r}; expected one of {', '.join(names)}")
    return saved[names.index(after)]
