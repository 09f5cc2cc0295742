"""`cllava-fast init`: the YAML it writes is what `train` reads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cllava_fast import cli
from cllava_fast.config import load_config
from cllava_fast.data import ready_streams
from cllava_fast.data.load import READY


def test_init_writes_a_file_that_train_understands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert cli.main(["init", str(file)]) == 0
    config = load_config(file)
    assert config.stream["name"] == "mine" and [task["name"] for task in config.stream["tasks"]] == ["charts", "forms"]
    assert config.training.output_dir == str(tmp_path / "runs/mine")
    before = file.read_text()
    assert cli.main(["init", str(file)]) == 1
    assert "exists" in capsys.readouterr().err and file.read_text() == before
    file.write_text(re.sub(r"^( +)#(?=\w)", r"\1", before, flags=re.MULTILINE))
    shown = load_config(file)
    assert (shown.model, shown.method, shown.training) == (config.model, config.method, config.training)


@pytest.mark.parametrize(
    "name",
    ["2024", "yes", "[1]", "a: b", "'q", "x #y", "- a", "~", "a\nb", "a\x1bb", "größe 大 🙂", "long " * 40],
)
def test_init_writes_a_file_of_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / f"{name}.yaml"
    assert cli.main(["init", str(file)]) == 0
    config = load_config(file)
    assert config.stream["name"] == name
    assert config.training.output_dir == str(tmp_path / "runs" / name)
    _, _, command = capsys.readouterr().out.partition("then: ")
    assert shlex.split(command) == ["cllava-fast", "train", str(file), "--model", "PATH"]


def test_init_finds_the_tasks_of_a_folder(tmp_path: Path) -> None:
    for name in ("a_train", "a_test", "b_train", "b_test"):
        (tmp_path / f"{name}.json").write_text("[]")
    (tmp_path / "images").mkdir()
    (tmp_path / "b_validation.jsonl").write_text("")
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "s.yaml"
    assert cli.main(["init", str(file), "--data", str(tmp_path)]) == 0
    stream = load_config(file).stream
    assert stream["images"] == "../images"
    assert stream["tasks"] == [
        {"name": "a", "train": "../a_train.json", "test": "../a_test.json"},
        {"name": "b", "train": "../b_train.json", "test": "../b_test.json", "validation": "../b_validation.jsonl"},
    ]


def test_init_tells_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("a_train.json", "a_test.json", "b.train.json", "c_dev.jsonl", "d.parquet", "notes.txt"):
        (tmp_path / name).write_text("[]")
    with pytest.warns(UserWarning, match=r"left out are \['b\.train\.json', 'c_dev\.jsonl', 'd\.parquet'\], whose"):
        assert cli.main(["init", str(tmp_path / "s.yaml"), "--data", str(tmp_path)]) == 0
    assert [task["name"] for task in load_config(tmp_path / "s.yaml").stream["tasks"]] == ["a"]


def test_init_copies_a_ready_stream(tmp_path: Path) -> None:
    for name in ready_streams():
        file = tmp_path / f"{name}.yaml"
        assert cli.main(["init", str(file), "--from", name]) == 0
        assert load_config(file).stream == yaml.safe_load((READY / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/s.yaml", "--from", "con"], "there is no ready stream 'con'; did you mean coin?"),
        (["{tmp}/s.yaml", "--data", "{tmp}/empty"], "holds no NAME_train.json"),
        (["{tmp}/s.yaml", "--data", "{tmp}/nothing"], "nothing', which is no folder here; expected one that holds"),
        (["{tmp}/s.yaml", "--data", "{tmp}/half"], "a_test.json (or .jsonl) is missing"),
        (["{tmp}/s.yaml", "--data", "{tmp}/both"], "a_train.json and a_train.jsonl are both there; keep one"),
        (["{tmp}/no/s.yaml"], "does not exist"),
    ],
)
def test_init_refuses(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty", "both"):
        (tmp_path / name).mkdir()
    for name in ("a_train.json", "a_train.jsonl", "a_test.json"):
        (tmp_path / "both" / name).touch()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "a_train.json").write_text("[]")
    assert cli.main(["init", *[argument.format(tmp=tmp_path) for argument in arguments]]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.yaml").exists()
