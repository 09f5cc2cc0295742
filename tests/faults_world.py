"""The run that ``tests/faults.py`` disturbs, and how it is watched: a tiny LLaVA, three tasks, forks."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import cllava_fast as cf
from cllava_fast import atomic, cli
from cllava_fast.surrogate import sentence_surrogate
from cllava_fast.train import checkpoint, loop, signals, tune  # noqa: F401  (warm before the first fork)

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
QUESTIONS = ("what color is the shape?", "which color has the bar?", "name the color of the box")
OPTIONS: dict[str, Any] = dict(
    align_steps=7, align_batch_size=4, num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-2,
    logging_steps=2, save_steps=2, save_minutes=0, eval_batch_size=4, max_new_tokens=2, progress=False,
)  # fmt: skip
MOMENTS = ("align", "tune", "save", "commit", "evaluate", "between tasks")
PATIENCE = 300  # seconds for one run


class Trial(NamedTuple):
    fault: str
    message: str
    lost: bool  # the end was not that of the undisturbed run
    detail: str = ""


class World:
    """The undisturbed run, and everything that a fork needs to run it again."""

    def __init__(self, folder: Path, seed: int) -> None:
        from cllava_fast.demo.base import new_base
        from cllava_fast.demo.tokenizer import build_processor

        torch.set_num_threads(1)  # a pool of threads would not survive a fork
        self.folder, self.random, self.count = folder, random.Random(seed), 0
        self.processor = build_processor()
        self.model = new_base(self.processor, seed=0).eval()
        self.model.config.text_config.attention_dropout = 0.1  # draws from torch's random state
        for layer in self.model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.1
        images = {name: Image.new("RGB", (64, 64), rgb) for name, rgb in COLORS.items()}
        names = [list(COLORS)[i * i % 3] for i in range(10)]
        self.stream = cf.Stream([
            cf.Task(f"task{k}", [cf.Sample(QUESTIONS[k], n, images[n]) for n in names],
                    [cf.Sample(QUESTIONS[k], n, images[n]) for n in names[:6]])
            for k in range(3)
        ])  # fmt: skip
        sentence_surrogate("sentence", "cpu")
        gc.freeze()  # forks need not go through all that is loaded
        whole = self.new("whole")
        events: list[tuple[str, float]] = []
        code = self.run(whole, watch=lambda kind, process: events.append((kind, time.perf_counter())))
        assert code == 0, self.said(whole)
        self.expected = outcome(whole)
        assert len(self.expected) > 8 and len(set(map(tuple, json.loads(self.expected["run.json"])["losses"].values())))
        self.moments: dict[str, list[float]] = {}  # seconds to the next event, by kind
        for (kind, at), (_, then) in zip(events, [*events[1:], events[-1]], strict=True):
            self.moments.setdefault(kind, []).append(then - at)

    def new(self, name: str) -> Path:
        self.count += 1
        return self.folder / f"{self.count:03d}-{name.replace(' ', '-')}"

    def said(self, run: Path) -> str:
        file = self._words(run)
        return file.read_text().strip() if file.exists() else ""

    def _words(self, run: Path) -> Path:
        """Where a fork writes what it has to say: never on the disk that is full."""
        return self.folder / f"{run.relative_to(self.folder)}.said".replace("/", "-")

    def run(
        self,
        run: Path,
        watch: Callable[[str, int], None] = lambda kind, process: None,
        prepare: Callable[[], None] = lambda: None,
        resume: bool = False,
    ) -> int:
        """Runs in a fork; returns its exit code. ``watch`` is told of every event while the run goes on."""
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            self._child(run, writer, prepare, resume)
        os.close(writer)
        guard = threading.Timer(PATIENCE, os.kill, (process, signal.SIGKILL))
        guard.start()
        with os.fdopen(reader, "rb", buffering=0) as events:
            while code := events.read(1):
                watch(MOMENTS[code[0]], process)
        _, status = os.waitpid(process, 0)
        guard.cancel()
        return os.waitstatus_to_exitcode(status)

    def _child(self, run: Path, writer: int, prepare: Callable[[], None], resume: bool) -> None:
        code, said = 70, []
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            warnings.showwarning = lambda message, *rest, **more: said.append(f"cllava-fast: {message}")
            warnings.simplefilter("once")
            report(writer)
            prepare()
            code = 0
            try:
                config = cf.IncrementConfig(rows_per_task=4, top_m=2, rank=2, a_std=0.1, scale=8.0)
                cf.patch(self.model, config, processor=self.processor)
                arguments = cf.ContinualArguments(output_dir=str(run), resume=resume, **OPTIONS)
                trainer = cf.ContinualTrainer(self.model, self.processor, self.stream, arguments, callbacks=[Stages])
                try:
                    trainer.train()
                finally:  # a signal that comes late must not keep the process from saying how the run ended
                    for signum in signals.SIGNALS:
                        signal.signal(signum, signal.SIG_IGN)
            except KeyboardInterrupt as stop:
                code = getattr(stop, "exit_code", 130)
                said.append(str(stop) or "interrupted")  # the second of two, while the first ends the run
            except Exception as error:
                code = getattr(error, "exit_code", 1)
                said.append(cli._sentence(error))
        finally:
            try:
                self._words(run).write_text("\n".join(said))
            finally:
                os._exit(code)

    def resume(self, run: Path) -> tuple[bool, str]:
        """Goes on to the end; whether that differs from the undisturbed run, and how."""
        code = self.run(run, resume=True)
        if code != 0:
            return True, f"resume ended with {code}: {self.said(run)}"
        found = outcome(run)
        differ = sorted(name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name))
        shutil.rmtree(run)
        return bool(differ), f"differ: {differ}" if differ else ""


class Stages(cf.ContinualCallback):
    """Which stage is going on, for ``report``."""

    now = "between tasks"

    def on_stage_begin(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
        Stages.now = stage

    def on_task_end(self, task: str, number: int, metrics: dict[str, float], **kwargs: Any) -> None:
        Stages.now = "between tasks"


def report(writer: int) -> None:
    """From here on, each step, batch and write of this process is one byte in the pipe ``writer``."""

    def tell(owner: Any, name: str, kind: Callable[[], str]) -> None:
        original = getattr(owner, name)

        def telling(*args: Any, **kwargs: Any) -> Any:
            os.write(writer, bytes([MOMENTS.index(kind())]))
            return original(*args, **kwargs)

        setattr(owner, name, telling)

    tell(checkpoint.TaskSaver, "due", lambda: Stages.now)
    tell(signals.Watch, "check", lambda: Stages.now)
    tell(atomic, "_to_disk", lambda: "save" if Stages.now in ("align", "tune") else Stages.now)


def outcome(run: Path) -> dict[str, str]:
    """All that a run leaves, less the time it took."""
    found = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(file.relative_to(run))
        if name in ("run.json", "results.json"):
            values = json.loads(file.read_text())
            found[name] = json.dumps(
                without(values, {"seconds", "seconds_of", "sha256", "environment"}), sort_keys=True
            )
        elif name not in ("run.previous.json", "config.yaml", ".lock"):
            found[name] = file.read_bytes().hex()
    return found


def without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: without(entry, names) for key, entry in value.items() if key not in names}
    return [without(entry, names) for entry in value] if isinstance(value, list) else value
