"""From encoded images to RGB: what is decoded, how large it may be, and how other modes become RGB."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NoReturn

from PIL import Image

from cllava_fast.names import brief
from cllava_fast.untrusted import open_regular

# no others: some of Pillow's run programs, and few have seen as many broken files
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# a processor that makes the short side 336 pixels long makes 336 x 67200 of the narrowest
MAX_ASPECT = 200
TURNS = {  # of the EXIF tag 0x0112, how to turn the pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


class ImageError(OSError):
    """A file that is no image of ``FORMATS``, is damaged, or has too many pixels."""


def read_rgb(source: str | os.PathLike[str] | BinaryIO | Image.Image, name: str) -> Image.Image:
    """The first frame in RGB, upright, on white where it is transparent.

    Args:
        source: a path, a file or an image that is open already.
        name: what errors call it.

    Raises:
        FileNotFoundError, PermissionError: as ``open``.
        ImageError: see there.
    """
    with _opened(source, name) as image, _damage_is_named(name):
        return to_rgb(image)


def read_size(source: str | os.PathLike[str] | BinaryIO | Image.Image, name: str) -> tuple[int, int]:
    """Width and height of what ``read_rgb`` gives, by the file's header alone. Raises as it does."""
    with _opened(source, name) as image, _damage_is_named(name):
        width, height = image.size
        return (height, width) if _orientation(image) in SIDEWAYS else (width, height)


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as one of ``FORMATS`` does, damaged or not. Raises as ``open_regular``."""
    with open_regular(path) as file:
        try:
            Image.open(file, formats=FORMATS)
        except Image.UnidentifiedImageError:
            return False
        except Exception:  # damage is told when the pixels are read
            return True
        return True


@contextmanager
def _opened(source: str | os.PathLike[str] | BinaryIO | Image.Image, name: str) -> Iterator[Image.Image]:
    if isinstance(source, Image.Image):
        _check_size(source, name)
        yield source
        return
    try:
        file = open_regular(source) if isinstance(source, (str, os.PathLike)) else source
    except ValueError as error:  # a NUL, half a surrogate pair
        raise ImageError(f"image {brief(name)} cannot be opened: {error}") from None
    with file:
        with _damage_is_named(name):
            image = Image.open(file, formats=FORMATS)
        with image:
            _check_size(image, name)
            yield image


@contextmanager
def _damage_is_named(name: str) -> Iterator[None]:
    """Whatever a decoder raises for a damaged file says which one it is."""
    try:
        yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"image {name} cannot be read as an image; expected one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        _refuse_size(name, "far too many")
    except Exception as error:
        raise ImageError(f"image {name} cannot be decoded: {str(error) or type(error).__name__}") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        _refuse_size(name, f"{width} x {height}")
    if not width or not height or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"image {name} is {width} x {height}; expected one side at most {MAX_ASPECT} times the other")


def _refuse_size(name: str, pixels: str) -> NoReturn:
    raise ImageError(
        f"image {name} has {pixels} pixels; expected {Image.MAX_IMAGE_PIXELS} at most (PIL.Image.MAX_IMAGE_PIXELS)"
    ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An open image as ``read_rgb`` gives it. Raises ValueError for a mode without a fixed range, such as F."""
    turn = TURNS.get(_orientation(image))  # as read_size: loading finds more, behind a PNG's pixels
    image.load()
    if image.mode.startswith("I"):
        image = _eight_bits(image)
        image.info.pop("transparency", None)  # of 16 bits
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits scaled to 8; Pillow would cut off what is above 255."""
    if image.mode != "I":
        image = image.convert("I")
    least, most = image.getextrema()
    if not 0 <= least <= most <= 65535:  # type: ignore[operator]
        raise ValueError(f"its pixels are from {least} to {most}; expected 0 to 65535")
    return image.point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _orientation(image: Image.Image) -> int:
    """The EXIF tag, as far as it stands before the pixels; 1 (upright) without, and for TIFF, which Pillow turns."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # getexif() would decode the whole PNG
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata are no reason to lose an image
        return 1
