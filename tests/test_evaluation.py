"""Evaluation: what a run leaves after every task, and a model that is evaluated as it is."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import UserList
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import cllava_fast as cf
from cllava_fast import cli, distributed
from cllava_fast.data import pad_to_square
from cllava_fast.data.encode import Collator, Encoder, ImageFeatures
from cllava_fast.data.prepared import PreparedStream
from cllava_fast.data.stream import fingerprint
from cllava_fast.evaluate import evaluation, scores
from cllava_fast.evaluate.predict import Answer, predict, queries_of
from cllava_fast.evaluate.report import REPORT_FILES, load_results
from cllava_fast.methods.diki import DikiConfig
from cllava_fast.model import get_increments
from cllava_fast.model.files import base_fingerprint
from tests.helpers import QUESTIONS, learn
from tests.train_helpers import CONFIG, arguments, stream


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def graded_stream() -> cf.Stream:
    """The second task is measured by ANLS against several answers."""
    tasks = stream(2).tasks
    test = [dataclasses.replace(s, references=(s.answer, s.answer + "dish"), id=f"q{i}") for i, s in
            enumerate(tasks[1].test)]  # fmt: skip
    return cf.Stream([tasks[0], dataclasses.replace(tasks[1], test=test, metric="anls")])


@pytest.fixture(scope="module")
def run(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, cf.ContinualResult, Any]:
    from cllava_fast.demo.base import new_base

    folder = tmp_path_factory.mktemp("runs") / "run"
    model = cf.patch(new_base(processor, seed=0).eval(), CONFIG, processor=processor)
    result = cf.ContinualTrainer(model, processor, graded_stream(), arguments(folder, max_steps=40)).train()
    return folder, result, model


def test_a_run_leaves_its_results(run: tuple[Path, cf.ContinualResult, Any]) -> None:
    folder, result, _ = run
    results = load_results(folder / "results.json")
    assert results["stream"] == ["task0", "task1"] and results["seeds"] == [0]
    assert results["metrics"] == {"task0": "exact_match", "task1": "anls"}
    method = results["methods"]["continual_llava"]
    assert method["accuracy_matrix"] == result.accuracy_matrix and method["losses"] == result.losses
    assert method["selection_accuracy"] == result.selection_accuracy
    assert method["average_accuracy"] == pytest.approx(sum(v or 0.0 for v in result.accuracy_matrix[1]) / 2)
    assert results["config"]["train_samples"] == {task.name: len(task.train) for task in graded_stream()}
    assert results["config"]["arguments"]["max_steps"] == 40 and results["environment"]["torch"] == torch.__version__
    assert set(method["examples"]) == {"task0", "task1"} and method["cut_off"] == {"task0": 0.0, "task1": 0.0}


def test_predictions_of_every_task_after_every_task(run: tuple[Path, cf.ContinualResult, Any]) -> None:
    folder, result, _ = run
    found = sorted(str(p.relative_to(folder / "predictions")) for p in (folder / "predictions").rglob("*.jsonl"))
    assert found == ["01-task0/task0.jsonl", "02-task1/task0.jsonl", "02-task1/task1.jsonl"]
    last = records(folder / "predictions" / "02-task1" / "task1.jsonl")
    assert [r["id"] for r in last] == [f"q{i}" for i in range(6)]
    task = graded_stream().tasks[1]
    for record, sample in zip(last, task.test, strict=True):
        assert record["question"] == sample.instruction and record["answers"] == list(sample.references)
        assert record["score"] == scores.anls(record["prediction"], record["answers"])
        assert len(record["rows"]) == len(record["weights"]) == CONFIG.top_m
        assert sum(record["weights"]) == pytest.approx(1.0, abs=1e-4)
        assert "cut_off" not in record  # the answers are words, learned with their end
    mean = sum(r["score"] for r in last) / 6
    assert result.accuracy_matrix[1][1] == pytest.approx(mean)


def test_the_right_block_is_read_off_the_rows(run: tuple[Path, cf.ContinualResult, Any]) -> None:
    folder, result, model = run
    owner = get_increments(model).pool.row_task.tolist()
    shares = [
        sum(weight for row, weight in zip(record["rows"], record["weights"], strict=True) if owner[row] == task)
        for task in range(2)
        for record in records(folder / "predictions" / "02-task1" / f"task{task}.jsonl")
    ]
    assert result.selection_accuracy == pytest.approx(sum(shares) / len(shares), abs=1e-4)


def test_a_stream_too_long_for_a_report_is_refused_before_it_is_evaluated(
    run: tuple[Path, cf.ContinualResult, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "MAX_TASKS", 1)
    _, _, model = run
    with pytest.raises(ValueError, match="the stream has 2 tasks, and a report room for 1; leave output_dir out"):
        cf.evaluate_stream(model, model.increments.processor, graded_stream(), output_dir=tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_what_is_shown_of_a_task(run: tuple[Path, cf.ContinualResult, Any]) -> None:
    _, result, _ = run
    for examples in result.examples.values():
        assert 1 <= len(examples) <= 2 * evaluation.EXAMPLES
        right = [example["score"] >= 0.5 for example in examples]
        assert right == sorted(right, reverse=True)
        assert all(example["image"] for example in examples)


def test_an_unfinished_run_has_a_report(
    new_llava: Callable, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = cf.patch(new_llava(), CONFIG, processor=processor)
    trainer = cf.ContinualTrainer(model, processor, stream(2), arguments(tmp_path / "run"))
    learn_task = trainer._learn

    def stops(number: int, *args: Any, **kwargs: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return learn_task(number, *args, **kwargs)

    monkeypatch.setattr(trainer, "_learn", stops)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    results = load_results(tmp_path / "run" / "results.json")
    matrix = results["methods"]["continual_llava"]["accuracy_matrix"]
    assert matrix[0][0] is not None and matrix[1] == [None, None]
    assert results["methods"]["continual_llava"]["average_accuracy"] == matrix[0][0]
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "after 1 of 2 tasks" in capsys.readouterr().out
    assert "learned 1 of 2 tasks" in (tmp_path / "run" / "report.md").read_text()
    # and the report is in nobody's way
    again = cf.patch(new_llava(), CONFIG, processor=processor)
    resumed = cf.ContinualTrainer(again, processor, stream(2), arguments(tmp_path / "run", resume=True)).train()
    assert resumed.accuracy_matrix[0] == matrix[0] and resumed.accuracy_matrix[1][1] is not None
    final = load_results(tmp_path / "run")  # as the file in it
    assert final["methods"]["continual_llava"]["accuracy_matrix"] == resumed.accuracy_matrix
    assert final["methods"]["continual_llava"]["average_forgetting"] is not None


def test_a_finished_run_that_goes_on_gives_the_same(
    run: tuple[Path, cf.ContinualResult, Any], new_llava: Callable, processor: Any
) -> None:
    folder, result, _ = run
    (folder / "results.json").unlink()
    model = cf.patch(new_llava(), CONFIG, processor=processor)
    args = arguments(folder, max_steps=40, resume=True)
    assert cf.ContinualTrainer(model, processor, graded_stream(), args).train() == result
    assert load_results(folder / "results.json")["methods"]["continual_llava"]["losses"] == result.losses


def test_evaluate_stream_of_a_learned_model(
    run: tuple[Path, cf.ContinualResult, Any], processor: Any, tmp_path: Path
) -> None:
    folder, result, model = run
    options: dict[str, Any] = {"max_new_tokens": 3, "progress": False}
    results = cf.evaluate_stream(model, processor, graded_stream(), tmp_path / "eval", seed=2, **options)
    assert results["seeds"] == [2]
    method = results["methods"]["continual_llava"]
    assert method["accuracy_matrix"] == [[None, None], result.accuracy_matrix[1]]
    assert method["selection_accuracy"] == result.selection_accuracy
    assert load_results(tmp_path / "eval" / "results.json") == json.loads(json.dumps(results))
    samples = results["config"]["samples_sha256"]
    assert samples == load_results(folder / "results.json")["config"]["samples_sha256"]
    assert samples == {task.name: fingerprint(task.test) for task in graded_stream()}
    assert results["config"]["base"] == load_results(folder / "results.json")["config"]["base"]
    assert results["config"]["base"]["base_fingerprint"] == base_fingerprint(model)
    for task in ("task0", "task1"):
        file = f"{task}.jsonl"
        assert records(tmp_path / "eval" / "predictions" / file) == records(folder / "predictions" / "02-task1" / file)
    written = {p.name for p in (tmp_path / "eval").iterdir()}
    assert written == {"predictions", *REPORT_FILES} - {"losses.png"}
    with pytest.raises(FileExistsError, match="earlier evaluation; set overwrite"):
        cf.evaluate_stream(model, processor, graded_stream(), tmp_path / "eval", **options)
    cf.evaluate_stream(model, processor, stream(1), tmp_path / "eval", overwrite=True, **options)
    assert [p.name for p in (tmp_path / "eval" / "predictions").iterdir()] == ["task0.jsonl"]


def test_a_processor_that_the_model_was_not_patched_with_is_told(llava: Any, processor: Any) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    other = copy.deepcopy(processor)
    pad_to_square(other)
    with pytest.warns(UserWarning, match="another do_pad of images than the one .* give model.increments.processor"):
        cf.evaluate_stream(llava, other, stream(1), max_new_tokens=2, progress=False)


def test_evaluate_stream_of_a_plain_model_is_that_of_one_that_has_learned_nothing(llava: Any, processor: Any) -> None:
    plain = cf.evaluate_stream(llava, processor, stream(2), max_new_tokens=3, progress=False)
    named = cf.evaluate_stream(llava, processor, stream(2), max_new_tokens=3, progress=False, name="merged")
    assert named["methods"]["merged"]["accuracy_matrix"] == plain["methods"]["frozen"]["accuracy_matrix"]
    assert named["config"]["method_configs"] == {"merged": {"method": "frozen"}} and len(named["methods"]) == 1
    assert set(named["config"]["base"]) == {"chat_template_sha256", "image_settings"}  # weights may be what was learned
    assert plain["methods"]["frozen"]["selection_accuracy"] is None
    assert not hasattr(llava, "increments")
    llava.train()
    llava.model.vision_tower.eval()
    before = [module.training for module in llava.modules()]
    data = PreparedStream(stream(2), processor)
    patched = cf.evaluate_stream(cf.patch(llava, CONFIG, processor=processor), processor, data, max_new_tokens=3,
                                 progress=False)  # fmt: skip
    assert [module.training for module in cf.unpatch(llava).modules()] == before
    found, expected = patched["methods"]["continual_llava"], plain["methods"]["frozen"]
    assert found["accuracy_matrix"] == expected["accuracy_matrix"] and found["selection_accuracy"] is None
    assert [e["prediction"] for e in found["examples"]["task0"]] == [
        e["prediction"] for e in expected["examples"]["task0"]
    ]


def test_several_processes_each_evaluate_on_their_device(
    llava: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(model: Any, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt(model.device.type)

    monkeypatch.setattr(evaluation, "evaluate_tasks", reached)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(distributed, "failing_together", nullcontext)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    for processes, where in ((1, "cpu"), (2, "meta")):
        monkeypatch.setattr(distributed, "count", lambda processes=processes: processes)
        with pytest.raises(KeyboardInterrupt, match=where):
            cf.evaluate_stream(llava, processor, stream())


def test_features_are_computed_where_a_plain_model_came_first(llava: Any, processor: Any) -> None:
    """A stream is prepared once for several models; a plain one, which takes pixels, computes no features."""
    data = PreparedStream(stream(1), processor)
    data.examples("task0", "test", llava, with_features=False)
    assert not data.features._projected
    data.examples("task0", "test", llava)
    assert len(data.features._projected) == 3


def test_other_processes_open_the_images(
    llava: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cf.patch(llava, dataclasses.replace(CONFIG, surrogate="text+image"), processor=processor)
    learn(llava, 2, torch.Generator().manual_seed(0))
    opened_here: list[int] = []
    images = Encoder.images
    monkeypatch.setattr(Encoder, "images", lambda self, given: opened_here.append(len(given)) or images(self, given))
    found, before = [], torch.get_rng_state()
    for workers in (0, 2):
        results = cf.evaluate_stream(
            llava, processor, stream(2), tmp_path / str(workers), batch_size=5, max_new_tokens=2, progress=False,
            image_feature_bytes=0, dataloader_num_workers=workers,
        )  # fmt: skip
        predictions = [records(file) for file in sorted((tmp_path / str(workers) / "predictions").iterdir())]
        found.append((predictions, results["methods"]["continual_llava"]["examples"]))
        # for the tower, which sees each image once, and for the batches
        assert opened_here == [3, 5, 5, 2], "nothing more with workers"
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), before), "what is drawn next is not to depend on an evaluation"


def test_tasks_that_the_model_does_not_know(llava: Any, processor: Any, rng: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, rng)
    other = cf.Stream([dataclasses.replace(task, name=f"other{i}") for i, task in enumerate(stream(2).tasks)])
    results = cf.evaluate_stream(llava, processor, other, max_new_tokens=2, progress=False)
    assert results["methods"]["continual_llava"]["selection_accuracy"] is None


def test_the_documentation_runs(
    run: tuple[Path, cf.ContinualResult, Any],
    processor: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    metrics = list(scores.SCORES)
    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))  # the page adds one
    names = {"model": run[2], "processor": processor, "stream": graded_stream()}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert capsys.readouterr().out.splitlines()[-1] == "0.4"
    assert (tmp_path / "runs" / "report" / "report.html").is_file()
    named = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    assert named[1 : 1 + len(metrics)] == metrics  # behind the head, `metric`
    (line,) = re.findall(r"```json\n(.*?)\n```", page)
    written = records(tmp_path / "runs" / "eval" / "predictions" / "task0.jsonl")[0]
    assert list(json.loads(line)) == list(written)


def test_each_answer_stays_with_its_sample(
    llava: Any, processor: Any, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks share batches; answers, rows and metrics are those of each sample's own."""
    image = stream(1).tasks[0].test[0].image
    asked = {"task0": QUESTIONS[:2], "task1": QUESTIONS[2:]}
    tasks = [
        cf.Task(
            name, train=stream(1).tasks[0].train, test=[cf.Sample(q, q[:-4], image) for q in questions], metric=metric
        )
        for (name, questions), metric in zip(asked.items(), ("exact_match", "anls"), strict=True)
    ]
    increments = learn(cf.patch(llava, CONFIG, processor=processor), 2, rng)
    monkeypatch.setattr(evaluation, "predict", lambda model, examples, *args, **kwargs: [
        evaluation.Answer(example.instruction, is_cut_off=False) for example in examples])  # fmt: skip
    found = evaluation.evaluate_tasks(
        llava, PreparedStream(cf.Stream(tasks), processor), list(asked), "test",
        batch_size=4, max_new_tokens=1, progress=False,
    )  # fmt: skip
    seen = set()
    for result, questions in zip(found, asked.values(), strict=True):
        for record, question in zip(result.records, questions, strict=True):
            assert record["question"] == record["prediction"] == question
            exact = result.task == "task0"
            # four letters too many
            assert record["score"] == (0.0 if exact else pytest.approx(1 - 4 / len(question)))
            query = increments.surrogate.query([increments.reader.canonical(question)])
            own = increments.method.select(increments.pool, query, increments.groups, training=False)
            assert record["rows"] == own.index[0].tolist()
            assert record["weights"] == pytest.approx(own.weight[0].tolist(), abs=1e-5)
            seen.add(tuple(record["rows"]))
    assert len(seen) > 2


