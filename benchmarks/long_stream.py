"""What a stream of many tasks costs, task by task: `python -m benchmarks.long_stream --tasks 200`.

A tiny model learns many tiny tasks; after each: processor time of a tuning step and of each stage, resident memory,
open files, and bytes of what was written. Runs differ in how earlier tasks take part (`RUNS`). Processor time on one
thread, so that other programs matter little. Results go to benchmarks/results/long-stream.json, the picture and the
table to docs/long-streams.{png,md}, which says what bounds each curve.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cllava_fast as cf
from benchmarks import tiny_stream
from benchmarks.results import FOLDER, device_name, fill
from cllava_fast import atomic, ops
from cllava_fast.environment import environment
from cllava_fast.model import get_increments
from cllava_fast.train.committed import CommittedRows

STEPS, BATCH, TRAIN, TEST = 4, 4, 8, 2
BUDGET = 32
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact, everything measured": ({}, {}),
    f"context_rank 4, eval_budget {BUDGET}": ({"context_rank": 4}, {"eval_budget": BUDGET}),
    f"no context, eval_budget {BUDGET}": ({"context": "none"}, {"eval_budget": BUDGET}),
}
WINDOW = 10  # tasks at either end whose medians are compared


class Meter(cf.ContinualCallback):
    """Measures every task where it happens."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder, self.points = model, folder, list[dict[str, float]]()
        self.point: dict[str, float] = {}
        self.steps: list[float] = []
        self.written = 0
        self.start = self.mark = time.process_time()

    def on_task_begin(self, task: str, number: int, **kwargs: Any) -> None:
        self.point, self.steps = {}, []

    def on_stage_begin(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
        self.mark = time.process_time()

    def on_stage_end(self, task: str, number: int, stage: str, metrics: dict[str, float], **kwargs: Any) -> None:
        self.point[f"{stage}_seconds"] = time.process_time() - self.mark
        self.mark = time.process_time()
        if "context_error" in metrics:
            self.point["context_error"] = metrics["context_error"]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.process_time() - self.start)

    def on_task_end(self, task: str, number: int, metrics: dict[str, float], **kwargs: Any) -> None:
        point = self.point
        point["write_seconds"] = time.process_time() - self.mark
        point["step_seconds"] = statistics.median(self.steps[1:])
        point["resident_bytes"], point["open_files"] = tiny_stream.resident_bytes(), tiny_stream.open_files()
        run, (saved, *_) = self.folder, sorted((self.folder / "increments").iterdir(), reverse=True)
        sizes = {file.name: file.stat().st_size for file in (*saved.iterdir(), run / "run.json", run / "results.json")}
        predicted = list((run / "predictions" / saved.name).iterdir())
        point["increments_bytes"] = sizes["adapter_model.safetensors"]
        point["run_json_bytes"], point["results_json_bytes"] = sizes["run.json"], sizes["results.json"]
        point["predictions_bytes"] = sum(file.stat().st_size for file in predicted)
        self.written += point["increments_bytes"] + point["predictions_bytes"]
        point["all_folders_bytes"] = self.written
        pool = get_increments(self.model).pool
        point["pool_bytes"] = sum(t.nbytes for t in pool.buffers())
        point["evaluated_samples"] = sum(len(file.read_text().splitlines()) for file in predicted)
        point["accuracy"] = statistics.mean(v for name, v in metrics.items() if name.startswith("evaluate/accuracy"))
        self.points.append({name: round(value, 6) for name, value in point.items()})
        # what was measured is counted above; the disk is not to fill up
        shutil.rmtree(saved)
        shutil.rmtree(run / "predictions" / saved.name)


