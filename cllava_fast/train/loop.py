"""The loop: task after task, align, tune, commit, save, evaluate everything seen so far without a task id."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from cllava_fast import distributed
from cllava_fast.atomic import write_text
from cllava_fast.data.encode import Collator, Encoder, Example, ImageFeatures
from cllava_fast.data.stream import Stream, fingerprint
from cllava_fast.evaluate import metrics
from cllava_fast.evaluate.predict import predict
from cllava_fast.model import get_increments, load_pretrained, patch, save_pretrained, unpatch
from cllava_fast.model.files import base_fingerprint
from cllava_fast.model.paths import vision_width
from cllava_fast.train.align import align_keys
from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.callbacks import TaskEvents
from cllava_fast.train.progress import stage
from cllava_fast.train.tune import Tuned, tune

RUN = "run.json"


class PreparedStream:
    """A stream encoded for one base model: ids, and what the frozen vision tower makes of each image.

    Several runs on equal base models (methods that are compared, seeds) can share one.
    """

    def __init__(self, stream: Stream, processor: Any, image_feature_bytes: int = 2 << 30) -> None:
        self.stream = stream
        self.encoder = Encoder(processor)
        self.features = ImageFeatures(image_feature_bytes)
        self._examples: dict[tuple[str, str], list[Example]] = {}

    def examples(self, task: str, split: str, model: Any) -> list[Example]:
        key = (task, split)
        if key not in self._examples:
            samples = next(getattr(t, split) for t in self.stream if t.name == task)
            self.features.add(samples, self.encoder, model)
            self._examples[key] = self.encoder.encode(samples)
        return self._examples[key]


@dataclass
class ContinualResult:
    """What a run measured; fractions in 0..1, ``matrix[i][j]`` = accuracy on task j after task i (None: not measured).

    ``selection_accuracy`` is the share of selection weight that falls into the right task's block at the end, over
    the evaluation samples; None for methods that do not select. See ``cllava_fast.evaluate.metrics`` for the others.
    """

    task_names: list[str]
    accuracy_matrix: list[list[float | None]]
    selection_accuracy: float | None
    trainable_parameters: int
    seconds: float
    losses: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "accuracy_matrix": self.accuracy_matrix,
            **metrics.summarize(self.accuracy_matrix),
            "selection_accuracy": self.selection_accuracy,
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
        }

    @property
    def average_accuracy(self) -> float | None:
        return metrics.average_accuracy(self.accuracy_matrix)

    @property
    def average_forgetting(self) -> float | None:
        return metrics.average_forgetting(self.accuracy_matrix)


class ContinualTrainer:
    """Learns a stream with a patched LLaVA, on one process or all that ``accelerate launch`` or ``torchrun`` started.

    Args:
        model: a LLaVA; patched with ``IncrementConfig()`` if it is not patched yet. It trains on the device it is on;
            of several processes, each moves it to its own device.
        processor: its processor.
        stream: the tasks in order, or a ``PreparedStream``.
        args: see ``ContinualArguments``.
        callbacks: ``transformers.TrainerCallback`` objects or classes; a ``ContinualCallback`` is told of tasks, too.

    Raises:
        FileExistsError: ``args.output_dir`` holds another run, or this one and ``resume`` is off.
        ValueError: a split that the run needs is empty, or the processes were given different things.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        stream: Stream | PreparedStream,
        args: ContinualArguments,
        *,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    ) -> None:
        distributed.start()
        if isinstance(stream, Stream):
            stream = PreparedStream(stream, processor, args.image_feature_bytes)
        self.args = args
        self.callbacks = [c() if isinstance(c, type) else c for c in callbacks]
        self.data = stream
        self.stream = stream.stream
        self.output_dir = Path(args.output_dir)
        for task in self.stream:
            if not len(getattr(task, args.eval_split)):
                raise ValueError(f"task {task.name!r} has no {args.eval_split} sample; eval_split needs at least one")
        was_patched = hasattr(model, "increments")
        self.model = patch(model, processor=processor)
        self.increments = get_increments(model)
        try:
            self._progress = self._check()
        except BaseException:
            if not was_patched:
                unpatch(model)
            raise
        self._train_collate = Collator(stream.encoder, stream.features, training=True)
        self._eval_collate = Collator(stream.encoder, stream.features, training=False)

    def _check(self) -> dict[str, Any]:
        if self.increments.pool.num_tasks or self.increments.pool.block_rows:
            raise ValueError(
                f"the model has learned {self.increments.pool.task_names or 'a part of a task'} already; "
                "a run starts from a freshly patched model"
            )
        if self.increments.surrogate is not None and self.increments.reader is None:
            raise ValueError("the model is patched without a processor; unpatch(model) and patch it with one")
        identity: dict[str, Any] = {
            "method": self.increments.config.to_dict(),
            "arguments": self.args.identity(),
            "stream": {task.name: [len(task.train), len(getattr(task, self.args.eval_split))] for task in self.stream},
            "stream_sha256": [fingerprint([*task.train, *getattr(task, self.args.eval_split)]) for task in self.stream],
        }
        # so that a run may go on with fewer processes and more samples on each
        per_device, accumulated = (
            identity["arguments"].pop(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        identity["arguments"]["train_batch_size"] = per_device * accumulated * distributed.count()
        distributed.check_equal(identity, "the method, the arguments or the stream")
        return distributed.on_main(lambda: self._find(identity))

    def _find(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What ``output_dir`` holds of this run."""
        fresh: dict[str, Any] = {**identity, "matrix": [], "losses": {}, "seconds": 0.0, "parameters": 0}
        if not self.output_dir.exists() or not any(self.output_dir.iterdir()):
            return fresh
        try:
            found = json.loads((self.output_dir / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        identity = json.loads(json.dumps(identity))
        if {key: found.get(key) for key in identity} != identity:
            raise FileExistsError(f"{self.output_dir} holds another run or other files; give a new output_dir")
        if not self.args.resume:
            raise FileExistsError(f"{self.output_dir} holds this run already; set resume to go on, or a new output_dir")
        return found

    def train(self) -> ContinualResult:
        """Learns all tasks that are not learned yet. After each, the increments and ``run.json`` are on disk.

        Every process returns the same result; the main one alone writes. If one raises, all do.
        """
        with distributed.failing_together():
            return self._train()

    def _train(self) -> ContinualResult:
        tasks, progress = self.stream.task_names, self._progress
        phases = [tasks] if self.increments.method.joint else [[name] for name in tasks]
        done = len(progress["matrix"])
        self._place()
        if done:
            load_pretrained(self.model, self._saved(done - 1, phases))
        self._read_ahead(tasks, done if len(phases) > 1 else 0)
        for number in range(done, len(phases)):
            start = time.perf_counter()
            names = phases[number]
            events = TaskEvents(self.callbacks, "+".join(names), number)
            events.begin()
            tuned, parameters = self._learn(number, names, events)
            seen = tasks if self.increments.method.joint else tasks[: number + 1]
            with events.stage("evaluate") as measured:
                row = self._evaluate(seen)
                measured.update({f"accuracy/{name}": value for name, value in zip(seen, row, strict=True)})
            tuned.trainer.log(dict(events.metrics))
            progress["matrix"].append(row)
            progress["losses"][", ".join(names)] = tuned.losses
            progress["seconds"] += time.perf_counter() - start
            progress["parameters"] = max(progress["parameters"], parameters)
            progress = distributed.on_main(functools.partial(self._write, progress, self._saved(number, phases)))
            events.end()
        return ContinualResult(
            task_names=tasks,
            accuracy_matrix=self._matrix(progress["matrix"]),
            selection_accuracy=self._selection_accuracy(),
            trainable_parameters=progress["parameters"],
            seconds=progress["seconds"],
            losses=progress["losses"],
        )

    def _read_ahead(self, tasks: list[str], done: int) -> None:
        """Encodes all that will be needed: what cannot be read fails now, and FSDP has not yet sharded the base."""
        if distributed.count() > 1:
            self.increments.base_fingerprint = base_fingerprint(self.model)
        for name in tasks[done:]:
            self._queries(self.data.examples(name, "train", self.model))
        for examples in self._examples(tasks):
            self._queries(examples)

    def _place(self) -> None:
        """Several processes each compute on the device that the launcher gave them."""
        if distributed.count() == 1 or self.increments.pool.row_task.device == distributed.device():
            return
        if distributed.uses_fsdp():
            # the language model need not fit on one device: it moves when it is sharded
            parts = [part for name, part in self.model.model.named_children() if name != "language_model"]
        else:
            parts = [self.model]
        for part in (*parts, self.increments):
            part.to(distributed.device())

    def _write(self, progress: dict[str, Any], increments: Path) -> dict[str, Any]:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        save_pretrained(self.model, increments)
        write_text(self.output_dir / RUN, json.dumps(progress, indent=2) + "\n")
        return progress

    def _saved(self, number: int, phases: list[list[str]]) -> Path:
        name = phases[number][0] if len(phases) > 1 else "all"
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        return self.output_dir / "increments" / f"{number + 1:02d}-{safe}"

    def _learn(self, number: int, names: list[str], events: TaskEvents) -> tuple[Tuned, int]:
        """Stages and commit of one task (of all tasks, for a joint method)."""
        increments, args = self.increments, self.args
        pool, method, title = increments.pool, increments.method, "+".join(names)
        seed = args.seed * 10_000 + number
        examples = [e for name in names for e in self.data.examples(name, "train", self.model)]
        queries = self._queries(examples)
        method.open_task(pool, queries, torch.Generator().manual_seed(seed))
        parameters = pool.trainable_parameters()
        try:
            if method.aligns_keys:
                assert queries is not None
                top_m: int = increments.config.top_m  # type: ignore[attr-defined]
                with events.stage("align") as measured:
                    measured["loss"] = align_keys(
                        pool, queries, top_m, increments.groups, args, seed, f"{title}: align"
                    )
            with events.stage("tune") as measured:
                tuned = tune(
                    self.model, examples, queries, self._train_collate, args, seed=seed, title=title,
                    steps_factor=len(names), callbacks=self.callbacks,
                )  # fmt: skip
                if tuned.losses:
                    measured["loss"] = tuned.losses[-1]
            with events.stage("commit"):
                method.close_task(pool, title, queries, increments.groups)
        except BaseException:
            # what is committed stays usable, and half a task never is
            pool.drop_block()
            raise
        return tuned, parameters

    def _queries(self, examples: list[Example]) -> Tensor | None:
        """``[n, D]`` on the CPU, by the same reading of instructions as in the model."""
        surrogate, reader = self.increments.surrogate, self.increments.reader
        if surrogate is None:
            return None
        assert reader is not None
        texts = [reader.canonical(example.instruction) for example in examples]
        image = None
        if surrogate.uses_image:
            image = self.data.features.pooled([e.sample for e in examples], vision_width(self.model))
        return distributed.from_main(surrogate.query(texts, image, batch_size=64))

    def _examples(self, names: list[str]) -> list[list[Example]]:
        return [self.data.examples(name, self.args.eval_split, self.model) for name in names]

    def _evaluate(self, names: list[str]) -> list[float]:
        """Accuracy on each task; the samples of all tasks share batches."""
        by_task = self._examples(names)
        examples = [example for task in by_task for example in task]
        batches = -(-len(examples) // (self.args.eval_batch_size * distributed.count()))
        with stage(f"evaluate {len(names)} task(s)", batches, self.args.progress) as advance:
            answers = iter(
                predict(
                    self.model,
                    examples,
                    self._queries(examples),
                    self._eval_collate,
                    batch_size=self.args.eval_batch_size,
                    max_new_tokens=self.args.max_new_tokens,
                    advance=advance,
                )  # fmt: skip
            )
        return [
            metrics.exact_match([next(answers) for _ in task], [example.sample.answer for example in task])
            for task in by_task
        ]

    def _matrix(self, rows: list[list[float]]) -> list[list[float | None]]:
        """T x T; rows above the diagonal, and a joint method's earlier rows, were not measured."""
        size = len(self.stream)
        missing: list[list[float | None]] = [[None] * size for _ in range(size - len(rows))]
        return missing + [[*row, *[None] * (size - len(row))] for row in rows]

    def _selection_accuracy(self) -> float | None:
        increments = self.increments
        if increments.surrogate is None or not increments.pool.num_rows:
            return None
        shares: list[Tensor] = []
        for task, examples in enumerate(self._examples(self.stream.task_names)):
            queries = self._queries(examples)
            assert queries is not None
            selection = increments.method.select(
                increments.pool, queries.to(increments.pool.keys.device), increments.groups, training=False
            )
            assert selection is not None and selection.index is not None and selection.weight is not None
            right = increments.pool.row_task[selection.index] == task
            shares.append((selection.weight * right).sum(1).cpu())
        return torch.cat(shares).mean().item()