@pytest.mark.parametrize("config", [CONFIG, cf.JointLoraConfig()], ids=["by queries", "joint"])
def test_samples_that_are_not_in_memory_are_encoded_once_a_stage(
    config: Any, llava: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    found: dict[str, int] = {}
    encode = Encoder.encode_one

    def noting(self: Encoder, sample: cf.Sample, where: str = "") -> Any:
        encoded.append(sample.id)
        return encode(self, sample, where)

    class Counts(cf.ContinualCallback):
        def on_task_begin(self, *args: Any, **kwargs: Any) -> None:
            found.setdefault("before the first task", len(encoded))
            encoded.clear()

        def on_stage_begin(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
            found[f"before {stage}"] = len(encoded)
            encoded.clear()

        def on_stage_end(self, task: str, number: int, stage: str, *args: Any, **kwargs: Any) -> None:
            found[stage] = len(encoded)

    (task,) = stream(1)
    lazy = dataclasses.replace(task, train=UserList(task.train), test=UserList(task.test))
    tasks = cf.Stream([lazy, dataclasses.replace(lazy, name="task1")])
    monkeypatch.setattr(Encoder, "encode_one", noting)
    cf.patch(llava, config, processor=processor)
    trainer = cf.ContinualTrainer(llava, processor, tasks, arguments(tmp_path / "run"), callbacks=[Counts()])
    trainer.train()
    assert found["before the first task"] == 2 * (len(task.train) + len(task.test))
    assert found["before tune"] == found.get("before align", 0) == 0 and found["evaluate"] == 2 * len(task.test)
    encoded.clear()
    evaluation.evaluate_tasks(llava, trainer.data, ["task0"], "test", batch_size=4, max_new_tokens=1, progress=False)
    assert len(encoded) == len(task.test)
    encoded.clear()
    cf.evaluate_stream(llava, processor, tasks, max_new_tokens=1, progress=False)
    assert len(encoded) == 2 * 2 * len(task.test), "looked through, then answered"


def test_predictions_say_where_a_model_would_have_gone_on(llava: Any, processor: Any, tmp_path: Path) -> None:
    encoder, questions = Encoder(processor), stream(2)
    found = cf.evaluate_stream(llava, processor, questions, tmp_path / "cut", max_new_tokens=3, progress=False)
    said = [r for task in ("task0", "task1") for r in records(tmp_path / "cut" / "predictions" / f"{task}.jsonl")]
    samples = [sample for task in questions for sample in task.test]
    for record, sample in zip(said, samples, strict=True):
        batch = Collator(encoder, None, training=False)(encoder.encode([sample]))
        ids = llava.generate(**batch, max_new_tokens=3)[0, batch["input_ids"].shape[1] :]
        assert record.get("cut_off", False) == (processor.tokenizer.eos_token_id not in ids)
    count = sum("cut_off" in record for record in said)
    assert sum(found["methods"]["frozen"]["cut_off"].values()) == pytest.approx(count / 6) and count > 0


def test_answers_are_greedy_whatever_the_base_generates_by(llava: Any, processor: Any) -> None:
    encoder = Encoder(processor)
    sample = stream(1).tasks[0].test[0]
    examples = encoder.encode([dataclasses.replace(sample, instruction=question) for question in QUESTIONS])

    def answers() -> list[Answer]:
        return predict(llava, examples, None, Collator(encoder, None, training=False), batch_size=3, max_new_tokens=8)

    plain = answers()
    options = {"do_sample": True, "num_beams": 2, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    llava.generation_config.update(**options)
    assert answers() == plain
    assert {name: getattr(llava.generation_config, name) for name in options} == options


@pytest.mark.parametrize("others", [None, 5, [5, 6]])
def test_answers_end_where_training_ends_them(others: Any, llava: Any, processor: Any) -> None:
    """The tokenizer's end, which the base's own generation config may not know."""
    processor = copy.deepcopy(processor)
    llava.generation_config.eos_token_id = others
    sample = dataclasses.replace(stream(1).tasks[0].test[0], instruction=QUESTIONS[0])

    def answer() -> Answer:
        encoder = Encoder(processor)
        collate = Collator(encoder, None, training=False)
        (found,) = predict(llava, encoder.encode([sample]), None, collate, batch_size=1, max_new_tokens=4)
        return found

    (first, *rest), is_cut_off = answer().text.split(), answer().is_cut_off
    processor.tokenizer.eos_token = first
    assert rest and is_cut_off and answer() == (first, False) and llava.generation_config.eos_token_id == others


@pytest.mark.parametrize(("system", "between"), [("", ""), ("you are it", ""), ("you are it", "</sys>")])
def test_a_system_prompt_that_is_read_as_the_instruction(
    system: str, between: str, llava: Any, processor: Any, rng: torch.Generator, recwarn: pytest.WarningsRecorder
) -> None:
    increments = learn(cf.patch(llava, CONFIG, processor=processor), 1, rng)
    increments.reader._behind_system = between
    sample = dataclasses.replace(stream(1).tasks[0].test[0], system=system)
    queries_of(llava, [sample], ImageFeatures())
    said = [str(warning.message) for warning in recwarn if "system prompt" in str(warning.message)]
    assert len(said) == (system != "" and between == "")


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, calibrate=True), DikiConfig()])
def test_predictions_say_how_much_of_the_rows_acted(
    config: Any, llava: Any, processor: Any, rng: torch.Generator
) -> None:
    test = [cf.Sample(question, "x") for question in (QUESTIONS[0], "transcribe the sign")]
    increments = learn(cf.patch(llava, config, processor=processor), 2, rng)
    seen = []
    llava.model.language_model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda *_: seen.append(increments.call.active.past.coefficient)
    )
    data = PreparedStream(cf.Stream([cf.Task("task0", test, test)]), processor)
    (found,) = evaluation.evaluate_tasks(llava, data, ["task0"], "test", batch_size=1, max_new_tokens=1, progress=False)
    by_length = sorted(data.examples("task0", "test", llava), key=lambda example: len(example.prompt_ids))
    acted = {example.instruction: coefficient for example, coefficient in zip(by_length, seen, strict=True)}
    for record in found.records:
        weights = torch.tensor([record["weights"]]) * record["strength"]
        torch.testing.assert_close(weights, acted[record["question"]], atol=1e-5, rtol=0)
    known, strange = (record["strength"] for record in found.records)
    assert (known, strange) == (1.0, 1.0) if config == CONFIG else known > 0.5 > 0.01 > strange


