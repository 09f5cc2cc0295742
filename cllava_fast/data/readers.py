"""Reads samples from where they are: LLaVA's JSON and JSON Lines, question files, data sets, folders of images."""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllava_fast.data.images import ImageFolder, StoredImage
from cllava_fast.data.lazy import LazySequence
from cllava_fast.data.pixels import FORMATS, is_image
from cllava_fast.data.records import COLUMNS, RecordReader
from cllava_fast.data.stream import Sample, check_texts
from cllava_fast.environment import require
from cllava_fast.names import brief
from cllava_fast.untrusted import open_regular, parse_json, read_file

# files that need no look into them to be known as images
PICTURES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SHOWN = 5  # of many faults of one kind
MAX_JSON_BYTES, MAX_LINE_BYTES = 4 << 30, 16 << 20  # of a .json, which is read whole, and of a record of a .jsonl


def read_samples(
    source: Any,
    images: str | Path | None = None,
    prompt: str | None = None,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Sequence[Sample]:
    """Samples of one file, folder, data set or list; every record is checked before anything is returned.

    Args:
        source: a path of ``.json`` or ``.jsonl`` (LLaVA conversations, or objects with a question and an answer), of
            ``.parquet``, of a folder that ``datasets`` wrote or that holds parquet files, or of a folder with one
            folder of images for each answer; or a ``datasets.Dataset``; or a list of records and ``Sample``.
        images: the folder that image paths start from and may not leave; by default the file's own.
        prompt: what is asked, with ``{question}`` where the record's own question stands. Of a folder of images it is
            the question itself.
        split: which one, where a folder holds several.
        columns: our names to the source's own, ``{"question": "query"}``.

    Returns:
        A list, or for JSON Lines and data sets a sequence that reads a record when it is asked for.

    Raises:
        ValueError: a record that is in none of the known forms, or an image path that leaves its folder; the message
            names file and record.
        FileNotFoundError, NotADirectoryError: the source, its image folder, or images are missing.
        ModuleNotFoundError: ``datasets`` is needed and not installed.
    """
    columns = {} if columns is None else columns
    if not isinstance(source, (str, Path)):
        return _from_memory(source, images, prompt, columns)
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; expected a file or folder of samples")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device; expected a file or folder of samples")
    if is_image_folder(path):
        for name, value in (("images", images), ("columns", columns or None), ("split", split)):
            if value is not None:
                raise ValueError(f"{path} is a folder of images, which takes no {name}; expected a prompt alone")
        return _from_image_folder(path, prompt)
    if path.is_dir() or path.suffix == ".parquet":
        return _Rows(_open_dataset(path, split), _reader(str(path), images, prompt, columns))
    if split is not None:
        raise ValueError(f"{path} has no splits; split is {split!r}, expected None")
    reader = _reader(str(path), path.parent if images is None else images, prompt, columns)
    if path.suffix == ".jsonl":
        return JsonLines(path, reader)
    if path.suffix == ".json":
        return _from_json(path, reader)
    raise ValueError(f"{path}: expected .json, .jsonl, .parquet or a folder; got {path.suffix or 'no suffix'}")


def _reader(name: str, images: str | Path | None, prompt: str | None, columns: Mapping[str, str]) -> RecordReader:
    return RecordReader(name, None if images is None else ImageFolder(images), prompt, columns)


class _LazySamples(LazySequence[Sample]):
    """Reads a sample each time it is asked for. All were checked when it was made."""

    checked = True


class JsonLines(_LazySamples):
    """Records of a JSON Lines file, found by where their lines start: eight bytes of memory a record."""

    def __init__(self, path: Path, reader: RecordReader) -> None:
        self.path, self.reader = path, reader
        self._starts = array("q")
        _exhaust(_checked(self._index(), reader))

    def __len__(self) -> int:
        return len(self._starts)

    def _index(self) -> Iterator[tuple[Sample, str]]:
        start = number = 0
        with open_regular(self.path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(
                        f"{self.reader.source}: line {number} has more than {MAX_LINE_BYTES} bytes; expected one record"
                    )
                if number == 1 and line.lstrip(b" \t\xef\xbb\xbf").startswith(b"["):
                    raise ValueError(
                        f"{self.reader.source} begins with a list; expected one record a line (a file of a list of "
                        "records is called .json)"
                    )
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    self._starts.append(start)
                    place = f"line {number}"
                    yield self.reader.sample(parse_json(line, f"{self.reader.source}: {place}"), place), place
                start += len(line)

    def at(self, index: int) -> Sample:
        # opened anew: a process that was forked shares the position of an open file
        with open_regular(self.path) as file:
            file.seek(self._starts[index])
            place = f"record {index}"
            return self.reader.sample(
                parse_json(file.readline(MAX_LINE_BYTES), f"{self.reader.source}: {place}"), place
            )


def _from_json(path: Path, reader: RecordReader) -> list[Sample]:
    data = read_file(path, MAX_JSON_BYTES)
    if not data.strip():
        raise ValueError(
            f"{reader.source} is no JSON in UTF-8: it is empty; expected a list of records, [{{...}}, ...]"
        )
    try:
        records = parse_json(data, reader.source)
    except ValueError as error:
        hint = "; a file of one record a line is called .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{error}{hint}") from None
    if not isinstance(records, list):
        raise ValueError(f"{reader.source} holds {brief(records)}; expected a list of records")
    pairs = ((reader.sample(record, f"record {i}"), f"record {i}") for i, record in enumerate(records))
    return list(_checked(pairs, reader))


