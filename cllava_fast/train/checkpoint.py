"""Checkpoints within a task: a run that was stopped there goes on from the last one, to the bit.

One is a folder ``checkpoints/0002-tune-000150``: the open block, the optimizer, the schedule, random states, losses.
Tensors are safetensors, all else is JSON; nothing is pickled. ``checkpoint.json`` names every file with its checksum.
"""

from __future__ import annotations

import random
import re
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from cllava_fast import distributed
from cllava_fast.atomic import DamagedError, check_sums, new_folder, read_json, remove_folder, signed_json, sums_of
from cllava_fast.pool import Pool
from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.signals import Watch

FOLDER, MANIFEST, TENSORS = "checkpoints", "checkpoint.json", "state.safetensors"
KEPT = 2
GO_ON, SAVE, STOP = range(3)
_TENSOR, _ITEMS = "__tensor__", "__items__"


class Checkpoints:
    """The newest ``KEPT`` checkpoints of a run. ``folder`` is that of the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def names(self) -> list[str]:
        """Oldest first."""
        found = [re.fullmatch(r"(\d+)-(align|tune)-(\d+)", path.name) for path in self.folder.glob("*")]
        named = [(int(name[1]), name[2], int(name[3]), name[0]) for name in found if name]
        return [name for *_, name in sorted(named)]

    def write(self, number: int, stage: str, step: int, state: dict[str, Any], files: dict[str, str]) -> None:
        """``state`` may hold tensors anywhere; ``files`` are texts by name, for others to read."""
        tensors: dict[str, Tensor] = {}
        values = {"number": number, "stage": stage, "step": step, "state": pack(state, tensors)}
        contents = {TENSORS: save(tensors), **{name: text.encode() for name, text in files.items()}}
        newest = self.folder / f"{number + 1:04d}-{stage}-{step:06d}"
        with new_folder(newest) as folder:
            for name, content in contents.items():
                (folder / name).write_bytes(content)
            manifest = {**values, "files": sums_of(folder)}
            (folder / MANIFEST).write_text(signed_json(manifest), encoding="utf-8")
        names = self.names()
        count = names.index(newest.name) + 1  # behind it lies what could not be read when the task went on
        for other in names[:count][:-KEPT] + names[count:]:
            remove_folder(self.folder / other)

    def newest(self, number: int) -> str | None:
        """The name of the newest whole checkpoint of task ``number``."""
        for name in reversed(self.names()):
            try:
                values = self.read(name)
            except (DamagedError, OSError) as error:
                warnings.warn(f"{error}; going on from what was saved before", stacklevel=2)
                continue
            if values["number"] == number:
                return name
        return None

    def read(self, name: str) -> dict[str, Any]:
        """Stage, step, state and, as ``folder``, where it is."""
        folder = self.folder / name
        values = read_json(folder / MANIFEST)
        check_sums(folder, values["files"])
        values["state"] = unpack(values["state"], load((folder / TENSORS).read_bytes()))
        return {**values, "folder": str(folder)}

    def clear(self, tasks: int | None = None) -> None:
        """Removes those of the first ``tasks`` tasks, or all."""
        for name in self.names():
            if tasks is None or int(name.partition("-")[0]) <= tasks:
                remove_folder(self.folder / name)
        with suppress(OSError):  # there is none, or somebody put something else into it
            self.folder.rmdir()


class TaskSaver:
    """Saves one task while it is learned, and brings it back.

    Args:
        saved: what ``Checkpoints.read`` found, None to begin anew.
        before: called on the main process before anything is written.
    """

    def __init__(
        self,
        pool: Pool,
        args: ContinualArguments,
        checkpoints: Checkpoints,
        watch: Watch,
        number: int,
        saved: dict[str, Any] | None,
        before: Callable[[], None],
    ) -> None:
        self.pool, self.args, self.checkpoints, self.watch, self.number = pool, args, checkpoints, watch, number
        self.before, self._saved = before, saved
        state: dict[str, Any] = {} if saved is None else saved["state"]
        self.folder: str | None = None if saved is None else saved["folder"]
        self.measured: dict[str, float] = state.get("measured", {})  # by finished stages of the task
        self._each: list[dict[str, Any]] = state.get("each", [])  # of every process
        self._begin = time.perf_counter() - state.get("seconds", 0.0)
        self._last = time.perf_counter()
        if saved is not None:
            self._load_block(state["block"])
            pool.restore(state["kept"])

    def _load_block(self, block: dict[str, Tensor]) -> None:
        found = dict(self.pool.named_parameters())
        # in the same order, too: an optimizer's state goes by it
        if [(n, p.shape) for n, p in found.items()] != [(n, t.shape) for n, t in block.items()]:
            raise DamagedError(f"{self.folder} holds another block than this task's; remove that folder to begin anew")
        with torch.no_grad():
            for name, parameter in found.items():
                parameter.copy_(block[name])

    @property
    def seconds(self) -> float:
        """Spent on the task, in this process and those before it."""
        return time.perf_counter() - self._begin

    def saved(self, stage: str) -> dict[str, Any] | None:
        """What ``stage`` gave to ``save``, with its ``step``; None if that was another stage, or nothing."""
        if self._saved is None or self._saved["stage"] != stage:
            return None
        return {**self._saved["state"]["stage"], "step": self._saved["step"]}

    def due(self, step: int) -> int:
        """After a step: GO_ON, SAVE or STOP, the same on every process."""
        every, minutes = self.args.save_steps, self.args.save_minutes
        save = (every and step % every == 0) or (minutes and time.perf_counter() - self._last >= 60 * minutes)
        return distributed.highest(STOP if self.watch.requested else SAVE if save else GO_ON)

    def save(self, stage: str, step: int, state: dict[str, Any], own: Any = None, files: Any = None) -> None:
        """``state`` is every process's; ``own`` and the random state are this one's."""
        each = distributed.gather({"random": random_state(), "own": own})
        whole = {
            "block": {name: parameter.detach() for name, parameter in self.pool.named_parameters()},
            "kept": self.pool.kept(),
            "stage": state,
            "each": each,
            "measured": self.measured,
            "seconds": self.seconds,
        }

        def write() -> None:
            self.before()
            self.checkpoints.write(self.number, stage, step, whole, files or {})

        distributed.on_main(write)
        self._last = time.perf_counter()

    def own(self) -> list[Any]:
        """What every process gave as its own."""
        return [each["own"] for each in self._each]

    def restore_random_state(self) -> None:
        """On another number of processes than before, random numbers cannot go on as they would have."""
        if len(self._each) == distributed.count():
            set_random_state(self._each[distributed.rank()]["random"])

    def step(self, stage: str, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Saves where it is due, and raises RunStopped where a signal came."""
        action = self.due(step)
        if action != GO_ON:
            self.save(stage, step, state())
        if action == STOP:
            self.watch.check()


def random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch, on the CPU and on the GPU at hand."""
    numpy: Any = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON can hold it: its tensors go to ``tensors``, tuples become lists."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        # an optimizer counts its parameters: keys that are no text stay what they are
        return {_ITEMS: [[key, pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return [pack(entry, tensors) for entry in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be saved: {value!r}")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: unpack(entry, tensors) for key, entry in value[_ITEMS]}
    return [unpack(entry, tensors) for entry in value] if isinstance(value, list) else value
