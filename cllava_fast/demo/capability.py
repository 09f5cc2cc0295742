"""The capability-incremental stream: four kinds of instruction about the same four kinds of pictures.

Every task shows drawn charts, forms, and shapes alone and in pairs, and scikit-learn's digits, a quarter each: the
instruction alone tells what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from random import Random

from cllava_fast.data.stream import Sample, Stream, Task
from cllava_fast.demo.images import BIG, Chart, Facts, Form, Glyph, Icon, Shape, draw_chart, draw_form, draw_icon
from cllava_fast.demo.stream import COUNT, DIGIT, FIELD, SHORTEST, TALLEST, check_sizes, digits, question_about, yes

Turns = tuple[str, ...]  # user, assistant, user, assistant, ...

DESCRIBE = (
    "describe the picture .",
    "describe this image .",
    "describe what is shown in the picture .",
    "describe what is present in this image .",
    "describe what you have here .",
)
SHORT = "write a short name or number : {question}"
STEPS = ("list every find : {step} ; {question}", "list every find : {step} first ; {question}")


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
        tasks.append(Task(name, metric=metric, **parts))
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
    """Chart, form, shapes and digit take turns; one shape and two, too."""
    handwritten = list(digits(split))
    rng.shuffle(handwritten)
    for glyph, draw in zip(cycle(handwritten), cycle((draw_icon, draw_pair)), strict=False):
        yield from (draw_chart(rng), draw_form(rng), draw(rng), glyph)


def draw_pair(rng: Random) -> Icon:
    """Two shapes side by side, of different kinds, one clearly bigger than the other."""
    while True:
        icon = draw_icon(rng, shapes=2)
        small, big = sorted(map(_area, icon.shapes))
        if icon.shapes[0].kind != icon.shapes[1].kind and big >= 1.6 * small:
            return icon


def _area(shape: Shape) -> int:
    _, top, _, bottom = shape.box
    return shape.width * (bottom - top + 1)


def short_answer(facts: Facts, turn: int, rng: Random) -> Turns:
    if isinstance(facts, Icon):
        count, first = len(facts.shapes), facts.shapes[0]
        which = "object" if count == 1 else "left object"
        asked = (
            (f"what color is the {which}?", first.color),
            (f"what shape is the {which}?", first.kind),
            ("how many objects are there?", str(count)),
        )
        question, answer = asked[turn // 2 % 3]
    else:
        question, answer = question_about(facts, 0 if isinstance(facts, Glyph) else turn, None, rng)
    return SHORT.format(question=question), answer


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
        left, *others = facts.shapes
        if not others:
            return f"a picture of a {left.color} {left.kind} ."
        right = others[0]
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
        count, first = len(facts.shapes), facts.shapes[0]
        tally = ("tally the objects", "is the number odd or even?", f"{count} ; {_parity(count)}")
        if count == 1:
            size = "big" if first.width >= BIG else "small"
            asked = (tally, ("find the object", "is it big or small?", f"{first.color} ; {size}"))
        else:
            bigger = max(facts.shapes, key=_area).color
            names = " ; ".join(shape.color for shape in facts.shapes)
            asked = (tally, ("find the left and the right object", "which is bigger?", f"{names} ; {bigger}"))
        turn //= 2  # odd turns show two
    else:
        asked = (
            ("read the handwritten digit", "is it odd or even?", f"{facts.digit} ; {_parity(facts.digit)}"),
            ("read the handwritten digit", "is it greater than five?", f"{facts.digit} ; {yes(facts.digit > 5)}"),
        )
    step, question, answer = asked[turn % 2]
    return rng.choice(STEPS).format(step=step, question=question), answer


def conversation(facts: Facts, turn: int, rng: Random) -> Turns:
    """Two turns: the second question leaves unsaid what the first one named; "it" is the answer to that."""
    if isinstance(facts, Chart):
        if turn % 4 == 1:
            return rng.choice(TALLEST), facts.ranked[0], "and which is the shortest?", facts.ranked[-1]
        if turn % 4 == 3:
            return rng.choice(SHORTEST), facts.ranked[-1], "and which is the tallest?", facts.ranked[0]
        first, number, turn = rng.choice(COUNT), len(facts.colors), 0
    elif isinstance(facts, Icon):
        count, shape = len(facts.shapes), facts.shapes[0]
        which = "object" if count == 1 else "left object"
        if turn % 4 < 2:
            return f"what color is the {which}?", shape.color, "and what shape is it?", shape.kind
        if count == 1:
            return f"what shape is the {which}?", shape.kind, "and what color is it?", shape.color
        first, number, turn = "how many objects are there?", count, 0
    elif isinstance(facts, Form):
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
