"""Metrics by hand-computed examples."""

from __future__ import annotations

import pytest

from cllava_fast.evaluate import metrics

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
    assert metrics.mean_average_accuracy(JOINT) == pytest.approx(0.6)


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
