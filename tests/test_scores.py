"""Scores of answers by hand-computed examples, and what is refused."""

from __future__ import annotations

import pytest

from cllava_fast.evaluate import scores
from cllava_fast.evaluate.scores import SCORES, find_metric


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("Red.", ["red"], 1.0),
        (" dark  blue", ["Dark blue"], 1.0),
        ('"Red".', ["red"], 1.0),
        ("**(red)**", ["red"], 1.0),
        ("“red”", ["red"], 1.0),
        ("«red».", ["red"], 1.0),
        ("red。", ["red"], 1.0),
        ("（red）！", ["red"], 1.0),
        ("red…", ["red"], 1.0),
        ("(red.).", ["red"], 1.0),
        ("…", ["。"], 0.0),
        ("$5", ["5"], 0.0),
        ("red green", ["red"], 0.0),
        ("blue", ["red", "blue"], 1.0),  # any of them
        ("-5", ["5"], 0.0),
        ("50%", ["50"], 0.0),
        (".5", ["5"], 0.0),
        ("?", ["!"], 0.0),
        ("", ["red"], 0.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], score: float) -> None:
    assert scores.exact_match(prediction, references) == score


@pytest.mark.parametrize("name", ["exact_match", "vqa_accuracy", "relaxed_accuracy", "anls", "rouge_l"])
def test_a_letter_and_its_accent_are_one_however_they_are_written(name: str) -> None:
    decomposed, composed = "pa\u0302te\u0301", "p\xe2t\xe9"
    for prediction, reference in ((composed, decomposed), (decomposed, composed)):
        assert SCORES[name]([prediction], [[reference]]) == 1.0
    assert SCORES[name](["pate"], [[composed]]) < 1.0


@pytest.mark.parametrize(
    ("equal", "score"),
    # k of ten answers are equal: k times min((k - 1) / 3, 1), 10 - k times min(k / 3, 1), over ten
    [(0, 0.0), (1, 9 / 3 / 10), (2, (2 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_answers(equal: int, score: float) -> None:
    references = ["red"] * equal + [f"other {i}" for i in range(10 - equal)]
    assert scores.vqa_accuracy("red", references) == pytest.approx(score)


def test_vqa_accuracy_normalises_references_as_answers() -> None:
    assert scores.vqa_accuracy("None.", ["none"] * 10) == scores.vqa_accuracy("two", ["the two"] * 10) == 1.0


def test_vqa_accuracy_of_few_answers() -> None:
    assert scores.vqa_accuracy("red", ["red"]) == 1.0 and scores.vqa_accuracy("red", ["blue"]) == 0.0
    assert scores.vqa_accuracy("red", ["red", "blue"]) == 0.5  # met by one that is left of two, and not by the other
    assert scores.vqa_accuracy("red", ["red"] * 3) == 1.0
    # one of three: left out once (0), one of two equal otherwise
    assert scores.vqa_accuracy("red", ["red", "blue", "green"]) == pytest.approx(2 * 0.5 / 3)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two dogs.", "2 dogs"),
        ("a bus on an island", "bus on island"),
        ("none", "0"),
        ("1,000 people", "1000 people"),
        ("1,000-2,000", "10002000"),  # with such a number every sign goes without a trace
        ("black/white", "black white"),
        ("black - white", "black white"),
        ("well-known", "well known"),
        ("3.5 m.", "3.5 m"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("shed", "shed"),  # a word of its own, as are hell, well and ill
        ("let's go", "let's go"),
        ("yes\n", "yes"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text: str, normal: str) -> None:
    assert scores.normalize_vqa(text) == normal


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("105", "100", True),
        ("1.05", "1", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("94.9", "100", False),
        ("-100", "100", False),
        ("-104", "-100", True),
        ("1,234", "1234", True),
        ("1,2", "12", False),
        ("$12", "12", False),
        ("12%", "12.5%", True),
        ("12%", "0.12", True),
        ("12%", "12", False),
        ("0.0", "0", True),
        ("0.01", "0", False),
        ("12.", "12", True),
        ("1e2", "100", True),
        ("Yes.", "yes", True),
        ("2019 or 2020", "2019", False),
        ("nan", "nan", True),  # a text
        ("inf", "100", False),
    ],
)
def test_relaxed_accuracy(prediction: str, reference: str, right: bool) -> None:
    assert scores.relaxed_accuracy(prediction, [reference]) == right


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("Invoice 42", ["invoice  42"], 1.0),
        ("hello", ["hallo"], 0.8),  # one of five letters
        ("kitten", ["sitting"], 4 / 7),  # three edits, seven letters
        ("abcd", ["abxy"], 0.5),  # exactly the threshold
        ("abcd", ["axyz"], 0.0),
        ("ab", ["abcde"], 0.0),
        ("", ["a"], 0.0),
        ("hello", ["xxxxx", "hallo", "hell"], 0.8),
    ],
)
def test_anls(prediction: str, references: list[str], score: float) -> None:
    assert scores.anls(prediction, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ('"B"', "B"),
        ("'b'", "B"),
        ("'B'.", "B"),
        ("B. a text", "B"),
        ("b) a text", "B"),
        ("B: a text", "B"),
        ("B\nBECAUSE: it is", "B"),
        ("The answer is B.", "B"),
        ("The answer is: B", "B"),
        ("The answer is: **b**", "B"),
        ("The answer is 'B'.", "B"),
        ("the answer is (b).", "B"),
        ("It floats. The answer is B because ice is light.", "B"),
        ("SOLUTION: ice is light. ANSWER: B", "B"),
        ("A dog", None),
        ('"A dog"', None),
        ("A's", None),
        ("B'nai", None),
        ("rock'B'roll", None),
        ("a", "A"),
        ("The answer is a dog", None),
        ("The answer is: a dog", None),
        ("The answer is: I'm not sure", None),
        ("The answer is A. Or the answer is B.", None),
        ("I'm not sure", None),
        ("the answer is I think B", None),
        ("U.S. flag", None),
        ("Because", None),
        ("", None),
    ],
)
def test_option_letters(prediction: str, letter: str | None) -> None:
    got = [option for option in "ABCDEIU" if scores.option_letter(prediction, [option])]
    assert got == ([letter] if letter else [])
    if letter:  # references may be written alike
        assert scores.option_letter("B", [prediction]) == (letter == "B")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("[0.0, 0.0, 1.0, 1.0]", True),
        ("[0, 0, 1, 0.5]", True),  # half of it: IoU 0.5
        ("[0, 0, 1, 0.49]", False),
        ("[0.5, 0, 1.5, 1]", False),  # 0.5 / 1.5
        ("The box is [0.1,0.1,.9,.9].", True),
        ("0, 0, 1, 1", True),
        ("[2, 2, 3, 3]", False),
        ("[1, 1, 0, 0]", False),  # no box
        ("[0, 0, 1]", False),
        ("left", False),
    ],
)
def test_grounding_accuracy(prediction: str, right: bool) -> None:
    assert scores.grounding_accuracy(prediction, ["[0, 0, 1, 1]"]) == right
    assert scores.grounding_accuracy(prediction, ["[7, 7, 8, 8]", "[0, 0, 1, 1]"]) == right


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("the cat sat", ["The cat sat!"], 1.0),
        # Lin's own examples: "police the gunman", and "the gunman", of four words each
        ("police kill the gunman", ["police killed the gunman"], 0.75),
        ("the gunman kill police", ["police killed the gunman"], 0.5),
        ("a cat", ["cat", "dog"], 2 / 3),  # precision 1/2, recall 1
        ("", ["cat"], 0.0),
        ("...", ["???"], 0.0),
        ("\u0915\u0940", ["\u0915\u093e"], 0.0),  # one letter with two vowel signs
        ("I \u2764\ufe0f cats", ["i cats"], 1.0),
        ("\u0915\u0940 cat_", ["\u0915\u0940, cat"], 1.0),
    ],
)
def test_rouge_l(prediction: str, references: list[str], score: float) -> None:
    assert scores.rouge_l(prediction, references) == pytest.approx(score)


