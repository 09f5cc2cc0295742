"""The whole path of a new user, by typed commands: own files, a run that is killed, its answers, PEFT's files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cllava_fast import cli
from cllava_fast.demo.base import FOLDER, load_base
from cllava_fast.train.loop import saved_increments
from tests.test_distributed import environment, free_port

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "what color is the triangle?"
SETTINGS = (
    "--training.seed", "1", "--training.align_steps", "20", "--training.max_steps", "40",
    "--training.learning_rate", "3e-3", "--training.lr_scheduler_type", "linear",
    "--method.scale", "8", "--method.a_std", "0.09",
    "--training.per_device_train_batch_size", "16", "--training.max_new_tokens", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("easy_vqa", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("user")
    command = [sys.executable, ROOT / "examples" / "easy_vqa_to_llava.py", folder / "data"]
    subprocess.run([*command, "--train", "160", "--test", "24"], check=True, cwd=ROOT)
    assert cli.main(["init", str(folder / "stream.yaml"), "--data", str(folder / "data")]) == 0
    return folder


def command(data: Path, output: str) -> list[str]:
    return ["train", str(data / "stream.yaml"), "--model", str(FOLDER), "--output", str(data / output), *SETTINGS]


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A run that was killed in its second task and resumed by the same command."""
    output = data / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "cllava_fast.cli", *command(data, "run")],
        cwd=data, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("shape: align"):
            break
    process.kill()
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL, "".join(said)
    assert len(json.loads((output / "run.json").read_text())["matrix"]) == 1
    assert [entry.name for entry in (output / "increments").iterdir()] == ["01-color"]
    first = contents(output / "increments" / "01-color")

    assert cli.main(command(data, "run")) == 1  # without --resume nothing is touched
    assert contents(output / "increments" / "01-color") == first
    assert cli.main([*command(data, "run"), "--resume"]) == 0
    assert contents(output / "increments" / "01-color") == first
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


def picture(data: Path) -> Path:
    records = json.loads((data / "data" / "color_test.json").read_text())
    return data / "data" / "images" / records[0]["image"]


def test_a_run_that_was_killed_ends_as_one_that_was_not(data: Path, run: Path, printed: Callable[..., str]) -> None:
    shown = printed(*command(data, "whole"))
    assert "average" in shown and "color" in shown and "shape" in shown
    for task in ("01-color", "02-shape"):
        assert contents(run / "increments" / task) == contents(data / "whole" / "increments" / task)
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, data / "whole")]
    matrices = [found["methods"]["continual_llava"]["accuracy_matrix"] for found in results]
    assert matrices[0] == matrices[1]
    # it has learned: guessing gives 1 in 8 colors and 1 in 3 shapes
    assert matrices[0][1][0] > 0.3 and matrices[0][1][1] > 0.4, matrices