def _from_memory(source: Any, images: Any, prompt: str | None, columns: Mapping[str, str]) -> Sequence[Sample]:
    if type(source).__module__.partition(".")[0] == "datasets":
        return _Rows(source, _reader("dataset", images, prompt, columns))
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TypeError(f"the source is a {type(source).__name__}; expected a path, a Dataset or a list of records")
    reader = _reader("samples", images, prompt, columns)

    def sample(entry: Any, place: str) -> Sample:
        if not isinstance(entry, Sample):
            return reader.sample(entry, place)
        check_texts(entry, f"samples: {place}")
        return entry

    return list(_checked(((sample(entry, f"record {i}"), f"record {i}") for i, entry in enumerate(source)), reader))


def _from_image_folder(folder: Path, prompt: str | None) -> list[Sample]:
    """One folder of images for each answer."""
    if prompt is None or "{question}" in prompt:
        raise ValueError(
            f"{folder}: prompt is {prompt!r}; a folder of images needs the question itself, such as "
            "'What is the object in the image?' (its answers are the names of its folders)"
        )
    reader = RecordReader(str(folder), ImageFolder(folder))
    assert reader.images is not None
    pairs: list[tuple[Sample, str]] = []
    skipped = _Faults()
    folders, loose = _entries(folder)
    for answer in folders:
        inner, files = _entries(folder / answer)
        if inner:
            raise ValueError(
                f"{folder / answer} holds the folder {brief(inner[0])}; expected one folder for each answer, and in it "
                "images alone"
            )
        before = len(pairs)
        for name in files:
            place = f"{answer}/{name}"
            image = reader.images.path(place, f"{folder}: {place}")
            if _is_picture(image):
                pairs.append((Sample(prompt, answer, image, id=place), place))
            else:
                skipped.add(place)
        if len(pairs) == before:
            raise ValueError(f"{folder / answer} has no image; expected files of {', '.join(FORMATS)}")
    if not pairs:
        raise ValueError(f"{folder} holds no parquet file, no saved Dataset, and no folder of images for each answer")
    for name in loose:
        if _is_picture(reader.images.path(name, str(folder))):
            raise ValueError(
                f"{folder} holds the image {brief(name)} beside the folders; put it into its answer's folder"
            )
    if skipped.count:
        warnings.warn(f"{folder}: {skipped.count} files are no images and left out ({skipped})", stacklevel=3)
    return list(_checked(pairs, reader))


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the other files in a folder, without hidden ones."""
    with os.scandir(folder) as entries:
        shown = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    return [name for name, is_folder in shown if is_folder], [name for name, is_folder in shown if not is_folder]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES or is_image(path)


class _Rows(_LazySamples):
    """Rows of a ``datasets.Dataset``, which lies on the disk; images are decoded when they are opened."""

    def __init__(self, dataset: Any, reader: RecordReader) -> None:
        datasets = require("datasets", f"{reader.source}: reading a data set of Hugging Face")
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(
                f"{reader.source} is a {type(dataset).__name__}; expected a datasets.Dataset, one split that is not "
                "streamed"
            )
        if dataset.format["type"] == "custom":
            raise ValueError(
                f"{reader.source} has a transform (set_transform), which is not applied; expected a data set without, "
                "such as map() makes"
            )
        features = dataset.features
        self.reader = reader
        read = {reader.columns.get(name, name) for name in COLUMNS}
        labels = {name: _inside(feature) for name, feature in features.items() if name in read}
        self._labels = {name: f for name, f in labels.items() if isinstance(f, datasets.ClassLabel)}
        self._pictures = [name for name, f in features.items() if isinstance(_inside(f), datasets.Image)]
        reader.check_columns(dataset.column_names)
        if self._pictures and reader.columns.get("image", "image") not in dataset.column_names:
            name = self._pictures[0]
            raise ValueError(
                f"{reader.source}: the images of column {name!r} are not read; read them by "
                f"columns={{'image': {name!r}}}, or remove the column"
            )
        dataset = dataset.with_format("arrow")  # which decodes nothing
        # columns with an image in every row need no look at the row
        self._whole = [name for name in self._pictures if _has_all_bytes(dataset, name)]
        self._images, self._rest = dataset, dataset.remove_columns(self._whole)
        _exhaust(_checked(((self.at(i), f"record {i}") for i in range(len(self))), reader))

    def __len__(self) -> int:
        return len(self._images)

    def at(self, index: int) -> Sample:
        record = self._rest[index].to_pylist()[0] if self._rest.column_names else {}
        for name in self._pictures:
            if name in self._whole:
                record[name] = StoredImage(self._images, index, name)
                continue
            image = record[name]
            if isinstance(image, list) and len(image) == 1:
                (image,) = image
            if isinstance(image, dict):
                image = image["path"] if image["bytes"] is None else StoredImage(self._images, index, name)
            record[name] = image
        place = f"record {index}"
        for name, label in self._labels.items():
            if record[name] is not None:
                try:
                    record[name] = label.int2str(record[name])
                except ValueError:
                    raise ValueError(
                        f"{self.reader.source}: {place}: {name} is {brief(record[name])}; expected class labels from 0 "
                        f"to {label.num_classes - 1} (-1 stands for none: filter such rows out)"
                    ) from None
        return self.reader.sample(record, place)


def _inside(feature: Any) -> Any:
    """What a list's entries are; any other feature itself."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)


