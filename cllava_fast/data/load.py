"""Streams from YAML: the user's own file, a mapping, or one that ships with the package."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cllava_fast.data.readers import is_image_folder, read_samples
from cllava_fast.data.records import COLUMNS
from cllava_fast.data.stream import SPLITS, Sample, Stream, Task, check_name
from cllava_fast.evaluate.scores import find_metric
from cllava_fast.names import brief, check_names, nearest
from cllava_fast.untrusted import read_yaml

READY = Path(__file__).resolve().parent / "ready"
STREAM_KEYS = ("name", "images", "tasks")
SECTIONS = ("model", "method", "training")  # of a file that describes a whole run; not the stream's business
TASK_KEYS = ("name", *SPLITS, "images", "metric", "prompt")
SOURCE_KEYS = ("path", "split", "columns")


def ready_streams() -> list[str]:
    """Names of the streams that ship with the package."""
    return sorted(path.stem for path in READY.glob("*.yaml"))


def load_stream(source: str | Path | Mapping[str, Any], base: str | Path | None = None) -> Stream:
    """A stream from YAML, checked whole before anything is read; see ``docs/data.md``. Warns of tasks whose train and
    test are one file.

    Args:
        source: the path of a stream's YAML, the mapping that such a file holds, or one of ``ready_streams()``.
        base: the folder that relative paths start from; by default what the YAML says (``base:``, as a run's own does),
            or its own folder, the current one for the others.

    Raises:
        ValueError: unknown keys (the nearest known one is named), values of a wrong kind, two tasks of one name, an
            unknown metric; and see ``read_samples``.
        FileNotFoundError: no such stream, or files and folders that are missing: all are named, with ``base``.
    """
    spec, title, home = _open(source)
    tasks = _tasks(spec, title)
    root = under(home, spec.get("base") or ".") if base is None else Path(os.path.expanduser(base))
    missing = list(dict.fromkeys(line for task in tasks for line in task.missing(root)))
    if missing:
        raise FileNotFoundError(
            f"{title}: {len(missing)} files or folders are missing; relative paths start from base={str(root)!r}\n  "
            + "\n  ".join(missing)
        )
    same = [task.name for task in tasks if task.place("train", root) == task.place("test", root)]
    if same:
        warnings.warn(
            f"{title}: train and test of {brief(same)} are one file, so that what is measured is what was learned; "
            "give questions that are not trained as test",
            stacklevel=2,
        )
    return Stream([task.read(root) for task in tasks], name=spec.get("name", "stream"))


@dataclass
class _Source:
    path: str
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class _TaskSpec:
    """A task of a YAML before anything is read."""

    name: str
    splits: dict[str, _Source]
    images: str | None
    metric: str
    prompt: str | None

    def missing(self, root: Path) -> list[str]:
        wanted = {f"{self.name}, {split}": source.path for split, source in self.splits.items()}
        lines = [f"{what}: {path}" for what, path in wanted.items() if not os.path.exists(under(root, path))]
        if self.images is not None and not os.path.isdir(under(root, self.images)):
            lines.append(f"image folder: {self.images}")
        return lines

    def place(self, split: str, root: Path) -> _Source:
        """Where the samples of ``split`` are read from."""
        source = self.splits[split]
        return replace(source, path=os.path.realpath(under(root, source.path)))

    def read(self, root: Path) -> Task:
        read = {split: self._samples(source, root) for split, source in self.splits.items()}
        for split in ("train", "test"):
            if not len(read[split]):
                path, what = under(root, self.splits[split].path), f"{split} sample of task {self.name!r}"
                raise ValueError(f"{path} is empty; expected at least one {what}")
        return Task(self.name, metric=self.metric, **read)

    def _samples(self, source: _Source, root: Path) -> Sequence[Sample]:
        path = under(root, source.path)
        # a folder of images is its own image folder
        images = None if self.images is None or is_image_folder(path) else under(root, self.images)
        return read_samples(path, images, self.prompt, split=source.split, columns=source.columns)


def under(root: Path, path: str) -> Path:
    """What a YAML means by a path: from ``root`` where it is relative, ``~`` is the home folder."""
    return root / os.path.expanduser(path)


def _open(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str, Path]:
    """What the source says, how errors call it, and where its relative paths start."""
    if isinstance(source, Mapping):
        return source, "stream", Path.cwd()
    if str(source) in ready_streams():
        path, home = READY / f"{source}.yaml", Path.cwd()
    else:
        path = Path(os.path.expanduser(source))
        home = path.parent
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"stream {brief(str(source))} is neither the path of a YAML nor a ready stream; "
                f"{nearest(str(source), ready_streams())}"
            )
    return read_yaml(path), str(path if path.parent != READY else source), home


def _tasks(spec: Any, title: str) -> list[_TaskSpec]:
    check_names(spec, (*STREAM_KEYS, *SECTIONS, "base"), f"{title}: ")
    for key in ("name", "images", "base"):
        _text(spec, key, title)
    listed = spec.get("tasks")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{title}: tasks is {brief(listed)}; expected a list of tasks, each with name, train and test")
    tasks: list[_TaskSpec] = []
    for number, entry in enumerate(listed):
        where = f"{title}: tasks[{number}]"
        check_names(entry, TASK_KEYS, f"{where}: ")
        for key in ("name", "train", "test"):
            if entry.get(key) is None:
                raise ValueError(f"{where} has no {key}; every task needs name, train and test")
        check_name(entry["name"], f"{where}: name")
        for key in ("images", "metric", "prompt"):
            _text(entry, key, where)
        if entry["name"] in (task.name for task in tasks):
            raise ValueError(f"{where}: the name {brief(entry['name'])} is taken; give every task its own")
        metric = entry.get("metric") or "exact_match"
        try:
            find_metric(metric)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        splits = {key: _source(entry[key], f"{where}: {key}") for key in SPLITS if entry.get(key) is not None}
        images = entry.get("images") or spec.get("images")
        tasks.append(_TaskSpec(entry["name"], splits, images, metric, entry.get("prompt")))
    return tasks


def _source(value: Any, where: str) -> _Source:
    if isinstance(value, Mapping):
        check_names(value, SOURCE_KEYS, f"{where}: ")
        for key in ("path", "split"):
            _text(value, key, where)
        if value.get("path") is None:
            raise ValueError(f"{where} has no path; expected path, and split or columns where they are needed")
        columns = value.get("columns") or {}
        check_names(columns, COLUMNS, f"{where}: columns.")
        for key in columns:
            _text(columns, key, f"{where}: columns")
        return _Source(value["path"], value.get("split"), dict(columns))
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} is {brief(value)}; expected a path, or a mapping with {', '.join(SOURCE_KEYS)}")
    return _Source(value)


def _text(mapping: Mapping[str, Any], key: str, where: str) -> None:
    value = mapping.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"{where}: {key} is {brief(value)}; expected a text")