def test_a_stream_too_long_for_a_report_ends_well(
    data: Path, run: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllava_fast.evaluate.results.MAX_TASKS", 1)
    shown = printed(*command(data, "run"), "--resume")
    assert f"Report: none, which has room for 1 tasks; {run}/results.json holds these 2 " in shown


def test_a_task_that_comes_later(
    data: Path, run: Path, printed: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tasks under other names, learned for a moment, behind those of the run and without their data."""
    stream = yaml.safe_load((data / "stream.yaml").read_text())
    new = {
        **stream,
        "method": "continual_llava",
        "tasks": [{**task, "name": f"new-{task['name']}"} for task in stream["tasks"]],
    }
    (data / "new.yaml").write_text(yaml.safe_dump(new))
    increments, output = run / "increments" / "02-shape", data / "later"
    begin = [
        "train", str(data / "new.yaml"), "--model", str(FOLDER), "--model.increments", str(increments),
        "--output", str(output), "--training.max_steps", "2", "--training.align_steps", "2",
    ]  # fmt: skip
    for flag, value, wanted in (("--method.rank", "2", "8"), ("--method", "slm", "'continual_llava'")):
        assert cli.main([*begin, flag, value]) == 1
        name = "method.rank" if flag == "--method.rank" else "method.name"
        said = capsys.readouterr().err
        assert f"{name} is " in said and f"and {increments} was learned with {wanted}" in said
    assert not output.exists()
    shown = printed(*begin)
    assert "new-color" in shown and "new-shape" in shown
    assert [folder.name for folder in saved_increments(output)] == ["03-new-color", "04-new-shape"]
    old, now = (load_file(folder / "adapter_model.safetensors") for folder in (increments, saved_increments(output)[1]))
    assert all(torch.equal(now[name][: len(rows)], rows) for name, rows in old.items() if not name.endswith("context"))
    method = yaml.safe_load((output / "config.yaml").read_text())["method"]
    assert method == yaml.safe_load((run / "config.yaml").read_text())["method"]
    # what it began with is in what it saved
    written = (output / "config.yaml").read_text()
    assert str(increments) in written
    (output / "config.yaml").write_text(written.replace(str(increments), str(data / "removed")))
    assert "color" in printed("ask", output, "--image", picture(data), QUESTION)
    assert "after the last task" in printed("eval", output)
    assert "after 1 of 2 tasks" in printed("eval", output, "--after", "new-color")


def test_eval_measures_what_the_run_did(data: Path, run: Path, printed: Callable[..., str]) -> None:
    shown = printed("eval", run, "--output", data / "measured")
    results = json.loads((data / "measured" / "results.json").read_text())
    measured = results["methods"]["continual_llava"]["accuracy_matrix"][-1]
    trained = json.loads((run / "results.json").read_text())["methods"]["continual_llava"]["accuracy_matrix"][-1]
    assert measured == trained and results["seeds"] == [1]
    of_run = json.loads((run / "results.json").read_text())["config"]["arguments"]
    assert results["config"]["arguments"] == of_run
    assert (results["config"]["learned"], results["config"]["tasks"]) == (2, 2)
    assert "after the last task" in shown
    assert f"{100 * measured[0]:.1f}" in shown
    lines = (data / "measured" / "predictions" / "color.jsonl").read_text().splitlines()
    assert len(lines) == 24 and "prediction" in json.loads(lines[0])


def test_eval_after_the_first_task_says_so_and_is_no_finished_run(
    data: Path, run: Path, printed: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed("eval", run, "--after", "color", "--output", data / "half")
    assert "after 1 of 2 tasks" in shown and "after the last" not in shown
    assert "learned 1 of 2 tasks" in (data / "half" / "report.md").read_text()
    half = json.loads((data / "half" / "results.json").read_text())
    last = half["methods"]["continual_llava"]["accuracy_matrix"][-1]
    assert half["stream"] == ["color", "shape"] and None not in last  # what is not learned yet is asked, too
    assert cli.main(["report", str(run), f"half={data / 'half'}", "--output", str(data / "table")]) == 1
    assert "half has learned 1 of 2 tasks; finish it first" in capsys.readouterr().err


def test_eval_does_without_a_runs_results(data: Path, run: Path, printed: Callable[..., str]) -> None:
    torn = data / "torn-results"
    shutil.copytree(run, torn)
    for damage in (lambda file: file.write_text(file.read_text()[:99]), Path.unlink):
        damage(torn / "results.json")
        assert "after the last task" in printed("eval", torn)


def test_an_evaluation_stands_in_place_of_its_run(data: Path, run: Path, printed: Callable[..., str]) -> None:
    printed("eval", run, "--output", data / "again", "--max-new-tokens", "4")
    results = json.loads((data / "again" / "results.json").read_text())
    other = {**results, "seeds": [2]}
    (data / "other").mkdir()
    (data / "other" / "results.json").write_text(json.dumps(other))
    assert "2 seed(s)" in printed("report", run, data / "other", "--output", data / "both")
    other["config"]["arguments"]["max_steps"] += 1
    (data / "other" / "results.json").write_text(json.dumps(other))
    assert cli.main(["report", str(run), str(data / "other"), "--output", str(data / "neither")]) == 1


def test_eval_on_two_processes_is_that_on_one(data: Path, run: Path, printed: Callable[..., str]) -> None:
    shown = printed("eval", run, "--output", data / "once")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command += ["-m", "cllava_fast.cli", "eval", run, "--output", data / "together"]
    both = subprocess.run([*map(str, command)], cwd=data, env=environment(), check=True, capture_output=True, text=True)
    assert both.stdout.count("Continual LLaVA") == shown.count("Continual LLaVA") == 1
    assert contents(data / "together" / "predictions") == contents(data / "once" / "predictions")


def test_eval_of_the_frozen_base_is_worse(run: Path, printed: Callable[..., str]) -> None:
    assert "Frozen" in printed("eval", run, "--frozen")


def test_ask_answers_and_says_which_rows_did(data: Path, run: Path, printed: Callable[..., str]) -> None:
    shown = printed("ask", run, "--image", picture(data), QUESTION)
    answer, *table = [line for line in shown.splitlines() if line.strip()]
    assert answer.strip()
    for word in ("task", "row", "similarity", "weight", "context"):
        assert word in table[0], shown
    rows = [line.split() for line in table[2:]]
    assert len(rows) == 4 and rows[0][0] == "color", shown
    assert sum(float(row[3].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.3)
    assert printed("ask", run, "--image", picture(data), "--quiet", QUESTION).strip() == answer.strip()


def test_ask_brings_context_from_earlier_tasks(data: Path, run: Path, printed: Callable[..., str]) -> None:
    rows = [line.split() for line in printed("ask", run, "what shape is in the image?").splitlines()]
    shares = {row[0]: float(row[4].rstrip("%")) for row in rows if len(row) == 5 and row[0] in ("color", "shape")}
    assert shares["shape"] > 0.0 and shares.get("color", 0.0) == 0.0


def test_ask_as_it_was_after_the_first_task(run: Path, printed: Callable[..., str]) -> None:
    shown = printed("ask", run, "--after", "color", "what shape is in the image?")
    assert "color" in shown and "shape " not in shown


def test_ask_takes_saved_increments_too(data: Path, run: Path, printed: Callable[..., str]) -> None:
    asked = ("--image", picture(data), "--quiet", QUESTION)
    assert printed("ask", run / "increments" / "02-shape", *asked) == printed("ask", run, *asked)


def test_ask_says_when_a_saved_file_is_gone(data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = shutil.copytree(run, data / "torn")
    file = torn / "increments" / "02-shape" / "adapter_config.json"
    file.unlink()
    for source in (torn, file.parent):
        assert cli.main(["ask", str(source), QUESTION]) == 4
        assert f"{file} does not exist" in capsys.readouterr().err


def test_ask_refuses_what_the_model_cannot_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", str(run), "what color? " * 90]) == 1
    refused = capsys.readouterr().err
    assert "ask: 'the question' has" in refused and "expected 256 at most, the model's max_position" in refused


def test_a_base_that_moved_is_named(data: Path, run: Path, printed: Callable[..., str], capsys: Any) -> None:
    moved, lost = data / "moved", data / "nothing"
    shutil.copytree(run, moved)
    increments = moved / "increments" / "02-shape"
    for file in (moved / "config.yaml", increments / "adapter_config.json"):
        text = file.read_text()
        assert str(FOLDER) in text
        file.write_text(text.replace(str(FOLDER), str(lost)))
    asked = ("--image", str(picture(data)), "--quiet", QUESTION)
    for source in (moved, increments):
        assert cli.main(["ask", str(source), *asked]) == 1
        error = capsys.readouterr().err
        assert str(lost) in error and "--model PATH" in error
        assert printed("ask", source, "--model", FOLDER, *asked) == printed("ask", run, *asked)
    assert printed("eval", moved, "--model", FOLDER, "--frozen").splitlines()[-1].startswith("Frozen")
    assert "a LoRA of rank" in printed(
        "export", moved, "--model", FOLDER, "--task", "color", "--output", data / "lora2"
    )


def test_report_is_drawn_again(run: Path, printed: Callable[..., str]) -> None:
    (run / "report.md").unlink()
    assert "Continual LLaVA" in printed("report", run)
    assert (run / "report.md").is_file()


def test_the_export_gives_the_same_outputs_in_stock_peft(data: Path, run: Path, printed: Callable[..., str]) -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    from cllava_fast.cli.running import open_run

    shown = printed("export", run, "--instruction", QUESTION, "--output", data / "adapter")
    assert "adapter" in shown and "PeftModel" in shown
    patched, processor = open_run(str(run))
    batch = _batch(processor, picture(data))
    base, _ = load_base()
    with torch.no_grad():
        wanted = patched(**batch).logits
        frozen = base(**batch).logits
        adapted = peft.PeftModel.from_pretrained(base, data / "adapter").eval()(**batch).logits
    assert (wanted - frozen).abs().max() > 0.1
    torch.testing.assert_close(adapted, wanted, rtol=1e-4, atol=1e-4)


def _batch(processor: Any, image: Path) -> dict[str, Any]:
    from PIL import Image

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return dict(processor(text=[text], images=[Image.open(image)], return_tensors="pt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{run}", "--after", "digits"], "no state after task 'digits'; expected one of color, shape"),
        (["ask", "{run}", "--image", "{run}/run.json", "what?"], "cannot be read as an image"),
        (["export", "{run}", "--task", "color", "--output", "{run}"], "holds something already"),
        (["export", "{run}", "--task", "color", "--output", "{run}/run.json"], "run.json is a file; give"),
        (["eval", "{run}", "--output", "{run}/run.json"], "run.json is a file; give"),
        (["export", "{run}", "--output", "{run}/new"], "nothing says what; expected --task or --instruction"),
        (["export", "{run}", "--task", "digits", "--output", "{run}/new"], "digits"),
        (["eval", "{run}/increments"], "config.yaml does not exist"),
        (["eval", "{run}", "--frozen", "--after", "color"], "--frozen measures the base"),
        (["eval", "{run}", "--base", "{run}"], "--base is given without --stream"),
        (["eval", "{run}", "--overwrite"], "--overwrite is given without --output"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert cli.main([argument.format(run=run) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cllava-fast: ") and message in error and "Traceback" not in error, error
    assert contents(run) == before
