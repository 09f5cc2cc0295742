"""Metrics by hand-computed examples."""

from __future__ import annotations

import math
from itertools import product
from operator import mul

import pytest

from cllava_fast.evaluate import metrics
from cllava_fast.evaluate.selection import reorder, selection_study

MATRIX = [[0.8, None, None], [0.9, 0.6, None], [0.5, 0.7, 0.4]]
JOINT = [[None, None, None], [None, None, None], [0.5, 0.6, 0.7]]


def test_metrics_of_a_stream() -> None:
    assert metrics.average_accuracy(MATRIX) == pytest.approx((0.5 + 0.7 + 0.4) / 3)
    # task 0: best before the end 0.9, last 0.5; task 1: best 0.6, last 0.7 (it grew)
    assert metrics.average_forgetting(MATRIX) == pytest.approx((0.4 - 0.1) / 2)
    assert metrics.backward_transfer(MATRIX) == pytest.approx((-0.3 + 0.1) / 2)
    assert metrics.mean_average_accuracy(MATRIX) == pytest.approx((0.8 + 0.75 + (0.5 + 0.7 + 0.4) / 3) / 3)
    assert metrics.summarize(MATRIX)["average_forgetting"] == metrics.average_forgetting(MATRIX)


def test_what_was_not_measured_is_none() -> None:
    assert metrics.average_accuracy(JOINT) == pytest.approx(0.6)
    assert metrics.average_forgetting(JOINT) is None and metrics.backward_transfer(JOINT) is None
    assert metrics.mean_average_accuracy(JOINT) is None
    assert metrics.average_forgetting([[0.5, None, None], [None, 0.4, None], [0.3, 0.3, 0.3]]) is None


def test_a_single_task_forgets_nothing() -> None:
    assert metrics.average_forgetting([[0.3]]) == 0.0 and metrics.backward_transfer([[0.3]]) == 0.0


def test_an_unfinished_run_is_summarized_over_what_it_has_learned() -> None:
    unfinished = [[0.8, None, None], [0.5, 0.6, None], [None, None, None]]
    assert metrics.learned_tasks(unfinished) == 2 and metrics.learned_tasks(MATRIX) == 3
    summary = metrics.summarize(unfinished)
    assert summary["average_accuracy"] == pytest.approx(0.55)
    assert summary["average_forgetting"] == pytest.approx(0.3)
    nothing = [[None, None], [None, None]]
    assert metrics.learned_tasks(nothing) == 0 and set(metrics.summarize(nothing).values()) == {None}
    assert metrics.summarize(JOINT)["average_accuracy"] == pytest.approx(0.6)


def test_means_over_seeds() -> None:
    seeds = [
        {"accuracy_matrix": [[0.2, None], [0.4, 0.6]], "seconds": 10.0, "selection_accuracy": None, "parameters": 7},
        {"accuracy_matrix": [[0.4, None], [0.4, 0.8]], "seconds": 20.0, "selection_accuracy": None, "parameters": 7},
    ]
    mean = metrics.mean_over_seeds(seeds)
    assert mean["accuracy_matrix"][0] == [pytest.approx(0.3), None]
    assert mean["accuracy_matrix"][1] == [pytest.approx(0.4), pytest.approx(0.7)]
    assert mean["seconds"] == 15.0 and mean["selection_accuracy"] is None and mean["parameters"] == 7


