"""Names of what a record holds: mapped, of others' files, misspelt, or two for one thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllava_fast.data import read_samples
from tests.test_data_readers import GOOD, turns, write


def test_columns_by_other_names() -> None:
    names = {"question": "query", "answer": "label"}
    (sample,) = read_samples([{"query": "What?", "label": "It.", "answer": 5}], columns=names)
    assert (sample.instruction, sample.answer) == ("What?", "It.")


@pytest.mark.parametrize(
    ("names", "instruction", "answer", "references"),
    [
        ({"question": "query"}, "Which bar?", "it", ("red", "blue")),
        ({"answer": "gold"}, "Be brief.", "blue", ()),
        ({"answers": "gold", "text": "query"}, "Which bar?", "blue", ()),
        ({"answer_bbox": "gold"}, "Be brief.", "blue", ()),
        ({"references": "gold"}, "Be brief.", "it", ("blue",)),
        ({"answer": "gold", "references": "answers"}, "Be brief.", "blue", ("red", "blue")),
        ({"question_id": "query"}, "Be brief.", "it", ("red", "blue")),
        ({"conversations": "talk"}, "Who?", "Ann", ("red", "blue")),
    ],
)
def test_what_is_mapped_wins(names: Any, instruction: str, answer: str, references: Any) -> None:
    record = {"query": "Which bar?", "instruction": "Be brief.", "gold": "blue", "answers": ["red", "blue"]}
    record |= {"id": "1", "talk": turns("Who?", "Ann")} | ({} if "conversations" in names else {"answer": "it"})
    (sample,) = read_samples([record], columns=names)
    assert (sample.instruction, sample.answer, sample.references) == (instruction, answer, references)
    assert sample.id == ("Which bar?" if "question_id" in names else "1")


def test_a_mapped_question_beside_conversations() -> None:
    talk = {"conversations": turns("Who?", "Ann")}
    a, b = read_samples([{**talk, "query": "Which?", "answer": "It."}, talk], columns={"question": "query"})
    assert (a.instruction, a.answer, b.instruction, b.answer) == ("Which?", "It.", "Who?", "Ann")


@pytest.mark.parametrize("name", ["question", "instruction"])
def test_a_question_beside_conversations_is_the_one_that_they_ask(folder: Path, name: str) -> None:
    talk = {"conversations": turns("<image>\nWho?\nBe brief.", "Ann"), "image": "a.png", "answer": "Ann", "text": "Hm"}
    for same in ("Who?", "<image>\nWho?", "Who?\nBe brief.\n", "", None, float("nan")):
        assert read_samples([{**talk, name: same}], folder / "images") == read_samples([talk], folder / "images")
    within = {"conversations": turns("What is <image> here?\nBe brief.", "Ann"), "image": "a.png"}
    for same in ("What is <image> here?", "What is <image> here?\r\nBe brief.", "What is  here?"):
        assert read_samples([{**within, name: same}], folder / "images") == read_samples([within], folder / "images")
    longer = {"conversations": [*turns("Where?", "There"), *turns("Who?", "Ann")]}  # an earlier turn is read, too
    assert read_samples([{**longer, name: "Where?"}]) == read_samples([longer])
    record = {**talk, name: "Which?"}
    with pytest.raises(ValueError, match=rf"record 1: {name} is 'Which\?', and the last human turn .* 'Who\?"):
        read_samples([talk, record], folder / "images")
    for columns, asked in (({name: name}, "Which?"), ({"conversations": "conversations"}, "Who?\nBe brief.")):
        assert read_samples([record], folder / "images", columns=columns)[0].instruction == asked


def test_a_mapped_name_is_what_is_missing() -> None:
    for names in ({"answer": "labl"}, {"references": "labl"}):
        with pytest.raises(ValueError, match=r"record 0 has no answer; it has 'question', 'label', .*one of labl"):
            read_samples([{"question": "Q?", "label": "A"}], columns=names)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_columns_that_no_record_has(folder: Path, suffix: str) -> None:
    path = write(folder / f"a{suffix}", [GOOD, {**GOOD, "img": "a.png", "who": 7}])
    _, b = read_samples(path, folder / "images", columns={"image": "img", "id": "who"})
    assert b.image == folder / "images" / "a.png" and b.id == "7"
    for ours in ("image", "id", "system", "history", "references"):
        with pytest.raises(ValueError, match=rf"a{suffix}: columns=\{{'{ours}': 'imgg'\}} names what no record has"):
            read_samples(path, folder / "images", columns={"image": "img", ours: "imgg"})
    assert list(read_samples(write(folder / f"none{suffix}", []), columns={"id": "who"})) == []


@pytest.mark.parametrize("name", ["images", "image_path", "img", "Image", "imgae", "imge"])
def test_images_by_another_name(folder: Path, name: str) -> None:
    for value in ("a.png", ["a.png"]):
        record = {**GOOD, name: value}
        with pytest.raises(ValueError, match=rf"record 1 has '{name}' and no image; read it by columns=.*'{name}'"):
            read_samples([GOOD, record], folder / "images")
        assert read_samples([record], folder / "images", columns={"image": name})[0].image is not None
        assert read_samples([{**record, "image": "a.png"}], folder / "images")[0].image is not None
    assert all(s.image is None for s in read_samples([{**GOOD, name: None}, {**GOOD, name: []}]))
    assert read_samples([{**GOOD, "image_id": 7, "imageid": 7, "page": "a.png"}])[0].image is None


@pytest.mark.parametrize(
    ("name", "known", "value"),
    [
        ("histroy", "history", [["Who?", "Ann"]]),
        ("History", "history", [["Who?", "Ann"]]),
        ("sytem", "system", "Be brief."),
        ("System", "system", "Be brief."),
        ("reference", "references", ["B"]),
        ("Referencess", "references", ["B"]),
        ("Answers", "answers", ["B"]),
        ("conversation", "conversations", turns("Who?", "Ann")),
    ],
)
def test_a_misspelt_key_is_no_key_that_is_not_there(name: str, known: str, value: Any) -> None:
    record = {**GOOD, name: value}
    with pytest.raises(
        ValueError, match=rf"record 1 has '{name}' and no {known}; read it by columns=\{{'{known}': '{name}'\}}, or"
    ):
        read_samples([GOOD, record])
    for nothing in (None, "", [], float("nan")):
        assert read_samples([{**GOOD, name: nothing}]) == read_samples([GOOD])
    if known in ("history", "system", "references"):
        assert read_samples([record], columns={known: name}) == read_samples([{**GOOD, known: value}])
    if known != "conversations":
        assert read_samples([{**record, known: value}]) == read_samples([{**GOOD, known: value}])


def test_other_keys_are_left_alone() -> None:
    """Names that stand in published files, some of them like ours."""
    others = ("model", "dataset", "source", "answer_type", "answer_id", "Answer", "answered", "conversation_id", "turn")
    others += ("history_id", "preference", "preferences", "difference", "referring", "system_prompt", "story", "texts")
    others += ("questions", "instructions", "contexts", "category", "task", "split", "Id", "file_name", "metadata")
    others += ("answer1", "AnswerB")  # of two that are compared
    counts = dict.fromkeys(("reference", "conversation", "History"), 17)
    assert read_samples([{**GOOD, **dict.fromkeys(others, "x"), **counts}]) == read_samples([GOOD])
