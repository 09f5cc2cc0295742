"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

import cllava_fast
from cllava_fast import cli
from cllava_fast.cli.base import load_base
from cllava_fast.config import ModelConfig
from cllava_fast.demo.base import FOLDER
from cllava_fast.evaluate import metrics
from cllava_fast.evaluate.report import write_report
from cllava_fast.methods import METHODS, Method, MethodConfig
from tests.helpers import learn


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder with the report of a run of one method."""
    matrix = [[0.75, None], [0.5, 0.25]]
    result = {
        "accuracy_matrix": matrix, **metrics.summarize(matrix), "selection_accuracy": None,
        "trainable_parameters": 10, "seconds": 1.0,
    }  # fmt: skip
    results = {
        "stream": ["chart", "icon"], "seeds": [0], "methods": {"frozen": {**result, "per_seed": [result]}},
        "environment": {"python": "3"},
    }  # fmt: skip
    write_report(results, tmp_path / "finished")
    return tmp_path / "finished"


def test_report_prints_the_table_and_draws_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "forgetting.png").unlink()
    assert cli.main(["report", str(finished)]) == 0
    assert (finished / "forgetting.png").is_file()
    printed = capsys.readouterr().out
    assert "37.5" in printed and "Frozen" in printed


def test_report_into_another_folder(finished: Path, tmp_path: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert cli.main(["report", str(finished), "--output", str(tmp_path / "other")]) == 0
    assert {p.name: p.stat().st_mtime_ns for p in finished.iterdir()} == before
    assert {p.name for p in (tmp_path / "other").iterdir()} == set(before)
    assert json.loads((tmp_path / "other" / "results.json").read_text())["stream"] == ["chart", "icon"]


def test_a_report_is_not_written_over_other_files(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    assert cli.main(["report", str(finished), "--output", str(tmp_path / "other")]) == 1
    assert "thesis.txt" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_report_into_a_folder_that_cannot_be_made(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(path: Path, *mode: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", read_only)
    assert cli.main(["report", str(finished), "--output", str(tmp_path / "a" / "b")]) == 3
    assert f"{tmp_path}/a/b cannot be written: Read-only file system" in capsys.readouterr().err


def test_a_report_of_results_that_were_cut_off(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished / "results.json"
    file.write_text(file.read_text()[:-20])
    assert cli.main(["report", str(finished)]) == 4
    assert f"{file} is no JSON" in capsys.readouterr().err


def test_the_table_fits_a_terminal_of_80_columns(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    size = 4
    matrix = [[0.5] * size for _ in range(size)]
    method = {**results["methods"]["frozen"], "accuracy_matrix": matrix, **metrics.summarize(matrix), "per_seed": []}
    results.update(stream=["chart", "document", "icon", "digit"], seeds=[0, 1, 2])
    results["methods"] = {"continual_llava": method}
    write_report(results, finished)
    run = subprocess.run(
        [sys.executable, "-m", "cllava_fast.cli", "report", str(finished)],
        capture_output=True, text=True, check=True, env={"COLUMNS": "80", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    assert sum("Continual LLaVA" in line for line in lines) == 1, run.stdout
    for word in ("average", "forgetting", "document"):
        assert word in run.stdout, run.stdout


def test_env_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    for word in ("torch", "transformers", "select", "aggregate", "inject", "reference"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "{tmp}/nothing"], "does not exist"),
        (["demo", "--output", "{tmp}/demo", "--methods", "magic"], "methods is ['magic']"),
        (["demo", "--output", "{tmp}/demo", "--ambiguous", "1.5"], "ambiguous is 1.5"),
        (["demo", "--output", "{tmp}/demo", "--seeds", "0"], "seeds is 0"),
        (["demo", "--output", "{tmp}/demo", "--train", "0"], "train is 0"),
        (["demo", "--output", "{tmp}/demo", "--surrogate", "magic"], "surrogate"),
        (["demo", "--output", "{tmp}/demo", "--context", "magic"], "context is 'magic'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cllava-fast: ") and message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_backend_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cllava_fast.ops.dispatch._asked", ["magic"])
    command = ["demo", "--output", str(tmp_path / "demo"), "--methods", "continual_llava", "--train", "32"]
    assert cli.main([*command, "--test", "4", "--steps", "1"]) == 1
    assert "unknown backend 'magic'" in capsys.readouterr().err


def test_help_and_version_need_no_torch() -> None:
    code = """
