"""The domain-incremental stream: charts, forms, easy-VQA's shapes and scikit-learn's handwritten digits.

Images of training, validation and test never meet. Icons keep easy-VQA's own test split; digits have a fixed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import cycle
from random import Random

from PIL import Image

from cllava_fast.data.stream import Sample, Stream, Task
from cllava_fast.demo.images import Chart, Form, Glyph, draw_chart, draw_form, scan

TALLEST = (
    "which bar is the tallest?",
    "what is the color of the tallest bar?",
    "which bar reaches highest in the chart?",
    "what color is the highest bar in the chart?",
)
SHORTEST = (
    "which bar is the shortest?",
    "what is the color of the shortest bar?",
    "which bar is the lowest in the chart?",
    "what color is the lowest bar in the chart?",
)
COUNT = (
    "how many bars are there?",
    "how many bars does the chart show?",
    "what is the number of bars in the chart?",
    "how many bars have been drawn in this chart?",
)
FIELD = (
    "what stands beside {label} on the form?",
    "what has been entered for {label}?",
    "what does the form say for {label}?",
    "what is filled in under {label} on this form?",
)
BOX = (
    "is the check box on the form ticked?",
    "has the box beside agreed been ticked?",
    "does the form have a ticked box?",
    "is there a tick in the check box?",
)
DIGIT = (
    "which handwritten digit is it?",
    "what digit did the writer write?",
    "which digit has been written by hand?",
    "which digit do you read in this handwritten picture?",
)
PARITY = ("is the handwritten digit odd or even?", "did the writer write an odd or an even digit?")
ODD = ("is the handwritten digit odd?", "did the writer write an odd digit?")
BIGGER = ("is the handwritten digit bigger than five?", "did the writer write a digit greater than five?")

# asked about forms and about digits alike: only the image tells the two apart
AMBIGUOUS = (
    "which number is shown?",
    "what number is it?",
    "what is the number in the picture?",
    "which number do you read here?",
    "what number do you read in the image?",
    "which number is on show?",
)

# easy-VQA's questions come in groups, by what they ask and, where that is yes or no, by the answer
ICON_TURNS = (
    "color", "shape", "color", "shape", "plain color yes", "plain color no", "plain kind yes", "plain kind no",
    "color", "shape", "color", "shape", "negated color yes", "negated color no", "negated kind yes", "negated kind no",
)  # fmt: skip

TASKS = ("chart", "document", "icon", "digit")
PER_IMAGE = 2  # questions about one drawn image
SPLIT_SEED = "the digits' split"

Pair = tuple[str, str]  # question, answer


def build_stream(
    seed: int = 0, train: int = 1200, validation: int = 200, test: int = 200, ambiguous: float = 0.0
) -> Stream:
    """Four tasks, in this order: chart, document, icon, digit.

    Args:
        seed: what is drawn and asked; the packages' images are split the same way for every seed.
        train, validation, test: samples of each task.
        ambiguous: share of the document and digit tasks' questions that are word for word the same in both, each
            with its own right answer.

    Raises:
        ValueError: a size that is not positive (``validation`` may be 0), or a share outside 0..1.
    """
    sizes = check_sizes(train, validation, test)
    if not 0.0 <= ambiguous <= 1.0:
        raise ValueError(f"ambiguous is {ambiguous}; expected a share in 0..1")
    tasks = []
    for name in TASKS:
        parts = {split: _samples(name, split, size, seed, ambiguous) for split, size in sizes.items()}
        tasks.append(Task(name, parts["train"], parts["test"], parts["validation"]))
    return Stream(tasks, name="demo")


def check_sizes(train: int, validation: int, test: int) -> dict[str, int]:
    """The sizes by split. Raises ValueError for one that is not positive (``validation`` may be 0)."""
    sizes = {"train": train, "validation": validation, "test": test}
    for split, size in sizes.items():
        if size < (split != "validation"):
            raise ValueError(f"{split} is {size}; expected a positive number of samples")
    return sizes


def _samples(task: str, split: str, size: int, seed: int, ambiguous: float) -> list[Sample]:
    rng = Random(f"{seed}/{task}/{split}")
    if task == "icon":
        asked = icons(split, size, rng)
    else:
        shared: list[str | None] = [None] * size
        if task in ("document", "digit"):
            # not this task's generator: both tasks draw the same questions
            shared = _shared_questions(size, ambiguous, Random(f"{seed}/ambiguous/{split}"))
        asked = [
            (facts.image, question_about(facts, position, question, rng))
            for facts, position, question in zip(pictures(task, split, rng), range(size), shared, strict=False)
        ]
    return [
        Sample(question, answer, image, f"{task}/{split}/{i}") for i, (image, (question, answer)) in enumerate(asked)
    ]


def _shared_questions(size: int, share: float, rng: Random) -> list[str | None]:
    """The ambiguous questions, None where a task asks its own."""
    ambiguous = set(rng.sample(range(size), round(share * size)))
    return [rng.choice(AMBIGUOUS) if i in ambiguous else None for i in range(size)]


def pictures(task: str, split: str, rng: Random) -> Iterator[Chart | Form | Glyph]:
    """What a task but ``icon`` asks about, without end."""
    if task == "digit":
        glyphs = list(digits(split))
        rng.shuffle(glyphs)
        yield from cycle(glyphs)
    while True:
        facts = draw_chart(rng) if task == "chart" else draw_form(rng)
        yield from [facts] * PER_IMAGE


def question_about(facts: Chart | Form | Glyph, position: int, shared: str | None, rng: Random) -> Pair:
    """Kinds take turns, so that their shares do not depend on the seed."""
    if isinstance(facts, Chart):
        kind, answer = (
            (TALLEST, facts.ranked[0]),
            (SHORTEST, facts.ranked[-1]),
            (COUNT, str(len(facts.colors))),
        )[position % 3]
        return rng.choice(kind), answer
    if isinstance(facts, Form):
        if shared is not None:
            return shared, facts.fields[facts.number_label]
        if position % 3 == 0:
            return rng.choice(BOX), yes(facts.ticked)
        label = facts.number_label if position % 3 == 1 else facts.word_label
        return rng.choice(FIELD).format(label=label), facts.fields[label]
    if shared is not None or position % 2 == 0:
        return shared or rng.choice(DIGIT), str(facts.digit)
    odd = facts.digit % 2 == 1
    return rng.choice(
        (
            (rng.choice(PARITY), "odd" if odd else "even"),
            (rng.choice(ODD), yes(odd)),
            (rng.choice(BIGGER), yes(facts.digit > 5)),
        )
    )


def yes(true: bool) -> str:
    return "yes" if true else "no"


@cache
def digits(split: str) -> tuple[Glyph, ...]:
    """scikit-learn's handwritten digits: 1,097 to train on, 300 to validate, 400 to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, targets = data.images, data.target  # [n, 8, 8], [n]
    order = list(range(len(targets)))
    Random(SPLIT_SEED).shuffle(order)
    part = {"test": order[:400], "validation": order[400:700], "train": order[700:]}[split]
    ink = (images * 16).clip(max=255).astype("uint8")
    return tuple(Glyph(scan(Image.fromarray(ink[i])), int(targets[i])) for i in part)


