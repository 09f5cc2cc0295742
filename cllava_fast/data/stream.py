"""What is learned: samples, tasks and the stream that orders them."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from cllava_fast.data.images import StoredImage
from cllava_fast.data.pixels import read_rgb, read_size
from cllava_fast.names import brief

ImageSource = str | Path | Image.Image | StoredImage
SPLITS = ("train", "test", "validation")
MAX_CHARACTERS = 1 << 18  # of all texts of a sample together: more than any model reads
MAX_TURNS = 1000


@dataclass(frozen=True)
class Sample:
    """One instruction about at most one image, and the answer that is wanted.

    Args:
        image: a path, a PIL image, a row of a data set, or None for a text-only sample. Samples that share one image
            should share the same object (or path): features of the frozen vision tower are computed once per image.
        history: earlier turns of the conversation, (user, assistant) texts; the instruction is its last user turn.
        references: all answers that evaluation accepts, one for each annotator, say; ``(answer,)`` where empty.
        system: a system turn before the conversation, for chat templates that have one.
    """

    instruction: str
    answer: str
    image: ImageSource | None = None
    id: str = ""
    history: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = ()
    system: str = ""

    def open_image(self) -> Image.Image | None:
        """The image in RGB, or None; see ``pixels.read_rgb``.

        Raises FileNotFoundError, or ``pixels.ImageError`` (an OSError) for a file that is no image.
        """
        return None if self.image is None else read_rgb(*_source(self.image))

    def image_size(self) -> tuple[int, int] | None:
        """Width and height of ``open_image()``, by the file's header alone; None without an image."""
        return None if self.image is None else read_size(*_source(self.image))


def _source(image: ImageSource) -> tuple[Any, str]:
    """What to read, and what errors call it."""
    if isinstance(image, Image.Image):
        return image, "in memory"
    return (image.open() if isinstance(image, StoredImage) else image), str(image)


@dataclass(frozen=True)
class Task:
    """One step of the stream. ``validation`` is what hyperparameters are chosen on; ``test`` is only ever measured.

    ``metric`` is the name of a function of ``cllava_fast.evaluate.scores.SCORES``.
    """

    name: str
    train: Sequence[Sample]
    test: Sequence[Sample]
    validation: Sequence[Sample] = ()
    metric: str = "exact_match"


class Stream:
    """Tasks in the order in which they are learned, checked at once so that no run fails halfway.

    The check visits every sample once and keeps none; what ``read_samples`` reads from a large file was checked there.

    Raises:
        TypeError: what is no ``Task``, no ``Sample`` or no image stands in place of one.
        ValueError: no task, a name that is no text, two tasks of one name, a task without training or test samples, a
            sample without an instruction or an answer.
        FileNotFoundError: a sample names an image that does not exist.
    """

    def __init__(self, tasks: Sequence[Task], name: str = "stream") -> None:
        self.name = name
        self.tasks = list(tasks)
        self._check()

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def _check(self) -> None:
        if not self.tasks:
            raise ValueError(f"stream {self.name!r} has no task; give at least one Task")
        seen: set[str] = set()
        for number, task in enumerate(self.tasks):
            if not isinstance(task, Task):
                raise TypeError(
                    f"stream {self.name!r}: tasks[{number}] is a {type(task).__name__}; expected a cllava_fast.Task "
                    "(cllava_fast.load_stream reads mappings)"
                )
            check_name(task.name, f"stream {self.name!r}: tasks[{number}].name")
            if task.name in seen:
                raise ValueError(f"stream {self.name!r} names task {task.name!r} twice; give every task its own name")
            seen.add(task.name)
            for split in SPLITS:
                samples = getattr(task, split)
                if not hasattr(samples, "__len__"):
                    raise TypeError(
                        f"task {task.name!r}: {split} is a {type(samples).__name__}; expected a sequence of Samples, "
                        "such as a list"
                    )
                if len(samples) == 0 and split != "validation":
                    raise ValueError(f"task {task.name!r} has no {split} sample; every task needs at least one")
                if getattr(samples, "checked", False):
                    continue
                for position, sample in enumerate(samples):
                    check_sample(sample, f"{task.name}/{split}[{position}]")


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over the samples in order: texts, and pixels of images, or of files their names and sizes in bytes, and
    how the files of a thousand samples begin. Not their folders: data may be moved."""
    digest = hashlib.sha256()
    every = -(-len(samples) // 1000)
    for position, sample in enumerate(samples):
        image: object = sample.image
        if isinstance(image, Image.Image):
            image = [image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()]
        elif isinstance(image, str | Path):
            path = Path(image)
            try:
                image = [path.name, path.stat().st_size]
                if position % every == 0:
                    with path.open("rb") as file:
                        digest.update(file.read(1 << 16))
            except OSError:
                image = [path.name, None]  # gone: whoever opens it says so
        texts = [sample.system, sample.instruction, sample.answer, *sample.history, *sample.references]
        digest.update(json.dumps([texts, str(image)]).encode())
    return digest.hexdigest()


def check_name(name: Any, what: str) -> None:
    """Raises ValueError for a task's name that no file could hold or table show. ``what`` is what errors call it."""
    is_text = isinstance(name, str) and name and name == name.strip() and _is_unicode(name)
    if not is_text or any(unicodedata.category(character) == "Cc" for character in name):
        raise ValueError(
            f"{what} is {brief(name)}; expected a text in UTF-8 that is not blank, without control characters such as "
            "line ends, and without blanks at its ends"
        )


