"""The loop: task after task, align, tune, commit, save, evaluate everything seen so far without a task id."""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from cllava_fast import distributed
from cllava_fast.atomic import (
    MAX_NAME_BYTES,
    DamagedError,
    MissingError,
    check_sums,
    remove_folder,
    sums_of,
    sweep,
    write_text,
)
from cllava_fast.data.encode import Collator, samples_of
from cllava_fast.data.prepared import PreparedStream
from cllava_fast.data.stream import Stream
from cllava_fast.evaluate import evaluation
from cllava_fast.evaluate.budget import within_budget
from cllava_fast.evaluate.predict import ends_answers, queries_of
from cllava_fast.evaluate.report import RESULTS
from cllava_fast.evaluate.results import results_json
from cllava_fast.model import get_increments, load_pretrained, patch, save_pretrained, unpatch
from cllava_fast.model.files import INCREMENTS_FOLDER, base_fingerprint, saved_increments
from cllava_fast.model.liger import kernels_for
from cllava_fast.model.patching import check_not_merged
from cllava_fast.names import brief
from cllava_fast.train.align import align_keys
from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.bad_numbers import check_queries
from cllava_fast.train.callbacks import TaskEvents
from cllava_fast.train.checkpoint import Checkpoints, TaskSaver
from cllava_fast.train.committed import CommittedRows
from cllava_fast.train.garbage import nothing_old_collected
from cllava_fast.train.identity import base_identity, learned_before, run_identity
from cllava_fast.train.lock import run_lock
from cllava_fast.train.progress import Advance, stage
from cllava_fast.train.result import ContinualResult, begin, keep_measured, result_of
from cllava_fast.train.runfile import RunFile, find_run
from cllava_fast.train.signals import Watch
from cllava_fast.train.tune import Tuned, check_engine, kept_whole, tune


