"""Where images come from: a folder that records cannot leave, or a row of a data set."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image


class ImageFolder:
    """Gives records the images of one folder and nothing else: what they name may come from anywhere.

    Raises:
        NotADirectoryError: there is no such folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise NotADirectoryError(f"the image folder {str(root)!r} does not exist; check images")
        self._real = os.path.realpath(self.root)
        self._inside: dict[Path, bool] = {}

    def path(self, name: object, where: str) -> Path:
        """The path of an image, which need not exist.

        Raises:
            ValueError: a name that is no relative path, or leads out of the folder, by ``..`` or by a symbolic link.
        """
        if not isinstance(name, (str, Path)) or not str(name) or "\0" in str(name):
            raise ValueError(f"{where}: image is {name!r}; expected a path inside the image folder {self.root}")
        both = PurePosixPath(name), PureWindowsPath(name)
        if any(path.anchor for path in both) or any(".." in path.parts for path in both):
            raise ValueError(
                f"{where}: image is {str(name)!r}; expected a path inside the image folder {self.root}, without '..' "
                "and not absolute"
            )
        path = self.root / name
        if not self._is_inside(path.parent) or (path.is_symlink() and not self._reaches_inside(path)):
            raise ValueError(
                f"{where}: image {str(name)!r} is a symbolic link out of the image folder {self.root}; "
                "give the folder that holds the images themselves as images"
            )
        return path

    def _is_inside(self, folder: Path) -> bool:
        if folder not in self._inside:
            self._inside[folder] = self._reaches_inside(folder)
        return self._inside[folder]

    def _reaches_inside(self, path: Path) -> bool:
        real = os.path.realpath(path)
        return real == self._real or real.startswith(os.path.join(self._real, ""))


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image in a row of a Hugging Face data set, decoded each time it is opened.

    Args:
        dataset: with the column as ``datasets.Image(decode=False)``.
    """

    dataset: Any
    row: int
    column: str

    def __str__(self) -> str:
        # what identifies the pixels without reading them
        return f"dataset {self.dataset._fingerprint}, row {self.row}, {self.column}"

    @contextmanager
    def open(self) -> Iterator[Image.Image]:
        with Image.open(io.BytesIO(self.dataset[self.row][self.column]["bytes"])) as image:
            yield image
