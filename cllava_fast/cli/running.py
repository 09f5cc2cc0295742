"""What commands share: a run from its configuration, and a finished run opened again from its folder."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import TrainingArguments
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

import cllava_fast as cf
from cllava_fast import distributed
from cllava_fast.atomic import check_writable, is_empty
from cllava_fast.cli.base import check_base, default_device, load_base, load_processor
from cllava_fast.config import CONFIG, RunConfig, load_config
from cllava_fast.data import Stream, load_stream
from cllava_fast.evaluate.evaluation import check_tasks
from cllava_fast.evaluate.report import load_results, no_task_yet
from cllava_fast.methods import METHODS
from cllava_fast.model.files import CONFIG as INCREMENTS
from cllava_fast.model.files import WEIGHTS, read_config, saved_increments
from cllava_fast.names import brief, check_names
from cllava_fast.surrogate import check_surrogate
from cllava_fast.train.identity import processor_identity, run_identity
from cllava_fast.train.runfile import find_run
from cllava_fast.train.tune import check_engine
from cllava_fast.untrusted import read_file

MAX_TEMPLATE_BYTES = 1 << 20


def train(config: RunConfig) -> cf.ContinualResult:
    """Learns the configuration's stream, with everything that can be refused refused before a weight is loaded."""
    (stream, processor), before = open_new(config), config.model.increments
    model, _ = open_base(config, processor)
    if before is None:
        model = cf.patch(model, config.method, processor=processor)
    else:
        model = cf.load_pretrained(model, before, processor=processor)
    trainer = cf.ContinualTrainer(model, processor, stream, config.training)
    with trainer.locked():
        distributed.on_main(lambda: config.save(trainer.output_dir))
        return trainer.train()


def open_new(config: RunConfig) -> tuple[Stream, Any]:
    """The stream of a run that is to begin or to go on, and its processor. Raises for what of its configuration stands
    against it."""
    distributed.start()
    _check_trainer_options(config)
    before = config.model.increments
    if before is not None:
        _check_method(config, Path(before))
    surrogate = getattr(config.method, "surrogate", None)
    if surrogate is not None:
        check_surrogate(surrogate)
    stream = open_stream(config)
    check_tasks(stream, config.training.eval_split)
    if before is not None:
        _check_new(stream, Path(before))
    check_base(config.model, config.method)
    processor = load_processor(config.model)
    distributed.on_main(lambda: _check_output(config, stream, processor))
    return stream, processor


def _check_method(config: RunConfig, increments: Path) -> None:
    """New tasks are learned by the method of those before them."""
    if METHODS[config.method.method][1].joint:
        raise ValueError(
            f"{config.source}: model.increments is {str(increments)!r}, and {config.method.method} learns all tasks at "
            "once; leave it out"
        )
    wanted, given = read_config(increments).config.to_dict(), config.method.to_dict()
    other = [name for name in ("method", *wanted) if given.get(name) != wanted[name]]
    if other:
        name = "name" if other[0] == "method" else other[0]
        raise ValueError(
            f"{config.source}: method.{name} is {given.get(other[0])!r}, and {increments} was learned with "
            f"{wanted[other[0]]!r}; leave it out"
        )


def _check_new(stream: Stream, increments: Path) -> None:
    learned = read_config(increments).tasks
    again = [name for name in stream.task_names if name in learned]
    if again:
        raise ValueError(f"{increments} has learned {brief(again)} already; leave them out of the stream")


def _check_output(config: RunConfig, stream: Stream, processor: Any) -> None:
    """By the main process alone: whoever looks holds the run's lock for a moment."""
    output = Path(config.training.output_dir)
    check_writable(output)
    if not is_empty(output):
        identity = {**run_identity(config.method, config.training, stream), **processor_identity(processor)}
        if config.model.increments is None:
            identity["learned_before"] = None
        find_run(output, identity, config.training.resume)
    elif config.training.resume:
        warnings.warn(f"{output} holds nothing to go on with; the run begins anew", stacklevel=2)


def _check_trainer_options(config: RunConfig) -> None:
    """What transformers would refuse when the first task is tuned."""
    options, known = config.training.trainer_options, [field.name for field in fields(TrainingArguments)]
    check_names(options, known, f"{config.source}: training.trainer_options.")
    try:
        check_engine(config.training, default_device())
    except (TypeError, ValueError, ImportError) as error:
        raise type(error)(f"{config.source}: training: {error}") from error


def open_stream(config: RunConfig) -> Stream:
    """The configuration's stream, its errors under the name of the file."""
    if isinstance(config.stream, str):
        return load_stream(config.stream, base=config.base)
    try:
        return load_stream(config.stream, base=config.base)
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{config.source}: {str(error).removeprefix('stream: ')}") from error


