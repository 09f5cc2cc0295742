"""Images of strangers: converted rightly, or refused by name; nothing waits and nothing is too large."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cllava_fast.data import Sample
from cllava_fast.data.encode import Encoder
from cllava_fast.data.pixels import FORMATS, MAX_ASPECT, TURNS, ImageError, read_rgb, read_size
from tests.helpers import image as random_image


def opened(path: Path) -> Image.Image:
    sample = Sample("q", "a", path)
    image = sample.open_image()
    assert image is not None and image.mode == "RGB" and image.size == sample.image_size()
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG whose header says what it wants."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def test_sixteen_bits_are_scaled(tmp_path: Path, rng: torch.Generator) -> None:
    pixels = torch.randint(0, 65536, (8, 9), generator=rng, dtype=torch.int32).numpy().astype(np.uint16)
    pixels[0, :3] = (0, 65535, 257)
    expected = np.floor(pixels / 257 + 0.5)
    for name in ("a.png", "a.tif", "a.ppm"):
        Image.fromarray(pixels).save(tmp_path / name)
        got = np.asarray(opened(tmp_path / name))
        assert np.abs(got - expected[..., None]).max() <= 1e-9, name
        assert (got[0, :3, 0] == (0, 255, 1)).all()


def test_bad_numbers_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "f.tif")
    Image.new("I", (4, 4), 70_000).save(tmp_path / "i.tif")
    for name, message in (
        ("f.tif", "floating-point numbers; save it with 8 or 16 bits"),
        ("i.tif", "from 70000 to 70000"),
    ):
        with pytest.raises(ImageError, match=f"{name} cannot be decoded: its pixels are .*{message.split()[-1]}"):
            opened(tmp_path / name)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 1), (255, 0, 0, 255))
    clear.putpixel((2, 2), (0, 0, 0, 128))
    clear.save(tmp_path / "rgba.png")
    clear.save(tmp_path / "a.webp", lossless=True, exact=True)
    grey = Image.new("LA", (4, 4), (0, 0))
    grey.save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    keyed = Image.new("RGB", (4, 4), (0, 0, 0))
    keyed.save(tmp_path / "key.png", transparency=(0, 0, 0))
    for name in ("rgba.png", "a.webp", "la.png", "p.png", "p.gif", "key.png"):
        assert opened(tmp_path / name).getpixel((0, 0)) == (255, 255, 255), name
    for name in ("rgba.png", "a.webp", "p.png", "p.gif"):
        assert opened(tmp_path / name).getpixel((1, 1)) == (255, 0, 0), name
    assert opened(tmp_path / "rgba.png").getpixel((2, 2)) == (127, 127, 127)


def test_other_modes(tmp_path: Path, rng: torch.Generator) -> None:
    picture = random_image(rng).resize((64, 48))
    picture.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(np.asarray(opened(tmp_path / "cmyk.tif"), int) - np.asarray(picture, int)).max() <= 1
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    red, green, blue = opened(tmp_path / "cmyk.jpg").getpixel((3, 3))
    assert red > 240 and green < 15 and blue < 15
    Image.new("1", (8, 8), 1).save(tmp_path / "bits.png")
    assert opened(tmp_path / "bits.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert opened(tmp_path / f"a.{suffix}").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, *TURNS])
def test_images_stand_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    # a red corner, on the top left of what the camera saw
    upright = Image.new("RGB", (32, 16), "blue")
    upright.paste("red", (0, 0, 8, 8))
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(TURNS[inverse]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    image = opened(tmp_path / f"a.{suffix}")
    assert image.size == (32, 16)
    red, _, blue = image.getpixel((3, 3))
    assert red > 200 and blue < 60
    assert image.getpixel((28, 12))[2] > 200
    with Image.open(tmp_path / f"a.{suffix}") as lazy:
        assert read_size(lazy, "lazy") == read_rgb(lazy, "lazy").size == (32, 16)


def test_a_png_that_says_behind_its_pixels_how_it_stands(tmp_path: Path) -> None:
    """Its size and its pixels agree, however often it is looked at."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png", exif=exif)
    data, position, chunks = (tmp_path / "a.png").read_bytes(), 8, []
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        chunks.append(data[position:end])
        position = end
    late = sorted(chunks, key=lambda chunk: (chunk[4:8] == b"eXIf") + 2 * (chunk[4:8] == b"IEND"))
    assert late != chunks
    (tmp_path / "a.png").write_bytes(data[:8] + b"".join(late))
    sample = Sample("what?", "red", str(tmp_path / "a.png"))
    assert sample.image_size() == sample.open_image().size == sample.image_size() == (32, 16)


