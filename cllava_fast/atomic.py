"""Files and folders that appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # in the name of what is being written; a process that was killed leaves it behind
MAX_NAME_BYTES = 230  # of what is to be written; a file system takes 255, with what PARTIAL adds
CHECKSUM = "sha256"  # of a JSON file: that of all its other entries
CANNOT_WRITE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
)  # fmt: skip


class SaveError(OSError):
    """The disk is full, or the folder cannot be written. What was saved before is untouched."""

    exit_code = 3


class DamagedError(ValueError):
    """A file is not what was saved: cut off, or changed since."""

    exit_code = 4


class MissingError(FileNotFoundError):
    """A file that was saved is not there any more."""

    exit_code = 4


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, signed_json(values))


def signed_json(values: Mapping[str, Any]) -> str:
    """JSON that carries its own checksum, for ``read_json``."""
    return readable_json({**values, CHECKSUM: checksum(values)}) + "\n"


def readable_json(value: Any, *, allow_nan: bool = True, indent: str = "") -> str:
    """JSON with an entry on each line, but a list of plain values on one: ``json.dumps`` is fast without ``indent``."""
    dump = functools.partial(json.dumps, allow_nan=allow_nan)
    inner = indent + "  "
    within = functools.partial(readable_json, allow_nan=allow_nan, indent=inner)
    if isinstance(value, dict) and value:
        entries = {key if isinstance(key, str) else dump(key): entry for key, entry in value.items()}
        start, *lines, end = "{", *(f"{dump(key)}: {within(entry)}" for key, entry in entries.items()), "}"
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict | list | tuple):
        start, *lines, end = "[", *map(within, value), "]"
    else:
        return dump(value)
    return f"{start}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{end}"


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote.

    Raises:
        MissingError: there is no such file.
        DamagedError: it was cut off, or changed since it was written.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.pop(CHECKSUM)
    except FileNotFoundError as error:
        raise MissingError(f"{path} is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged (it is not whole)") from error
    if found != checksum(values):
        raise DamagedError(f"{path} is damaged (its checksum differs)")
    return values


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of what JSON makes of ``values``, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sums_of(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def check_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Raises DamagedError or MissingError unless the files of a folder are those that ``sums`` names."""
    for name, digest in sums.items():
        if not (folder / name).is_file():
            raise MissingError(f"{folder / name} is missing")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise DamagedError(f"{folder / name} is damaged (its checksum differs)")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then puts it in the place of ``path``.

    Raises:
        SaveError: there is no space or no permission.
    """
    temporary = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
    with save_errors(path):
        try:
            write(temporary)
            _to_disk(temporary)
            os.replace(temporary, path)
            _to_disk(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def check_replaceable(path: Path, names: Collection[str], what: str) -> None:
    """Raises FileExistsError if ``path`` is a file, or a folder that holds anything else than ``names``, and SaveError
    where it cannot be made."""
    check_writable(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file; give an empty or a new folder")
    strangers = sorted(p.name for p in path.iterdir() if p.name not in names)
    if strangers:
        raise FileExistsError(
            f"{path} holds something else than {what}: {', '.join(strangers[:3])}; give an empty or a new folder"
        )


def check_writable(path: Path) -> None:
    """Raises SaveError where nothing is at ``path`` and nothing can be made there."""
    if path.exists():
        return
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise SaveError(f"{path} cannot be written: {above} is no folder that can be written to; give another")


def is_empty(path: Path) -> bool:
    """Whether nothing is there, or a folder without anything in it."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def check_empty(path: Path) -> None:
    """Raises FileExistsError where ``is_empty`` does not hold, and SaveError where it cannot be made."""
    check_writable(path)
    if not is_empty(path):
        what = "is a file" if path.is_file() else "holds something already"
        raise FileExistsError(f"{path} {what}; give an empty or a new folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of ``path`` at the end of the block.

    If the block fails, nothing of it stays and what stood at ``path`` is untouched. A link stays one: the folder that
    it leads to is replaced.

    Raises:
        SaveError: there is no space or no permission.
        ValueError: ``path`` is the current directory, which would be lost to who stands in it.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and path.samefile(os.curdir):
        raise ValueError(f"{path} is the current directory, which cannot be replaced; give a folder within it")
    with save_errors(path):
        make_folder(path.parent)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}{PARTIAL}", dir=path.parent))
        new, old = work / "new", work / "old"
        try:
            new.mkdir()
            yield new
            for file in (*new.rglob("*"), new):
                _to_disk(file)
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except BaseException:
                if old.exists():
                    old.rename(path)
                raise
            _to_disk(path.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, for good."""
    if not path.is_dir():
        make_folder(path.parent)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
        _to_disk(path.parent)


def remove_folder(path: Path) -> None:
    """Takes a folder away at once; its files follow."""
    gone = path.with_name(f".{path.name}{PARTIAL}gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed processes left half written in a folder that no other process writes to."""
    for left in folder.glob(f".*{PARTIAL}*"):
        # killed between the two renames of new_folder: what stood there comes back
        name = left.name[1:].rpartition(PARTIAL)[0]
        if (left / "old").is_dir() and not (folder / name).exists():
            (left / "old").rename(folder / name)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def save_errors(path: Path) -> Iterator[None]:
    """Turns the system's word for a full disk or a missing permission into a sentence about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE or not _concerns(error, path):
            raise
        raise SaveError(f"{path} cannot be written: {error.strerror}; what was saved before is untouched") from error


def _concerns(error: OSError, path: Path) -> bool:
    """Whether it is about a file beside ``path``, or a folder above it, and not about one that is only read."""
    if not isinstance(error.filename, str | os.PathLike):
        return True  # of an open file: there is no space
    file, target = (Path(os.path.abspath(p)) for p in (error.filename, path))
    return file.is_relative_to(target.parent) or target.is_relative_to(file)


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # no such call there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
