"""``cllava-fast train --dry-run``: what would stop a run, told before weights are loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor

import cllava_fast as cf
from cllava_fast import cli
from cllava_fast.data import Sample
from cllava_fast.data.encode import Encoder
from cllava_fast.data.pixels import read_rgb
from cllava_fast.data.records import RecordReader
from cllava_fast.demo.base import FOLDER, load_base
from tests.base_models import new_model, new_processor
from tests.helpers import learn
from tests.test_distributed import environment, free_port


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """For a stream of two tasks, on a base without weights."""
    (tmp_path / "images").mkdir()
    tasks = []
    for task in ("color", "shape"):
        records = []
        for number in range(30):
            name = f"{task}-{number}.png"
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "images" / name)
            records.append({"id": name, "image": name, "question": "what is it?", "answer": "red"})
        records.append({"question": "is it text alone?", "answer": "yes"})
        (tmp_path / f"{task}.json").write_text(json.dumps(records))
        (tmp_path / f"{task}-test.json").write_text(json.dumps(records[:2]))
        tasks.append({"name": task, "train": f"{task}.json", "test": f"{task}-test.json"})
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump({"images": "images", "tasks": tasks}))
    shutil.copytree(FOLDER, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    output = ["--output", str(tmp_path / "run")]
    return ["train", str(tmp_path / "stream.yaml"), "--model", str(tmp_path / "base"), *output, "--dry-run"]


def damage(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:60])


@pytest.mark.parametrize("end", [["--dry-run"], ["--resume"]])
def test_the_processor_is_loaded_once(
    command: list[str], end: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what a run that was killed at once has left, too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    load = Mock(wraps=AutoProcessor.from_pretrained)
    monkeypatch.setattr("cllava_fast.cli.base.AutoProcessor.from_pretrained", load)
    assert cli.main([*command[:-1], *end]) == (end == ["--resume"])  # the base has no weights
    assert load.call_count == 1


def test_a_sound_stream_is_counted_and_nothing_is_written(
    command: list[str], processor: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = Encoder(processor).encode([Sample("what is it?", "red", tmp_path / "images" / "color-0.png")])
    tokens = str(len(example.prompt_ids) + len(example.answer_ids))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith(("color", "shape"))]
    counts = [["color", "train", "31", "30"], ["color", "test", "2", "2"]]
    assert [row[:4] for row in rows[:2]] == counts and len(rows) == 4
    assert all(row[4:] == [tokens, tokens, "2"] for row in rows)  # a text alone is shorter
    assert "256 tokens" in said and said.splitlines()[-1].startswith("Nothing was found that would stop this run")
    assert sorted(tmp_path.rglob("*")) == before


def test_every_damaged_image_is_named(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(tmp_path / "images" / "color-0.png")  # which the test split names, too
    (tmp_path / "images" / "color-7.png").write_bytes(b"no image")
    damage(tmp_path / "images" / "shape-29.png")
    assert cli.main(command) == 1
    said = capsys.readouterr()
    faults = said.err.partition("this run would stop:")[2].strip().splitlines()
    assert [fault.split(":")[0].strip() for fault in faults] == ["task 'color', train"] * 2 + ["task 'shape', train"]
    for fault, name in zip(faults, ("color-0.png", "color-7.png", "shape-29.png"), strict=True):
        assert name in fault
    assert "Nothing was found" not in said.out and "color" in said.out, "the table is of what can be read"


def test_of_a_file_that_is_read_line_by_line_no_sample_is_kept(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(tmp_path / "images" / "color-7.png")
    for file in tmp_path.glob("*.json"):
        lines = [json.dumps(record) for record in json.loads(file.read_text())]
        file.with_suffix(".jsonl").write_text("\n".join(lines))
    stream = tmp_path / "stream.yaml"
    stream.write_text(stream.read_text().replace(".json", ".jsonl"))
    made: list[weakref.ref[Sample]] = []
    kept: list[int] = []

    def noted(do: Any, before: bool = True) -> Any:
        def call(*given: Any) -> Any:
            if before:
                kept.append(sum(sample() is not None for sample in made))
                return do(*given)
            made.append(weakref.ref(sample := do(*given)))
            return sample

        return call

    monkeypatch.setattr(RecordReader, "sample", noted(RecordReader.sample, before=False))
    monkeypatch.setattr("cllava_fast.data.stream.read_rgb", noted(read_rgb))
    monkeypatch.setattr(Encoder, "encode_one", noted(Encoder.encode_one))
    assert cli.main(command) == 1
    assert len(kept) > 120 and max(kept) <= 3, "each is there while it is looked at"


def test_what_the_run_does_not_use_does_not_stop_it(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = yaml.safe_load((tmp_path / "stream.yaml").read_text())
    for task in stream["tasks"]:
        (tmp_path / f"{task['name']}-dev.json").write_text(
            json.dumps([{"image": f"{task['name']}-dev.png", "question": "what is it?", "answer": "red"}])
        )
        task["validation"] = f"{task['name']}-dev.json"
        (tmp_path / "images" / f"{task['name']}-dev.png").write_bytes(b"no image")
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(stream))
    assert cli.main(command) == 0
    assert "validation" not in capsys.readouterr().out
    assert cli.main([*command, "--training.eval_split", "validation"]) == 1
    assert "task 'color', validation: image" in capsys.readouterr().err


def test_many_faults_are_counted(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(25):
        damage(tmp_path / "images" / f"shape-{number}.png")
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said.count("cannot be decoded") == 20 and said.rstrip().endswith("and 5 more")


def test_samples_that_are_too_long_and_answers_that_no_evaluation_meets(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(tmp_path / "images" / "shape-3.png")
    for task, split in (("color", "color"), ("shape", "shape-test")):
        records = json.loads((tmp_path / f"{split}.json").read_text())
        long = {"id": f"{task}-long", "question": "what is it? " * 80, "answer": "red " * 20}
        (tmp_path / f"{split}.json").write_text(json.dumps([*records, long]))
    with pytest.warns(UserWarning, match="task 'shape', test: 1 of 3 answers have more than max_new_tokens=4"):
        assert cli.main([*command, "--training.max_new_tokens", "4"]) == 1
    said = capsys.readouterr().err
    assert "task 'color', train: 'color-long' has" in said and "task 'shape', test: 'shape-long' has" in said
    assert "shape-3.png" in said


def test_tasks_that_were_learned_before_are_refused(
    command: list[str], tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = load_base()
    learn(cf.patch(model, cf.IncrementConfig(), processor=processor), 1, generator)
    saved = cf.save_pretrained(model, tmp_path / "before")
    assert cli.main([*command, "--model.increments", str(saved)]) == 0
    stream = tmp_path / "stream.yaml"
    stream.write_text(stream.read_text().replace("name: shape", "name: task0"))
    assert cli.main([*command, "--model.increments", str(saved)]) == 1
    assert f"{saved} has learned ['task0'] already; leave them out of the stream" in capsys.readouterr().err
    joint = cf.patch(load_base()[0], cf.JointLoraConfig(), processor=processor)
    learn(joint, 1, generator)
    saved = cf.save_pretrained(joint, tmp_path / "joint")
    assert cli.main([*command, "--model.increments", str(saved)]) == 1
    assert "joint_lora learns all tasks at once; leave it out" in capsys.readouterr().err


def test_a_run_goes_on_as_it_began(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*command, "--model", str(FOLDER), "--training.max_steps", "1", "--training.max_new_tokens", "1"]
    model, processor = load_base()
    learn(cf.patch(model, cf.IncrementConfig(), processor=processor), 1, torch.Generator())
    before = ["--model.increments", str(cf.save_pretrained(model, tmp_path / "before"))]
    assert cli.main([*(flag for flag in command if flag != "--dry-run"), *before]) == 0
    assert cli.main([*command, *before, "--resume"]) == 0
    for flags, words in (
        (["--model.conversation", "vicuna_v1", *before], "another chat_template"),
        (["--model.image_aspect_ratio", "pad", *before], "image_settings: do_pad False, not True"),
        (["--training.seed", "1", *before], "arguments: seed 0, not 1"),
        ([], "another learned_before"),
    ):
        capsys.readouterr()
        assert cli.main([*command, "--resume", *flags]) == 1
        assert f"{tmp_path / 'run'} holds another run, with {words}" in capsys.readouterr().err


def test_images_are_refused_by_a_base_without(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "LlamaForCausalLM"
    for part in (processor := new_processor(name), new_model(name, processor)):
        part.save_pretrained(tmp_path / "text")
    assert cli.main([*command, "--model", str(tmp_path / "text")]) == 1
    said = capsys.readouterr().err
    assert said.count("it has an image, and a tokenizer alone, as of a model without images, takes none") == 4


def test_of_several_processes_one_looks(command: list[str], tmp_path: Path) -> None:
    damage(tmp_path / "images" / "shape-3.png")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    both = subprocess.run(
        [*map(str, launch), "-m", "cllava_fast.cli", *command], env=environment(), capture_output=True, text=True
    )
    assert both.returncode != 0 and both.stderr.count("this run would stop") == 1, both.stderr


def test_what_train_refuses_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--method.targets", "[nothing.here]"]) == 1
    assert "nothing.here" in capsys.readouterr().err
    assert cli.main([*command, "--training.trainer_options", "{no_such_option: 1}"]) == 1
    assert "no_such_option" in capsys.readouterr().err
    assert cli.main([*command, "--output", f"{command[1]}/run"]) == 3
    assert "stream.yaml/run cannot be written" in capsys.readouterr().err
