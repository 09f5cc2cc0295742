"""The demo: a tiny LLaVA learns a stream of small tasks by several methods, same steps, same data, and is measured."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import cllava_fast as cf
from cllava_fast.atomic import check_replaceable, new_folder
from cllava_fast.demo.base import load_base
from cllava_fast.demo.settings import SETTINGS, in_order, task_orders
from cllava_fast.demo.skills import base_ability, build_skills
from cllava_fast.environment import environment
from cllava_fast.evaluate import metrics
from cllava_fast.evaluate.evaluation import evaluate_tasks
from cllava_fast.evaluate.report import REPORT_FILES, write_report
from cllava_fast.evaluate.wording import title_of
from cllava_fast.methods import METHODS as LEARNING
from cllava_fast.methods import MethodConfig
from cllava_fast.names import nearest
from cllava_fast.surrogate import check_surrogate

DEFAULT = ("frozen", "sequential_lora", "joint_lora", "continual_llava")
CALIBRATED = "continual_llava+calibrate"
METHODS = (*DEFAULT, CALIBRATED, *(name for name in LEARNING if name not in DEFAULT))
MARK = "demo.json"  # says that a folder is the demo's own

# Chosen on the validation split (`--split validation`), never on the test split.
SCALE = 8.0
A_STD = 128**-0.5  # 1 / sqrt(hidden size)
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class DemoConfig:
    """What ``cllava-fast demo`` decides.

    Args:
        output: folder for the report and the learned increments.
        setting: what changes from task to task, of ``SETTINGS``.
        seeds: how many seeds; seed s draws its own stream and its own increments.
        orders: how many orders of the tasks, each with every seed and every method; see ``task_orders``.
        methods: which methods, of ``METHODS``; ``("all",)`` for all of them.
        ambiguous: share of the questions of two tasks that are word for word the same; for ``setting="domain"``.
        surrogate: as in ``IncrementConfig``.
        context: as in ``IncrementConfig``.
        steps: tuning steps for each task.
        split: ``"validation"`` while hyperparameters are being chosen.
        train, test: samples of each task.
        overwrite: replace an earlier demo in ``output``.
        progress: show what is going on.
        jobs: runs at the same time, each in a process and on as many threads as it then has cores; 1: in this one.
    """

    output: str = "runs/demo"
    setting: str = "domain"
    seeds: int = 1
    orders: int = 1
    methods: tuple[str, ...] = DEFAULT
    ambiguous: float = 0.0
    surrogate: str = "sentence"
    context: str = "product"
    steps: int = 300
    split: str = "test"
    train: int = 1200
    test: int = 200
    overwrite: bool = False
    progress: bool = True
    jobs: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", METHODS if list(self.methods) == ["all"] else tuple(self.methods))
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"methods is {list(self.methods)}; expected some of {list(METHODS)}")
        if self.setting not in SETTINGS:
            raise ValueError(f"setting is {self.setting!r}; {nearest(str(self.setting), SETTINGS)}")
        task_orders(SETTINGS[self.setting].tasks, self.orders)
        for name in ("seeds", "steps", "train", "test", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0.0 <= self.ambiguous <= 1.0:
            raise ValueError(f"ambiguous is {self.ambiguous}; expected a share in 0..1")
        if self.ambiguous and self.setting != "domain":
            raise ValueError(f"ambiguous is {self.ambiguous}; setting {self.setting!r} has no such questions")
        # refused now, not when their turn comes
        for name in self.methods:
            self.method_config(name)
        self.arguments(Path(self.output), 0)
        check_surrogate(self.surrogate)

    def identity(self) -> dict[str, Any]:
        """What decides the results: all but where they go and how the work is shown and shared (up to the order in
        which threads sum)."""
        values = asdict(self)
        for name in ("output", "overwrite", "progress", "jobs"):
            del values[name]
        return values

    def method_config(self, name: str) -> MethodConfig:
        name, _, variant = name.partition("+")
        config = LEARNING[name if name != "frozen" else DEFAULT[-1]][0]
        asked = {"surrogate": self.surrogate, "context": self.context, **({variant: True} if variant else {})}
        fields = {key: value for key, value in asked.items() if key in config.__dataclass_fields__}
        return config(**{"scale": SCALE, "a_std": A_STD, **fields, **config.demo})

    def arguments(self, output_dir: Path, seed: int) -> cf.ContinualArguments:
        return cf.ContinualArguments(
            output_dir=str(output_dir),
            seed=seed,
            align_steps=60,
            max_steps=self.steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=10,
            per_device_train_batch_size=32,
            eval_split=self.split,  # type: ignore[arg-type]
            eval_batch_size=100,
            max_new_tokens=SETTINGS[self.setting].max_new_tokens,
            progress=self.progress,
        )

    def stream(self, seed: int) -> cf.Stream:
        """The seed's tasks in the first order."""
        more = {"ambiguous": self.ambiguous} if self.ambiguous else {}
        return SETTINGS[self.setting].build(seed, train=self.train, test=self.test, **more)


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the methods over the seeds and writes the report; returns what ``results.json`` holds.

    ``config.output`` appears at the end, whole; an earlier demo stays there until then.

    Raises:
        FileExistsError: ``config.output`` holds something else than an earlier demo, or one and ``overwrite`` is off.
    """
    output = Path(config.output)
    _check_output(output, config.overwrite)
    with new_folder(output) as folder:
        (folder / MARK).write_text('{"format": 1}\n')
        try:
            results = _run_methods(config, folder)
        finally:
            _tasks.cache_clear()
            _skills.cache_clear()
        write_report(results, folder)
    return results


class _Run(NamedTuple):
    """One method on one order of one seed's tasks."""

    seed: int
    order: int
    method: str

    def folder(self, orders: int) -> str:
        return f"seed{self.seed}-order{self.order}" if orders > 1 else f"seed{self.seed}"