import sys
from cllava_fast import cli
for arguments in (["--help"], ["--version"], ["init", "--help"], ["ask", "--help"], ["eval", "--help"]):
    try:
        cli.main(arguments)
    except SystemExit as exit:
        assert exit.code == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in cli.COMMANDS:
        assert command in run.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_tells_its_flags_and_ends_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert f"cllava-fast {command}" in shown.split("example")[-1]
    assert "--traceback" in shown


def test_help_of_train_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    from cllava_fast.config import ContinualArguments, ModelConfig, typed_fields
    from cllava_fast.methods import IncrementConfig

    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for section, cls in (("model", ModelConfig), ("method", IncrementConfig), ("training", ContinualArguments)):
        for name, (entry, _) in typed_fields(cls).items():
            assert f"--{section}.{name} " in shown
            assert entry.metadata["help"], f"{section}.{name} has no help"
    for default in (  # of each method
        "(default: 8; 32 in sequential_lora, joint_lora, per_task_lora; 16 in moe_lora, branch_lora; 1 in smora)",
        "(default: sentence; text+image in branch_lora)",
        "(default: 8 in moe_lora; 64 in smora)",
        "(default: false)",
    ):
        assert default in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "s.yaml", "--training.max_step", "3"], "max_step is unknown; did you mean --training.max_steps?"),
        (["train", "s.yaml", "--max_steps", "3"], "--max_steps is unknown; did you mean --training.max_steps?"),
        (["train", "s.yaml", "--training.max_step=3"], "did you mean --training.max_steps?"),
        (["ask", "run", "what?", "--imagee", "a.png"], "--imagee is unknown; did you mean --image?"),
        (["ask", "run", "what?", "now?"], "unexpected argument 'now?'"),
        (["ask", "run"], "required: question"),
        (["export", "run"], "required: --output"),
        (["export", "run", "--output", "a", "--task", "a", "--instruction", "b"], "not allowed with"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "required: COMMAND"),
    ],
)  # fmt: skip
def test_a_misspelt_command_line_is_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help_of_a_method_with_any_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(MethodConfig):
        method = "mine"
        sizes: tuple[int, ...] = dataclasses.field(default=(1, 2), metadata={"help": "Some sizes."})
        least: int | None = dataclasses.field(default=None, metadata={"help": "Or none."})

    monkeypatch.setitem(METHODS, "mine", (Mine, Method))
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Some sizes. (default: 1, 2 in mine)" in said
    assert "Or none." in said and "Or none. (default" not in said