def open_base(config: RunConfig, processor: Any = None) -> tuple[Any, Any]:
    """The frozen base of a run, and its processor: that of ``open_new``, which has checked the base, if any."""
    if processor is None:
        check_base(config.model, config.method)
    logging.disable_progress_bar()
    return load_base(config.model, processor)


def open_run(
    path: str, after: str | None = None, base: str | None = None, template: str | None = None
) -> tuple[Any, Any]:
    """The patched model with what it has learned, and its processor.

    Args:
        path: folder of a run, folder of saved increments, or a hub's repository of them.
        after: for a run, its state after this task; by default after the last one.
        base: folder or hub name of the base, by default what the run or the increments name.
        template: for increments, a file of the chat template to speak, as in ``from_pretrained``.
    """
    folder = Path(path)
    holds_increments = any((folder / name).is_file() for name in (INCREMENTS, WEIGHTS))
    if not (folder / CONFIG).is_file() and (holds_increments or not folder.exists()):
        if after is not None:
            raise ValueError(f"{path} is no folder of a run, so --after has no meaning; leave it out")
        text = None if template is None else _text_of(template)
        logging.disable_progress_bar()
        model = cf.from_pretrained(path, base_model=base, chat_template=text)
        return model, model.increments.processor
    config = run_config(folder, base)
    if template is not None:
        raise ValueError(f"{path} is the folder of a run, which knows its chat template; leave --chat-template out")
    saved = increments_of(folder, after)
    model, processor = open_base(config)
    return cf.load_pretrained(model, saved, processor=processor), processor


def _text_of(file: str) -> str:
    if not Path(file).is_file():
        raise FileNotFoundError(f"--chat-template is {file!r}, which is no file; expected a template in Jinja")
    try:
        text = read_file(Path(file), MAX_TEMPLATE_BYTES).decode()
        render_jinja_template([], chat_template=text)  # of no conversation: it is compiled alone
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template is {file!r}, which is no text in UTF-8: {error}") from None
    except TemplateSyntaxError as error:
        raise ValueError(
            f"--chat-template is {file!r}, which is no Jinja in line {error.lineno}: {error.message}; expected what "
            "processor.chat_template held in training"
        ) from None
    return text


def run_config(folder: Path, base: str | None = None) -> RunConfig:
    """The configuration that ``cllava-fast train`` left in a run's folder; ``base`` as in ``open_run``."""
    if not (folder / CONFIG).is_file():
        saved = saved_increments(folder)
        hint = f"; ask and export also take a folder of increments, such as {saved[-1]}" if saved else ""
        raise FileNotFoundError(
            f"{folder / CONFIG} does not exist; expected the folder of a cllava-fast train run{hint}"
        )
    moved = {} if base is None else {"model.path": base}
    # what the run began with is in what it saved
    flags = {"training.output_dir": str(folder), "model.increments": None, **moved}
    return load_config(folder / CONFIG, flags)


def answer_tokens(path: str) -> int:
    """How long an answer may be, as in the run's training; of a folder that no run left, as in any."""
    folder = Path(path)
    training = run_config(folder).training if (folder / CONFIG).is_file() else cf.ContinualArguments
    return training.max_new_tokens


def increments_of(folder: Path, after: str | None) -> Path:
    """Where a run saved its state after a task."""
    saved = saved_increments(folder)
    if not saved:
        raise no_task_yet(folder)
    if after is None:
        return saved[-1]
    tasks, folders = [_newest_task(entry) for entry in saved], [_in_name(entry) for entry in saved]
    for names in (tasks, folders):
        if after in names:
            return saved[names.index(after)]
    raise ValueError(f"{folder} has no state after task {after!r}; expected one of {', '.join(tasks)}")


def said_of_run(folder: Path, config: RunConfig, after: str | None) -> dict[str, Any]:
    """What an evaluation of a run says of it: how it was trained, and how much of its stream it had learned."""
    said: dict[str, Any] = {"arguments": config.training.identity()}
    newest = _newest_task(increments_of(folder, after))
    try:
        tasks = load_results(folder)["stream"]
    except (OSError, ValueError):  # an evaluation goes without
        tasks = []
    if METHODS[config.method.method][1].joint:
        newest = tasks[-1] if tasks else ""
    # folders count what a model had learned before the run, too
    return said if newest not in tasks else {**said, "learned": tasks.index(newest) + 1, "tasks": len(tasks)}


def _newest_task(increments: Path) -> str:
    try:
        return read_config(increments).tasks[-1]
    except (OSError, ValueError, IndexError):  # what is damaged is refused where it is loaded
        return _in_name(increments)


def _in_name(increments: Path) -> str:
    """The task in a folder's name, without the characters that a file name cannot have."""
    return increments.name.partition("-")[2]


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for a flag that is given and below 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
