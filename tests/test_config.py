"""One YAML for a run: what it may say, how flags change it, how it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import torch
import yaml

import cllava_fast as cf
from cllava_fast.cli import init
from cllava_fast.config import CONFIG, convert, from_text, load_config
from cllava_fast.methods import IncrementConfig, LoraConfig

STREAM = {"name": "mine", "images": "images", "tasks": [{"name": "a", "train": "a.json", "test": "b.json"}]}


def write(folder: Path, **values: Any) -> Path:
    file = folder / "stream.yaml"
    file.write_text(yaml.safe_dump({**STREAM, **values}))
    return file


def test_a_file_and_flags_make_one_configuration_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "llava").mkdir()
    file = write(
        tmp_path, model="llava", method={"name": "continual_llava", "rank": 4, "top_m": 2},
        training={"output_dir": "out", "seed": 3, "bf16": True},
    )  # fmt: skip
    config = load_config(file, {"method.rank": "16", "training.seed": "5", "training.bf16": "false"})
    assert config.model.path == str(tmp_path / "llava")
    assert config.method == IncrementConfig(rank=16, top_m=2)
    assert (config.training.seed, config.training.bf16) == (5, False)
    assert config.training.output_dir == str(tmp_path / "out")
    assert config.stream == STREAM and config.base == tmp_path


def test_a_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = write(tmp_path, model="x", base="~/data", training={"output_dir": "~/runs/mine"})
    for base, meant in ((None, "data"), ("~/other", "other")):
        config = load_config(file, base=base)
        assert config.base == tmp_path / "home" / meant
        assert config.training.output_dir == str(tmp_path / "home" / "runs" / "mine")


def test_a_flags_path_starts_where_the_user_is(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), {"model.path": "llava", "training.output_dir": "out"})
    assert (config.model.path, config.training.output_dir) == ("llava", "out")


def test_a_model_that_is_no_folder_here_keeps_its_name(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, model="some/llava")).model.path == "some/llava"


def test_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, model="some/llava"))
    assert config.method == IncrementConfig()
    assert config.training.output_dir == "runs/mine"
    assert config.model.device_map is None


def test_another_method(tmp_path: Path) -> None:
    file = write(tmp_path, model="m", method="sequential_lora")
    assert load_config(file) == load_config(file, {"method.name": "sequential_lora"})
    assert load_config(file, {"method.rank": "2"}).method == LoraConfig(rank=2)
    with pytest.raises(ValueError, match="^--method.top_m is a field of .*slm; this run's method is sequential_lora$"):
        load_config(file, {"method.top_m": "2"})


def test_a_saved_configuration_reads_back(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    flags = {"method.targets": "[self_attn.o_proj, mlp.down_proj]", "training.trainer_options": "{optim: sgd}"}
    config = load_config(write(tmp_path, model={"path": "m", "dtype": "bfloat16"}), flags)
    config.save(tmp_path / "run")
    again = load_config(tmp_path / "run" / CONFIG)
    assert again.method == config.method == IncrementConfig(targets=("self_attn.o_proj", "mlp.down_proj"))
    assert (again.model, again.stream, again.base) == (config.model, config.stream, config.base)
    assert again.training.identity() == config.training.identity()
    assert again.training.trainer_options == {"optim": "sgd"}
    assert not {"output_dir", "resume"} & set(yaml.safe_load((tmp_path / "run" / CONFIG).read_text())["training"])


def test_a_ready_stream_is_named_in_place_of_a_file(tmp_path: Path) -> None:
    config = load_config("icons", {"model.path": "m"})
    assert config.stream == "icons" and config.training.output_dir == "runs/icons"
    config.save(tmp_path)
    assert load_config(tmp_path / CONFIG).stream == "icons"


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (cf.IncrementConfig, {"calibrate": "no"}, "calibrate is 'no'; expected true or false"),
        (cf.IncrementConfig, {"calibrate": 0}, "calibrate is 0; expected true or false"),
        (cf.IncrementConfig, {"rank": 2.5}, "rank is 2.5; expected a whole number"),
        (cf.IncrementConfig, {"targets": [1]}, "targets is .1.; expected a list, each a text"),
        (cf.ContinualArguments, {"max_steps": 2.5}, "max_steps is 2.5; expected a whole number"),
        (cf.ContinualArguments, {"max_steps": 0}, r"max_steps is 0; expected -1 .* or at least 1"),
        (cf.ContinualArguments, {"lr_scheduler_type": "cosin"}, "type is 'cosin'; did you mean cosine?"),
        (cf.ContinualArguments, {"bf16": "no"}, "bf16 is 'no'; expected true or false"),
        (cf.ContinualArguments, {"trainer_options": 1}, "trainer_options is 1; expected a mapping"),
    ],
)
def test_python_values_have_the_types_of_a_yaml(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**({"output_dir": "runs/x"} if kind is cf.ContinualArguments else {}), **values)


def test_a_file_that_is_no_mapping_says_what_it_holds(tmp_path: Path) -> None:
    for text, held in (("", "nothing"), ("- a", r"\['a'\]"), ("a", "'a'")):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ValueError, match=rf"s.yaml holds {held}; expected a mapping with tasks"):
            load_config(tmp_path / "s.yaml")


def test_types_that_no_file_holds_are_the_methods_own() -> None:
    @dataclass(frozen=True)
    class Own(cf.IncrementConfig):
        pair: tuple[int, str] = (1, "a")
        function: Callable[[int], int] = abs
        many: tuple[int, ...] = ()

    own = Own(pair=(2, "b"), function=max, many=[1, 2])
    assert (own.pair, own.function, own.many) == ((2, "b"), max, (1, 2))
    with pytest.raises(ValueError, match="many is .'a'.; expected a list, each a whole number"):
        Own(many=["a"])


def test_python_values_are_brought_to_their_types(tmp_path: Path) -> None:
    config = cf.IncrementConfig(rank=numpy.int64(3), scale="2", a_std=torch.tensor(0.5), targets="o_proj")
    assert json.loads(json.dumps(config.to_dict()))["targets"] == ["o_proj"]
    assert (config.rank, config.scale, config.a_std, config.targets) == (3, 2.0, 0.5, ("o_proj",))
    arguments = cf.ContinualArguments(output_dir=tmp_path, learning_rate=numpy.float32(0.5), seed=numpy.int64(1))
    assert (arguments.output_dir, arguments.learning_rate, arguments.seed) == (str(tmp_path), 0.5, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainin": {}}, "stream.yaml: trainin is unknown; did you mean training?"),
        ({"training": {"max_step": 3}}, "stream.yaml: training.max_step is unknown; did you mean max_steps?"),
        ({"model": {"path": "m", "dtpye": "auto"}}, "model.dtpye is unknown; did you mean dtype?"),
        ({"method": {"top_n": 3}}, "method.top_n is unknown; did you mean top_m?"),
        ({"method": {"name": "continual-llava"}}, "method.name is 'continual-llava'; did you mean continual_llava?"),
        ({"training": {"max_steps": "many"}}, "training.max_steps is 'many'; expected a whole number"),
        ({"training": {"max_steps": 2.5}}, "training.max_steps is 2.5; expected a whole number"),
        ({"training": {"seed": True}}, "training.seed is True; expected a whole number"),
        ({"training": {"bf16": "yes please"}}, "training.bf16 is 'yes please'; expected true or false"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate is 'fast'; expected a number"),
        ({"training": {"trainer_options": [1]}}, "training.trainer_options is [1]; expected a mapping"),
        ({"training": {"eval_split": "tset"}}, "training.eval_split is 'tset'; expected one of test, validation"),
        ({"training": [1]}, "training is [1]; expected a mapping"),
        ({"model": {"path": "m", "dtype": "int4"}}, "model.dtype is 'int4'; expected one of auto, float32"),
        ({"method": {"targets": [1]}}, "method.targets is [1]; expected a list, each a text"),
        ({"method": {"scale": 0.0}}, "method: scale is 0, and increments would add nothing"),
        ({"method": {"a_std": -1.0}}, "method: a_std is -1.0; expected a positive number"),
        ({"method": {"context_init": float("nan")}}, "method: context_init is nan; expected a finite number"),
        ({"method": {"top_m": 9}}, "stream.yaml: method: top_m is 9; expected 1 to 8"),
        ({"training": {"learning_rate": -1}}, "training: learning_rate is -1.0; expected a positive number"),
        ({"model": None}, "model is missing; give --model PATH"),
        ({"stream": "icons"}, "stream and tasks are both given"),
        ({"tasks": None, "stream": None}, "stream and tasks are both given"),
    ],
)
def test_what_is_refused_names_the_file_the_key_and_what_was_meant(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        load_config(write(tmp_path, **{"model": "m", **values}))
    assert message in str(error.value), error.value
    assert "stream.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("training.max_steps", "many", "--training.max_steps is 'many'; expected a whole number"),
        ("model.quantization", "4", "--model.quantization is '4'; expected one of 4bit, 8bit or null"),
        ("method.name", "lora", "--method.name is 'lora'"),
        ("method.rank", "0", "--method.rank: rank is 0; expected"),
        ("training.learning_rate", "-1", "--training.learning_rate: learning_rate is -1"),
    ],
)
def test_a_flag_is_refused_by_its_own_name(flag: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_config(write(tmp_path, model="m"), {flag: value})
    assert str(error.value).startswith(message), error.value


@pytest.mark.parametrize("text", ["- 1", ""])
def test_a_file_that_is_no_yaml_mapping_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="bad.yaml"):
        load_config(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cllava-fast init"):
        load_config(tmp_path / "nothing.yaml")


def test_bad_numbers_as_yaml_and_people_write_them() -> None:
    assert convert(yaml.safe_load("1e-4"), float, "x") == 1e-4  # a text, to YAML
    assert convert(3, float, "x") == 3.0 and isinstance(convert(3, float, "x"), float)
    assert convert(None, int | None, "x") is None
    assert convert("a", tuple[str, ...], "x") == ("a",)
    assert convert([], str | list[str], "x") == [] and convert("a", str | list[str], "x") == "a"
    assert from_text("none", Literal["4bit", "8bit"] | None) is None and from_text("8", Literal["8"]) == "8"
    for text in ("*_proj, down", "*_proj,down", "['*_proj', down]"):  # a YAML text begins with no asterisk
        assert from_text(text, list[str]) == from_text(text, tuple[str, ...]) == ["*_proj", "down"]
    assert from_text("down", list[str]) == ["down"] and from_text("[]", list[str]) == []
    assert from_text("a,b", dict[str, int]) == "a,b"


def test_what_init_writes_shows_every_default_and_loads(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = "tasks: [{name: a, train: a.json, test: b.json}]\n" + init.settings("mine")
    file.write_text(text)
    plain = load_config(file)
    file.write_text(re.sub(r"(?m)^  #(?! )", "  ", text))
    shown = load_config(file)
    assert shown == plain
    values = yaml.safe_load(file.read_text())
    assert set(values["method"]) == {"name", *(entry.name for entry in fields(IncrementConfig))}
    assert set(values["training"]) == {entry.name for entry in fields(plain.training)} - {"resume"}