def test_means_over_orders_are_by_task() -> None:
    orders = [["a", "b"], ["b", "a"]]
    study = {"tasks": ["b", "a"], "block_rows": [8, 4], "rows_used": [7, 3], "effective_rows": [5.0, 2.0],
             "block_weight": [[0.9, 0.1], [0.3, 0.7]], "overlap": [[1.0, 0.2], [0.2, 1.0]]}  # fmt: skip
    runs = [
        {"accuracy_matrix": [[0.8, None], [0.6, 0.4]], "seed": 0, "order": 0, "selection": reorder(study, ["a", "b"])},
        {"accuracy_matrix": [[0.6, None], [0.2, 1.0]], "seed": 0, "order": 1, "selection": study},
    ]
    mean = metrics.mean_over_orders(runs, orders, ["a", "b"])
    # after one task, neither was learned in both orders
    assert mean["accuracy_matrix"] == [[None, None], [pytest.approx(0.8), pytest.approx(0.3)]]
    assert mean["selection"] == reorder(study, ["a", "b"]) and "seed" not in mean and "order" not in mean
    assert mean["selection"]["block_weight"] == [[0.7, 0.3], [0.1, 0.9]]
    assert mean["selection"]["block_rows"] == [4, 8]
    found = list(metrics.runs_by_order({"stream": ["a", "b"], "orders": orders}, {"per_seed": runs}))
    assert found == [(["a", "b"], runs[:1]), (["b", "a"], runs[1:])]


def test_paired_p_values_by_hand() -> None:
    assert metrics.paired_p_value([0.1] * 5) is None, "no p below 0.05 is possible"
    assert metrics.paired_p_value([0.1] * 6) == 2 / 64
    # one of six the other way: the sums of 0 or 1 minus signs, and their mirror images, reach as far
    assert metrics.paired_p_value([0.1, 0.1, 0.1, 0.1, 0.1, -0.1]) == 2 * (1 + 6) / 64
    assert metrics.paired_p_value([0.0] * 6) == 1.0
    assert metrics.paired_p_value([0.1, 0.2, -0.3] * 2) == 1.0, "their sum is 0, though not in floating point"


@pytest.mark.parametrize(
    "right", [[-3, 4, -1, 4, 3, 13, 14, 9], [2, -1, 12, -6, 2, -1, 8], [-8, 2, 3, 3, 8, -5, 1024, -1024]]
)
def test_paired_p_values_count_every_tie(right: list[int]) -> None:
    """Differences of so many right answers out of 1200: in whole numbers, ways to sign them tie exactly."""
    signed = [sum(map(mul, signs, right)) for signs in product((1, -1), repeat=len(right))]
    assert signed.count(sum(right)) > 1
    as_far = sum(abs(total) >= abs(sum(right)) for total in signed)
    assert metrics.paired_p_value([n / 1200 for n in right]) == pytest.approx(as_far / len(signed), abs=1e-12)


def test_paired_p_values_of_many_runs_are_drawn() -> None:
    assert metrics.paired_p_value([0.1] * 16) == 2 / 2**16
    drawn = metrics.paired_p_value([0.1] * 20)
    assert drawn is not None and 0 < drawn <= 4 / metrics.RESAMPLES, "2 of a million ways"
    assert metrics.paired_p_value([0.1, -0.1] * 10) > 0.9


def test_the_study_of_a_selection_by_hand() -> None:
    weights = {"a": [2.0, 2.0, 0.0, 0.0], "b": [0.1, 0.0, 0.895, 0.005]}  # of a, twice as much
    study = selection_study(weights, ["a", "a", "b", "b"])
    assert study is not None and study["tasks"] == ["a", "b"] and study["block_rows"] == [2, 2]
    assert study["rows_used"] == [2, 1], "0.5 % is not more than 1 %"
    entropy = -(0.1 * math.log(0.1) + 0.895 * math.log(0.895) + 0.005 * math.log(0.005))
    assert study["effective_rows"] == [pytest.approx(2.0), pytest.approx(math.exp(entropy))]
    assert study["block_weight"][0] == [1.0, 0.0]
    assert study["block_weight"][1] == [pytest.approx(0.1), pytest.approx(0.9)]
    assert study["overlap"] == [[1.0, pytest.approx(0.1)], [pytest.approx(0.1), 1.0]]
    assert selection_study({"a": [0.0]}, ["a"]) is None and selection_study({}, []) is None