def _run_methods(config: DemoConfig, output: Path) -> dict[str, Any]:
    start = time.perf_counter()
    orders = task_orders(SETTINGS[config.setting].tasks, config.orders)
    every = [_Run(*one) for one in product(range(config.seeds), range(len(orders)), config.methods)]
    found = dict(_each(config, output, every))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in config.methods}
    details: dict[str, dict[str, Any]] = {}  # of the last seed, in the first order
    for run in every:
        where = {"seed": run.seed, "order": run.order} if len(orders) > 1 else {}
        runs[run.method].append({**found[run]["values"], **where})
        if run.order == 0:
            details[run.method] = found[run]["details"]
    methods = {
        name: {**metrics.mean_over_orders(values, orders, orders[0]), "per_seed": values, **details[name]}
        for name, values in runs.items()
    }
    return {
        "stream": orders[0],
        **({"orders": orders} if len(orders) > 1 else {}),
        "metrics": found[every[-1]]["metrics"],
        "note": "Hyperparameters were chosen on the validation split, never on the test split.",
        "seeds": list(range(config.seeds)),
        "methods": methods,
        "environment": environment(),
        "config": {
            **config.identity(), "jobs": config.jobs, "seconds_in_all": time.perf_counter() - start,
            "arguments": config.arguments(Path("."), 0).identity(),
            "method_configs": {
                name: config.method_config(name).to_dict() for name in config.methods if name != "frozen"
            },
        },
    }  # fmt: skip


def _each(config: DemoConfig, output: Path, runs: list[_Run]) -> Iterator[tuple[_Run, dict[str, Any]]]:
    """Each run's outcome, in whatever order they end."""
    console = Console(stderr=True)
    if config.jobs == 1:
        for run in runs:
            if config.progress:
                name = run.folder(config.orders).replace("-", ", ")
                console.rule(f"{title_of(run.method)}, {name}", align="left")
            yield run, _one(config, output, run)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    jobs = min(config.jobs, len(runs))
    threads = max(1, torch.get_num_threads() // jobs)
    quiet, spawn = replace(config, progress=False), multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console, disable=not config.progress) as bar,
        ProcessPoolExecutor(jobs, spawn, _in_a_process, (threads, _modules_of(config.methods))) as pool,
    ):
        shown = bar.add_task("runs", total=len(runs))
        # from behind: the quickest methods are named first, and leave no process idle at the end
        started = {pool.submit(_one, quiet, output, run): run for run in reversed(runs)}
        try:
            for future in as_completed(started):
                run = started[future]
                yield run, future.result()
                bar.console.print(f"{title_of(run.method)}, {run.folder(config.orders)}: done")
                bar.advance(shown)
        except BaseException:  # what else would run to its end before the pool is left
            for process in list(pool._processes.values()):
                process.terminate()
            raise