def learn(tasks: int, run: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    method, options = RUNS[run]
    model, processor = tiny_stream.new_model()
    model = cf.patch(model, cf.IncrementConfig(**tiny_stream.METHOD, **method), processor=processor)
    stream = cf.Stream([tiny_stream.tiny_task(k, TRAIN, TEST) for k in range(tasks)])
    with tempfile.TemporaryDirectory() as folder:
        meter = Meter(model, Path(folder) / "run")
        arguments = cf.ContinualArguments(
            output_dir=str(meter.folder), max_steps=STEPS, align_steps=STEPS, learning_rate=1e-2, logging_steps=STEPS,
            per_device_train_batch_size=BATCH, max_new_tokens=2, progress=False, **options,
        )  # fmt: skip
        cf.ContinualTrainer(model, processor, stream, arguments, callbacks=[meter]).train()
    pool = get_increments(model).pool
    start = time.process_time()
    CommittedRows(pool)
    checked = time.process_time() - start
    return {
        "method": method, "options": options, "points": meter.points, "rows": pool.num_rows,
        "checksum_seconds": checked, "checksum_bytes": sum(t.nbytes for t in pool.buffers()),
    }  # fmt: skip


def select_seconds(rows: int) -> float:
    """Processor time of one `select` of 4 rows out of many, median of 20, by the backend that the library picks."""
    query, keys = torch.randn(32, 384), torch.randn(rows, 384)
    times = []
    for _ in range(20):
        start = time.process_time()
        index, _, _ = ops.select(query, keys, 4)
        times.append(time.process_time() - start)
    assert torch.equal(index.sort()[0], _expected(query, keys).sort()[0]), f"select is wrong at {rows} rows"
    return statistics.median(times)


def _expected(query: Tensor, keys: Tensor) -> Tensor:
    cosine = torch.nn.functional.normalize(query.double()) @ torch.nn.functional.normalize(keys.double()).t()
    return cosine.topk(4).indices


def growth(points: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Medians over the first and the last tasks; the very first ones warm up."""
    skip = 2 if len(points) > 2 * WINDOW else 0
    first, last = points[skip : skip + WINDOW], points[-WINDOW:]
    return tuple(statistics.median(p[name] for p in part) for part in (first, last))  # type: ignore[return-value]


IN_MIB = 1 / (1 << 20)
ROWS = {  # of the table, what they are called, and the factor to that unit
    "step_seconds": ("tuning step, ms", 1e3), "tune_seconds": ("tuning, s", 1.0),
    "evaluate_seconds": ("evaluation, s", 1.0), "evaluated_samples": ("samples evaluated", 1.0),
    "commit_seconds": ("commit, ms", 1e3), "write_seconds": ("writing, ms", 1e3),
    "resident_bytes": ("resident memory, MiB", IN_MIB), "open_files": ("open files", 1.0),
    "increments_bytes": ("one saved folder, MiB", IN_MIB), "all_folders_bytes": ("all saved folders, MiB", IN_MIB),
    "run_json_bytes": ("run.json, KiB", 1 / 1024), "results_json_bytes": ("results.json, KiB", 1 / 1024),
    "context_error": ("error of a shortened mean", 1.0),
}  # fmt: skip
PANELS = (  # of the picture
    "step_seconds", "evaluate_seconds", "commit_seconds", "write_seconds", "resident_bytes", "increments_bytes",
    "all_folders_bytes", "run_json_bytes",
)  # fmt: skip


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    axes = figure.subplots(2, 4).flat
    for ax, name in zip(axes, PANELS, strict=True):
        label, factor = ROWS[name]
        for run, found in results["runs"].items():
            ax.plot([factor * point[name] for point in found["points"]], label=run, linewidth=1)
        top = max(
            sorted(p[name] for p in found["points"])[int(0.98 * len(found["points"]))]
            for found in results["runs"].values()
        )
        ax.set(title=label, ylim=(0, 1.15 * factor * top))
        ax.set_xlabel("tasks learned", fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100, format="png")


def report(results: dict[str, Any], docs: Path) -> int:
    atomic.write_file(docs.with_suffix(".png"), lambda path: plot(results, path))
    fill(docs, "long stream", table(results))
    return 0


def table(results: dict[str, Any]) -> str:
    """First to last tasks of every run; `select` by rows; the guard's speed."""
    runs = results["runs"]
    lines = [f"| {results['tasks']} tasks | {' | '.join(runs)} |", "| --- |" + " ---: |" * len(runs)]
    for name, (label, factor) in ROWS.items():
        cells = []
        for found in runs.values():
            ends = found["growth"].get(name)
            cells.append(f"{factor * ends[0]:.3g} → {factor * ends[1]:.3g}" if ends else "–")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    rows = results["select_seconds"]
    first = next(iter(runs.values()))
    speed = first["checksum_bytes"] / first["checksum_seconds"] / 1e9
    return "\n".join(
        [
            *lines,
            "",
            "`select`, 4 rows for each of 32 samples, width 384: "
            + ", ".join(f"{1e3 * seconds:.2f} ms of {int(count):,} rows" for count, seconds in rows.items())
            + ".",
            f"Checking that committed rows are unchanged reads {speed:.2g} GB/s.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; processor time does not mind")
    parser.add_argument("--out", type=Path, default=FOLDER / "long-stream.json")
    parser.add_argument(
        "--docs", type=Path, default=tiny_stream.DOCS, help="page to fill in; the picture lies beside it"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing: fill in the page from --out")
    chosen: Any = parser.parse_args(arguments)
    if chosen.report:
        return report(json.loads(chosen.out.read_text(encoding="utf-8")), chosen.docs)
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "kind": "long stream", "device": device_name(), "environment": environment(), "tasks": chosen.tasks,
        "task": {"steps": STEPS, "batch": BATCH, "train": TRAIN, "test": TEST}, "increments": tiny_stream.METHOD,
        "select_seconds": {rows: select_seconds(rows) for rows in (100, 400, 1600, 6400, 25600)}, "runs": {},
    }  # fmt: skip
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for name, found in zip(RUNS, pool.map(learn, [chosen.tasks] * len(RUNS), RUNS), strict=True):
            results["runs"][name] = {**found, "growth": {p: growth(found["points"], p) for p in found["points"][0]}}
            atomic.write_text(chosen.out, json.dumps(results) + "\n")
            print(name)
            for label, (first, last) in results["runs"][name]["growth"].items():
                times = f"{last / first:.2f}x" if first else ""
                print(f"  {label:<20} {first:>14.6g} -> {last:>14.6g}  {times}", flush=True)
    return report(results, chosen.docs)


if __name__ == "__main__":
    sys.exit(main())
