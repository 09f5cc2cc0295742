"""Draws the demo's pictures with PIL, 64x64: bar charts, forms, shapes and printed digits.

Every picture comes with what is true about it. The same generator in the same state draws the same pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

SIZE = 64
ROW = 16  # forms are written on the lines of the vision tower's patches

COLORS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
BIG = 21  # pixels of a shape's width
SHAPES = ("circle", "rectangle", "triangle")
NUMBER_LABELS = ("age", "page", "room", "row")
WORD_LABELS = {"pet": ("bird", "cat", "dog", "fish"), "drink": ("coffee", "milk", "tea", "water")}

RGB = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True, eq=False)
class Chart:
    image: Image.Image
    colors: tuple[str, ...]  # from left to right
    heights: tuple[int, ...]  # in pixels

    @property
    def ranked(self) -> list[str]:
        """Colours from the tallest bar to the shortest."""
        return [color for _, color in sorted(zip(self.heights, self.colors, strict=True), reverse=True)]


@dataclass(frozen=True, eq=False)
class Form:
    image: Image.Image
    fields: dict[str, str]  # label -> value, from top to bottom
    ticked: bool

    @property
    def number_label(self) -> str:
        return next(label for label in self.fields if label in NUMBER_LABELS)

    @property
    def word_label(self) -> str:
        return next(label for label in self.fields if label in WORD_LABELS)


@dataclass(frozen=True)
class Shape:
    kind: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def width(self) -> int:
        return self.box[2] - self.box[0] + 1


@dataclass(frozen=True, eq=False)
class Icon:
    image: Image.Image
    shapes: tuple[Shape, ...]  # from left to right


@dataclass(frozen=True, eq=False)
class Glyph:
    image: Image.Image
    digit: int


Facts = Chart | Form | Icon | Glyph


def draw_chart(rng: Random) -> Chart:
    """Two to five bars of different colours; tallest and shortest stand out by at least 8 pixels."""
    count = rng.randint(2, 5)
    colors = rng.sample(sorted(COLORS), count)
    low = rng.randint(8, 18)
    high = rng.randint(max(42, low + 26), 58)
    heights = [low, high, *(rng.randint(low + 8, high - 8) for _ in range(count - 2))]
    rng.shuffle(heights)
    image = Image.new("RGB", (SIZE, SIZE), _shade(rng, 242, 255))
    draw = ImageDraw.Draw(image)
    base = SIZE - rng.randint(1, 3)
    slot = (SIZE - 4) / count
    width = min(rng.randint(8, 14), int(slot) - 2)
    for i, (color, height) in enumerate(zip(colors, heights, strict=True)):
        left = 2 + int(i * slot) + rng.randint(0, int(slot) - width - 1)
        draw.rectangle((left, base - height, left + width - 1, base - 1), fill=_near(rng, COLORS[color]))
    draw.line((0, base, SIZE - 1, base), fill=(60, 60, 60))
    return Chart(image, tuple(colors), tuple(heights))


def draw_form(rng: Random) -> Form:
    """A coloured head, a line with a number, a line with a word, and a check-box."""
    image = Image.new("RGB", (SIZE, SIZE), _shade(rng, 242, 255))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIZE - 1, rng.randint(6, 10)), fill=_near(rng, COLORS[rng.choice(sorted(COLORS))], 40))
    ink = _shade(rng, 0, 60)
    word_label = rng.choice(sorted(WORD_LABELS))
    values = {rng.choice(NUMBER_LABELS): str(rng.randint(0, 9)), word_label: rng.choice(WORD_LABELS[word_label])}
    labels = sorted(values)
    rng.shuffle(labels)
    ticked = rng.random() < 0.5
    tick_line = rng.randint(1, 3)
    lines = [line for line in (1, 2, 3) if line != tick_line]
    for line, label in zip(lines, labels, strict=True):
        middle = line * ROW + ROW // 2 + rng.randint(-1, 1)
        draw.text((2 + rng.randint(0, 1), middle), label, font=default_font(10), fill=ink, anchor="lm")
        size, left = (16, 42) if values[label].isdigit() else (10, 32)
        value_at = (left + rng.randint(0, 2), middle)
        draw.text(value_at, values[label], font=default_font(size), fill=ink, anchor="lm")
    _draw_check_box(draw, rng, tick_line * ROW + ROW // 2, ink, ticked)
    return Form(image, {label: values[label] for label in labels}, ticked)


def draw_icon(rng: Random, shapes: int = 1) -> Icon:
    """Shapes side by side on a pale ground, each of its own colour."""
    image = Image.new("RGB", (SIZE, SIZE), _shade(rng, 225, 255))
    draw = ImageDraw.Draw(image)
    room = SIZE // shapes
    drawn = []
    for i, color in enumerate(rng.sample(sorted(COLORS), shapes)):
        kind = rng.choice(SHAPES)
        width, height = rng.randint(9, min(32, room - 2)), rng.randint(9, 32)
        if kind == "circle":
            height = width
        elif kind == "triangle":
            height = round(width * rng.uniform(0.75, 1.0))
        left = i * room + rng.randint(0, room - width)
        top = rng.randint(0, SIZE - height)
        box = (left, top, left + width - 1, top + height - 1)
        drawn.append(Shape(kind, color, box))
        _draw_shape(draw, drawn[-1], _near(rng, COLORS[color], 12))
    return Icon(image, tuple(drawn))


def draw_glyph(rng: Random) -> Glyph:
    """A printed digit, bent, and scanned at 8x8 pixels."""
    digit = rng.randint(0, 9)
    big = Image.new("L", (96, 96), 0)
    font = ImageFont.truetype(rng.choice(_font_files()), 72) if rng.random() < 0.85 else default_font(72)
    ImageDraw.Draw(big).text((48, 48), str(digit), font=font, fill=255, anchor="mm", stroke_width=rng.randint(0, 4))
    big = _bend(big, rng)
    width = rng.randint(5, 8)
    ink = big.crop(big.getbbox()).resize((width, 8), Image.Resampling.BOX)
    gain = rng.uniform(1.0, 1.8)
    tiny = Image.new("L", (8, 8), 0)
    tiny.paste(ink.point([min(255, round(value * gain)) for value in range(256)]), ((8 - width) // 2, 0))
    return Glyph(scan(tiny), digit)


def scan(tiny: Image.Image) -> Image.Image:
    """Dark ink on white, 64x64, of light ink on black at 8x8 pixels in mode L."""
    return ImageOps.invert(tiny).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")


@cache
def default_font(size: int) -> Font:
    return ImageFont.load_default(size=size)


@cache
def _font_files() -> tuple[str, ...]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "SansMono-Oblique", "Serif", "Serif-Italic")
    return tuple(str(folder / f"DejaVu{name}.ttf") for name in names)


def _shade(rng: Random, low: int, high: int) -> RGB:
    return (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))


def _near(rng: Random, color: RGB, by: int = 24) -> RGB:
    r, g, b = (min(255, max(0, part + rng.randint(-by, by))) for part in color)
    return r, g, b


def _draw_check_box(draw: ImageDraw.ImageDraw, rng: Random, middle: int, ink: RGB, ticked: bool) -> None:
    left, top = 3 + rng.randint(0, 2), middle - 6 + rng.randint(-1, 1)
    draw.rectangle((left, top, left + 11, top + 11), outline=ink, width=1)
    if ticked and rng.random() < 0.5:
        draw.line((left + 2, top + 5, left + 5, top + 9, left + 10, top + 2), fill=ink, width=2)
    elif ticked:
        draw.line((left + 2, top + 2, left + 9, top + 9), fill=ink, width=2)
        draw.line((left + 2, top + 9, left + 9, top + 2), fill=ink, width=2)
    draw.text((20 + rng.randint(0, 2), middle), "agreed", font=default_font(10), fill=ink, anchor="lm")


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, fill: RGB) -> None:
    left, top, right, bottom = shape.box
    if shape.kind == "circle":
        draw.ellipse(shape.box, fill=fill)
    elif shape.kind == "rectangle":
        draw.rectangle(shape.box, fill=fill)
    else:
        draw.polygon(((left, bottom), ((left + right) / 2, top), (right, bottom)), fill=fill)


def _bend(image: Image.Image, rng: Random) -> Image.Image:
    """A random affine map and a warp along sine waves, as no two hands write alike."""
    turn, shear = rng.gauss(0, 0.12), rng.gauss(0, 0.15)
    cos, sin = math.cos(turn), math.sin(turn)
    a, b, d, e = cos, shear - sin, sin, cos
    half = image.width / 2
    affine = (a, b, half - (a + b) * half, d, e, half - (d + e) * half)
    image = image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    steps = 3
    edge = image.width // steps
    grid = [
        [(x * edge + rng.gauss(0, 5), y * edge + rng.gauss(0, 5)) for x in range(steps + 1)] for y in range(steps + 1)
    ]
    mesh = []
    for y in range(steps):
        for x in range(steps):
            corners = (grid[y][x], grid[y + 1][x], grid[y + 1][x + 1], grid[y][x + 1])
            quad = tuple(part for corner in corners for part in corner)
            mesh.append(((x * edge, y * edge, (x + 1) * edge, (y + 1) * edge), quad))
    image = image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3.0)))