def _modules_of(methods: Iterable[str]) -> list[str]:
    """Where methods are registered, which a new process would not know of those from outside this package."""
    policies = [LEARNING[name][1] for name in methods if name in LEARNING]
    return [policy.__module__ for policy in policies if policy.__module__ != "__main__"]  # that one it runs itself


def _in_a_process(threads: int, modules: list[str]) -> None:
    from transformers.utils import logging

    for module in modules:
        importlib.import_module(module)
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A parent that is killed cannot stop its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _one(config: DemoConfig, output: Path, run: _Run) -> dict[str, Any]:
    data = _tasks(config, run.seed, run.order)
    # a fresh base for each: no method sees what another left
    model, processor = load_base()
    if run.method == "frozen":
        result = _frozen(model, data, config)
    else:
        cf.patch(model, config.method_config(run.method), processor=processor)
        folder = output / "methods" / run.method / run.folder(config.orders)
        result = cf.ContinualTrainer(model, processor, data, config.arguments(folder, run.seed)).train()
    asked, able = _skills(run.seed)
    kept = (1.0 if run.method == "frozen" else base_ability(model, asked) / able) if able else None
    return {
        "values": {**result.to_dict(), "base_kept": kept},
        "details": {"losses": result.losses, "examples": result.examples},
        "metrics": {task.name: task.metric for task in data.stream},
    }


@functools.lru_cache(maxsize=1)
def _tasks(config: DemoConfig, seed: int, order: int) -> cf.PreparedStream:
    """A seed's tasks in one order."""
    orders = task_orders(SETTINGS[config.setting].tasks, config.orders)
    return cf.PreparedStream(in_order(config.stream(seed), orders[order]), load_base()[1])


@functools.lru_cache(maxsize=1)
def _skills(seed: int) -> tuple[cf.PreparedStream, float]:
    """Questions of what the base was trained on, and how able the frozen base is."""
    plain, processor = load_base()
    asked = build_skills(processor, seed)
    return asked, base_ability(plain, asked)


def _frozen(model: Any, data: cf.PreparedStream, config: DemoConfig) -> cf.ContinualResult:
    """The base as it is: it learns nothing, so its accuracy is the same after every task."""
    start = time.perf_counter()
    evaluations = evaluate_tasks(
        model, data, data.stream.task_names, config.split, batch_size=100,
        max_new_tokens=SETTINGS[config.setting].max_new_tokens, progress=config.progress,
    )  # fmt: skip
    row = [evaluation.score for evaluation in evaluations]
    size = len(row)
    return cf.ContinualResult(
        task_names=data.stream.task_names,
        accuracy_matrix=[[*row[: i + 1], *[None] * (size - i - 1)] for i in range(size)],
        selection_accuracy=None,
        trainable_parameters=0,
        seconds=time.perf_counter() - start,
        examples={evaluation.task: evaluation.examples for evaluation in evaluations},
        cut_off={evaluation.task: evaluation.cut_off for evaluation in evaluations},
    )


def _check_output(output: Path, overwrite: bool) -> None:
    check_replaceable(output, (MARK, "methods", *REPORT_FILES), "a demo")
    if (output / "results.json").exists() and not (output / MARK).is_file():
        raise FileExistsError(f"{output} holds the report of another run; give another --output")
    if not overwrite and (output / MARK).is_file():
        raise FileExistsError(f"{output} holds an earlier demo; use --overwrite, or give another --output")