def icons(split: str, size: int, rng: Random) -> list[tuple[Image.Image, Pair]]:
    """easy-VQA's own questions, as many of each kind and, within yes-or-no, of each answer."""
    import easy_vqa

    official = split == "test"
    asked = easy_vqa.get_test_questions() if official else easy_vqa.get_train_questions()
    paths = easy_vqa.get_test_image_paths() if official else easy_vqa.get_train_image_paths()
    groups: dict[str, list[tuple[str, str, int]]] = {}
    for question, answer, image in zip(*asked, strict=True):
        if official or (image % 5 == 0) == (split == "validation"):
            groups.setdefault(_icon_group(question, answer), []).append((question, answer, image))
    for group in groups.values():
        rng.shuffle(group)
    left = {name: cycle(group) for name, group in groups.items()}
    chosen = [next(left[name]) for name, _ in zip(cycle(ICON_TURNS), range(size), strict=False)]
    rng.shuffle(chosen)
    return [(_open(str(paths[image])), (question, answer)) for question, answer, image in chosen]


def _icon_group(question: str, answer: str) -> str:
    words = question.rstrip("?").split()
    if words[0] == "what":
        return "color" if "color" in words else "shape"
    about = "color" if words[-1] == "shape" or " shape " in question else "kind"
    return f"{'negated' if {'not', 'no'} & set(words) else 'plain'} {about} {answer}"


@cache
def _open(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
