"""The capability-incremental stream: four kinds of instruction about the same four kinds of pictures.

Every task shows drawn charts, forms and pairs of shapes, and scikit-learn's digits, a quarter each: the instruction
alone tells what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from random import Random
from typing import Any

from cllava_fast.data.stream import Sample, Stream, Task
from cllava_fast.demo.images import Chart, Form, Glyph, Icon, draw_chart, draw_form, draw_icon
from cllava_fast.demo.stream import DIGIT, FIELD, SHORTEST, TALLEST, check_sizes, digits, question_about, yes

Facts = Chart | Form | Icon | Glyph
Turns = tuple[str, ...]  # user, assistant, user, assistant, ...

DESCRIBE = (
    "describe the picture .",
    "describe this image .",
    "describe what is shown in the picture .",
    "describe what is present in this image .",
    "describe what you have here .",
)
STEPS = ("first {step} ; {question}", "{step} first ; {question}")


def build_capability_stream(seed: int = 0, train: int = 1200, validation: int = 200, test: int = 200) -> Stream:
    """Four tasks, in this order: short_answer, description, reasoning, conversation.

    Args:
        seed: what is drawn and asked; the digits are split the same way for every seed.
        train, validation, test: samples of each task.

    Raises:
        ValueError: a size that is not positive (``validation`` may be 0).
    """
    sizes = check_sizes(train, validation, test)
    tasks = []
    for name, ask in TASKS.items():
        parts = {split: _samples(name, ask, split, size, seed) for split, size in sizes.items()}
        metric = "rouge_l" if name == "description" else "exact_match"
        tasks.append(Task(name, parts["train"], parts["test"], parts["validation"], metric))
    return Stream(tasks, name="demo-capability")


def _samples(task: str, ask: Callable[[Facts, int, Random], Turns], split: str, size: int, seed: int) -> list[Sample]:
    rng = Random(f"{seed}/{task}/{split}")
    samples = []
    for i, facts in zip(range(size), _pictures(split, rng), strict=False):
        *earlier, question, answer = ask(facts, i // 4, rng)
        history = tuple(zip(earlier[::2], earlier[1::2], strict=True))
        samples.append(Sample(question, answer, facts.image, f"{task}/{split}/{i}", history))
    return samples


def _pictures(split: str, rng: Random) -> Iterator[Facts]:
    """Chart, form, shapes and digit take turns."""
    handwritten = list(digits(split))
    rng.shuffle(handwritten)
    for glyph in cycle(handwritten):
        yield from (draw_chart(rng), draw_form(rng), draw_pair(rng), glyph)


def draw_pair(rng: Random) -> Icon:
    """Two shapes side by side, of different kinds, one clearly bigger than the other."""
    while True:
        icon = draw_icon(rng, shapes=2)
        small, big = sorted(map(_area, icon.shapes))
        if icon.shapes[0].kind != icon.shapes[1].kind and big >= 1.6 * small:
            return icon


def _area(shape: Any) -> int:
    left, top, right, bottom = shape.box
    return int((right - left + 1) * (bottom - top + 1))


def short_answer(facts: Facts, turn: int, rng: Random) -> Turns:
    if isinstance(facts, Icon):
        shape = rng.choice(facts.shapes)
        asked = (
            (f"what color is the {shape.kind}?", shape.color),
            (f"what shape is the {shape.color} object?", shape.kind),
        )
        question, answer = asked[turn % 2]
    else:
        question, answer = question_about(facts, 0 if isinstance(facts, Glyph) else turn, None, rng)
    return f"in short : {question}", answer


def description(facts: Facts, turn: int, rng: Random) -> Turns:
    return rng.choice(DESCRIBE), describe(facts)


def describe(facts: Facts) -> str:
    """One sentence that says all that is in the picture."""
    if isinstance(facts, Chart):
        return f"a chart with {len(facts.colors)} bars : {' '.join(facts.colors)} ."
    if isinstance(facts, Form):
        fields = " and ".join(f"{label} {value}" for label, value in facts.fields.items())
        return f"a form with {fields} ; the box is {'' if facts.ticked else 'not '}ticked ."
    if isinstance(facts, Icon):
        left, right = facts.shapes
        return f"a {left.color} {left.kind} on the left and a {right.color} {right.kind} on the right ."
    return f"the handwritten digit {facts.digit} ."


def reasoning(facts: Facts, turn: int, rng: Random) -> Turns:
    """Counting and comparing in steps: the answer names what was found first, then what follows from it."""
    if isinstance(facts, Chart):
        count, ends = len(facts.colors), (facts.ranked[0], facts.ranked[-1])
        asked = (
            ("tally the bars", "is the number odd or even?", f"{count} ; {_parity(count)}"),
            ("find the tallest bar and the shortest bar", "which is on the left?",
             f"{' ; '.join(ends)} ; {min(ends, key=facts.colors.index)}"),
        )  # fmt: skip
    elif isinstance(facts, Form):
        number = int(facts.fields[facts.number_label])
        asked = (
            ("read the number on the form", "is it greater than five?", f"{number} ; {yes(number > 5)}"),
            ("read the number on the form", "is it odd and the box ticked?",
             f"{number} ; {yes(number % 2 == 1 and facts.ticked)}"),
        )  # fmt: skip
    elif isinstance(facts, Icon):
        names = " ; ".join(shape.color for shape in facts.shapes)
        small, big = (shape.color for shape in sorted(facts.shapes, key=_area))
        asked = (
            ("find the left and the right object", "which is bigger?", f"{names} ; {big}"),
            ("find the left and the right object", "which is not bigger?", f"{names} ; {small}"),
        )
    else:
        asked = (
            ("read the handwritten digit", "is it odd or even?", f"{facts.digit} ; {_parity(facts.digit)}"),
            ("read the handwritten digit", "is it greater than five?", f"{facts.digit} ; {yes(facts.digit > 5)}"),
        )
    step, question, answer = asked[turn % 2]
    return rng.choice(STEPS).format(step=step, question=question), answer


def conversation(facts: Facts, turn: int, rng: Random) -> Turns:
    """Two turns: the second question says "it" of the first one's answer."""
    if isinstance(facts, Chart):
        tallest = turn % 4 < 2
        color = facts.ranked[0 if tallest else -1]
        place = facts.colors.index(color) + 1
        first = rng.choice(TALLEST if tallest else SHORTEST)
        asked = (
            ("and which number is it from the left?", str(place)),
            ("and is there a bar on the right of it?", yes(place < len(facts.colors))),
        )
        return (first, color, *asked[turn % 2])
    if isinstance(facts, Icon):
        shape, side = rng.choice(tuple(zip(facts.shapes, ("left", "right"), strict=True)))
        if turn % 2:
            return f"which object is on the {side}?", shape.kind, "and what color is it?", shape.color
        return f"which color is on the {side}?", shape.color, "and what shape is it?", shape.kind
    if isinstance(facts, Form):
        first, number = rng.choice(FIELD).format(label=facts.number_label), int(facts.fields[facts.number_label])
    else:
        first, number = rng.choice(DIGIT), facts.digit
    asked = (("and is it odd or even?", _parity(number)), ("and is it greater than five?", yes(number > 5)))
    return (first, str(number), *asked[turn % 2])


def _parity(number: int) -> str:
    return "odd" if number % 2 else "even"


TASKS: dict[str, Callable[[Facts, int, Random], Turns]] = {
    "short_answer": short_answer,
    "description": description,
    "reasoning": reasoning,
    "conversation": conversation,
}
