"""The dataset-incremental stream: one data set after another, each with its own pictures, questions and answers.

easy-VQA's shapes, scikit-learn's handwritten digits, its wines drawn as charts, tiles of its two photographs, and
drawn signs. All come with the packages; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cllava_fast.data.stream import Sample, Stream, Task
from cllava_fast.demo.images import COLORS, NUMBER_LABELS, ROW, SIZE, WORD_LABELS, default_font
from cllava_fast.demo.stream import SPLIT_SEED, Pair, check_sizes, icons, pictures, question_about

KIND = (
    "which kind of drink is it?",
    "what kind of drink does the chart show?",
    "which kind of drink do you read in this chart?",
    "what is the kind of the drink in this chart?",
)
BAR = ("which bar is the {rank} for this drink?", "what is the color of the {rank} bar of this drink?")
# Three data sets ask for a color, and a sentence surrogate sees wordings alone: photos name their choices, as ScienceQA
# does, and signs have a tint.
TILE = (
    "is this picture black or brown or gray or teal?",
    "black or brown or gray or teal : which is this picture?",
    "what does this picture show : black or brown or gray or teal?",
    "which do you find in this picture : black or brown or gray or teal?",
)
SAYS = ("what does the sign say?", "what is written on this sign?", "what do you read on the sign?")
FRAME = ("which tint has this sign?", "in which tint is the sign drawn?")

WINE = {6: "red", 12: "yellow", 11: "blue", 0: "green", 9: "black"}  # the columns that tell most, and their bars
SIGNS = tuple(
    (label, value)
    for label, values in {**dict.fromkeys(NUMBER_LABELS, tuple("0123456789")), **WORD_LABELS}.items()
    for value in values
)
TILE_SIDE = 40  # pixels of a photograph
TILE_COLORS = ("black", "brown", "gray", "teal")  # what the two photographs consist of


def build_dataset_stream(seed: int = 0, train: int = 1200, validation: int = 200, test: int = 200) -> Stream:
    """Five tasks, in this order: easy_vqa, digits, wine, photos, signs.

    Args:
        seed: what is drawn and asked; the packages' images are split the same way for every seed.
        train, validation, test: samples of each task.

    Raises:
        ValueError: a size that is not positive (``validation`` may be 0).
    """
    sizes = check_sizes(train, validation, test)
    tasks = []
    for name, ask in TASKS.items():
        parts = {
            split: [
                Sample(question, answer, image, f"{name}/{split}/{i}")
                for i, (image, (question, answer)) in enumerate(ask(split, size, Random(f"{seed}/{name}/{split}")))
            ]
            for split, size in sizes.items()
        }
        tasks.append(Task(name, parts["train"], parts["test"], parts["validation"]))
    return Stream(tasks, name="demo-dataset")


Asked = list[tuple[Image.Image, Pair]]


def _digit_questions(split: str, size: int, rng: Random) -> Asked:
    asked = zip(range(size), pictures("digit", split, rng), strict=False)
    return [(glyph.image, question_about(glyph, position, None, rng)) for position, glyph in asked]


class Wine(NamedTuple):
    image: Image.Image
    heights: dict[str, int]  # pixels by colour
    kind: int  # 1, 2 or 3

    @property
    def ranked(self) -> list[str]:
        return sorted(self.heights, key=lambda color: -self.heights[color])


def _wine_questions(split: str, size: int, rng: Random) -> Asked:
    bottles = list(wines(split))
    rng.shuffle(bottles)
    asked: Asked = []
    for wine in cycle(bottles):
        if len(asked) >= size:
            return asked
        turn = len(asked) % 4
        top, second, *_, last_but_one, last = (wine.heights[color] for color in wine.ranked)
        if turn in (0, 2):
            asked.append((wine.image, (rng.choice(KIND), str(wine.kind))))
        elif turn == 1 and top - second >= 3:
            asked.append((wine.image, (rng.choice(BAR).format(rank="tallest"), wine.ranked[0])))
        elif turn == 3 and last_but_one - last >= 3:
            asked.append((wine.image, (rng.choice(BAR).format(rank="shortest"), wine.ranked[-1])))
    raise AssertionError("a cycle does not end")


@cache
def wines(split: str) -> tuple[Wine, ...]:
    """scikit-learn's wines as charts of five measurements: 98 to train on, 40 to validate, 40 to test."""
    from sklearn.datasets import load_wine

    data = load_wine()
    values, kinds = data.data[:, list(WINE)], data.target  # [n, 5], [n]
    order = list(range(len(kinds)))
    Random(SPLIT_SEED).shuffle(order)
    part = {"test": order[:40], "validation": order[40:80], "train": order[80:]}[split]
    seen = values[order[80:]]  # the scale knows nothing of the other splits
    low, high = seen.min(0), seen.max(0)
    heights = 6 + np.rint((values - low) / (high - low) * 50).clip(0, 50).astype(int)
    bars = [dict(zip(WINE.values(), row, strict=True)) for row in heights.tolist()]
    return tuple(_draw_wine(bars[i], int(kinds[i]) + 1) for i in part)


