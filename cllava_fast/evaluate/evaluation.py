"""Evaluation of a model on tasks: answers, their scores, what was selected for each, and the files that hold it all.

The training loop calls ``evaluate_tasks`` after every task; ``evaluate_stream`` does it for a model as it is.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllava_fast import distributed
from cllava_fast.atomic import check_replaceable, is_empty, new_folder
from cllava_fast.data.encode import Collator, Example, samples_of
from cllava_fast.data.prepared import PreparedStream
from cllava_fast.data.stream import Sample, Stream, fingerprint
from cllava_fast.environment import environment
from cllava_fast.evaluate.predict import Answer, batches_of, predict, queries_of
from cllava_fast.evaluate.report import REPORT_FILES, write_report
from cllava_fast.evaluate.results import MAX_TASKS
from cllava_fast.evaluate.scores import find_metric
from cllava_fast.evaluate.selection import selection_study
from cllava_fast.model.processors import prepared_otherwise
from cllava_fast.pool import Pool
from cllava_fast.train.as_it_was import same_mode
from cllava_fast.train.identity import base_identity, processor_identity
from cllava_fast.train.progress import stage
from cllava_fast.train.result import ContinualResult

PREDICTIONS = "predictions"  # folder of a run that holds a JSONL file for each task
EXAMPLES = 2  # right ones and wrong ones of each task in the report
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class TaskEvaluation:
    """What a model answered to the samples of one task.

    Attributes:
        records: one for each sample: id, question, answers, prediction, score, cut_off where the model would have gone
            on, and where rows were selected, rows, weights and strength.
        right_block: for each sample the share of the selection weight in the task's own rows; None where nothing was
            selected or the model has no rows of a task of this name.
        examples: a few of the records, right and wrong ones, with a small picture.
        row_weight: for each committed row its mean selection weight over the samples; None where nothing was selected.
        row_owner: the task that each of these rows was learned for.
    """

    task: str
    records: list[dict[str, Any]]
    right_block: list[float] | None
    examples: list[dict[str, Any]]
    row_weight: list[float] | None = None
    row_owner: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        return sum(record["score"] for record in self.records) / len(self.records)

    @property
    def cut_off(self) -> float:
        """Share of the answers that the model would have gone on with."""
        return sum("cut_off" in record for record in self.records) / len(self.records)


def check_tasks(stream: Stream, split: str) -> None:
    """Raises ValueError for a task without samples of the split, an unknown metric, or references it cannot read."""
    for task in stream:
        samples = getattr(task, split)
        if not len(samples):
            raise ValueError(f"task {task.name!r} has no {split} sample; evaluation needs at least one")
        try:
            find_metric(task.metric)([sample.answer for sample in samples], [references_of(s) for s in samples])
        except ValueError as error:
            raise ValueError(f"task {task.name!r}: {error}") from None


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises FileExistsError for a folder that holds something else than an evaluation, or one that is to stay."""
    check_replaceable(folder, (PREDICTIONS, *REPORT_FILES), "an evaluation")
    if not overwrite and not is_empty(folder):
        raise FileExistsError(
            f"{folder} holds an earlier evaluation; set overwrite (--overwrite), or give another output_dir (--output)"
        )


def references_of(sample: Sample) -> tuple[str, ...]:
    return sample.references or (sample.answer,)


