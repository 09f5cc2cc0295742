"""Where images come from: a folder that records cannot leave, or a row of a data set; ``pixels.py`` decodes them."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from cllava_fast.names import brief

MAX_PATH, MAX_NAME = 4096, 255  # bytes of a path and of one name in it, as Linux has them


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
            ValueError: a name that is no path or leads out of the folder: absolute, by ``..``, by a symbolic link.
        """
        if not isinstance(name, (str, Path)) or not _can_be_a_path(str(name)):
            raise ValueError(f"{where}: image is {brief(name)}; expected a path inside the image folder {self.root}")
        given, name = str(name), self._relative(str(name))
        both = PurePosixPath(name), PureWindowsPath(name)
        if any(".." in path.parts for path in both) or any(path.anchor for path in both):
            raise ValueError(
                f"{where}: image is {brief(given)}; expected a path inside the image folder {self.root}, without '..': "
                "where records name several folders, give the folder above them all as images"
            )
        path = self.root / name
        if path == self.root:
            raise ValueError(f"{where}: image is {brief(given)}, the image folder itself; expected a file in {path}")
        if not self._is_inside(path.parent) or (path.is_symlink() and not self._reaches_inside(path)):
            raise ValueError(
                f"{where}: image {brief(given)} is a symbolic link out of the image folder {self.root}; "
                "give the folder that holds the images themselves as images"
            )
        return path

    def _relative(self, name: str) -> str:
        """An absolute path inside the folder as one that is relative to it; any other name as it is."""
        for root in (os.path.abspath(self.root), self._real):
            if os.path.isabs(name) and name.startswith(os.path.join(root, "")):
                return name[len(root) :].lstrip(os.sep)
        return name

    def _is_inside(self, folder: Path) -> bool:
        if folder not in self._inside:
            self._inside[folder] = self._reaches_inside(folder)
        return self._inside[folder]

    def _reaches_inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._real)


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image in a row of a Hugging Face data set, decoded each time it is opened.

    Args:
        dataset: in the format "arrow"; the column holds images, or lists of one.
    """

    dataset: Any
    row: int
    column: str

    def __str__(self) -> str:
        # what identifies the pixels without reading them
        return f"dataset {self.dataset._fingerprint}, row {self.row}, {self.column}"

    def open(self) -> BinaryIO:
        """The encoded image."""
        (image,) = self.dataset[self.row][self.column].to_pylist()
        if isinstance(image, list):
            (image,) = image
        return io.BytesIO(image["bytes"])


def _can_be_a_path(name: str) -> bool:
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    fits = len(encoded) <= MAX_PATH and all(len(part) <= MAX_NAME for part in encoded.split(b"/"))
    return bool(encoded) and b"\0" not in encoded and fits