def check_sample(sample: Sample, where: str, needs_answer: bool = True) -> None:
    """Raises ValueError for texts that are blank or none, FileNotFoundError for a path without an image, TypeError for
    what is no sample or no image. What is only asked needs no answer."""
    if not isinstance(sample, Sample):
        raise TypeError(
            f"{where} is a {type(sample).__name__}; expected a cllava_fast.Sample (cllava_fast.read_samples makes them "
            "of records)"
        )
    if not isinstance(sample.image, ImageSource | None):
        raise TypeError(f"{where}: image is a {type(sample.image).__name__}; expected one path, one PIL image, or None")
    check_texts(sample if needs_answer or sample.answer != "" else replace(sample, answer="-"), where)
    if isinstance(sample.image, (str, Path)) and not os.path.isfile(sample.image):
        raise FileNotFoundError(
            f"{where}: image {str(sample.image)!r} does not exist or is no file; check the path or the image folder"
        )


def check_texts(sample: Sample, where: str) -> None:
    """Raises ValueError for a text that is blank or none, that UTF-8 or a C string cannot hold, or for too many, and
    TypeError where no tuple stands in place of one."""
    history = sample.history
    if not isinstance(history, (tuple, list)) or not all(_is_pair(turn) for turn in history):
        raise TypeError(f"{where}: history is {brief(history)}; expected pairs of texts, (user, assistant)")
    if len(history) >= MAX_TURNS:
        raise ValueError(f"{where}: the conversation has {len(history) + 1} turns; expected {MAX_TURNS} at most")
    if not isinstance(sample.references, (tuple, list)):
        raise TypeError(f"{where}: references is {brief(sample.references)}; expected a tuple of texts")
    if not isinstance(sample.system, str):
        raise ValueError(f"{where}: system is {brief(sample.system)}; expected a text")
    turns = [text for turn in history for text in turn]
    named = [("instruction", sample.instruction), ("answer", sample.answer), *(("history", text) for text in turns)]
    for field, value in [*named, *(("references", text) for text in sample.references)]:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {field} is {brief(value)}; expected a text that is not blank")
    texts = [value for _, value in named] + [*sample.references, sample.system]
    for value in texts:
        if "\0" in value or not _is_unicode(value):
            raise ValueError(f"{where}: {brief(value)} holds a NUL or half a surrogate pair; expected a text in UTF-8")
    size = sum(map(len, texts))
    if size > MAX_CHARACTERS:
        raise ValueError(f"{where}: its texts have {size} characters; expected {MAX_CHARACTERS} at most")


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, (tuple, list)) and len(turn) == 2


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