def test_damaged_metadata_cost_no_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff" + b"\xff" * 40)
    assert opened(tmp_path / "a.jpg").size == (8, 4)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (65_000, 65_000, "has (far too many|65000 x 65000) pixels; expected 89478485 at most"),
        (10_000, 10_000, "has 10000 x 10000 pixels; expected 89478485 at most .PIL.Image.MAX_IMAGE_PIXELS"),
        (1, MAX_ASPECT + 1, "is 1 x 201; expected one side at most 200 times the other"),
        (80_000_000, 1, "expected one side at most 200 times the other"),
        (0, 5, "a.png"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, width: int, height: int, message: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height))
    for read in (read_rgb, read_size):
        with pytest.raises(ImageError, match=message) as raised:
            read(path, str(path))
        assert str(path) in str(raised.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError):
            read_size(path, str(path))


def test_the_limit_is_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(ImageError, match="has 20 x 20 pixels; expected 300 at most"):
        opened(tmp_path / "a.png")
    with pytest.raises(ImageError, match="in memory has 20 x 20"):
        Sample("q", "a", Image.new("RGB", (20, 20))).open_image()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert opened(tmp_path / "a.png").size == (20, 20)


def test_a_bomb_in_a_text_chunk(tmp_path: Path) -> None:
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100 << 20), 9))
    (tmp_path / "a.png").write_bytes(png(8, 8, bomb))
    with pytest.raises(ImageError, match="a.png cannot be decoded"):
        opened(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif", "ppm"])
def test_a_cut_image_is_named(tmp_path: Path, suffix: str, rng: torch.Generator) -> None:
    out = io.BytesIO()
    random_image(rng).save(out, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(out.getvalue()[: len(out.getvalue()) // 2])
    with pytest.raises(ImageError, match=f"a.{suffix}"):
        opened(path)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 100, b"not an image", b"\x89PNG\r\n\x1a\n", 
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"8BPS\0\1" + bytes(20),
    ],
)  # fmt: skip
def test_what_is_no_image_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="a.png"):
        opened(path)


@pytest.mark.parametrize("format", ["PCX", "ICO", "SGI", "TGA"])
def test_a_format_that_nobody_needs_is_not_decoded(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16), "red").save(path, format)
    with Image.open(path) as image:
        assert image.format == format, "Pillow would"
    with pytest.raises(ImageError, match="a.png cannot be read as an image; expected one of BMP, GIF"):
        opened(path)


def test_no_decoder_that_runs_a_program() -> None:
    assert set(FORMATS) == {"BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"}


def test_a_name_that_no_system_takes() -> None:
    for name in ("a\0.png", "\ud800.png"):
        with pytest.raises(ImageError, match="cannot be opened"):
            Sample("q", "a", name).open_image()


def test_image_tokens_are_those_of_the_upright_image(tmp_path: Path, processor: Any, monkeypatch: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    encoder = Encoder(processor)
    sizes: list[Any] = []
    monkeypatch.setattr(Image, "new", lambda mode, size, *a, real=Image.new: sizes.append(size) or real(mode, size, *a))
    encoder.encode([Sample("is it?", "yes", tmp_path / "a.jpg")])
    assert set(sizes) == {(32, 64)}
