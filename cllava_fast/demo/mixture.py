"""What the base is pretrained on: captions, listings and short extractions of drawn pictures, and lines to repeat.

Neither wordings nor answer formats are those of the stream: an answer here is never the bare word that a question
of the stream wants. So the base learns to see, and tuning to answer.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from PIL import Image

from cllava_fast.demo.images import (
    BIG,
    COLORS,
    SHAPES,
    Chart,
    Facts,
    Form,
    Glyph,
    Icon,
    Shape,
    draw_chart,
    draw_form,
    draw_glyph,
    draw_icon,
)
from cllava_fast.demo.tokenizer import ANSWERS, vocabulary

Pair = tuple[str, str]  # prompt, answer

REPEAT_SHARE = 0.1


def draw_picture(rng: Random) -> Facts:
    draw: Callable[[Random], Facts] = rng.choices(
        (draw_chart, draw_form, lambda r: draw_icon(r, r.choice((1, 1, 2))), draw_glyph), (3, 3, 4, 2)
    )[0]
    return draw(rng)


def describe(facts: Facts, rng: Random) -> Pair:
    """One prompt about the picture and its answer."""
    if isinstance(facts, Chart):
        return _about_chart(facts, rng)
    if isinstance(facts, Form):
        return _about_form(facts, rng)
    return _about_icon(facts, rng) if isinstance(facts, Icon) else _about_glyph(facts, rng)


def repeat_line(rng: Random) -> Pair:
    """Text only: gives every word a trained embedding, those of answers most often."""
    words = [word for word in vocabulary() if word.isalnum()]
    line = " ".join(rng.choice(ANSWERS if rng.random() < 0.6 else words) for _ in range(rng.randint(1, 5)))
    return f"repeat: {line}", line


def draw_example(rng: Random) -> tuple[Image.Image | None, Pair]:
    if rng.random() < REPEAT_SHARE:
        return None, repeat_line(rng)
    facts = draw_picture(rng)
    return facts.image, describe(facts, rng)


def _about_chart(chart: Chart, rng: Random) -> Pair:
    what = rng.randrange(8)
    if what == 0:
        return rng.choice(("list the columns", "list every column from left to right")), " ".join(chart.colors)
    if what == 1:
        return rng.choice(("rank the columns", "rank from long to short")), " ".join(chart.ranked)
    if what == 2:
        return "rank from short to long", " ".join(reversed(chart.ranked))
    if what == 3:
        return rng.choice(("tally", "tally of columns")), f"{len(chart.colors)} columns"
    if what == 4:
        color = rng.choice(chart.colors) if rng.random() < 0.5 else rng.choice(sorted(COLORS))
        found = color in chart.colors
        return f"find a {color} column", f"found : {chart.colors.index(color) + 1}" if found else "none found"
    if what == 5:
        return rng.choice(("name the long column", "long column")), f"long : {chart.ranked[0]}"
    return rng.choice(("name the short column", "short column")), f"short : {chart.ranked[-1]}"


def _about_form(form: Form, rng: Random) -> Pair:
    mark = "mark" if form.ticked else "empty"
    what = rng.randrange(7)
    if what == 0:
        lines = [f"{label} {value}" for label, value in form.fields.items()]
        return rng.choice(("transcribe the sheet", "copy the sheet")), " ; ".join([*lines, mark])
    if what == 1:
        return rng.choice(("transcribe the sign", "name the mark")), f"sign {mark}"
    if what == 2:
        return "list the rows", " ".join(form.fields)
    label = form.number_label if what in (3, 4) else form.word_label
    return rng.choice((f"copy {label}", f"transcribe {label}")), f"{label} = {form.fields[label]}"


def _about_icon(icon: Icon, rng: Random) -> Pair:
    shape = rng.choice(icon.shapes)
    what = rng.randrange(8)
    if what == 0:
        return rng.choice(("caption", "describe the drawing")), " and ".join(_phrase(s) for s in icon.shapes)
    if what == 1:
        listed = " ; ".join(f"{s.kind} {s.color}" for s in icon.shapes)
        return rng.choice(("list the objects", "list every object")), listed
    if what in (2, 3):
        return f"kind of the {shape.color} object", f"kind {shape.kind}"
    if what == 4 and len({s.kind for s in icon.shapes}) == len(icon.shapes):
        return f"tint of the {shape.kind}", f"tint {shape.color}"
    if what == 5:
        color = shape.color if rng.random() < 0.5 else rng.choice(sorted(COLORS))
        hit = next((s for s in icon.shapes if s.color == color), None)
        return f"find a {color} object", f"found : {hit.kind}" if hit else "none found"
    if what == 6:
        kind = rng.choice(SHAPES)
        hit = next((s for s in icon.shapes if s.kind == kind), None)
        return f"find a {kind}", f"found : {hit.color}" if hit else "none found"
    first = icon.shapes[0]
    return rng.choice((("first tint", f"tint {first.color}"), ("first kind", f"kind {first.kind}")))


def _about_glyph(glyph: Glyph, rng: Random) -> Pair:
    return rng.choice(
        (("name the glyph", f"glyph {glyph.digit}"), ("caption", f"the glyph {glyph.digit}"),
         ("copy the glyph", f"it is {glyph.digit} ."), ("describe the panel", f"a panel with a {glyph.digit}"))
    )  # fmt: skip


def _phrase(shape: Shape) -> str:
    return f"a {'big' if shape.width >= BIG else 'small'} {shape.color} {shape.kind}"