def test_a_metric_is_the_mean_over_predictions() -> None:
    predictions, references = ["hello", "hello", "x"], [["hallo"], ["hello"], ["abc"]]
    assert SCORES["anls"].each(predictions, references) == pytest.approx([0.8, 1.0, 0.0])
    assert SCORES["anls"](predictions, references) == pytest.approx(0.6)


def test_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"metric is 'exact-match'; did you mean exact_match\?"):
        find_metric("exact-match")
    with pytest.raises(ValueError, match=r"metric is 'zzz'; expected one of anls, exact_match"):
        find_metric("zzz")


def test_a_bare_function_is_no_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "mine", lambda prediction, references: 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r'SCORES\["mine"\] is a function; expected Metric\(function, "its title"\)'):
        find_metric("mine")


@pytest.mark.parametrize("name", SCORES)
def test_what_every_metric_refuses(name: str) -> None:
    metric = find_metric(name)
    with pytest.raises(ValueError, match="1 predictions came with 2 references"):
        metric(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="no prediction came"):
        metric([], [])
    with pytest.raises(ValueError, match=r"references\[0\] is \(\)"):
        metric(["a"], [()])
    with pytest.raises(ValueError, match=r"references\[0\] is 'abc'; expected a list"):
        metric(["a"], ["abc"])


@pytest.mark.parametrize("score", [200.0, -0.1, float("nan")])
def test_a_score_beyond_its_range_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match=f"mine: the score of predictions.0. is {score}; expected one in 0..1"):
        scores.Metric(lambda prediction, accepted: score, "mine")(["a"], [["b"]])


def test_references_that_a_metric_cannot_read_are_refused() -> None:
    with pytest.raises(ValueError, match="reference 'a cat' names no option"):
        scores.option_letter("A", ["a cat"])
    with pytest.raises(ValueError, match="reference 'left' is no box"):
        scores.grounding_accuracy("[0, 0, 1, 1]", ["left"])