def evaluate_tasks(
    model: Any,
    data: PreparedStream,
    names: Sequence[str],
    split: str,
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: bool,
    after_batch: Callable[[], None] = lambda: None,
    positions: Mapping[str, Sequence[int]] | None = None,
) -> list[TaskEvaluation]:
    """Answers of a patched or a plain model to tasks' samples, which share batches, except of a method that selects
    ``by_batch``; no task id is given, except to one with ``uses_task``.

    Args:
        after_batch: called between batches; may raise to stop.
        positions: which samples of each task; None for all.
    """
    increments = getattr(model, "increments", None)
    if increments is not None and increments.method.by_batch and len(names) > 1:
        options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "progress": progress}
        options |= {"after_batch": after_batch, "positions": positions}
        return [found for name in names for found in evaluate_tasks(model, data, [name], split, **options)]
    features = data.features if increments is not None else None  # a plain model takes pixels alone
    every = {name: data.examples(name, split, model, with_features=features is not None) for name in names}
    if positions is None:
        positions = {name: range(len(task)) for name, task in every.items()}
    # in memory from here on: each is asked for more than once
    tasks = {name: [task[i] for i in positions[name]] for name, task in every.items()}
    examples = [example for task in tasks.values() for example in task]
    queries = queries_of(
        model, samples_of(examples), data.features, [name for name, task in tasks.items() for _ in task]
    )
    batches = batches_of(examples, batch_size)
    with stage(f"evaluate {len(names)} task(s)", len(batches), progress) as advance:
        answers = predict(
            model, examples, queries, Collator(data.encoder, features, training=False),
            batch_size=batch_size, max_new_tokens=max_new_tokens, workers=data.workers, advance=advance,
            together=after_batch,
        )  # fmt: skip
    selected = None if queries is None else _selections(increments, queries, batches)
    metric_of = {task.name: find_metric(task.metric) for task in data.stream}
    evaluations, start = [], 0
    for name, task in tasks.items():
        part = slice(start, start + len(task))
        start = part.stop
        own = selected and _of_task(model.increments.pool, name, *(tensor[part] for tensor in selected))
        evaluations.append(_evaluation(name, task, positions[name], answers[part], metric_of[name], own))
    return evaluations


class _Selected(NamedTuple):
    rows: list[Any]  # of each sample
    weights: list[Any]
    strength: list[float]
    right: list[float] | None  # share of each sample's weights in the task's own rows
    row_weight: list[float]  # mean over the samples
    row_owner: tuple[str, ...]


def _selections(increments: Any, queries: Tensor, batches: list[list[int]]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Rows and weights of each sample, ``[n, M]``, and how much of them acts, ``[n]``, chosen batch by batch as for the
    answers: a method may choose for a batch as a whole. Where tasks share rows, what is selected are tasks."""
    index, weight, strength = [], [], []
    for rows in batches:
        selection = increments.select_by_query(queries[rows])
        if selection is None or selection.index is None or selection.weight is None:
            return None
        index.append(selection.index)
        weight.append(selection.weight)
        whole = selection.weight.new_ones(len(rows))
        strength.append(whole if selection.strength is None else selection.strength)
    place = torch.tensor([row for rows in batches for row in rows], device=index[0].device).argsort()
    return torch.cat(index)[place], torch.cat(weight)[place], torch.cat(strength)[place]


def _of_task(pool: Pool, task: str, index: Tensor, weight: Tensor, strength: Tensor) -> _Selected:
    """What was selected for a task's samples, from rows and weights ``[n, M]`` and strengths ``[n]``."""
    # tasks stand for themselves where they share rows
    owner = torch.arange(pool.num_tasks, device=index.device) if pool.shared_rows else pool.row_task  # [N]
    right = None
    if task in pool.task_names:
        right = (weight * (owner[index] == pool.task_names.index(task))).sum(1).tolist()
    total = weight.new_zeros(len(index), len(owner)).scatter_add_(1, index, weight)  # [n, N]
    names = tuple(pool.task_names[i] for i in owner.tolist())
    return _Selected(index.tolist(), weight.tolist(), strength.tolist(), right, total.mean(0).tolist(), names)


def _evaluation(
    name: str,
    examples: Sequence[Example],
    places: Sequence[int],
    answers: Sequence[Answer],
    metric: Any,
    selected: _Selected | None,
) -> TaskEvaluation:
    samples = [example.sample for example in examples]
    scores = metric.each([answer.text for answer in answers], [references_of(sample) for sample in samples])
    records: list[dict[str, Any]] = []
    for position, (sample, answer, score) in enumerate(zip(samples, answers, scores, strict=True)):
        record = {
            "id": sample.id or str(places[position]),
            "question": sample.instruction,
            "answers": list(references_of(sample)),
            "prediction": answer.text,
            **({"cut_off": True} if answer.is_cut_off else {}),
            "score": score,
        }
        if selected:
            record["rows"] = selected.rows[position]
            record["weights"] = [round(weight, 6) for weight in selected.weights[position]]
            record["strength"] = round(selected.strength[position], 6)
        records.append(record)
    right = [i for i, score in enumerate(scores) if score >= 0.5][:EXAMPLES]
    wrong = [i for i, score in enumerate(scores) if score < 0.5][:EXAMPLES]
    shown = [_example(records[i], samples[i]) for i in right + wrong]
    if selected is None:
        return TaskEvaluation(name, records, None, shown)
    return TaskEvaluation(name, records, selected.right, shown, selected.row_weight, selected.row_owner)


def _example(record: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
    return {
        "question": _short(record["question"]),
        "answers": [_short(answer) for answer in dict.fromkeys(record["answers"])][:5],
        "prediction": _short(record["prediction"]),
        "score": record["score"],
        "image": _thumbnail(sample),
    }


def _short(text: str, limit: int = 500) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _thumbnail(sample: Sample) -> str | None:
    """A small JPEG in base64."""
    try:
        image = sample.open_image()
    except OSError:
        return None  # gone since its features were computed: no reason to lose a run
    if image is None:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80, optimize=True)
    return base64.b64encode(out.getvalue()).decode("ascii")


def selection_accuracy(evaluations: Sequence[TaskEvaluation]) -> float | None:
    """Mean over the samples of the share of selection weight in the rows of their own task; None without any."""
    shares = [share for evaluation in evaluations for share in evaluation.right_block or ()]
    return sum(shares) / len(shares) if shares else None


def study_of(evaluations: Sequence[TaskEvaluation]) -> dict[str, Any] | None:
    """See ``selection_study``; None unless every task's questions selected rows."""
    weights = {e.task: e.row_weight for e in evaluations if e.row_weight is not None}
    if not weights or len(weights) < len(evaluations):
        return None
    return selection_study(weights, evaluations[0].row_owner)


def write_predictions(folder: Path, evaluations: Sequence[TaskEvaluation]) -> None:
    """Writes ``<task>.jsonl`` for each task, one record a line; the folder appears whole and replaces an old one."""
    with new_folder(folder) as new:
        for evaluation, name in zip(evaluations, file_names([e.task for e in evaluations]), strict=True):
            lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in evaluation.records]
            # "replace": half a surrogate pair, which JSON can hold and UTF-8 cannot
            (new / f"{name}.jsonl").write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "replace"))


