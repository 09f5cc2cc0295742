"""Files and folders that appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then puts it in the place of ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        _to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path, names: Collection[str], what: str) -> None:
    """Raises FileExistsError if ``path`` is a file, or a folder that holds anything else than ``names``."""
    if not path.exists():
        return
    strangers = [path.name] if not path.is_dir() else sorted(p.name for p in path.iterdir() if p.name not in names)
    if strangers:
        raise FileExistsError(
            f"{path} holds something else than {what}: {', '.join(strangers[:3])}; give an empty or a new folder"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of ``path`` at the end of the block.

    If the block fails, nothing of it stays and what stood at ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                _to_disk(file)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
