"""``run.json``: what makes a run that run, and how far it has come. The one before stays beside it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cllava_fast.atomic import PARTIAL, DamagedError, MissingError, make_folder, read_json, save_errors, write_json
from cllava_fast.config import CONFIG
from cllava_fast.methods import METHODS
from cllava_fast.model.processors import differing
from cllava_fast.names import brief
from cllava_fast.train.checkpoint import FOLDER, Checkpoints
from cllava_fast.train.lock import LOCK, check_free

RUN, PREVIOUS = "run.json", "run.previous.json"


class RunFile:
    """``run.json`` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.path, self.previous = folder / RUN, folder / PREVIOUS
        self.last: str | None = None  # what was read or written last, as JSON

    def read(self) -> dict[str, Any] | None:
        """What it says; what the one before says, with a warning, if it is damaged. None if there is neither.

        Raises:
            DamagedError: there is nothing that can be read.
        """
        found, trouble = None, ""
        for path in (self.path, self.previous):
            try:
                found = read_json(path)
                break
            except (MissingError, DamagedError) as error:
                trouble = str(error) if path == self.path else f"{trouble}, and {error}"
        if found is None:
            if not self.path.exists() and not self.previous.exists():
                return None
            raise DamagedError(
                f"{trouble}; the increments in {self.path.parent / 'increments'} stay usable, "
                "but the run cannot go on: give a new output_dir"
            )
        if trouble:
            warnings.warn(f"{trouble}; going on from {self.previous.name}, saved before it", stacklevel=3)
        self.last = json.dumps(found)
        return found

    def write(self, values: dict[str, Any], keep: bool = True) -> None:
        """``keep``: what it said stays as the one before."""
        with save_errors(self.path):
            make_folder(self.path.parent)
        if keep and self.last is not None:
            write_json(self.previous, json.loads(self.last))
        write_json(self.path, values)
        self.last = json.dumps(values)


def _finished_part(values: dict[str, Any], learned: int, measured: int) -> dict[str, Any]:
    """``values``, with what they say of the first ``learned`` tasks, and of ``measured`` tasks' splits, alone."""

    def done(of_tasks: Iterable[list[Any]]) -> list[list[Any]]:
        return [[train, other if i < measured else None] for i, (train, other) in enumerate(of_tasks)][:learned]

    return {
        **values,
        "stream": dict(zip(values["stream"], done(values["stream"].values()), strict=False)),
        "metrics": dict([*values["metrics"].items()][:measured]),
        "stream_sha256": done(values["stream_sha256"]),
    }


def _differences(found: dict[str, Any], identity: dict[str, Any], half: bool) -> list[str]:
    """What the run in the folder has in place of what is asked for, in words.

    ``half``: a part of a task is learned, too. Tasks still to come may be others, unless all are learned at once.
    """
    if not METHODS[identity["method"]["method"]][1].joint:
        learned = len(found["losses"]) + half
        found, identity = (_finished_part(values, learned, len(found["matrix"])) for values in (found, identity))
    before, now, words = list(found["stream"]), list(identity["stream"]), []
    other = [name for name in identity if found.get(name) != identity[name] and name != "image_settings"]
    images = differing(found.get("image_settings"), identity.get("image_settings"))  # earlier versions' runs have none
    for name, (theirs, ours) in list(images.items())[:1]:
        words.append(f"image_settings: {name} {brief(theirs)}, not {brief(ours)}")
    if before != now:
        words.append(f"tasks {brief(before)}, not {brief(now)}")
        other = [name for name in other if name not in ("metrics", "stream_sha256")]
    for name in other:
        theirs, ours = found.get(name), identity[name]
        if name == "stream_sha256":
            changed = [task for task, *each in zip(before, found[name], ours, strict=True) if each[0] != each[1]]
            words.append(f"other samples of task {brief(changed)}")
        elif name == "stream":
            continue  # numbers of samples: those tasks' samples are others, too
        elif name in ("method", "arguments", "metrics") and isinstance(theirs, dict):
            key = next(key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key))
            words.append(f"{name}: {key} {brief(theirs.get(key))}, not {brief(ours.get(key))}")
        else:
            words.append(f"another {name}")
    return words


def find_run(output_dir: Path, identity: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """What ``run.json`` says of the run; None where it has not begun yet. Of its stream, what has been learned and
    measured is the same.

    Raises:
        FileExistsError: ``output_dir`` is a file or holds another run or other files, or this one and ``resume`` is
            off.
        DamagedError: see ``RunFile``.
        InUseError: another process runs in it.
    """
    check_free(output_dir)
    if not output_dir.exists():
        return None
    if not output_dir.is_dir():
        raise FileExistsError(f"{output_dir} is a file; give a new output_dir (--output)")
    ours = (CONFIG, LOCK)
    if all(file.name in ours or PARTIAL in file.name for file in output_dir.iterdir()):
        return None
    found = RunFile(output_dir).read()
    if found is None:
        raise FileExistsError(f"{output_dir} holds other files than a run's; give a new output_dir")
    identity, do = json.loads(json.dumps(identity)), ""
    try:
        done = len((found.get("learned_before") or {"tasks": ()})["tasks"]) + len(found["losses"])
        half = any(int(name.partition("-")[0]) > done for name in Checkpoints(output_dir).names())
        other = _differences(found, identity, half)
        if other and half and not _differences(found, identity, False):
            do = f"; without the folder {output_dir / FOLDER}, what is half learned begins anew"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileExistsError(
            f"{output_dir} holds a run of another version of cllava_fast; give a new output_dir (--output)"
        ) from error
    if other:
        raise FileExistsError(
            f"{output_dir} holds another run, with {', '.join(other)}; give what it was started with, or a new "
            f"output_dir (--output){do}"
        )
    if not resume:
        raise FileExistsError(
            f"{output_dir} holds this run already; set resume (--resume) to go on, or a new output_dir (--output)"
        )
    return found
