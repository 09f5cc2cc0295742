"""What makes a step of tuning: the order of a task's samples, and the batches that the model is handed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from cllava_fast.data.encode import Collator, Example
from cllava_fast.data.workers import outlive_signals
from cllava_fast.model.answers import IGNORE, answer_positions, next_labels
from cllava_fast.train.bad_numbers import Samples


class GlobalOrder(Sampler[int]):
    """An order of ``samples``, the same for any number of processes; accelerate deals it out batch by batch.

    It is filled up to a multiple of ``together`` by the index ``samples``, which stands for an item without a label.
    Accelerate would fill up with samples, which then count twice.
    """

    def __init__(self, samples: int, together: int, seed: int, shuffled: bool = True) -> None:
        self.samples, self.seed, self.shuffled, self.epoch = samples, seed, shuffled, 0
        self.length = -(-samples // together) * together

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.samples))
        if self.shuffled:
            random = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.samples, generator=random).tolist()
        yield from order
        yield from [self.samples] * (self.length - self.samples)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Item(NamedTuple):
    example: Example
    query: Tensor | None
    counts: bool  # False: fills a batch, and has no part in the loss
    number: int = 0  # its place among the task's samples


class TuneSet(Dataset[Item]):
    def __init__(self, examples: Sequence[Example], queries: Tensor | None) -> None:
        self.examples, self.queries = examples, queries

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Item:
        counts = i < len(self)
        i = i if counts else 0
        return Item(self.examples[i], None if self.queries is None else self.queries[i], counts, i)


class TuneCollator:
    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        if get_worker_info() is not None:  # transformers leaves no other place
            outlive_signals()
        batch: dict[str, Any] = self.collate([item.example for item in items])
        batch["labels"][torch.tensor([not item.counts for item in items])] = IGNORE
        # found here, where reading the labels waits for no device
        batch["answer_positions"] = answer_positions(batch["labels"])
        batch["samples"] = _samples(items, batch["labels"])
        queries = [item.query for item in items if item.query is not None]
        return {**batch, "query": torch.stack(queries)} if queries else batch


def _samples(items: Sequence[Item], labels: Tensor) -> Samples:
    learned = (next_labels(labels) != IGNORE).any(1).tolist()  # [B]
    names = [(item.example.sample.id or f"number {item.number}", item.counts) for item in items]
    unlabelled = [name for (name, counts), has in zip(names, learned, strict=True) if counts and not has]
    return Samples([name for name, counts in names if counts], unlabelled)