def _draw_wine(heights: dict[str, int], kind: int) -> Wine:
    image = Image.new("RGB", (SIZE, SIZE), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for place, (color, height) in enumerate(heights.items()):
        left = 3 + 12 * place
        draw.rectangle((left, SIZE - 2 - height, left + 9, SIZE - 3), fill=COLORS[color])
    draw.line((0, SIZE - 2, SIZE - 1, SIZE - 2), fill=(60, 60, 60))
    return Wine(image, heights, kind)


def _tile_questions(split: str, size: int, rng: Random) -> Asked:
    """As many tiles of each colour."""
    by_color: dict[str, list[Image.Image]] = {color: [] for color in TILE_COLORS}
    for image, color in tiles(split):
        by_color[color].append(image)
    for group in by_color.values():
        rng.shuffle(group)
    left = {color: cycle(group) for color, group in by_color.items()}
    colors = [color for color, _ in zip(cycle(TILE_COLORS), range(size), strict=False)]
    rng.shuffle(colors)
    return [(next(left[color]), (rng.choice(TILE), color)) for color in colors]


@cache
def tiles(split: str) -> tuple[tuple[Image.Image, str], ...]:
    """Tiles of scikit-learn's two photographs whose colour has a name; those of two splits do not overlap."""
    from sklearn.datasets import load_sample_images

    found = []
    for number, photo in enumerate(load_sample_images().images):  # [427, 640, 3] uint8
        height, width = photo.shape[0] // TILE_SIDE, photo.shape[1] // TILE_SIDE
        places = [(row, column) for row in range(height) for column in range(width)]
        Random(f"{SPLIT_SEED}/{number}").shuffle(places)
        fifth = len(places) // 5
        part = {"test": places[:fifth], "validation": places[fifth : 2 * fifth], "train": places[2 * fifth :]}[split]
        for row, column in part:
            top, left = row * TILE_SIDE, column * TILE_SIDE
            tile = photo[top : top + TILE_SIDE, left : left + TILE_SIDE]
            color = _color_name(tile)
            if color:
                image = Image.fromarray(tile).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                found.append((image, color))
    return tuple(found)


def _color_name(tile: np.ndarray) -> str | None:
    """The nearest of ``TILE_COLORS`` to the median pixel; None where another is nearly as near."""
    median = np.median(tile.reshape(-1, 3), axis=0)
    distance = {name: float(np.linalg.norm(median - np.array(COLORS[name]))) for name in TILE_COLORS}
    first, second, *_ = sorted(TILE_COLORS, key=distance.__getitem__)
    return first if distance[first] <= 0.8 * distance[second] else None


def _sign_questions(split: str, size: int, rng: Random) -> Asked:
    asked: Asked = []
    for turn in range(size):
        image, text, color = draw_sign(rng)
        asked.append((image, (rng.choice(FRAME), color) if turn % 3 == 2 else (rng.choice(SAYS), text)))
    return asked


def draw_sign(rng: Random) -> tuple[Image.Image, str, str]:
    """A pale board in a coloured frame with a label and its value on one line; and what it says, and its colour."""
    color = rng.choice(sorted(COLORS))
    pale = rng.randint(240, 255)
    image = Image.new("RGB", (SIZE, SIZE), (pale, pale, pale))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIZE - 1, SIZE - 1), outline=COLORS[color], width=rng.randint(4, 7))
    middle = rng.randint(1, 2) * ROW + ROW // 2 + rng.randint(-1, 1)
    label, value = rng.choice(SIGNS)
    left = 42 if value.isdigit() else 32
    for text, at, size in ((label, 8, 10), (value, left, 16 if value.isdigit() else 10)):
        where = (at + rng.randint(0, 1), middle)
        draw.text(where, text, font=default_font(size), fill=(20, 20, 20), anchor="lm")
    return image, f"{label} {value}", color


TASKS: dict[str, Callable[[str, int, Random], Asked]] = {
    "easy_vqa": icons,
    "digits": _digit_questions,
    "wine": _wine_questions,
    "photos": _tile_questions,
    "signs": _sign_questions,
}
