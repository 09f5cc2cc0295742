"""Several runs in one report: ``cllava-fast report RUN RUN ...``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cllava_fast import cli
from cllava_fast.evaluate.combine import Source, combine
from cllava_fast.evaluate.metrics import summarize
from cllava_fast.evaluate.report import load_results, table

TASKS = ["a", "b"]


def run_of(
    method: str, seed: int, last: list[float], stream: list[str] = TASKS, first: float = 1.0, **config: Any
) -> dict[str, Any]:
    matrix = [[first, None], last] if method != "frozen" else [[None, None], last]
    measured = {
        "accuracy_matrix": matrix, **summarize(matrix), "selection_accuracy": None, "trainable_parameters": 8,
        "seconds": 1.0, "cut_off": {stream[0]: 0.0, stream[1]: last[1]}, "transfer": first / 4 + seed,
    }  # fmt: skip
    arguments = {"seed": seed, "learning_rate": config.pop("learning_rate", 0.1)}
    return {
        "stream": stream, "metrics": dict.fromkeys(stream, "exact_match"), "seeds": [seed],
        "methods": {method: {**measured, "per_seed": [measured], "losses": {}, "examples": {}}},
        "environment": {"torch": "2.13.0"},
        "config": {"arguments": arguments, "method_configs": {method: {"rank": 8}}, **config},
    }  # fmt: skip


def sources(*results: dict[str, Any]) -> list[Source]:
    return [Source(f"runs/{number}", each) for number, each in enumerate(results)]


def test_seeds_of_a_method_are_averaged_and_methods_stand_side_by_side() -> None:
    ours = [run_of("continual_llava", seed, [0.5 + seed / 10, 0.9]) for seed in (1, 0)]
    lora = [run_of("sequential_lora", seed, [0.1 * seed, 0.9], learning_rate=0.2) for seed in (0, 1)]
    found = combine(sources(*ours, *lora, run_of("frozen", 0, [0.2, 0.3])))
    assert found["stream"] == TASKS and found["seeds"] == [0, 1] and "orders" not in found
    assert list(found["methods"]) == ["continual_llava", "sequential_lora", "frozen"]
    mean = found["methods"]["continual_llava"]
    assert mean["accuracy_matrix"][1] == pytest.approx([0.55, 0.9]) and mean["accuracy_matrix"][0] == [1.0, None]
    assert mean["average_accuracy"] == pytest.approx((0.55 + 0.9) / 2) and mean["transfer"] == pytest.approx(0.75)
    assert mean["cut_off"] == {"a": 0.0, "b": 0.9}
    assert [run["accuracy_matrix"][1][0] for run in mean["per_seed"]] == [0.5, 0.6]  # by seed, however they were named
    assert found["methods"]["frozen"]["accuracy_matrix"][1] == [0.2, 0.3]
    assert found["methods"]["frozen"]["transfer"] == 0.3, "what it answers before a task is learned, as ever"
    assert found["config"]["runs"]["sequential_lora"] == ["runs/2", "runs/3"]
    # what was combined can be combined again, with more seeds of the same
    more = [run_of("continual_llava", 2, [0.7, 0.9]), run_of("sequential_lora", 2, [0.2, 0.9], learning_rate=0.2)]
    again = combine([Source("all", found), *sources(*more)])
    assert again == {
        **combine(sources(*ours, *lora, run_of("frozen", 0, [0.2, 0.3]), *more)),
        "config": again["config"],
    }
    assert again["config"]["settings"] == found["config"]["settings"] and again["seeds"] == [0, 1, 2]


def test_transfer_is_averaged_where_every_run_measured_it() -> None:
    runs = [run_of("continual_llava", seed, [0.5, 0.9]) for seed in (0, 1)]
    for run, unseen in zip(runs, (0.2, 0.4), strict=True):
        (result,) = run["methods"].values()
        result["accuracy_matrix"][0][1], result["transfer"] = unseen, unseen
        result["per_seed"] = []
    mean = combine(sources(*runs))["methods"]["continual_llava"]
    assert mean["transfer"] == pytest.approx(0.3) and [run["transfer"] for run in mean["per_seed"]] == [0.2, 0.4]
    assert mean["accuracy_matrix"][0] == [1.0, pytest.approx(0.3)]
    last = run_of("continual_llava", 2, [0.5, 0.9])
    last["methods"]["continual_llava"]["per_seed"][0]["transfer"] = None
    another = combine(sources(*runs, last))["methods"]["continual_llava"]
    assert another["transfer"] is None and another["accuracy_matrix"][0] == [1.0, None]


def test_orders_are_matched_by_the_names_of_their_tasks() -> None:
    runs = [run_of("continual_llava", 0, [0.5, 0.9]), run_of("continual_llava", 0, [0.7, 0.3], TASKS[::-1])]
    found = combine(sources(*runs, run_of("frozen", 0, [0.2, 0.4], TASKS[::-1])))
    assert found["orders"] == [TASKS, TASKS[::-1]]
    assert found["methods"]["continual_llava"]["accuracy_matrix"][1] == pytest.approx(
        [(0.5 + 0.3) / 2, (0.9 + 0.7) / 2]
    )
    assert found["methods"]["frozen"]["accuracy_matrix"][1] == [0.4, 0.2]
    assert found["methods"]["frozen"]["transfer"] == pytest.approx((0.2 + 0.4) / 2), "on each order's second task"
    assert found["methods"]["continual_llava"]["cut_off"] == pytest.approx({"a": 0.3 / 2, "b": 0.9 / 2})
    assert [run["order"] for run in found["methods"]["continual_llava"]["per_seed"]] == [0, 1]


def test_runs_that_measured_no_task_to_come_stand_beside_others() -> None:
    old, frozen = run_of("sequential_lora", 0, [0.5, 0.9]), run_of("frozen", 0, [0.2, 0.3])
    for results in (old, frozen):
        for values in results["methods"].values():
            del values["transfer"], values["per_seed"][0]["transfer"]
    gone_on = run_of("sequential_lora", 1, [0.5, 0.9])  # as this version writes it of what an earlier one measured
    gone_on["methods"]["sequential_lora"]["per_seed"][0]["cut_off"] = None
    for pair in ([old, gone_on], [gone_on, old]):
        assert combine(sources(*pair))["methods"]["sequential_lora"]["cut_off"] is None
    alone = combine(sources(old, frozen))
    assert all(result.get("transfer") is None for result in alone["methods"].values())
    header, rows = table(combine(sources(run_of("continual_llava", 0, [0.5, 0.9]), old, frozen)))
    assert [row[header.index("transfer")] for row in rows] == ["25.0", "–", "30.0"]


def test_settings_of_one_method_stand_side_by_side_under_names() -> None:
    wide = run_of("continual_llava", 0, [0.6, 0.9])
    wide["config"]["method_configs"]["continual_llava"]["rank"] = 16
    found = combine([Source("x", run_of("continual_llava", 0, [0.5, 0.9])), Source("y", wide, "rank 16")])
    assert found["methods"]["rank 16"]["accuracy_matrix"][1] == [0.6, 0.9]
    assert found["config"]["settings"]["rank 16"] == {"rank": 16, "learning_rate": 0.1}


def test_samples_are_compared_seed_by_seed() -> None:
    def measured(method: str, seed: int, samples: str, name: str | None = None) -> Source:
        results = run_of(method, seed, [0.5, 0.9], samples_sha256={"a": "A", "b": samples})
        return Source(f"runs/{method}-{seed}-{samples}", results, name)

    ours = [measured("continual_llava", 0, "B"), measured("continual_llava", 1, "C")]
    base = measured("frozen", 0, "B", "base")
    base.results["config"]["method_configs"]["frozen"]["method"] = "frozen"  # as evaluate_stream writes it
    found = combine([*ours, base])
    assert found["config"]["samples_sha256"] == {"0": {"a": "A", "b": "B"}, "1": {"a": "A", "b": "C"}}
    lora = [measured("sequential_lora", 0, "B"), measured("sequential_lora", 1, "C")]
    assert list(combine([Source("all", found), *lora])["methods"]) == ["continual_llava", "base", "sequential_lora"]
    combine([*ours, run_of_before("sequential_lora", 0), run_of_before("sequential_lora", 1)])  # which do not say it
    with_old = combine([run_of_before("sequential_lora", 0), run_of_before("sequential_lora", 1), *ours])
    renamed = [source._replace(name="other") for source in lora]
    combine([Source("all", with_old), *renamed])
    with pytest.raises(ValueError, match="measured other samples of task 'b'"):  # an old one beside it hides nothing
        combine([Source("all", with_old), renamed[0], measured("sequential_lora", 1, "D", "other")])
    for first in ([*ours, base], [Source("all", found)]):
        with pytest.raises(ValueError, match=r"runs/sequential_lora-1-D and .* other samples of task 'b'"):
            combine([*first, lora[0], measured("sequential_lora", 1, "D")])


def run_of_before(method: str, seed: int) -> Source:
    return Source("runs/old", run_of(method, seed, [0.5, 0.9]))


def changed(**values: Any) -> dict[str, Any]:
    return copy.deepcopy(run_of("continual_llava", 1, [0.5, 0.9])) | values


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run_of("continual_llava", 0, [0.4, 0.4]), "runs/0 and runs/1 both hold 'continual_llava' with seed 0"),
        (run_of("continual_llava", 1, [0.4, 0.4], learning_rate=0.3), "with learning_rate 0.3, runs/0 with 0.1; give"),
        (run_of("continual_llava", 1, [0.4, 0.4], base={"base_fingerprint": "B"}),
         "with base_fingerprint 'B', runs/0 with 'A'"),
        (run_of("continual_llava", 1, [0.4, 0.4], ["a", "c"]), "the tasks of runs/1: .*'c'.*; of"),
        (run_of("continual_llava", 1, [0.4, 0.4], split="validation"), "the split of runs/1: 'validation'; of runs/0"),
        (run_of("continual_llava", 1, [0.4, 0.4], max_new_tokens=8), "max_new_tokens of runs/1: 8; of runs/0: None"),
        (changed(metrics={"a": "anls", "b": "exact_match"}), "the metrics of runs/1"),
        (run_of("sequential_lora", 1, [0.4, 0.4]), "continual_llava has no run with seed 1; expected"),
        (run_of("sequential_lora", 0, [0.4, 0.4], TASKS[::-1]), "no run with seed 0 in the order b → a; expected"),
        (run_of("continual_llava", 1, [None, None]), "runs/1 has learned 1 of 2 tasks; finish it first"),  # type: ignore[list-item]
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(sources(run_of("continual_llava", 0, [0.5, 0.9], base={"base_fingerprint": "A"}), other))


def test_files_that_do_not_say_their_base_go_with_any_and_hide_nothing() -> None:
    old = run_of("continual_llava", 0, [0.5, 0.9])
    new = [run_of("continual_llava", n, [0.5, 0.9], base={"chat_template_sha256": "AB"[n // 2]}) for n in (1, 2)]
    assert combine(sources(old, new[0]))["seeds"] == [0, 1]
    with pytest.raises(ValueError, match="runs/2 holds .* with chat_template_sha256 'B', runs/1 with 'A'; give"):
        combine(sources(old, *new))
    with pytest.raises(ValueError, match="runs/2 holds .* with chat_template_sha256 'B', all with 'A'; give"):
        combine([Source("all", combine(sources(old, new[0]))), Source("runs/2", new[1])])


def test_runs_that_learned_from_more_samples_are_no_seeds_of_the_same() -> None:
    """Rehearsal, say, whose numbers of samples may change with the order."""

    def learned_from(seed: int, a: int, b: int, stream: list[str] = TASKS) -> dict[str, Any]:
        return run_of("sequential_lora", seed, [0.5, 0.9], stream, train_samples={"a": a, "b": b})

    replayed = [learned_from(0, 40, 48), learned_from(1, 40, 48)]
    turned = [learned_from(seed, 47, 40, TASKS[::-1]) for seed in (0, 1)]
    found = combine(sources(*replayed, *turned))
    assert combine([Source("all", found)])["seeds"] == [0, 1]
    assert combine(sources(replayed[0], run_of("sequential_lora", 1, [0.5, 0.9])))["seeds"] == [0, 1]  # an evaluation
    with pytest.raises(ValueError, match="runs/1 holds .* with .*40.* training samples, runs/0 with .*48.*; give one"):
        combine(sources(replayed[0], learned_from(1, 40, 40)))
    with pytest.raises(ValueError, match="runs/1 holds .* with .*40.* training samples, all with .*48.*; give one"):
        combine([Source("all", found), Source("runs/1", learned_from(2, 40, 40))])
    assert "train_samples" not in found["methods"]["sequential_lora"]  # of single runs, of which a mean says nothing


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        (tmp_path / f"run{seed}").mkdir()
        text = json.dumps(run_of("continual_llava", seed, [0.5 + seed / 10, 0.9]))
        (tmp_path / f"run{seed}" / "results.json").write_text(text)
    runs, table = [str(tmp_path / f"run{seed}") for seed in (0, 1)], str(tmp_path / "table")
    assert cli.main(["report", *runs, f"other={runs[0]}", f"other={runs[1]}", "--output", table]) == 0
    shown = capsys.readouterr().out
    assert "2 seed(s)" in shown and "Continual LLaVA" in shown and "other" in shown and "72.5 ± 3.5" in shown
    results = load_results(tmp_path / "table" / "results.json")
    assert list(results["methods"]) == ["continual_llava", "other"] and (tmp_path / "table" / "report.html").is_file()
    for arguments, message in (
        (runs, "give its --output"),
        ([*runs, "--output", runs[0]], ""),
        ([*runs, "--output", str(tmp_path)], "holds something else than a report"),
        ([f"x={table}", "--output", str(tmp_path / "new")], "holds several methods"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
        (tmp_path / "run0" / "run.json").touch()  # as a run has it
        assert cli.main(["report", *arguments]) == 1
        assert message in capsys.readouterr().err
        assert all(path.read_bytes() == content for path, content in before.items())