class ContinualTrainer:
    """Learns a stream with a patched LLaVA, on one process or all that ``accelerate launch`` or ``torchrun`` started.

    Args:
        model: a LLaVA; patched with ``IncrementConfig()`` if it is not patched yet. It trains on the device it is on;
            of several processes, each moves it to its own device. What it has learned before, from increments that
            were loaded, stays as it is, and the stream's tasks come after it.
        processor: its processor.
        stream: the tasks in order, or a ``PreparedStream``. With ``args.resume``, a stream that a run has finished
            may have new tasks at its end.
        args: see ``ContinualArguments``.
        callbacks: ``transformers.TrainerCallback`` objects or classes; a ``ContinualCallback`` is told of tasks, too.

    Raises:
        FileExistsError: ``args.output_dir`` holds another run, or this one and ``resume`` is off.
        DamagedError: nothing of the run in ``args.output_dir`` can be read.
        ValueError: a split that the run needs is empty, or a task's metric is unknown or cannot read its references,
            or the processes were given different things.
        TypeError: a model that ``patch`` refuses, another library's arguments or stream, or callbacks that are none.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        stream: Stream | PreparedStream,
        args: ContinualArguments,
        *,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
    ) -> None:
        if not isinstance(args, ContinualArguments):
            raise TypeError(
                f"args is a {type(args).__name__}; expected cllava_fast.ContinualArguments, whose trainer_options take "
                "further fields of transformers.TrainingArguments"
            )
        listeners: list[TrainerCallback] = [c() if isinstance(c, type) else c for c in callbacks or ()]
        if not all(isinstance(listener, TrainerCallback) for listener in listeners):
            raise TypeError(
                f"callbacks is {brief(callbacks)}; expected a list of transformers.TrainerCallback objects or classes"
            )
        if any(isinstance(listener, EarlyStoppingCallback) for listener in listeners):
            raise ValueError(
                "callbacks: early stopping evaluates within a task, and a task is evaluated at its end; leave it out"
            )
        distributed.start()
        if not isinstance(stream, PreparedStream):
            stream = PreparedStream(stream, processor, args.image_feature_bytes, args.dataloader_num_workers)
        self.args = args
        self.callbacks = listeners
        self.data = stream
        self.stream = stream.stream
        self.output_dir = Path(args.output_dir)
        self._run_file, self._checkpoints = RunFile(self.output_dir), Checkpoints(self.output_dir)
        self._watch, self._is_locked = Watch(), False
        evaluation.check_tasks(self.stream, args.eval_split)
        was_patched = hasattr(model, "increments")
        self.model = patch(model, processor=processor)
        self.increments = get_increments(model)
        try:
            self._start()
        except BaseException:
            if not was_patched:
                unpatch(model)
            raise
        self._train_collate = Collator(stream.encoder, stream.features, training=True)

    def _start(self) -> None:
        """Refuses what no run can go on with, and reads ``run.json``."""
        check_not_merged(self.increments)
        self._note_learned()
        patch(self.model, processor=self.data.encoder.processor)  # refused, if it is another than the model's
        self._warn_of_another_end()
        if self.increments.surrogate is not None and self.increments.reader is None:
            raise ValueError("the model is patched without a processor; unpatch(model) and patch it with one")
        if self.args.liger:
            kernels_for(self.model)
        check_engine(self.args, self.increments.pool.row_task.device)
        if distributed.count() > 1:
            self.increments.base_fingerprint = base_fingerprint(self.model)  # FSDP has not yet sharded the base
        self._base = base_identity(self.model, self.data.encoder.processor)
        identity = {
            **run_identity(self.increments.config, self.args, self.stream),
            **self._base,
            "learned_before": learned_before(self.increments.pool),
        }
        self._identity = identity
        distributed.check_equal(identity, "the base model, the method, the arguments or the stream")
        found = distributed.on_main(lambda: find_run(self.output_dir, identity, self.args.resume))
        self._run_file.last = None if found is None else json.dumps(found)

    def _warn_of_another_end(self) -> None:
        tokenizer = self.data.encoder.tokenizer
        if not ends_answers(self.model, tokenizer):
            end, known = tokenizer.eos_token_id, self.model.generation_config.eos_token_id
            warnings.warn(
                f"answers are learned with {tokenizer.eos_token!r} at their end; evaluation stops there, but plain "
                f"model.generate does not: model.generation_config.eos_token_id is {known}; add {end} there, in the "
                f"folder of the base, too, or serve with generate(..., eos_token_id={end})",
                stacklevel=4,
            )

    def _note_learned(self) -> None:
        """What the model has learned before this run; refused, where the stream cannot come after it."""
        pool, method = self.increments.pool, self.increments.method
        self._before = list(pool.task_names)
        if self.increments.is_within_a_task:
            raise ValueError("the model has learned a part of a task; a run starts from whole tasks, or from none")
        if pool.block_rows and method.joint:
            raise ValueError(
                f"the model has learned already, and {self.increments.config.method} learns all tasks at once; start "
                "from a freshly patched model"
            )
        again = [name for name in self.stream.task_names if name in self._before]
        if again:
            advice = "give a freshly patched model, which loads what the run has learned"
            raise ValueError(
                f"the model has learned {again} already; "
                + (advice if self.args.resume else f"leave them out of the stream, or set resume and {advice}")
            )
        # what is learned together; numbers count from the first task that the model ever learned
        names = self.stream.task_names
        self._phases = [names] if method.joint else [[]] * len(self._before) + [[name] for name in names]
        self._state_before = pool.state()  # never learned in place: each ``train`` begins with a copy

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other run out of ``output_dir``; ``train`` does so by itself.

        Raises:
            InUseError: another process runs in it.
            SaveError: it cannot be written.
            FileExistsError: another process has run in it since this trainer was made.
        """
        if self._is_locked:
            yield
            return
        with ExitStack() as stack:
            distributed.on_main(lambda: self._lock(stack))
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False
            distributed.on_main(stack.close)  # no process goes on before the folder is free

    def _lock(self, stack: ExitStack) -> None:
        stack.enter_context(run_lock(self.output_dir))
        found = RunFile(self.output_dir)
        found.read()
        if found.last != self._run_file.last:
            raise FileExistsError(f"{self.output_dir} was written by another run meanwhile; start again with resume")
        for folder in (self.output_dir, self.output_dir / INCREMENTS_FOLDER, self.output_dir / evaluation.PREDICTIONS):
            sweep(folder)
        sweep(self._checkpoints.folder)

    def train(self) -> ContinualResult:
        """Learns all tasks that are not learned yet.

        After each, the increments, ``run.json``, ``results.json`` and the predictions are on disk
        (``cllava_fast.write_report`` draws a report); within one, a checkpoint every ``save_minutes``. Every process
        returns the same result; the main one alone writes. If one raises, all do. The model then is as behind the last
        task that it learned.

        Raises:
            RunStopped: SIGTERM or Ctrl-C came; the step it came in is saved.
            InUseError: another process runs in ``output_dir``.
            SaveError: the disk is full or cannot be written; what was saved before is untouched.
            DamagedError: none of the run's saved increments can be read.
        """
        with distributed.failing_together(), self.locked(), self._watch.catching(), nothing_old_collected():
            return self._train()

    def _train(self) -> ContinualResult:
        tasks = self.stream.task_names
        first = len(self._before)
        self._place()
        # of an earlier call that failed, what was not saved does not count
        self._progress = distributed.on_main(lambda: begin(self._run_file.last, self._identity))
        learned = self._load()
        distributed.on_main(self._take_over)
        if self._ends_within_budget():
            keep_measured(self._progress, len(self._progress["matrix"]) - 1)
        self._committed = CommittedRows(self.increments.pool)
        self._read_ahead()
        if self.callbacks or self.args.report_to:
            distributed.on_main(self._begin_files)  # they may write beside it from the first step on
        for number in range(first + len(self._progress["matrix"]), len(self._phases)):
            self._watch.check()
            events = TaskEvents(self.callbacks, "+".join(self._phases[number]), number)
            events.begin()
            tuned = self._learn(number, events) if number >= learned else None
            start = time.perf_counter()
            with events.stage("evaluate") as measured:
                every = self._evaluate(seen := len(tasks) if self.increments.method.joint else number + 1 - first)
                measured.update({f"accuracy/{task.task}": task.score for task in every})
            if tuned is not None:
                tuned.trainer.log(dict(events.metrics))
            progress = self._progress
            evaluations, unseen = every[:seen], every[seen:]
            progress["matrix"].append([task.score for task in evaluations])
            progress["unseen"].append({task.task: task.score for task in unseen})
            if self.args.eval_budget is not None:
                progress["evaluated"].append({task.task: len(task.records) for task in every})
            progress["selection_accuracy"] = evaluation.selection_accuracy(evaluations)
            progress["selection"] = evaluation.study_of(evaluations)
            progress["examples"] = {task.task: task.examples for task in evaluations}
            progress["cut_off"] = {task.task: task.cut_off for task in evaluations}
            self._spent(number, "evaluation", time.perf_counter() - start)
            self._progress = distributed.on_main(functools.partial(self._write, self._folder(number), every))
            events.end()
        return self._result()

    def _load(self) -> int:
        """Brings back the newest saved increments that are whole, and returns how many tasks they have learned."""
        progress, first = self._progress, len(self._before)
        seen = [folder.name for folder in saved_increments(self.output_dir)], self._checkpoints.names()
        distributed.check_equal(seen, f"the content of {self.output_dir}, which belongs on a disk that all share,")
        good, learned = first, first + len(progress["losses"])
        for number in reversed(range(first, learned)):
            folder = self._folder(number)
            try:
                distributed.on_main(functools.partial(check_sums, folder, progress["files"][folder.name]))
            except (DamagedError, MissingError) as error:
                warnings.warn(f"{error}; going on from the task before", stacklevel=4)
                continue
            load_pretrained(self.model, folder)
            good = number + 1
            break
        if not progress["losses"]:
            self.increments.pool.load_state(self._state_before, self._before)
        elif good == first:
            raise DamagedError(f"{self.output_dir} holds no increments that can be read; give a new output_dir")
        if good < learned:
            lost = list(progress["losses"])[good - first :]
            for name in ("losses", "bad_numbers"):
                progress[name] = {task: found for task, found in progress[name].items() if task not in lost}
            keep_measured(progress, good - first)
            distributed.on_main(lambda: self._go_back(good))
        distributed.on_main(lambda: self._tidy(good))  # a process may have died before it did so
        if progress["matrix"]:
            distributed.on_main(self._write_results)
        return good

    def _take_over(self) -> None:
        """Nothing stays of tasks that were to come and are others now; checkpoints are of what ``run.json`` says."""
        if self._run_file.last is None:
            return
        before = json.loads(self._run_file.last)
        if all(before.get(name) == value for name, value in json.loads(json.dumps(self._identity)).items()):
            return
        names = {self._folder(number).name for number in range(len(self._before), len(self._phases))}
        for folder in (self.output_dir / INCREMENTS_FOLDER, self.output_dir / evaluation.PREDICTIONS):
            for other in folder.glob("[0-9]*-*"):
                if other.name not in names:
                    remove_folder(other)
        tasks = self.stream.task_names
        steps = zip(self._progress["matrix"], self._progress["unseen"], strict=True)
        for number, (row, unseen) in enumerate(steps, len(self._before)):
            answers = self.output_dir / evaluation.PREDICTIONS / self._folder(number).name
            evaluation.keep_predictions(answers, tasks, {*tasks[: len(row)], *unseen})
        for _ in range(2):  # in the one before it, too
            self._run_file.write(self._progress)

    def _ends_within_budget(self) -> bool:
        """Whether what is the end now, since tasks behind it were left out, was measured on a part of its samples."""
        if self.args.eval_budget is None or len(self._progress["matrix"]) < len(self.stream):
            return False
        whole = {task.name: len(getattr(task, self.args.eval_split)) for task in self.stream}
        return bool(self._progress["evaluated"][-1] != whole)

    def _go_back(self, good: int) -> None:
        for number in range(good, len(self._phases)):
            remove_folder(self._folder(number))
        self._run_file.write(self._progress, keep=False)

    def _result(self) -> ContinualResult:
        return result_of(self._progress, self.stream.task_names, self.increments.method.joint)

    def _read_ahead(self) -> None:
        """Encodes everything: what cannot be read fails now, and FSDP has not yet sharded the base.

        What a resumed run needs no more, too: an embedding's last bit may depend on what it is computed beside.
        """
        splits = "train", self.args.eval_split
        sizes = {(task.name, split): len(getattr(task, split)) for split in splits for task in self.stream}
        with stage("prepare", sum(sizes.values()), self.args.progress) as advance:
            for (task, split), samples in sizes.items():
                self._prepare(task, split, samples, advance)

    def _prepare(self, task: str, split: str, samples: int, advance: Advance) -> None:
        def move_on(done: int) -> None:
            nonlocal samples
            samples -= done
            advance(task, done)
            self._watch.check()

        move_on(0)
        examples = self.data.examples(task, split, self.model, advance=move_on)
        self.data.warn_of_answers(task, split, None if split == "train" else self.args.max_new_tokens)
        queries_of(self.model, samples_of(examples), self.data.features, [task] * len(examples))
        advance("", samples)

    def _place(self) -> None:
        """Several processes each compute on the device that the launcher gave them."""
        if distributed.count() == 1 or self.increments.pool.row_task.device == distributed.device():
            return
        # the language model need not fit on one device: it moves when it is sharded
        parts = kept_whole(self.model) if distributed.uses_fsdp() else [self.model]
        for part in parts:
            part.to(distributed.device())

    def _begin_files(self) -> None:
        """From the first file on, the folder says whose it is."""
        if self._run_file.last is None:
            self._run_file.write(self._progress)

    def _write_learned(self, increments: Path) -> dict[str, Any]:
        save_pretrained(self.model, increments)
        self._progress["files"][increments.name] = sums_of(increments)
        self._run_file.write(self._progress)
        self._tidy(len(self._before) + len(self._progress["losses"]))
        return self._progress

    def _tidy(self, learned: int) -> None:
        """Removes what the first ``learned`` tasks need no more."""
        self._checkpoints.clear(learned)
        if self.args.keep_increments is not None:
            for old in saved_increments(self.output_dir)[: -self.args.keep_increments]:
                remove_folder(old)

    def _write(self, increments: Path, evaluations: list[evaluation.TaskEvaluation]) -> dict[str, Any]:
        evaluation.write_predictions(self.output_dir / evaluation.PREDICTIONS / increments.name, evaluations)
        self._run_file.write(self._progress)
        self._write_results()
        return self._progress

    def _write_results(self) -> None:
        """``results.json``, which the report is made of, finished or not."""
        result, method = self._result(), self.increments.config.to_dict()
        config = {
            "model": self.model.name_or_path or None,
            "split": self.args.eval_split,
            "samples_sha256": {
                task: measured
                for task, (_, measured) in zip(self.stream.task_names, self._identity["stream_sha256"], strict=True)
            },
            "train_samples": {task.name: len(task.train) for task in self.stream},
            "arguments": self.args.identity(),
            "method_configs": {method["method"]: method},
            "base": self._base,
            **({} if self.args.eval_budget is None else {"evaluated": self._progress["evaluated"]}),
        }
        results = evaluation.results_of_run(self.stream, method["method"], self.args.seed, result, config)
        write_text(self.output_dir / RESULTS, results_json(results))

    def _folder(self, number: int) -> Path:
        """Of the increments after task ``number``."""
        name = "all" if self.increments.method.joint else self._phases[number][0]
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        whole = f"{number + 1:02d}-{safe}"
        return self.output_dir / INCREMENTS_FOLDER / whole.encode()[:MAX_NAME_BYTES].decode(errors="ignore")

    def _learn(self, number: int, events: TaskEvents) -> Tuned:
        """Stages and commit of one task (of all tasks, for a joint method), saved at the end."""
        increments, args, names = self.increments, self.args, self._phases[number]
        pool, method, title = increments.pool, increments.method, "+".join(names)
        seed = args.seed * 10_000 + number
        set_seed(seed)
        parts = [self.data.examples(name, "train", self.model) for name in names]
        examples: Any = ConcatDataset(parts)  # type: ignore[arg-type]
        samples: Any = ConcatDataset(map(samples_of, parts))  # type: ignore[arg-type]
        owners = [name for name, part in zip(names, parts, strict=True) for _ in range(len(part))]
        queries = queries_of(self.model, samples, self.data.features, owners)
        if queries is not None:
            check_queries(queries, samples, title)
        try:
            increments.open_task(queries, torch.Generator().manual_seed(seed))
            parameters = pool.trainable_parameters()
            saver = self._saver(number)
            if method.aligns_keys and "align" not in saver.measured:
                assert queries is not None
                with events.stage("align") as measured:
                    measured["loss"] = saver.measured["align"] = align_keys(
                        pool, queries, increments.groups, args, seed, f"{title}: align", method.alignment_loss, saver
                    )
            with events.stage("tune") as measured:
                tuned = tune(
                    self.model, examples, queries, self._train_collate, args, seed=seed, title=title,
                    steps_factor=len(names), callbacks=self.callbacks, saver=saver,
                )  # fmt: skip
                if tuned.losses:
                    measured["loss"] = tuned.losses[-1]
            with events.stage("commit") as measured:
                increments.close_task(title, queries)
                self._committed.check(title)
                self._committed.note()
                if pool.context_rank:
                    measured["context_error"] = pool.context_error[-1].item()
        except BaseException:
            # what earlier tasks learned stays usable, and half a task never is
            increments.drop_task()
            raise
        distributed.on_main(self._begin_files)
        progress = self._progress
        progress["losses"][", ".join(names)] = tuned.losses
        if tuned.bad_numbers:
            progress["bad_numbers"][", ".join(names)] = tuned.bad_numbers.to_dict()
        self._spent(number, "learning", saver.seconds)
        progress["parameters"] = max(progress["parameters"], parameters)
        self._progress = distributed.on_main(lambda: self._write_learned(self._folder(number)))
        self._watch.check()
        return tuned

    def _spent(self, number: int, stage: str, seconds: float) -> None:
        self._progress["seconds"] += seconds
        self._progress["seconds_of"].setdefault(", ".join(self._phases[number]), {})[stage] = seconds

    def _saver(self, number: int) -> TaskSaver:
        name = distributed.on_main(functools.partial(self._checkpoints.newest, number))
        if name is None:
            distributed.on_main(self._checkpoints.clear)
        saved = None if name is None else self._checkpoints.read(name)
        return TaskSaver(
            self.increments.pool, self.args, self._checkpoints, self._watch, number, saved, self._begin_files
        )

    def _evaluate(self, seen: int) -> list[evaluation.TaskEvaluation]:
        """Of the first ``seen`` tasks, and of those to come where that is asked for."""
        tasks = self.stream.tasks if self.args.eval_unseen else self.stream.tasks[:seen]
        sizes = {task.name: len(getattr(task, self.args.eval_split)) for task in tasks}
        # what a run ends with is measured on everything
        budget = None if seen == len(self.stream) else self.args.eval_budget
        return evaluation.evaluate_tasks(
            self.model,
            self.data,
            list(sizes),
            self.args.eval_split,
            batch_size=self.args.eval_batch_size,
            max_new_tokens=self.args.max_new_tokens,
            progress=self.args.progress,
            after_batch=self._watch.check,
            positions=within_budget(sizes, tasks[seen - 1].name, budget),
        )