def _has_all_bytes(dataset: Any, column: str) -> bool:
    for chunk in dataset.data.column(column).chunks:
        if not hasattr(chunk, "field"):  # lists
            if chunk.null_count or chunk.value_lengths().unique().to_pylist() != [1]:
                return False
            chunk = chunk.flatten()
        if chunk.null_count or chunk.field("bytes").null_count:
            return False
    return True


def _parquet_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])


def is_image_folder(path: Path) -> bool:
    """Whether it is a folder, and none that ``datasets`` wrote."""
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    return path.is_dir() and not saved and not _parquet_files(path)


def _open_dataset(path: Path, split: str | None) -> Any:
    datasets = require("datasets", f"{path}: reading a data set of Hugging Face")
    if (path / "dataset_dict.json").is_file():
        index = path / "dataset_dict.json"
        content = parse_json(read_file(index, MAX_LINE_BYTES), str(index))
        known = content.get("splits") if isinstance(content, dict) else None
        if not isinstance(known, list) or not all(isinstance(name, str) for name in known):
            raise ValueError(f"{index} is {brief(content)}; expected an object with a list of 'splits'")
        if split is None or split not in known or Path(split).name != split:
            raise ValueError(f"{path}: split is {split!r}; expected one of {', '.join(known)}")
        return _with_its_name(path / split, datasets.load_from_disk)
    if path.is_file() or (path / "dataset_info.json").is_file():
        if split is not None:
            raise ValueError(f"{path} has no splits; split is {split!r}, expected None")
        return _with_its_name(path, datasets.Dataset.from_parquet if path.is_file() else datasets.load_from_disk)
    by_split: dict[str, list[str]] = {}
    for file in _parquet_files(path):  # named as the hub does: train-00000-of-00002.parquet
        by_split.setdefault(file.stem.partition("-")[0], []).append(str(file))
    if split is None and len(by_split) == 1:
        (split,) = by_split
    if split not in by_split:
        raise ValueError(f"{path}: split is {split!r}; expected one of {', '.join(by_split)}")
    return _with_its_name(path, lambda _: datasets.Dataset.from_parquet(by_split[split]))


def _with_its_name(path: Path, load: Callable[[str], Any]) -> Any:
    """What ``load`` makes of a path; whatever it raises for damaged files says which one."""
    try:
        return load(str(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a data set: {str(error) or type(error).__name__}") from error


def _checked(pairs: Iterable[tuple[Sample, str]], reader: RecordReader) -> Iterator[Sample]:
    """The samples of ``(sample, place)``; what is missing or repeated is counted, and said when all have passed."""
    missing, repeated, seen = _Faults(), _Faults(), set[int]()
    total = 0
    for sample, place in pairs:
        total += 1
        if isinstance(sample.image, (str, Path)) and not os.path.isfile(sample.image):
            missing.add(f"{place}: {str(sample.image)[:200]!r}")
        if sample.id:
            code = hash(sample.id)
            if code in seen:
                repeated.add(brief(sample.id))
            seen.add(code)
        yield sample
    if total:
        reader.check_columns()
    if missing.count:
        folder = f" in {reader.images.root}" if reader.images else ""
        raise FileNotFoundError(
            f"{reader.source}: {missing.count} of {total} samples name an image that is not there{folder} ({missing}); "
            "check the image folder"
        )
    if repeated.count:
        # not refused: LLaVA's own files name all conversations about one image by the image
        warnings.warn(f"{reader.source}: {repeated.count} ids come more than once ({repeated})", stacklevel=4)


def _exhaust(samples: Iterable[Sample]) -> None:
    for _ in samples:
        pass


@dataclass
class _Faults:
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(text)

    def __str__(self) -> str:
        return ", ".join(self.first) + (", ..." if self.count > SHOWN else "")