def stream_file(folder: Path, **values: Any) -> Path:
    """A stream of two tasks of two samples, and its YAML."""
    for name in ("a_train", "a_test", "b_train", "b_test"):
        records = [{"question": f"what is {name} {i}?", "answer": "red", "id": f"{name}{i}"} for i in range(2)]
        (folder / f"{name}.json").write_text(json.dumps(records))
    tasks = [{"name": name, "train": f"{name}_train.json", "test": f"{name}_test.json"} for name in "ab"]
    file = folder / "stream.yaml"
    file.write_text(yaml.safe_dump({"tasks": tasks, "model": str(FOLDER), **values}))
    return file


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({"tasks": [{"name": "a", "train": "no.json", "test": "a_test.json"}]}, [], "no.json"),
        ({"tasks": [{"name": "a", "train": "a_train.json", "tset": "a_test.json"}]}, [], "tset is unknown"),
        ({"model": "{tmp}/nothing"}, [], "nothing"),
        ({"model": "{tmp}"}, [], "config.json does not exist; expected a model's folder"),
        ({"training": {"max_step": 3}}, [], "did you mean max_steps?"),
        ({"training": {"eval_split": "validation"}}, [], "task 'a' has no validation sample"),
        ({"training": {"trainer_options": {"optimm": "sgd"}}}, [], "training.trainer_options.optimm is unknown"),
        ({"training": {"lr_scheduler_type": "cosin"}}, [], "lr_scheduler_type is 'cosin'; did you mean cosine?"),
        ({"training": {"trainer_options": {"optim": "lomo"}}}, [], "install `lomo_optim`"),
        ({}, ["--training.report_to", "wandbb"], "report_to: wandbb is not supported, only azure_ml"),
        ({"method": {"surrogate": "magic"}}, [], "surrogate 'magic' was not found"),
        ({}, ["--method.top_m", "9"], "top_m is 9; expected 1 to 8"),
        ({}, ["--method.targets", "o_prj"], "target 'o_prj' is not in model.language_model.layers.0; expected one of"),
        ({}, ["--method", "lora"], "--method.name is 'lora'"),
        ({}, ["--method.name", "lora"], "--method.name is 'lora'"),
        ({}, ["--model.path", "{tmp}/nothing"], "nothing"),
        ({}, ["--model", ""], "--model.path: path is empty; expected the folder or the hub name"),
        ({"model": ""}, [], "stream.yaml: model: path is empty; expected the folder"),
        ({}, ["--model.device_map", "cuda:99"], "model.device_map is 'cuda:99', and torch finds"),
        ({}, ["--model.quantization", "4bit"], "needs bitsandbytes"),
        ({}, ["--output", "{tmp}"], "holds other files than a run's"),
        ({}, ["--output", "{tmp}/stream.yaml"], "stream.yaml is a file; give a new output_dir"),
        ({"model": "{tmp}/text"}, [], "a GPT2LMHeadModel; expected one of Llava"),
        ({}, [], "AssertionError: weights were loaded"),  # nothing is wrong
    ],
)
def test_train_refuses_before_it_loads_or_writes(
    values: dict[str, Any],
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    if "quantization" in " ".join(flags) and importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "gpt2"}')
    values = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in values.items()}
    file = stream_file(tmp_path, **values)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train", str(file), *[flag.format(tmp=tmp_path) for flag in flags]]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cllava-fast: ") and message in error and "Traceback" not in error, error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": ', "config.json cannot be read: It looks like"),
        ('{"model_type": "mine"}', "base', and transformers makes no model of its config.json: The checkpoint you are"),
        ('{"a": 1}', "base', and transformers makes no model of its config.json: Unrecognized model in"),
        (
            '{"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip"}',
            "a checkpoint in the format of LLaVA's own code; expected one in that of transformers",
        ),
        (None, "base', and its processor cannot be loaded: Can't load image processor for"),
    ],
)
def test_a_base_that_cannot_be_loaded(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    config = (FOLDER / "config.json").read_text() if content is None else content
    (tmp_path / "base" / "config.json").write_text(config)
    assert cli.main(["train", str(stream_file(tmp_path)), "--model", str(tmp_path / "base")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["  "], "the question is blank"),
        (["<image>\n"], "the question is blank; expected a text, and a picture as --image FILE"),
        (["what?", "--image", "no.png"], "--image is 'no.png', which is no file"),
        (["what?", "--image", "."], "--image is '.', which is no file"),
        (["what?", "--image", "words.png"], "words.png"),
        (["what?", "--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
    ],
)
def test_ask_refuses_before_it_loads(
    arguments: list[str], message: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def never(*arguments: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("cllava_fast.cli.running.open_run", never)
    monkeypatch.chdir(tmp_path)
    Path("words.png").write_text("no image")
    assert cli.main(["ask", str(finished), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "weights were loaded" not in error, error


def test_increments_of_a_template_of_ones_own_are_asked_with_it(
    tmp_path: Path, rng: torch.Generator, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = load_base(ModelConfig(path=str(FOLDER)))
    processor.chat_template = processor.chat_template + " "
    learn(cllava_fast.patch(model, cllava_fast.IncrementConfig(), processor=processor), 1, rng)
    saved, template = cllava_fast.save_pretrained(model, tmp_path / "mine"), tmp_path / "own.jinja"
    template.write_text(processor.chat_template)
    ask = ["ask", str(saved), "what is it?", "--max-new-tokens", "2"]
    assert cli.main(ask) == 1
    assert "if you trust it, give it as" in (error := capsys.readouterr().err) and "--chat-template FILE" in error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main([*ask, "--chat-template", str(template)]) == 0
    assert "task0" in capsys.readouterr().out
    export = ["export", str(saved), "--task", "task0", "--output", str(tmp_path / "lora")]
    assert cli.main([*export, "--chat-template", str(template)]) == 0
    assert cli.main([*ask, "--chat-template", str(tmp_path)]) == 1
    assert "which is no file; expected a template in Jinja" in capsys.readouterr().err
    template.write_text("{% for m in messages %}\n{{ m['role'] }\n{% endfor %}")
    assert cli.main([*ask, "--chat-template", str(template)]) == 1
    assert "own.jinja', which is no Jinja in line 2: unexpected '}'; expected what" in capsys.readouterr().err
    template.write_bytes(b"\xff")
    (finished / "config.yaml").write_text("stream: coin\nmodel: path/of/llava\n")
    for folder, message in (
        (saved, "own.jinja', which is no text in UTF-8"),
        (finished, "is the folder of a run, which knows its chat template; leave --chat-template out"),
    ):
        assert cli.main(["ask", str(folder), "what?", "--chat-template", str(template)]) == 1
        assert message in capsys.readouterr().err


def test_train_says_how_to_ask(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = finished.rename(tmp_path / "x #y")
    monkeypatch.setattr("cllava_fast.cli.running.train", lambda config: SimpleNamespace(task_names=["a", "b"]))
    assert cli.main(["train", str(stream_file(tmp_path)), "--output", str(output)]) == 0
    _, _, command = capsys.readouterr().out.partition("Ask it: ")
    assert shlex.split(command) == ["cllava-fast", "ask", str(output), "--image", "FILE", "QUESTION"]


def test_a_stream_that_is_not_there_can_be_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x #y.yaml"
    assert cli.main(["train", str(file)]) == 1
    command = re.findall("; (cllava-fast init .*) writes an example", capsys.readouterr().err)
    assert [shlex.split(line) for line in command] == [["cllava-fast", "init", str(file)]]


def test_errors_show_where_they_came_from_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["report", str(tmp_path / "nothing"), "--traceback"])
    monkeypatch.setenv("CLLAVA_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["report", str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "cllava-fast: interrupted\n"),
        (KeyError("x"), 1, "cllava-fast: KeyError: 'x' (--traceback shows where)\n"),
        (ValueError("a is 1\nexpected 2"), 1, "cllava-fast: a is 1\nexpected 2\n"),
    ],
)
def test_what_ends_a_command(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr("cllava_fast.cli.env.run", fail)
    assert cli.main(["env"]) == code
    assert capsys.readouterr().err == message


def test_an_error_says_which_process_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["report", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("cllava-fast, process 3: ")


def test_a_module_runs_as_the_command_does() -> None:
    run = subprocess.run([sys.executable, "-m", "cllava_fast.cli", "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"cllava_fast {cllava_fast.__version__}\n")


@pytest.mark.parametrize("arguments", [["init", "a.yaml"], ["env"]], ids=["plain text", "a table"])
def test_a_reader_that_has_seen_enough_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cllava_fast.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(cllava_fast.__file__).parents[1])}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close()
    assert (run.wait(), run.stderr.read()) == (141, b"")


def test_another_pipe_that_broke_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = BrokenPipeError(errno.EPIPE, "a worker is gone")
    monkeypatch.setattr("cllava_fast.cli.train.run", Mock(side_effect=broken))
    assert cli.main(["train", "a.yaml"]) == 1
    assert "a worker is gone" in capsys.readouterr().err


def documented_commands() -> list[str]:
    """Every command line that a help text or the quickstart shows."""
    root = Path(cli.__file__).resolve().parents[2]
    texts = [(root / "docs" / "quickstart.md").read_text(), cli.EXAMPLE]
    texts += [importlib.import_module(f"cllava_fast.cli.{name}").EXAMPLE for name in cli.COMMANDS]
    joined = "\n".join(texts).replace("\\\n", " ")
    shown = re.findall(
        r"(?m)^\s*(?:\$ |examples?: )?cllava-fast ((?:init|train|eval|ask|report|export|demo|env)\b.*)", joined
    )
    return [line for line in shown if "..." not in line]


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = shlex.split(line, comments=True)
    ran = []
    monkeypatch.setattr(f"cllava_fast.cli.{arguments[0]}.run", lambda parsed: ran.append(parsed) or 0)
    assert cli.main(arguments) == 0 and ran


def test_the_quickstart_shows_most_commands() -> None:
    assert {line.split()[0] for line in documented_commands()} == set(cli.COMMANDS)


def test_a_folder_with_nothing_but_the_configuration_is_a_new_run(tmp_path: Path) -> None:
    """So a run that was killed in its first task starts again by the same command."""
    from cllava_fast.train.loop import find_run

    (tmp_path / "config.yaml").write_text("tasks: []\n")
    assert find_run(tmp_path, {}, resume=False) is None
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError):
        find_run(tmp_path, {"method": 1}, resume=True)


def test_nothing_to_go_on_with_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded: the folder's name may be misspelt."""
    monkeypatch.setattr("cllava_fast.cli.running.open_base", Mock(side_effect=KeyboardInterrupt))
    command = ["train", str(stream_file(tmp_path)), "--output", str(tmp_path / "rnu")]
    assert cli.main(command) == 130
    with pytest.warns(UserWarning, match="rnu holds nothing to go on with; the run begins anew"):
        assert cli.main([*command, "--resume"]) == 130