def keep_predictions(folder: Path, tasks: Sequence[str], measured: Collection[str]) -> None:
    """Removes what ``folder`` holds of others than the ``measured`` ones of the stream's ``tasks``."""
    kept = {name for task, name in zip(tasks, file_names(tasks), strict=True) if task in measured}
    for file in folder.glob("*.jsonl"):
        if file.stem not in kept:
            file.unlink()


def file_names(tasks: Sequence[str]) -> list[str]:
    """A file name for each task, without an ending, distinct even where case does not count."""
    names: list[str] = []
    for task in tasks:
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in task)[:60]
        taken = {name.lower() for name in names}
        number, name = 1, safe
        while name.lower() in taken:
            number += 1
            name = f"{safe}-{number}"
        names.append(name)
    return names


def results_of_run(
    stream: Stream, method: str, seed: int, result: ContinualResult, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``results.json`` holds for one method and one seed."""
    numbers = result.to_dict()
    details = {name: getattr(result, name) for name in ("losses", "seconds_of", "examples")}
    return {
        "stream": stream.task_names,
        "metrics": {task.name: task.metric for task in stream},
        "seeds": [seed],
        "methods": {method: {**numbers, "per_seed": [numbers], **details}},
        "environment": environment(),
        "config": dict(config),
    }


def _warn_of_another_processor(model: Any, processor: Any) -> None:
    patched = getattr(getattr(model, "increments", None), "processor", None)
    other = "" if patched is None else prepared_otherwise(processor, patched)
    if other and distributed.is_main():
        warnings.warn(
            f"the processor has another {other} than the one that the model was patched with, and is measured with it; "
            "give model.increments.processor",
            stacklevel=3,
        )


def evaluate_stream(
    model: Any,
    processor: Any,
    stream: Stream | PreparedStream,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    split: str = "test",
    batch_size: int = 32,
    max_new_tokens: int = 16,
    image_feature_bytes: int = 2 << 30,
    dataloader_num_workers: int = 0,
    name: str | None = None,
    seed: int = 0,
    run: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a model as it is on all tasks of a stream, by greedy generation and without a task id
    (a method with ``uses_task`` is told it by the task's name), on one process or all that a launcher started.

    Args:
        model: a LLaVA, patched (with what it has learned) or plain, on the device it is on; of several processes, each
            moves it to its own device, unless it is offloaded.
        output_dir: receives ``predictions/<task>.jsonl`` and the report, from the main process; None writes nothing.
        split: ``"test"`` or ``"validation"``.
        image_feature_bytes, dataloader_num_workers: see ``PreparedStream``, of which they are.
        name: what the results call the model; None for its method's name, or ``"frozen"`` for a plain one.
        seed: that the model learned with (0 unless you say it), for a report of several; nothing is drawn here.
        run: what the results' config shall say of the run that the model learned in, for a report of several: its
            ``arguments``, how many tasks it had ``learned`` and how many ``tasks`` it has.
        overwrite: replace an earlier evaluation in ``output_dir``.

    Returns:
        The results as ``results.json`` holds them, with one method. The scores are the last row of its
        ``accuracy_matrix``, the only one that is measured.

    Raises:
        ValueError: an empty split, more tasks than a report has room for, an unknown metric or references that it
            cannot read, or a model that needs a processor and was patched without one, or is learning a task.
        FileExistsError: ``output_dir`` holds something else than an evaluation, or one and ``overwrite`` is off.
    """
    if split not in ("test", "validation"):
        raise ValueError(f"split is {split!r}; expected 'test' or 'validation'")
    for option, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{option} is {value}; expected at least 1")
    if hasattr(model, "increments") and model.increments.is_within_a_task:
        raise ValueError("a task is being learned, whose rows do not act in evaluation; evaluate once it is committed")
    distributed.start()
    data = stream
    if not isinstance(data, PreparedStream):
        data = PreparedStream(data, processor, image_feature_bytes, dataloader_num_workers)
    check_tasks(data.stream, split)
    _warn_of_another_processor(model, data.encoder.processor)
    folder = None if output_dir is None else Path(output_dir)
    names = data.stream.task_names
    if folder is not None:
        if len(names) > MAX_TASKS:
            raise ValueError(
                f"the stream has {len(names)} tasks, and a report room for {MAX_TASKS}; leave output_dir out, or "
                "evaluate the stream in parts"
            )
        distributed.on_main(functools.partial(check_output, folder, overwrite))
    start = time.perf_counter()
    with distributed.failing_together(), same_mode(model):
        # one that is offloaded stays: its hooks bring each layer to where it computes
        if distributed.count() > 1 and model.device not in (distributed.device(), torch.device("meta")):
            model.to(distributed.device())
        for task in names:
            data.examples(task, split, model, with_features=False)
            data.warn_of_answers(task, split, max_new_tokens)
        evaluations = evaluate_tasks(
            model, data, names, split, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
        )
    matrix: list[list[float | None]] = [[None] * len(names) for _ in names[1:]]
    matrix.append([evaluation.score for evaluation in evaluations])
    method_config = model.increments.config.to_dict() if hasattr(model, "increments") else {"method": "frozen"}
    method = name or method_config["method"]
    measured = ContinualResult(
        task_names=names,
        accuracy_matrix=matrix,
        selection_accuracy=selection_accuracy(evaluations),
        trainable_parameters=None if hasattr(model, "increments") else 0,  # what learned it had some
        seconds=time.perf_counter() - start,
        examples={evaluation.task: evaluation.examples for evaluation in evaluations},
        selection=study_of(evaluations),
        cut_off={evaluation.task: evaluation.cut_off for evaluation in evaluations},
    )
    config = {
        "model": model.name_or_path or None, "split": split,
        "samples_sha256": {task.name: fingerprint(getattr(task, split)) for task in data.stream},
        "batch_size": batch_size, "max_new_tokens": max_new_tokens, "method_configs": {method: method_config},
        "base": _base_of(model, data.encoder.processor),
        **(run or {}),
    }  # fmt: skip
    results = results_of_run(data.stream, method, seed, measured, config)
    if folder is not None:
        distributed.on_main(functools.partial(_write, folder, evaluations, results))
    return results


def _base_of(model: Any, processor: Any) -> dict[str, Any]:
    """The base as a run says it. Of weights that hold what was learned (plain, merged), which are others for each seed,
    and of some that FSDP has taken apart, the processor's part alone."""
    increments = getattr(model, "increments", None)
    if increments is None or increments.pristine:
        return processor_identity(processor)
    if increments.base_fingerprint is None and distributed.is_sharded(model):
        return processor_identity(processor)
    return base_identity(model, processor)


def _write(folder: Path, evaluations: Sequence[TaskEvaluation], results: Mapping[str, Any]) -> None:
    write_predictions(folder / PREDICTIONS, evaluations)
    write_report(results, folder)
