"""``cllava-fast train ... --dry-run``: what would stop a run hours from now, told before weights are loaded.

A run itself decodes an image when it is first needed, and stops at the first one that is damaged.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import add
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cllava_fast.cli.base import model_config
from cllava_fast.config import RunConfig
from cllava_fast.data import Sample, Stream
from cllava_fast.data.encode import Encoder, ImageFeatures
from cllava_fast.data.lazy import LazySequence
from cllava_fast.data.lengths import Lengths, check_lengths, count_tokens, token_limit, warn_of_answers
from cllava_fast.data.stream import ImageSource
from cllava_fast.train.progress import stage
from cllava_fast.untrusted import printable

SHOWN = 20  # faults
AT_ONCE = 1024  # images that wait for a thread


def look_through(config: RunConfig, stream: Stream, processor: Any) -> None:
    """Decodes every image and encodes every sample that a run would use, and prints a table of them. ``stream`` and
    ``processor`` are of ``open_new``.

    Raises:
        ValueError: what would stop the run: all images that cannot be decoded, and of each split the samples longer
            than the model allows, or the first whose turns the chat template does not write.
    """
    encoder = Encoder(processor)
    limit = token_limit(encoder.tokenizer, model_config(config.model))
    used = ("train", config.training.eval_split)
    splits = [(task.name, split, getattr(task, split)) for task in stream for split in used]
    damaged = _damaged_images(splits, config.training.progress)
    faults, rows = list(damaged.values()), []
    with stage("samples", sum(len(samples) for *_, samples in splits), config.training.progress) as advance:
        for task, split, samples in splits:
            where = f"task {task!r}, {split}"
            most = None if split == "train" else config.training.max_new_tokens
            lengths = None
            sound = _Sound(samples, damaged) if damaged else samples
            try:
                lengths = count_tokens(encoder.encode(sound, f"{where}: "), encoder.tokenizer)
                warn_of_answers(lengths, sound, most, where)
                check_lengths(lengths, sound, limit, where, answers=split == "train")
            except ValueError as error:
                faults.append(str(error))
            rows.append(_row(task, split, samples, lengths))
            advance("", len(samples))
    _print(rows, None if limit is None else f"at most {limit.tokens} tokens, {limit.name}")
    if faults:
        more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ValueError("this run would stop:\n  " + "\n  ".join(faults[:SHOWN]) + more)


class _Sound(LazySequence[Sample]):
    """Samples whose image is not ``damaged``; like these, not in memory where they are not."""

    def __init__(self, samples: Sequence[Sample], damaged: Collection[Any]) -> None:
        self.samples = samples
        self.places = array("q", (i for i, s in enumerate(samples) if ImageFeatures.key(s.image) not in damaged))

    def __len__(self) -> int:
        return len(self.places)

    def at(self, index: int) -> Sample:
        return self.samples[self.places[index]]


def _damaged_images(splits: Iterable[tuple[str, str, Sequence[Sample]]], progress: bool) -> dict[Any, str]:
    """By the key of each image that cannot be decoded, what is wrong with it and where it is first named."""
    first: dict[Any, tuple[ImageSource, str]] = {}
    for task, split, samples in splits:
        where = f"task {task!r}, {split}"
        for sample in samples:
            if sample.image is not None:
                first.setdefault(ImageFeatures.key(sample.image), (sample.image, where))
    damaged, keys = {}, list(first)
    with stage("images", len(keys), progress) as advance, ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(keys), AT_ONCE):
            some = keys[start : start + AT_ONCE]
            for key, fault in zip(some, threads.map(_fault_of, (first[key][0] for key in some)), strict=True):
                if fault is not None:
                    damaged[key] = f"{first[key][1]}: {fault}"
                advance(f"{len(damaged)} damaged")
    return damaged


def _fault_of(image: ImageSource) -> str | None:
    try:
        Sample("", "", image).open_image()
    except OSError as error:
        return str(error)
    return None


def _row(task: str, split: str, samples: Sequence[Sample], lengths: Lengths | None) -> list[str]:
    images = {ImageFeatures.key(sample.image) for sample in samples if sample.image is not None}
    row = [task, split, f"{len(samples)}", f"{len(images)}"]
    if lengths is None or not lengths.prompts:
        return [*row, "", "", ""]
    tokens = list(map(add, lengths.prompts, lengths.answers))
    return [*row, f"{median(tokens):.0f}", f"{max(tokens)}", f"{max(lengths.answers)}"]


def _print(rows: Sequence[Sequence[str]], limit: str | None) -> None:
    shown = Table(title=limit, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for position, name in enumerate(
        ("task", "split", "samples", "images", "median\ntokens", "most\ntokens", "longest\nanswer")
    ):
        shown.add_column(name, justify="left" if position < 2 else "right")
    for row in rows:
        shown.add_row(*(escape(printable(cell)) for cell in row))
    Console().print(shown)
