"""Scores of answers, one function a metric: what a prediction is worth, 0..1, against the answers that are accepted.

A task names its metric (``Task.metric``). To add one: a function of a prediction and its references, in ``SCORES`` as a
``Metric``. The function raises ValueError for references that it cannot read; predictions may be any text.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cllava_fast.names import nearest


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after ``normalize_answer``, else 0."""
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(reference) for reference in references))


def normalize_answer(text: str) -> str:
    """Lower case, single spaces, no quotes or brackets around it and no punctuation after it.

    Signs stay, so -5 is not 5; a text of punctuation alone stays as it is.
    """
    folded = _folded(text)
    return folded.lstrip(_AROUND).rstrip(_AROUND + _BEHIND) or folded


_AROUND = " \"'`*()[]{}“”„‟‘’‚‛«»‹›「」『』《》〈〉（）［］【】"
_BEHIND = ".,;:!?…。，、；：！？؟،؛।"


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Agreement with human answers: mean over all but one of them, in turn, of ``min(equal answers / 3, 1)``.

    The accuracy of VQA, TextVQA and VizWiz (Antol et al. 2015, arXiv:1505.00468; https://visualqa.org/evaluation.html),
    which come with ten answers a question. Below four answers fewer than three can be left: all that are left must be
    equal, and a single answer has to be met. Both sides are normalised by ``normalize_vqa``; of references the official
    script takes off the punctuation alone, and only where they differ.
    """
    answer = normalize_vqa(prediction)
    equal = sum(answer == normalize_vqa(reference) for reference in references)
    others = len(references) - 1
    if not others:
        return float(equal)
    needed = min(3, others)
    with_it_left_out, without = min((equal - 1) / needed, 1.0), min(equal / needed, 1.0)
    return (equal * with_it_left_out + (len(references) - equal) * without) / len(references)


_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've he'd
""".split()
# with any one of its apostrophes missing: "couldnt've" and "couldn'tve" are "couldn't've"
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # an oddity of the official table


def normalize_vqa(text: str) -> str:
    """What VQA's official script makes of an answer: https://github.com/GT-Vision-Lab/VQA, ``vqaEval.py``.

    Punctuation goes (beside a space, or where the text holds a number such as 1,000, without leaving a space), number
    words become digits, articles go, and contractions get their apostrophes.
    """
    text = " ".join(_composed(text).split())
    grouped = re.search(r"\d,\d", text) is not None
    plain = text
    for sign in _PUNCTUATION:
        drop = grouped or f"{sign} " in text or f" {sign}" in text
        plain = plain.replace(sign, "" if drop else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if a number lies within 5 % of a reference, or another text equals it; for charts.

    Masry et al. 2022 (ChartQA, arXiv:2203.10244, section 5.1), as published scores compute it: 12 % is the number 0.12.
    Beyond that, thousands may be separated (1,200), a reference of 0 is met by any form of 0, and texts are compared
    after ``normalize_answer``.
    """
    return float(any(_relaxed_equal(prediction, reference) for reference in references))


def _relaxed_equal(prediction: str, reference: str) -> bool:
    found, wanted = _number(prediction), _number(reference)
    if found is None or wanted is None:
        return normalize_answer(prediction) == normalize_answer(reference)
    # 105 is within 5 % of 100, and 1.05 of 1, whatever floats make of them
    return abs(found - wanted) <= 0.05 * abs(wanted) * (1 + 1e-9)


def _number(text: str) -> float | None:
    text = normalize_answer(text)
    body = text.removesuffix("%").rstrip()
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", body):
        body = body.replace(",", "")
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", body, re.ASCII):
        return None
    value = float(body) / (100.0 if text.endswith("%") else 1.0)
    return value if math.isfinite(value) else None


def anls(prediction: str, references: Sequence[str]) -> float:
    """``1 - edit distance / longer length``, 0 where that is below 0.5; the best over the references; for documents.

    Biten et al. 2019 (arXiv:1905.13648), as DocVQA's official evaluation computes it (https://rrc.cvc.uab.es/?ch=17):
    lower case, single spaces, and exactly 0.5 still counts.
    """
    answer = _folded(prediction)
    best = max(_similarity(answer, _folded(reference)) for reference in references)
    return best if best >= 0.5 else 0.0


def _folded(text: str) -> str:
    return " ".join(_composed(text).lower().split())


def _composed(text: str) -> str:
    """Unicode's NFC: a letter with its accent is one character, however it was written."""
    return unicodedata.normalize("NFC", text)


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    if a == b:
        return 1.0
    if 2 * abs(len(a) - len(b)) > longer:
        return 0.0  # as good as: it cannot reach 0.5
    return 1.0 - _edit_distance(a, b) / longer


def _edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions, 1 each."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def option_letter(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction names the option of a reference, else 0; for multiple choice.

    Lu et al. 2022 (ScienceQA, arXiv:2209.09513). Both may say "B", "(B)", "'B'", "b.", "B. text" or "The answer is B.".
    """
    wanted = {_known_option(reference) for reference in references}
    return float(_option(prediction) in wanted)


# a letter that stands for an option, not the article or a word's first one: "A dog" and "the answer is a dog" name none
_FIRST = re.compile(r"""[\s"'*(\[]*([A-Za-z])(?:[)\]*]|[.:,](?!\w)|\s*(?:\n|$))""")
_SAID = re.compile(
    r"""\b(?i:answer(?:\s+is|\s*:)+)[\s"'*(\[]*([A-HJ-Z](?![\w'])|[A-Za-z](?=[)\]*,:;]|\.(?!\w)|\s*$))"""
)
_QUOTED = re.compile(r"""(?<!\w)(["'])([A-Za-z])\1(?!\w)""")


def _option(text: str) -> str | None:
    text = _QUOTED.sub(r"(\2)", text)  # in quotes it stands for an option as it does in brackets
    said = {letter.upper() for letter in _SAID.findall(text)}
    if said:
        return said.pop() if len(said) == 1 else None
    first = _FIRST.match(text)
    return first[1].upper() if first else None


def _known_option(reference: str) -> str:
    option = _option(reference)
    if option is None:
        raise ValueError(f"reference {reference[:80]!r} names no option; expected 'B', '(B)', 'B. text' or 'Answer: B'")
    return option


def grounding_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the predicted box ``[x1, y1, x2, y2]`` overlaps a reference by an IoU of at least 0.5, else 0.

    The accuracy of RefCOCO (Kazemzadeh et al. 2014; Yu et al. 2016, arXiv:1608.00272), and of CoIN's Grounding task,
    whose script wants more than 0.5. Both boxes are in one unit, relative or pixels. The first four numbers in brackets
    count, or four numbers alone.
    """
    boxes = [_known_box(reference) for reference in references]
    box = _box(prediction)
    return float(box is not None and any(_iou(box, other) >= 0.5 for other in boxes))


Box = tuple[float, float, float, float]
_FLOAT = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
_FOUR = ",".join([_FLOAT] * 4)


def _box(text: str) -> Box | None:
    found = re.search(rf"[\[(]{_FOUR}[\])]", text) or re.fullmatch(rf"{_FOUR}\.?\s*", text)
    if found is None:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _known_box(reference: str) -> Box:
    box = _box(reference)
    if box is None:
        raise ValueError(
            f"reference {reference[:80]!r} is no box; expected '[x1, y1, x2, y2]' with x1 < x2 and y1 < y2"
        )
    return box


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words; the best over the references; for descriptions.

    Lin 2004 (https://aclanthology.org/W04-1013), with precision and recall of one weight, lower-case words of letters
    and digits, with their marks, and no stemming. What stands without spaces is one word.
    """
    words = _words(prediction)
    return max(_lcs_f1(words, _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    words = ""
    for letter in _composed(text).lower():
        # a vowel sign belongs to its letter, though \w leaves it out
        mark = unicodedata.category(letter)[0] == "M" and words[-1:].strip()
        words += letter if letter.isalnum() or mark else " "
    return words.split()


def _lcs_f1(a: list[str], b: list[str]) -> float:
    if a == b:
        return float(bool(a))
    row = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if left == right else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


class Metric(NamedTuple):
    """``metric(predictions, references)`` is the mean score of predictions, each with the answers it may equal."""

    score: Callable[[str, Sequence[str]], float]
    title: str  # in tables

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The mean of ``each``; ValueError also where no prediction came."""
        scores = self.each(predictions, references)
        if not scores:
            raise ValueError("no prediction came; expected at least one")
        return sum(scores) / len(scores)

    def each(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """One score in 0..1 for each prediction.

        Raises:
            ValueError: unequal numbers of predictions and references, a prediction without references, references
                that the metric cannot read, or a score beyond 0..1.
        """
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions came with {len(references)} references; expected one of each"
            )
        for position, accepted in enumerate(references):
            if isinstance(accepted, str) or not accepted:
                raise ValueError(f"references[{position}] is {accepted!r}; expected a list of at least one text")
        scores = [
            self.score(prediction, accepted) for prediction, accepted in zip(predictions, references, strict=True)
        ]
        for position, score in enumerate(scores):
            if not 0 <= score <= 1:
                raise ValueError(f"{self.title}: the score of predictions[{position}] is {score}; expected one in 0..1")
        return scores


SCORES = {
    "exact_match": Metric(exact_match, "exact match"),
    "vqa_accuracy": Metric(vqa_accuracy, "VQA accuracy"),
    "relaxed_accuracy": Metric(relaxed_accuracy, "relaxed accuracy"),
    "anls": Metric(anls, "ANLS"),
    "option_letter": Metric(option_letter, "option letter"),
    "grounding_accuracy": Metric(grounding_accuracy, "IoU ≥ 0.5"),
    "rouge_l": Metric(rouge_l, "ROUGE-L"),
}


def find_metric(name: str) -> Metric:
    """The metric of that name. Raises ValueError for an unknown one, with the nearest name, and TypeError for what is
    no ``Metric``."""
    if name not in SCORES:
        raise ValueError(f"metric is {name!r}; {nearest(str(name), SCORES)}")
    metric: object = SCORES[name]
    if not isinstance(metric, Metric):
        raise TypeError(f'SCORES["{name}"] is a {type(metric).__name__}; expected Metric(function, "its title")')
    return metric
