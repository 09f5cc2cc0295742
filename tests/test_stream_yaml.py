"""Streams from YAML: what is refused before anything is read, and the streams that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import cllava_fast as cf
from cllava_fast.data import load_stream, ready_streams
from cllava_fast.data.load import READY
from cllava_fast.evaluate.scores import SCORES

PROMPT = "{question}\nAnswer briefly."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """charts.json and forms.jsonl with images in images/, digits/<answer>/1.png."""
    for name in ("images/a.png", "digits/3/1.png", "digits/8/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    record = {"id": "1", "image": "a.png", "question": "Which bar?", "answer": "red"}
    (tmp_path / "charts.json").write_text(json.dumps([record]))
    (tmp_path / "forms.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def spec(**task: Any) -> dict[str, Any]:
    first = {"name": "charts", "train": "charts.json", "test": "forms.jsonl", **task}
    return {"name": "mine", "images": "images", "tasks": [{k: v for k, v in first.items() if v is not None}]}


def save(folder: Path, content: Any) -> Path:
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_stream_of_three_forms(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = spec(prompt=PROMPT, validation="forms.jsonl")
    content["tasks"] += [
        {"name": "forms", "train": {"path": "forms.jsonl", "columns": {"question": "answer"}}, "test": "forms.jsonl"},
        {"name": "digits", "train": "digits", "test": "digits", "prompt": "Which digit?", "metric": "exact_match"},
    ]
    content |= {"model": "some/llava", "method": {"name": "lora"}, "training": {"output_dir": "x"}}
    stream = load_stream(save(folder, content))
    assert stream.name == "mine" and stream.task_names == ["charts", "forms", "digits"]
    charts, forms, digits = stream
    assert charts.train[0].instruction == "Which bar?\nAnswer briefly." and charts.validation[0].answer == "red"
    assert charts.train[0].image == folder / "images" / "a.png"
    assert forms.train[0].instruction == "red" and forms.test[0].instruction == "Which bar?"
    assert [s.answer for s in digits.test] == ["3", "8"] and digits.metric == "exact_match"

    # a mapping, and paths from elsewhere
    assert load_stream(content, base=folder).task_names == stream.task_names
    monkeypatch.chdir(folder)
    assert load_stream(content).task_names == stream.task_names
    (folder / "sub").mkdir()
    moved = folder / "sub" / "s.yaml"
    save(folder, content).rename(moved)
    with pytest.raises(FileNotFoundError, match=f"start from base='{folder / 'sub'}'"):
        load_stream(moved)
    assert cf.load_stream(moved, base=folder).name == "mine"
    assert cf.load_stream(save(folder / "sub", {**spec(), "base": ".."})).name == "mine"  # as a run's own says it


def test_a_tasks_own_images(folder: Path) -> None:
    (folder / "images").rename(folder / "other")
    stream = load_stream(spec(images="other") | {"images": None}, base=folder)
    assert stream.tasks[0].test[0].image == folder / "other" / "a.png"
    content = spec() | {"images": None}
    for name in ("charts.json", "forms.jsonl"):
        (folder / "other" / name).write_bytes((folder / name).read_bytes())
    content["tasks"][0] |= {"train": "other/charts.json", "test": str(folder / "other" / "forms.jsonl")}
    assert load_stream(content, base=folder).tasks[0].train[0].image == folder / "other" / "a.png", "beside the file"


WRONG: list[tuple[Any, str]] = [
    ([1], r"is \[1\]; expected a mapping with name, images, tasks"),
    (None, "is None; expected a mapping"),
    ({**spec(), "task": []}, r"task is unknown; did you mean tasks\?"),
    ({**spec(), "zzz": 1}, r"zzz is unknown; expected one of"),
    ({**spec(), "name": 3}, "name is 3; expected a text"),
    ({"tasks": []}, r"tasks is \[\]; expected a list of tasks"),
    ({"tasks": {"a": 1}}, "tasks is {'a': 1}; expected a list"),
    ({"tasks": ["a"]}, r"tasks\[0\] is 'a'; expected a mapping"),
    (spec(metrics="exact_match"), r"tasks\[0\]: metrics is unknown; did you mean metric\?"),
    (spec(metric="exact_mach"), r"tasks\[0\]: metric is 'exact_mach'; did you mean exact_match\?"),
    (spec(test=None), r"tasks\[0\] has no test; every task needs name, train and test"),
    (spec(name=7), r"tasks\[0\]: name is 7; expected a text"),
    (spec(train=["a.json"]), r"tasks\[0\]: train is \['a.json'\]; expected a path, or a mapping"),
    (spec(train={"file": "a"}), "train: file is unknown"),
    (spec(train={"split": "a"}), "train has no path"),
    (
        spec(train={"path": "a", "columns": {"questions": "q"}}),
        r"columns\.questions is unknown; did you mean question\?",
    ),
    (spec(train={"path": "a", "columns": {"question": 1}}), "columns: question is 1; expected a text"),
    (spec(prompt=["x"]), r"prompt is \['x'\]; expected a text"),
    ({"tasks": spec()["tasks"] * 2}, "the name 'charts' is taken"),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_a_wrong_stream_is_refused_before_its_files_are_sought(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_stream(save(tmp_path, content))
    assert "stream.yaml" in str(raised.value)


def test_what_is_measured_on_what_was_learned_is_said_once(folder: Path) -> None:
    content = spec(test="./charts.json")
    content["tasks"] += [
        {"name": "forms", "train": "forms.jsonl", "test": str(folder / "forms.jsonl")},
        {"name": "both", "train": "charts.json", "test": "forms.jsonl"},
    ]
    with pytest.warns(UserWarning) as warned:
        load_stream(content, base=folder)
    assert len(warned) == 1
    assert "train and test of ['charts', 'forms'] are one file" in str(warned[0].message)


@pytest.mark.parametrize(("name", "text"), [("none.json", "[]"), ("none.jsonl", "\n")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_file_is_named(folder: Path, name: str, text: str, split: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is empty; expected at least one {split} sample of task 'charts'"):
        load_stream(spec(**{split: name}), base=folder)
    assert len(load_stream(spec(validation=name), base=folder).tasks[0].validation) == 0


def test_a_prompt_without_a_place_for_the_question(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"charts.json: prompt is 'Why\?'; expected a text with {question} in it"):
        load_stream(spec(prompt="Why?"), base=folder)


def test_all_that_is_missing_is_named(folder: Path) -> None:
    content = spec(train="x/train.json", validation="x/val.json")
    content["images"] = "pictures"
    content["tasks"].append({"name": "b", "train": "forms.jsonl", "test": "none"})
    with pytest.raises(FileNotFoundError, match="4 files or folders are missing") as raised:
        load_stream(save(folder, content))
    said = str(raised.value)
    assert f"base={str(folder)!r}" in said
    lines = ("charts, train: x/train.json", "charts, validation: x/val.json", "image folder: pictures", "b, test: none")
    assert said.splitlines()[1:] == [f"  {line}" for line in lines]


def test_a_stream_that_is_nowhere() -> None:
    with pytest.raises(FileNotFoundError, match=r"stream 'coast-domian' is neither .*; did you mean coast-domain\?"):
        load_stream("coast-domian")
    with pytest.raises(FileNotFoundError, match="neither .*; expected one of coast-capability, .*coin"):
        load_stream("/zz/yy")


class TestReady:
    def test_which(self) -> None:
        assert ready_streams() == ["coast-capability", "coast-dataset", "coast-domain", "coin", "mllm-dcl", "ucit"]

    @pytest.mark.parametrize("name", ready_streams())
    def test_names_what_it_needs_and_loads_where_that_is(self, tmp_path: Path, name: str) -> None:
        content = yaml.safe_load((READY / f"{name}.yaml").read_text())
        assert content["name"] == name
        files = {task[split] for task in content["tasks"] for split in ("train", "test")}
        folders = {task.get("images") or content["images"] for task in content["tasks"]}
        with pytest.raises(FileNotFoundError, match=f"{name}: {len(files | folders)} files or folders") as raised:
            load_stream(name, base=tmp_path)
        assert all(f": {file}" in str(raised.value) for file in files | folders) and str(tmp_path) in str(raised.value)
        for folder in folders:
            (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(json.dumps([{"question": "Q?", "answer": "A"}]))
        stream = load_stream(name, base=tmp_path)
        assert stream.name == name and all(task.metric in SCORES for task in stream)

    @pytest.mark.parametrize(
        ("name", "order"),
        [
            ("coin", "ScienceQA TextVQA ImageNet GQA VizWiz Grounding VQAv2 OCR-VQA"),
            ("ucit", "ImageNet-R ArxivQA VizWiz IconQA CLEVR Flickr30k"),
            ("mllm-dcl", "RS Med AD Sci Fin"),
        ],
    )
    def test_tasks_come_in_the_order_of_the_benchmark(self, name: str, order: str) -> None:
        tasks = yaml.safe_load((READY / f"{name}.yaml").read_text())["tasks"]
        assert [task["name"] for task in tasks] == order.split()

    @pytest.mark.parametrize(
        ("name", "task"), [("coin", "TextVQA"), ("coast-dataset", "vqav2"), ("coast-dataset", "textvqa")]
    )
    def test_ten_human_answers_are_judged_as_they_agree(self, name: str, task: str) -> None:
        tasks = yaml.safe_load((READY / f"{name}.yaml").read_text())["tasks"]
        (spec,) = (spec for spec in tasks if spec["name"] == task)
        answers = ["red", *(f"other {i}" for i in range(9))]
        assert SCORES[spec.get("metric", "exact_match")](["red"], [answers]) == pytest.approx(0.3), "one of ten"

    def test_they_are_in_the_package(self) -> None:
        import tomllib

        root = Path(cf.__file__).parents[1]
        data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cllava_fast"]
        package = Path(cf.__file__).parent
        shipped = {path for pattern in data for path in package.glob(pattern)}
        assert set(READY.glob("*.yaml")) | set((package / "data" / "conversations").glob("*.jinja")) <= shipped