def test_file_names_are_distinct_and_safe() -> None:
    names = evaluation.file_names(["a b", "a_b", "A/B", "../../etc", "é", "x" * 300])
    assert names == ["a_b", "a_b-2", "A_B-3", "______etc", "é", "x" * 60]


def test_predictions_are_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    good = evaluation.TaskEvaluation("a", [{"id": "0", "prediction": "é\u2028\ud800", "score": 1.0}], None, [])
    evaluation.write_predictions(folder, [good])
    line = (folder / "a.jsonl").read_bytes()
    assert json.loads(line)["prediction"] == "é\u2028?" and line.count(b"\n") == 1
    bad = evaluation.TaskEvaluation("b", [{"id": "0", "score": float("nan")}], None, [])
    with pytest.raises(ValueError):
        evaluation.write_predictions(folder, [good, bad])
    assert [p.name for p in folder.iterdir()] == ["a.jsonl"] and len(list(tmp_path.iterdir())) == 1


class TestRefusals:
    def test_metrics_are_checked_before_anything_is_learned(self, llava: Any, processor: Any, tmp_path: Path) -> None:
        for metric, message in (("anl", "did you mean anls"), ("option_letter", "'red' names no option")):
            wrong = cf.Stream([dataclasses.replace(stream(1).tasks[0], metric=metric)])
            with pytest.raises(ValueError, match=f"task 'task0': .*{message}"):
                cf.ContinualTrainer(llava, processor, wrong, arguments(tmp_path / "run"))
            with pytest.raises(ValueError, match=message):
                cf.evaluate_stream(llava, processor, wrong, tmp_path / "run")
        assert not hasattr(llava, "increments") and not (tmp_path / "run").exists()

    def test_a_run_goes_on_with_its_own_metric_alone(
        self, run: tuple[Path, cf.ContinualResult, Any], new_llava: Callable, processor: Any
    ) -> None:
        model = cf.patch(new_llava(), CONFIG, processor=processor)
        args = arguments(run[0], max_steps=40, resume=True)
        other = cf.Stream([dataclasses.replace(task, metric="exact_match") for task in graded_stream().tasks])
        with pytest.raises(FileExistsError, match="another run"):
            cf.ContinualTrainer(model, processor, other, args)

    def test_what_evaluate_stream_refuses(self, llava: Any, processor: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="split is 'train'"):
            cf.evaluate_stream(llava, processor, stream(1), split="train")
        with pytest.raises(ValueError, match="batch_size is 0"):
            cf.evaluate_stream(llava, processor, stream(1), batch_size=0)
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(FileExistsError, match="something else than an evaluation: thesis.txt"):
            cf.evaluate_stream(llava, processor, stream(1), tmp_path, overwrite=True)
        cf.patch(llava, cf.IncrementConfig(surrogate="backbone"))
        with pytest.raises(ValueError, match="patched without a processor"):
            cf.evaluate_stream(llava, processor, stream(1), progress=False)
