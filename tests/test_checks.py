"""Checks that run once for calls alike: what has passed excuses nothing else."""

import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops import checks


def past(**changed):
    """The past's A, B and coefficient, and what is changed of them."""
    given = {"A": torch.randn(3, 2, 8), "B": torch.randn(3, 2, 6), "coefficient": torch.rand(2, 3)}
    return ops.Past(**given | changed)


def arguments():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(6)
    A, B = torch.randn(5, 2, 8), torch.randn(5, 2, 6)
    index, coefficient = torch.tensor([[0, 1], [4, 2]]), torch.rand(2, 2)
    return {
        "x": x, "weight": weight, "A": A, "B": B, "index": index, "coefficient": coefficient,
        "bias": bias, "scale": 0.5, "past": past(),
    }  # fmt: skip


CHANGES = {
    "another shape": {"A": torch.randn(5, 2, 7)},
    "no rows alike": {"B": torch.randn(4, 2, 6)},
    "another dtype": {"x": torch.randn(2, 3, 8, dtype=torch.float64)},
    "another device": {"index": torch.zeros(2, 2, dtype=torch.int64, device="meta")},
    "short indices": {"index": torch.zeros(2, 2, dtype=torch.int32)},
    "a trained weight": {"weight": torch.randn(6, 8, requires_grad=True)},
    "a trained scale": {"scale": torch.tensor(0.5, requires_grad=True)},
    "no number": {"scale": "0.5"},
    "no tensor": {"coefficient": [[0.5, 0.5], [0.5, 0.5]]},
    "a past that trains": {"past": past(A=torch.randn(3, 2, 8, requires_grad=True))},
    "half a past": {"past": past(coefficient=torch.rand(2, 4))},
    "a past in half precision": {"past": past(coefficient=torch.rand(2, 3).half())},
    "a past that is no tensor": {"past": past(coefficient=None)},
    "no such row": {"index": torch.tensor([[0, 1], [5, 2]])},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_from_a_call_that_passed_is_refused(change):
    given = arguments()
    assert torch.equal(ops.inject(**given), ops.inject(**given))
    with pytest.raises(ValueError, match=next(iter(CHANGES[change]))):
        ops.inject(**given | CHANGES[change])


def test_a_region_of_autocast_excuses_only_calls_in_it():
    given = arguments() | {"weight": torch.randn(6, 8, dtype=torch.bfloat16), "bias": None}
    with torch.autocast("cpu"):
        assert ops.inject(**given).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="weight"):
        ops.inject(**given)


def test_equal_numbers_of_another_type_are_another_call():
    query, keys = torch.randn(2, 8), torch.randn(5, 8)
    ops.select(query, keys, 2)
    with pytest.raises(ValueError, match="top_m"):
        ops.select(query, keys, 2.0)
    with pytest.raises(ValueError, match="top_m"):
        ops.select(query, keys, 6)


def test_calls_alike_are_checked_once_and_memory_is_bounded(monkeypatch):
    calls = []
    check = checks.once(lambda *given: calls.append(given))
    for size in (2, 3, 2, 3):
        check(torch.zeros(size), None, 1.0, "sample", (torch.zeros(1), 2))
    assert len(calls) == 2
    check(torch.zeros(2), None, 2.0, "sample", (torch.zeros(1), 2))  # of a number with a fraction only its type counts
    assert len(calls) == 2
    check(torch.zeros(2), None, 1.0, "batch", (torch.zeros(1), 2))
    check(torch.zeros(2), None, 1.0, "sample", (torch.zeros(2), 2))
    assert len(calls) == 4
    for _ in range(2):  # what is no plain tensor may say anything
        check(torch.zeros(2), object())
    assert len(calls) == 6

    monkeypatch.setattr(checks, "REMEMBERED", 2)
    calls.clear()
    check = checks.once(lambda *given: calls.append(given))
    for size in (1, 2, 3, 3, 1):
        check(torch.zeros(size))
    assert [len(given[0]) for given in calls] == [1, 2, 3, 1]


def test_what_did_not_pass_is_refused_again():
    given = arguments() | {"bias": torch.randn(7)}
    for _ in range(2):
        with pytest.raises(ValueError, match="bias"):
            ops.inject(**given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_number_that_is_not_finite_is_found_anywhere(dtype):
    most = torch.finfo(dtype).max
    assert checks.is_finite(torch.tensor([[most, -most], [0, most]], dtype=dtype).t())
    assert checks.is_finite(torch.empty(3, 0, dtype=dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for size in (1, 7, 1000, 5000):
            for place in {0, size // 2, size - 1}:
                numbers = torch.randn(size).to(dtype)
                numbers[place] = bad
                assert not checks.is_finite(numbers), (bad, size, place)
                with pytest.raises(ValueError, match=rf"keys: expected finite values, got 1 .* at \({place},\)"):
                    checks.finite("keys", numbers)
