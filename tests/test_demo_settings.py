"""The demo's three settings: what their questions ask is true, and orders of tasks are run and kept."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from cllava_fast.cli import main
from cllava_fast.cli.demo import add_arguments
from cllava_fast.data.stream import Stream
from cllava_fast.demo import capability, dataset, mixture
from cllava_fast.demo.images import COLORS, SHAPES, draw_chart, draw_form, draw_glyph, draw_icon
from cllava_fast.demo.run import DemoConfig, run_demo
from cllava_fast.demo.settings import SETTINGS, in_order, task_orders
from cllava_fast.demo.stream import digits
from cllava_fast.demo.tokenizer import build_tokenizer
from cllava_fast.evaluate.report import load_results
from tests.test_demo_data import SPLITS, bar_heights, fingerprint, pixels

SMALL = {"train": 96, "validation": 48, "test": 48}


@pytest.fixture(scope="module", params=list(SETTINGS))
def built(request: pytest.FixtureRequest) -> tuple[str, Stream]:
    return request.param, SETTINGS[request.param].build(5, **SMALL)


@pytest.fixture(scope="module")
def capabilities() -> dict[str, Any]:
    return {task.name: task for task in capability.build_capability_stream(3, **SMALL)}


@pytest.fixture(scope="module")
def datasets() -> dict[str, Any]:
    return {task.name: task for task in dataset.build_dataset_stream(3, **SMALL)}


def texts(stream: Stream) -> set[str]:
    samples = [sample for task in stream for split in SPLITS for sample in getattr(task, split)]
    turns = {text for sample in samples for turn in sample.history for text in turn}
    return turns | {text for sample in samples for text in (sample.instruction, sample.answer)}


def test_a_setting_has_its_tasks(built: tuple[str, Stream]) -> None:
    name, stream = built
    assert tuple(stream.task_names) == SETTINGS[name].tasks and len(stream) >= 4
    for task in stream:
        assert [len(getattr(task, split)) for split in SPLITS] == list(SMALL.values())
        assert task.train[17].id == f"{task.name}/train/17"
        assert all(sample.image.size == (64, 64) for sample in task.train)
        train, validation, test = (pixels(task, split) for split in SPLITS)
        assert not train & validation and not train & test and not validation & test, task.name


def test_a_setting_is_reproducible(built: tuple[str, Stream]) -> None:
    name, stream = built
    assert fingerprint(SETTINGS[name].build(5, **SMALL)) == fingerprint(stream)
    assert fingerprint(SETTINGS[name].build(6, **SMALL)) != fingerprint(stream)
    with pytest.raises(ValueError, match="train is 0"):
        SETTINGS[name].build(train=0)


def test_the_base_can_read_and_write_it(built: tuple[str, Stream]) -> None:
    name, stream = built
    tokenizer = build_tokenizer()
    for text in texts(stream):
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
    answers = [sample.answer for task in stream for sample in task.train]
    ends = 1 + max(len(tokenizer(answer)["input_ids"]) for answer in answers)
    assert ends <= SETTINGS[name].max_new_tokens


def test_pretraining_knows_none_of_it(built: tuple[str, Stream]) -> None:
    _, stream = built
    asked, rng = texts(stream), Random(0)
    for draw in (draw_chart, draw_form, lambda r: draw_icon(r, 2), draw_glyph):
        assert not {mixture.describe(draw(rng), rng)[0] for _ in range(300)} & asked


def test_the_instruction_alone_tells_the_capability(capabilities: dict[str, Any]) -> None:
    glyphs = {glyph.image.tobytes() for split in SPLITS for glyph in digits(split)}
    asked = {}
    for name, task in capabilities.items():
        asked[name] = {sample.instruction for sample in task.train}
        for i, sample in enumerate(task.train):
            assert (sample.image.tobytes() in glyphs) == (i % 4 == 3)
            if i % 4 == 0:
                assert len(bar_heights(sample.image)) > 1, "a chart"
    names = list(asked)
    assert not any(asked[a] & asked[b] for a in names for b in names if a < b)
    assert {name: task.metric for name, task in capabilities.items() if task.metric != "exact_match"} == {
        "description": "rouge_l"
    }


def test_answers_about_charts_can_be_read_from_the_pixels(capabilities: dict[str, Any]) -> None:
    for name, task in capabilities.items():
        for sample in [*task.train, *task.test][::4]:
            heights = bar_heights(sample.image)  # from left to right
            colors, ranked = list(heights), sorted(heights, key=lambda color: -heights[color])
            words = sample.instruction
            if name == "description":
                assert sample.answer == f"a chart with {len(colors)} bars : {' '.join(colors)} ."
            elif name == "reasoning" and "tally" in words:
                assert sample.answer == f"{len(colors)} ; {'odd' if len(colors) % 2 else 'even'}"
            elif name == "reasoning":
                left = colors[min(colors.index(ranked[0]), colors.index(ranked[-1]))]
                assert sample.answer == f"{ranked[0]} ; {ranked[-1]} ; {left}"
            elif name == "conversation":
                ((question, it),) = sample.history
                if "odd" in words:
                    assert it == str(len(colors)) and sample.answer == ("odd" if len(colors) % 2 else "even")
                    continue
                tallest = re.search("tallest|highest", question)
                assert (it, sample.answer) == (ranked[0], ranked[-1])[:: 1 if tallest else -1]
                assert words == f"and which is the {'shortest' if tallest else 'tallest'}?"


def test_answers_about_digits_are_those_of_scikit_learn(capabilities: dict[str, Any]) -> None:
    truth = {glyph.image.tobytes(): glyph.digit for split in SPLITS for glyph in digits(split)}
    for name, task in capabilities.items():
        for sample in [*task.train, *task.test][3::4]:
            digit, words = truth[sample.image.tobytes()], sample.instruction
            follows = ("odd" if digit % 2 else "even") if "odd" in words else ("yes" if digit > 5 else "no")
            assert (
                sample.answer
                == {
                    "short_answer": str(digit),
                    "description": f"the handwritten digit {digit} .",
                    "reasoning": f"{digit} ; {follows}",
                    "conversation": follows,
                }[name]
            )
            assert [answer for _, answer in sample.history] == ([str(digit)] if name == "conversation" else [])


def test_answers_about_forms_follow_from_the_facts() -> None:
    rng = Random(11)
    for turn in range(60):
        form = draw_form(rng)
        number = int(form.fields[form.number_label])
        assert capability.describe(form).endswith("the box is ticked ." if form.ticked else "the box is not ticked .")
        assert all(f"{label} {value}" in capability.describe(form) for label, value in form.fields.items())
        question, answer = capability.reasoning(form, turn, rng)
        true = number > 5 if "greater" in question else number % 2 == 1 and form.ticked
        assert answer == f"{number} ; {'yes' if true else 'no'}"
        first, said, *_ = capability.conversation(form, turn, rng)
        assert form.number_label in first.rstrip("?").split() and said == str(number)


def test_answers_about_shapes_follow_from_the_facts() -> None:
    rng = Random(12)
    for turn in range(60):
        icon = capability.draw_pair(rng) if turn % 2 else draw_icon(rng)
        shapes, count = icon.shapes, 1 + turn % 2
        colors = " ; ".join(shape.color for shape in shapes)
        left, parity = shapes[0], ("even", "odd")[count % 2]
        assert capability.describe(icon).count(" a ") + capability.describe(icon).startswith("a ") == 2
        assert all(f"{shape.color} {shape.kind}" in capability.describe(icon) for shape in shapes)
        question, answer = capability.short_answer(icon, turn, rng)
        assert answer == (str(count) if "many" in question else left.color if "color" in question else left.kind)
        question, answer = capability.reasoning(icon, turn, rng)
        area = {s.color: (s.box[2] - s.box[0] + 1) * (s.box[3] - s.box[1] + 1) for s in shapes}
        size = "big" if f"a big {left.color}" in mixture._phrase(left) else "small"
        follows = parity if "odd" in question else size if "small" in question else max(area, key=area.__getitem__)
        assert answer == f"{count if 'odd' in question else colors} ; {follows}"
        first, it, question, answer = capability.conversation(icon, turn, rng)
        named = {"color": left.color, "shape": left.kind, "many": str(count), "odd": parity}
        assert it == next(value for word, value in named.items() if word in first)
        assert question.startswith("and ") and answer == next(v for word, v in named.items() if word in question)
        if count == 2:
            right = shapes[1]
            assert left.kind != right.kind and left.color != right.color and left.box[0] < right.box[0]
            assert max(area.values()) >= 1.6 * min(area.values())


def test_wines_are_those_of_scikit_learn(datasets: dict[str, Any]) -> None:
    from sklearn.datasets import load_wine

    known = {wine.image.tobytes(): wine for split in SPLITS for wine in dataset.wines(split)}
    assert sum(len(dataset.wines(split)) for split in SPLITS) == 178
    kinds = [wine.kind for wine in known.values()]
    assert len(kinds) == 178 and [kinds.count(k) for k in (1, 2, 3)] == np.bincount(load_wine().target).tolist()
    for sample in datasets["wine"].test:
        wine, heights = known[sample.image.tobytes()], bar_heights(sample.image)
        # the axis hides two pixels of every bar
        assert {color: height + 2 for color, height in heights.items()} == wine.heights
        if "kind" in sample.instruction:
            assert sample.answer == str(wine.kind)
        else:
            ends = max if "tallest" in sample.instruction else min
            assert sample.answer == ends(heights, key=heights.get)


def test_tiles_come_from_the_photographs(datasets: dict[str, Any]) -> None:
    answers = [sample.answer for sample in datasets["photos"].train]
    assert {answers.count(color) for color in dataset.TILE_COLORS} == {24}
    for sample in datasets["photos"].test:
        median = np.median(np.asarray(sample.image).reshape(-1, 3), axis=0)
        distance = {name: np.linalg.norm(median - COLORS[name]) for name in dataset.TILE_COLORS}
        assert sample.answer == min(distance, key=distance.__getitem__)


def test_signs_say_what_was_asked(datasets: dict[str, Any]) -> None:
    for sample in datasets["signs"].train:
        corner = sample.image.getpixel((0, 0))
        color = next(name for name, value in COLORS.items() if value == corner)
        if sample.instruction in dataset.FRAME:
            assert sample.answer == color
        else:
            assert sample.answer in {f"{k} {v}" for k, v in dataset.SIGNS}


def test_shapes_keep_their_words(datasets: dict[str, Any]) -> None:
    answers = {sample.answer for sample in datasets["easy_vqa"].train}
    assert answers <= {*COLORS, *SHAPES, "yes", "no"}


def test_orders_are_distinct_and_always_the_same() -> None:
    tasks = ["a", "b", "c"]
    orders = task_orders(tasks, 6)
    assert orders[0] == tasks and len({tuple(order) for order in orders}) == 6
    assert task_orders(tasks, 3) == orders[:3] and all(sorted(order) == tasks for order in orders)
    four = task_orders(SETTINGS["domain"].tasks, 4)
    assert all(len(set(place)) >= 3 for place in zip(*four, strict=True)), "every place is learned by several tasks"
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"orders is {count}; expected 1 to 6"):
            task_orders(tasks, count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "domains"}, "did you mean domain"),
        ({"orders": 0}, "orders is 0"),
        ({"orders": 25}, "expected 1 to 24"),
        ({"setting": "dataset", "orders": 121}, "expected 1 to 120"),
        ({"setting": "capability", "ambiguous": 0.5}, "'capability' has no such questions"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoConfig(**changes)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs") / "demo"
    size = ["--steps", "2", "--train", "48", "--test", "12", "--seeds", "1", "--orders", "2"]
    methods = ["--methods", "frozen", "continual_llava"]
    assert main(["demo", "--setting", "capability", "--output", str(output), *size, *methods]) == 0
    return output, load_results(output / "results.json")


def test_flags_have_the_defaults_of_the_configuration() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = {name: value for name, value in vars(parser.parse_args([])).items() if value is not None}
    assert given == {name: getattr(DemoConfig(), name) for name in given}


def test_every_order_keeps_its_matrix(ran: tuple[Path, dict[str, Any]]) -> None:
    output, results = ran
    names = list(SETTINGS["capability"].tasks)
    assert results["orders"] == task_orders(names, 2) and results["stream"] == names
    assert results["config"]["setting"] == "capability" and results["config"]["orders"] == 2
    for method, result in results["methods"].items():
        runs = result["per_seed"]
        assert [(run["seed"], run["order"]) for run in runs] == [(0, 0), (0, 1)]
        last = [dict(zip(results["orders"][run["order"]], run["accuracy_matrix"][-1], strict=True)) for run in runs]
        wanted = [sum(run[name] for run in last) / 2 for name in names]
        assert result["accuracy_matrix"][-1] == pytest.approx(wanted)
        assert result["average_accuracy"] == pytest.approx(sum(wanted) / 4)
        if method == "frozen":
            assert last[0] == last[1], "it learns nothing, in whatever order"
    for order in (0, 1):
        steps = sorted((output / "methods" / "continual_llava" / f"seed0-order{order}" / "increments").iterdir())
        assert [path.name[3:] for path in steps] == results["orders"][order]


def test_the_capability_is_found_by_its_instruction(ran: tuple[Path, dict[str, Any]]) -> None:
    output, results = ran
    study = results["methods"]["continual_llava"]["selection"]
    assert study["tasks"] == list(SETTINGS["capability"].tasks) and study["block_rows"] == [8] * 4
    assert min(study["block_weight"][i][i] for i in range(4)) > 0.5, study["block_weight"]
    weights = np.array(study["block_weight"])
    assert weights.sum(1) == pytest.approx(1.0) and (np.array(study["overlap"]) <= 1 + 1e-9).all()
    own = [study["block_weight"][i][i] for i in range(4)]
    assert results["methods"]["continual_llava"]["selection_accuracy"] == pytest.approx(sum(own) / 4, abs=1e-6)
    assert "selection" not in results["methods"]["frozen"]
    assert (output / "selection.png").stat().st_size > 0


def test_one_order_is_the_stream_as_given(tmp_path: Path) -> None:
    small = {"steps": 2, "train": 48, "test": 12, "progress": False, "methods": ("frozen",)}
    one = run_demo(DemoConfig(output=str(tmp_path / "one"), **small))  # type: ignore[arg-type]
    assert "orders" not in one and set(one["methods"]["frozen"]["per_seed"][0]) == {
        "accuracy_matrix", "average_accuracy", "average_forgetting", "backward_transfer", "mean_average_accuracy",
        "transfer", "selection_accuracy", "trainable_parameters", "seconds", "cut_off", "base_kept",
    }  # fmt: skip
    assert json.dumps(one["stream"]) == json.dumps(list(SETTINGS["domain"].tasks))


def test_reordering_keeps_the_tasks() -> None:
    stream = SETTINGS["domain"].build(0, train=4, validation=0, test=4)
    turned = in_order(stream, ["icon", "chart", "digit", "document"])
    assert turned.task_names == ["icon", "chart", "digit", "document"]
    assert {id(task) for task in turned} == {id(task) for task in stream}
