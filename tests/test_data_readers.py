"""Every form that samples come in, and what is refused about each."""

from __future__ import annotations

import json
import os
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cllava_fast as cf
from cllava_fast.data import Sample, Stream, Task, read_samples
from cllava_fast.data.encode import Collator, Encoder, ImageFeatures, LazyExamples
from cllava_fast.data.stream import fingerprint
from cllava_fast.evaluate.evaluation import references_of
from cllava_fast.evaluate.scores import grounding_accuracy
from tests.train_helpers import CONFIG, arguments

SHORT = "{question}\nAnswer the question using a single word or phrase."


def write(path: Path, records: Any) -> Path:
    """JSON, or JSON Lines, by the suffix."""
    lines = "\n".join(json.dumps(record) for record in records) if path.suffix == ".jsonl" else json.dumps(records)
    path.write_text(lines, encoding="utf-8")
    return path


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


LLAVA = [
    {"id": "one", "image": "a.png", "conversations": turns("<image>\nWhat is it?", "A square.")},
    {"id": "two", "image": "coco/b.png", "conversations": turns("What is it?\n<image>", "Blue.", "Sure?", "Yes.")},
    {"id": "three", "conversations": turns("Say hi.", "Hi!")},
    {"conversations": [{"from": "system", "value": "Be brief."}, *turns("What means <image> in LLaVA?", "A mark.")]},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_conversations(folder: Path, suffix: str) -> None:
    samples = read_samples(write(folder / f"train{suffix}", LLAVA), folder / "images")
    images = folder / "images"
    assert list(samples[:3]) == [
        Sample("What is it?", "A square.", images / "a.png", "one"),
        Sample("Sure?", "Yes.", images / "coco" / "b.png", "two", history=(("What is it?", "Blue."),)),
        Sample("Say hi.", "Hi!", None, "three"),
    ]
    last = samples[-1]
    assert (last.system, last.instruction, last.answer) == ("Be brief.", "What means <image> in LLaVA?", "A mark.")
    assert last.id == "train: record 3"
    assert len(samples) == 4 and samples[0].open_image().getpixel((0, 0)) == (255, 0, 0)
    Stream([Task("a", samples, samples)])


def test_a_leading_answer_is_left_out_as_llava_does(tmp_path: Path) -> None:
    record = {"conversations": [{"from": "gpt", "value": "Hello"}, *turns("Say hi.", "Hi!")]}
    assert read_samples([record])[0].history == () and read_samples([record])[0].instruction == "Say hi."


def test_a_system_text_beside_conversations() -> None:
    said, turn = {"conversations": turns("Q?", "A")}, {"from": "system", "value": "Be brief."}
    both = {"conversations": [turn, *turns("Q?", "A")]}
    samples = read_samples([said | {"system": "Be brief."}, both | {"system": "Be brief.\n", "history": []}, both])
    assert [s.system for s in samples] == ["Be brief."] * 3
    assert read_samples([said | {"system": ""}])[0].system == ""


def test_question_files(folder: Path) -> None:
    records = [
        {"question_id": 7, "image": "./a.png", "text": "What is it?", "answer": "square"},
        {"question_id": "8", "image": "a.png", "text": "<image>\nWhere?", "answer_bbox": "[0.1, 0.2, 0.3, 0.4]"},
        {"question_id": 9, "question": "How many?", "answer": 3},
        {"id": "x", "question": "Who?", "answers": ["Ann", "Bob", "Bob"]},
        {"id": "y", "question": "Who?", "answer": "Ann", "answers": [{"answer": "Bob", "id": 1}, {"answer": "Bob"}]},
        {"id": "z", "instruction": "And?", "answer": "no", "history": [["Who?", "Ann"]], "system": "S"},
    ]
    for suffix in (".json", ".jsonl"):
        a, b, c, d, e, f = read_samples(write(folder / f"test{suffix}", records), folder / "images", SHORT)
        assert a == Sample(SHORT.replace("{question}", "What is it?"), "square", folder / "images" / "a.png", "7")
        assert b.instruction == SHORT.replace("{question}", "Where?") and b.answer == "[0.1, 0.2, 0.3, 0.4]"
        assert (c.answer, c.references, c.image) == ("3", (), None)
        assert (d.answer, d.references) == ("Bob", ("Ann", "Bob", "Bob"))
        assert (e.answer, e.references) == ("Ann", ("Bob", "Bob"))
        assert (f.history, f.system) == ((("Who?", "Ann"),), "S")


def test_references_are_what_evaluation_accepts() -> None:
    """One is kept as several are, in either form; what is learned stays the answer."""
    talk = {"conversations": turns("Who?", "Ann", "Which?", "It is B.")}
    asked = {"question": "Which?", "answer": "It is B."}
    for record in (talk, asked, {**talk, "answer": "It is B."}):
        for name in ("references", "answers"):
            (sample,) = read_samples([{**record, name: ["B"]}])
            assert (sample.answer, references_of(sample)) == ("It is B.", ("B",))
            (sample,) = read_samples([{**record, name: [{"answer": "B"}, {"answer": "It"}, {"answer": "B"}]}])
            assert (sample.answer, references_of(sample)) == ("It is B.", ("B", "It", "B"))
            for same in ([], ["It is B."], "It is B."):
                assert read_samples([{**record, name: same}])[0].references == ()
    (sample,) = read_samples([{"conversations": turns("Where?", "There."), "answer_bbox": "[0, 0, 1, 1]"}])
    assert references_of(sample) == ("[0, 0, 1, 1]",)


def test_numbers_become_texts() -> None:
    """Whole ones without a point: a data set makes 3.0 of 3 where another row has none."""
    numbers = ((3, "3"), (3.0, "3"), (2.50, "2.5"), (-0.0, "0"), (1e-7, "1e-07"), ("3.0", "3.0"), (2**70, str(2**70)))
    for number, text in numbers:
        samples = read_samples([{"question": "Q?", "answer": number}, {"question": "Q?", "answers": [number]}])
        assert [sample.answer for sample in samples] == [text] * 2
    (sample,) = read_samples([{"question": "Q?", "answers": [3, "3", {"answer": 3.0}, 4]}])
    assert (sample.answer, sample.references) == ("3", ("3", "3", "3", "4"))


def test_a_box_of_numbers_is_one_answer() -> None:
    a, b, c = read_samples([{"question": "Where?", "answer_bbox": box} for box in BOXES])
    assert (a.answer, a.references) == ("[0.1, 0.2, 0.3, 1]", ()) and b.answer == "[0, 0, 1, 1]"
    assert c.references == ("[0, 0, 1, 1]", "[0, 0, 2, 2]")
    assert grounding_accuracy("[0.1, 0.2, 0.3, 0.9]", [a.answer]) == 1.0


def test_a_list_of_answers_beside_references_is_what_is_learned() -> None:
    record = {"question": "Q?", "answer": ["x", "y", "y"], "references": ["z", "z"]}
    assert [(s.answer, s.references) for s in read_samples([record])] == [("y", ("z", "z"))]


def test_nan_is_nothing() -> None:
    """As pandas writes what a row lacks."""
    nan = float("nan")
    lacks = dict.fromkeys(("id", "image", "images", "system", "history", "conversations", "instruction"), nan)
    (sample,) = read_samples([{"question": "Q?", "answer": nan, "answers": ["x", "y", "y"], **lacks}])
    assert (sample.answer, sample.references, sample.id) == ("y", ("x", "y", "y"), "samples: record 0")
    with pytest.raises(ValueError, match="record 0 has no answer"):
        read_samples([{"question": "Q?", "answer": nan}])


def test_a_prompt_is_no_format_string() -> None:
    sample = read_samples([{"question": "{answer} {0.__class__}?", "answer": "x"}], prompt="{question} {1} {answer}")[0]
    assert sample.instruction == "{answer} {0.__class__}? {1} {answer}"


@pytest.mark.parametrize("name", ["choices", "options"])
def test_a_place_among_choices_is_no_answer(name: str) -> None:
    record = {"question": "which is larger?", name: ["the cat", "the dog"], "answer": 1}
    with pytest.raises(
        ValueError, match=r"record 1: answer is 1, a place in \['the cat', 'the dog'\], which no prompt"
    ):
        read_samples([GOOD, record])
    assert [sample.answer for sample in read_samples([{**record, "answer": "B"}, {**GOOD, "answer": 1}])] == ["B", "1"]


@pytest.mark.parametrize("name", ["video", "videos"])
def test_videos_are_not_read_as_text_alone(folder: Path, name: str) -> None:
    for value in ("a.mp4", ["a.mp4"]):
        with pytest.raises(ValueError, match=f"record 1 has '{name}' and no image; streams hold images, not videos"):
            read_samples([GOOD, {**GOOD, name: value}], folder / "images")
        assert read_samples([{**GOOD, name: value, "image": "a.png"}], folder / "images")[0].image is not None
    assert read_samples([{**GOOD, name: None}])[0].image is None


def test_lists_of_records_and_samples(folder: Path) -> None:
    own = Sample("What?", "It.", Image.new("RGB", (4, 4)))
    picture = Image.new("L", (4, 4))
    a, b, c = read_samples(
        [own, {"question": "Q?", "answer": "A", "image": picture}, {"question": "Q?", "answer": "A", "image": "a.png"}],
        folder / "images",
    )
    assert a is own and b.image is picture and c.image == folder / "images" / "a.png" and c.id == "samples: record 2"


def test_a_folder_of_classes(folder: Path) -> None:
    images = folder / "images"
    (images / "a.png").unlink()
    for name in ("Persian cat/2.jpg", "Persian cat/1.PNG", "beagle/1.png"):
        (images / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(images / name)
    samples = read_samples(images, prompt="What is the object in the image?")
    expected = ["Persian cat/1.PNG", "Persian cat/2.jpg", "beagle/1.png", "coco/b.png"]
    assert [s.id for s in samples] == expected and {s.instruction for s in samples} == {
        "What is the object in the image?"
    }
    assert [s.answer for s in samples] == [name.split("/")[0] for name in expected]
    with pytest.raises(ValueError, match="needs the question itself"):
        read_samples(images)
    with pytest.raises(ValueError, match="takes no images"):
        read_samples(images, images, "What?")
    (images / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no image; expected files of BMP, GIF, JPEG"):
        read_samples(images, prompt="What?")


def test_no_image_of_a_folder_of_classes_is_lost(tmp_path: Path) -> None:
    cat, picture = tmp_path / "cat", Image.new("RGB", (8, 8))
    cat.mkdir()
    for name, form in (("a.jpg", "JPEG"), ("b.jfif", "JPEG"), ("c", "PNG"), ("d.dat", "WEBP"), ("e.jpg", "PNG")):
        picture.save(cat / name, form)
    (cat / ".hidden").write_text("")
    (tmp_path / "README").write_text("no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = read_samples(tmp_path, prompt="Which?")
    assert [s.id for s in samples] == ["cat/a.jpg", "cat/b.jfif", "cat/c", "cat/d.dat", "cat/e.jpg"]
    assert all(sample.image_size() == (8, 8) for sample in samples)
    for name in ("notes.txt", "f.heic"):
        (cat / name).write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.warns(UserWarning, match=r"2 files are no images and left out \(cat/f\.heic, cat/notes\.txt\)"):
        assert len(read_samples(tmp_path, prompt="Which?")) == 5
    for name in ("loose.png", "loose"):
        picture.save(tmp_path / name, "PNG")
        with pytest.raises(ValueError, match=f"holds the image '{name}' beside the folders; put it into"):
            read_samples(tmp_path, prompt="Which?")
        (tmp_path / name).unlink()
    (cat / "more").mkdir()
    with pytest.raises(ValueError, match="cat holds the folder 'more'; expected one folder for each answer"):
        read_samples(tmp_path, prompt="Which?")


GOOD = {"question": "Q?", "answer": "A"}


BOXES = ([0.1, 0.2, 0.3, 1], "[0, 0, 1, 1]", ["[0, 0, 1, 1]", "[0, 0, 2, 2]"])


BAD: list[tuple[Any, str]] = [
    ("text", r"record 1 is 'text'; expected an object with a question and an answer"),
    ({"id": "k", "question": "Q?"}, r"record 1 \(id 'k'\) has no answer; it has 'id', 'question', expected"),
    ({"answer": "A"}, r"record 1 has no question; .*columns=\{'question': its name\}"),
    ({"question": " ", "answer": "A"}, r"record 1: instruction is ''"),
    ({"question": "Q?", "answer": ""}, r"record 1: answer is ''"),
    ({"question": "Q?", "answer": ["A", None]}, r"record 1: answer is \['A', None\]; expected a text or a list"),
    ({"question": "Q?", "answer": True}, r"record 1: answer is True"),
    ({**GOOD, "answer": True, "answers": ["yes"]}, "record 1: answer is True; expected a text or a list of texts"),
    ({"question": "Q?", "answers": []}, "record 1 has no answer"),
    ({"question": "Q?", "answer_bbox": [1, 2, 3]}, r"answer_bbox is \[1, 2, 3\]; expected a text or a box of four"),
    ({"question": "Q?", "answer_bbox": 0.5}, "answer_bbox is 0.5; expected a text or a box of four numbers"),
    ({"question": ["Q?"], "answer": "A"}, r"a question is \['Q\?'\]; expected a text"),
    ({**GOOD, "history": [["a"]]}, r"history is \[\['a'\]\]; expected pairs"),
    ({**GOOD, "history": [["a", " "]]}, r"record 1: history is ' '"),
    ({**GOOD, "system": 1}, "system is 1; expected a text"),
    ({**GOOD, "image": ["a.png", "b.png"]}, "names 2 images; expected at most one"),
    ({**GOOD, "image": 5}, "image is 5; expected a path inside the image folder"),
    ({"question": "<image>\nQ?", "answer": "A"}, "has an <image> mark, but the record names no image"),
    ({"question": "<image>\n<image>Q?", "answer": "A", "image": "a.png"}, "2 <image> marks in one turn"),
    ({"conversations": turns("Q?", "A"), "answer": "B"}, "answer is 'B', and the last gpt turn, .*, is 'A'; expected"),
    (
        {"conversations": turns("Q?", "A"), "answer": ["B"], "answers": ["A"]},
        r"answer is \['B'\], and the last gpt turn",
    ),
    (
        {"conversations": turns("Q?", "A"), "history": [["Who?", "I."]]},
        "history is .* expected earlier turns in conversa",
    ),
    ({"conversations": turns("Q?", "A"), "system": 1}, "system is 1; expected a text"),
    (
        {"conversations": [{"from": "system", "value": "S"}, *turns("Q?", "A")], "system": "T"},
        "system is 'T', and the system turn 'S'; expected one of them",
    ),
    ({"conversations": turns("Q?", "A"), "references": [["A"]]}, r"references is \[\['A'\]\]; expected a text"),
    ({"conversations": []}, r"conversations is \[\]; expected a list of turns"),
    ({"conversations": turns("Q?")}, "the turns are user; expected human and gpt in turn, gpt at the end"),
    ({"conversations": turns("Q?", "A", "Q?")}, "the turns are user, assistant, user; expected"),
    ({"conversations": [*turns("Q?"), *turns("Q?", "A")]}, "the turns are user, user, assistant; expected"),
    ({"conversations": [{"from": "bot", "value": "Q?"}]}, r"turn 0 is \{'from': 'bot'.*expected an object with 'from'"),
    ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 is .*'value', a text"),
    ({"conversations": turns("Q?", "A", "<image>\nQ?", "A"), "image": "a.png"}, "in the first user turn"),
    ({"conversations": [{"from": "system", "value": "S"}]}, "the turns are none"),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_bad_record_is_named(folder: Path, record: Any, message: str) -> None:
    path = write(folder / "train.json", [GOOD, record])
    with pytest.raises(ValueError, match=message) as raised:
        read_samples(path, folder / "images")
    assert str(path) in str(raised.value)
    lines = write(folder / "train.jsonl", [GOOD, record])
    with pytest.raises(ValueError, match=message.replace("record 1", "line 2")) as raised:
        read_samples(lines, folder / "images")
    assert str(lines) in str(raised.value)


def test_files_that_hold_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": [1}')
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "Q?", "answer": "A"}\n\n{"question": "Q\xff"}\n')
    write(tmp_path / "b.json", {"data": [GOOD]})
    write(tmp_path / "lines.jsonl", [GOOD, GOOD]).rename(tmp_path / "lines.json")
    write(tmp_path / "list.json", [GOOD, GOOD]).rename(tmp_path / "list.jsonl")
    (tmp_path / "wide.jsonl").write_text("\ufeff" + json.dumps([GOOD], indent=1), encoding="utf-8")
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "nothing").mkdir()
    for name, message in [
        ("a.json", "a.json is no JSON in UTF-8"),
        ("a.jsonl", "a.jsonl: line 3 is no JSON in UTF-8"),
        ("b.json", r"b.json holds \{'data': .*; expected a list of records"),
        ("lines.json", r"lines.json is no JSON .*; a file of one record a line is called .jsonl"),
        ("list.jsonl", r"list.jsonl begins with a list; expected one record a line .* is called .json"),
        ("wide.jsonl", r"wide.jsonl begins with a list; expected one record a line"),
        ("a.csv", r"a.csv: expected .json, .jsonl, .parquet or a folder; got .csv"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_samples(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.json does not exist"):
        read_samples(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no folder of images for each answer"):
        read_samples(tmp_path / "nothing", prompt="What?")
    with pytest.raises(NotADirectoryError, match="image folder '.*none' does not exist"):
        read_samples(write(tmp_path / "c.json", [GOOD]), tmp_path / "none")
    with pytest.raises(ValueError, match="has no splits"):
        read_samples(tmp_path / "c.json", split="train")
    with pytest.raises(TypeError, match="the source is a dict"):
        read_samples({"question": "Q?", "answer": "A"})
    with pytest.raises(ValueError, match=r"columns\.quesion is unknown; did you mean question\?"):
        read_samples([GOOD], columns={"quesion": "q"})
    with pytest.raises(ValueError, match=r"expected a text with \{question\} in it"):
        read_samples([GOOD], prompt="Answer briefly.")


class TestImagePaths:
    @pytest.mark.parametrize(
        "name", ["/etc/hostname", "../secret.png", "coco/../../secret.png", "C:\\a.png", "..\\a.png"]
    )
    def test_a_path_out_of_the_folder(self, folder: Path, name: str) -> None:
        Image.new("RGB", (4, 4)).save(folder / "secret.png")
        path = write(folder / "train.jsonl", [{**GOOD, "id": "k", "image": name}])
        with pytest.raises(ValueError, match=r"line 1 \(id 'k'\): image is .*expected a path inside the image folder"):
            read_samples(path, folder / "images")

    @pytest.mark.parametrize("name", [".", "./", "{folder}/"])
    def test_the_folder_itself(self, folder: Path, name: str) -> None:
        images = folder / "images"
        with pytest.raises(ValueError, match=f"the image folder itself; expected a file in {images}"):
            read_samples([{**GOOD, "image": name.format(folder=images)}], images)

    def test_symbolic_links(self, folder: Path) -> None:
        images = folder / "images"
        (folder / "outside").mkdir()
        Image.new("RGB", (4, 4)).save(folder / "outside" / "secret.png")
        (images / "link.png").symlink_to(folder / "outside" / "secret.png")
        (images / "linked").symlink_to(folder / "outside")
        (images / "images2").symlink_to(images / "coco")
        (folder / "images-too").symlink_to(images)
        for name in ("link.png", "linked/secret.png"):
            with pytest.raises(ValueError, match="is a symbolic link out of the image folder"):
                read_samples([{**GOOD, "image": name}], images)
        with pytest.raises(ValueError, match="is a symbolic link out of the image folder"):
            read_samples(images, prompt="What?")
        for root, name in ((images, "images2/b.png"), (folder / "images-too", "a.png")):
            assert read_samples([{**GOOD, "image": name}], root)[0].open_image() is not None

    def test_a_neighbour_with_the_same_beginning_is_outside(self, folder: Path) -> None:
        (folder / "images2").mkdir()
        Image.new("RGB", (4, 4)).save(folder / "images2" / "s.png")
        (folder / "images" / "l").symlink_to(folder / "images2")
        with pytest.raises(ValueError, match="symbolic link"):
            read_samples([{**GOOD, "image": "l/s.png"}], folder / "images")

    def test_nothing_is_known_without_a_folder(self) -> None:
        with pytest.raises(ValueError, match="image is 'a.png', and no image folder is known; give images"):
            read_samples([{**GOOD, "image": "a.png"}])

    @pytest.mark.parametrize("suffix", [".json", ".jsonl"])
    def test_all_that_are_missing_are_counted(self, folder: Path, suffix: str) -> None:
        records = [{**GOOD, "image": f"{i}.png"} for i in range(7)] + [{**GOOD, "image": "a.png"}]
        path = write(folder / f"train{suffix}", records)
        with pytest.raises(FileNotFoundError, match="7 of 8 samples name an image that is not there in .*images") as e:
            read_samples(path, folder / "images")
        assert "0.png" in str(e.value) and "4.png" in str(e.value) and "5.png" not in str(e.value)


def test_repeated_ids_are_told_and_kept(tmp_path: Path) -> None:
    records = [{**GOOD, "id": name} for name in ("a", "b", "a", "a")]
    for suffix in (".json", ".jsonl"):
        with pytest.warns(UserWarning, match=r"2 ids come more than once \('a', 'a'\)"):
            assert len(read_samples(write(tmp_path / f"x{suffix}", records))) == 4


class TestLazy:
    def records(self, count: int) -> list[dict[str, Any]]:
        texts = ["plain", "ünïcode ✓", "line\nbreak", "x" * 300]
        return [{**GOOD, "id": str(i), "question": f"{texts[i % 4]} {i}?", "image": "a.png"} for i in range(count)]

    def test_any_order_gives_what_json_gives(self, folder: Path) -> None:
        records = self.records(200)
        expected = read_samples(write(folder / "a.json", records), folder / "images")
        lines = folder / "a.jsonl"
        write(lines, records)
        # a byte-order mark, other line ends, blank lines, no line end at the end of the file
        data = lines.read_bytes().replace(b"\n", b"\r\n", 50).replace(b"\n", b"\n\n  \n", 20)
        lines.write_bytes(b"\xef\xbb\xbf" + data)
        samples = pickle.loads(pickle.dumps(read_samples(lines, folder / "images")))
        assert not isinstance(samples, list) and len(samples) == 200
        order = list(range(-200, 200))
        random.shuffle(order)
        assert all(samples[i] == expected[i] for i in order)
        assert list(samples) == expected and samples[5:190:7] == expected[5:190:7]
        with pytest.raises(IndexError):
            samples[200]
        assert fingerprint(samples) == fingerprint(expected)

    def test_records_are_not_kept(self, folder: Path) -> None:
        import tracemalloc

        path = folder / "a.jsonl"
        with path.open("w") as file:
            for i in range(2000):
                file.write(json.dumps({**GOOD, "id": str(i), "question": "word " * 400, "image": "a.png"}) + "\n")
        size = path.stat().st_size
        tracemalloc.start()
        samples = read_samples(path, folder / "images")
        Stream([Task("a", samples, samples)])
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(samples) == 2000 and held < size / 20

    def test_images_of_many_sizes_are_not_kept_token_by_token(self, processor: Any, monkeypatch: Any) -> None:
        import tracemalloc

        tokens, mark = 3000, processor.image_token
        monkeypatch.setattr(
            type(processor), "__call__", lambda self, images, text: self.tokenizer(text.replace(mark, mark * tokens))
        )
        encoder = Encoder(processor)
        samples = [Sample("is it?", "no", Image.new("RGB", (width, 9))) for width in range(1, 41)]
        encoder.encode_one(samples.pop())
        tracemalloc.start()
        assert all(len(encoder.encode_one(sample).prompt_ids) > tokens for sample in samples)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < tokens * len(samples)  # bytes: less than one a token

    def test_what_was_checked_is_not_read_again(self, folder: Path, monkeypatch: Any) -> None:
        samples = read_samples(write(folder / "a.jsonl", self.records(5)), folder / "images")
        monkeypatch.setattr(type(samples), "at", lambda *args: pytest.fail("was read"))
        Stream([Task("a", samples, samples)])

    def test_examples_are_made_when_asked_for(self, folder: Path, processor: Any) -> None:
        records = self.records(6)
        samples = read_samples(write(folder / "a.jsonl", records), folder / "images")
        encoder = Encoder(processor)
        lazy, eager = encoder.encode(samples), encoder.encode(list(samples))
        assert isinstance(lazy, LazyExamples) and isinstance(eager, list) and len(lazy) == 6
        for i in (3, 0, -1):
            assert lazy[i].prompt_ids == eager[i].prompt_ids and lazy[i].answer_ids == eager[i].answer_ids
        assert [e.sample for e in lazy[1:3]] == list(samples[1:3])
        assert Collator(encoder, None, training=True)(lazy[:2])["pixel_values"].shape == (2, 3, 64, 64)

    def test_a_run_on_files_equals_one_on_lists(self, folder: Path, new_llava: Any, processor: Any) -> None:
        colors = ("red", "blue")
        records = [
            {"id": str(i), "image": ("a.png", "coco/b.png")[i % 2], "question": "which color?", "answer": colors[i % 2]}
            for i in range(16)
        ]
        samples = read_samples(write(folder / "a.jsonl", records), folder / "images")
        results = []
        for name, source in (("lazy", samples), ("list", list(samples))):
            args, task = arguments(folder / name, max_steps=3), Task("t", source, source)
            model = cf.patch(new_llava(), CONFIG, processor=processor)
            results.append(cf.ContinualTrainer(model, processor, Stream([task]), args).train())
        assert results[0].losses == results[1].losses
        assert results[0].accuracy_matrix == results[1].accuracy_matrix


def test_without_room_only_pooled_features_are_worth_the_vision_tower(folder: Path, llava: Any, processor: Any) -> None:
    images = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(6)]
    samples = [Sample("is it?", "no", image) for image in images]
    calls: list[int] = []
    handle = llava.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    features, encoder = ImageFeatures(limit=1), Encoder(processor)
    features.add(samples, encoder, llava, batch_size=2, pooled=False)
    assert len(calls) == 1, "it stops where nothing more can be kept"
    features.add(samples, encoder, llava, batch_size=2, pooled=True)
    assert len(calls) == 4 and features.pooled(samples, 128).shape == (6, 128)
    roomy = ImageFeatures()
    for pooled, expected in ((False, 7), (False, 7), (True, 10), (True, 10)):
        roomy.add(samples, encoder, llava, batch_size=2, pooled=pooled)
        assert len(calls) == expected, "what is there is not computed again, what is missing is"
    assert roomy.pooled(samples, 128).shape == (6, 128)
    handle.remove()


def test_names_are_checked_before_the_disk_is_asked(folder: Path, monkeypatch: Any) -> None:
    asked: list[str] = []
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **kw: asked.append(str(path)) or real(path, **kw))
    with pytest.raises(ValueError, match="expected a path inside"):
        read_samples([{**GOOD, "image": "../../etc/hostname"}], folder / "images")
    assert not any("hostname" in path for path in asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_samples([{**GOOD, "image": "a.png", "id": "a"}, {**GOOD, "image": "a.png", "id": "b"}], folder / "images")
