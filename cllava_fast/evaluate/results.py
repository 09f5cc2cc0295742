"""What ``results.json`` may hold: checked whole, so that a report is drawn of any file or refused with its fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cllava_fast.atomic import readable_json
from cllava_fast.evaluate.selection import STUDY
from cllava_fast.names import brief

OF_THE_MATRIX = ("average_accuracy", "average_forgetting", "backward_transfer", "mean_average_accuracy")
METRICS = ("accuracy_matrix", *OF_THE_MATRIX, "selection_accuracy", "trainable_parameters", "seconds")
MAX_DEPTH = 30
MAX_TASKS, MAX_METHODS = 200, 20  # that pictures have room for
MAX_RESULTS_BYTES = MAX_TASKS * MAX_METHODS * (64 << 10)  # a method's rows of a task over several seeds, and examples

Check = Callable[[Any], bool]


def results_json(results: Mapping[str, Any]) -> str:
    """The text of ``results.json``."""
    return readable_json(results, allow_nan=False) + "\n"


def check_results(results: Any, where: str) -> None:
    """Raises ValueError, which begins with ``where``, for what no run has written."""
    for key in ("stream", "seeds", "methods", "environment"):
        if not isinstance(results, dict) or not results.get(key):
            raise ValueError(f"{where} has no {key!r}; expected what a run writes as results.json")
    if _is_deeper(results, MAX_DEPTH):
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep")
    tasks = results["stream"]
    _check(where, "stream", tasks, _list_of(_is_text), "a list of names")
    _check(where, "stream", tasks, lambda names: len(set(names)) == len(names) <= MAX_TASKS,
           f"{MAX_TASKS} different names at most")  # fmt: skip
    _check(where, "seeds", results["seeds"], _list_of(_is_number), "a list of numbers")
    for key in ("environment", "config", "metrics"):
        _check(where, key, results.get(key, {}), _is_mapping, "a mapping")
    _check(where, "note", results.get("note", ""), lambda note: note is None or _is_text(note), "a text")
    if "metrics" in results:
        metrics = results["metrics"]
        _check(where, "metrics", list(metrics.values()), _list_of(_is_text), "names of metrics")
        if sorted(metrics) != sorted(tasks):
            raise ValueError(f"{where}: metrics are given for {brief(sorted(metrics))}; expected one for each task")
    orders = results.get("orders", [])
    _check(where, "orders", orders, _list_of(_list_of(_is_text)), "a list of orders of the tasks")
    for order in orders:
        _check(where, "order", order, lambda names: sorted(names) == sorted(tasks), "the tasks of the stream")
    methods = results["methods"]
    _check(where, "methods", methods, lambda value: _is_mapping(value) and len(value) <= MAX_METHODS,
           f"a mapping of {MAX_METHODS} methods at most")  # fmt: skip
    for name, result in methods.items():
        _check_method(result, len(tasks), len(orders), where, brief(name))


def _check_method(result: Any, size: int, orders: int, where: str, name: str) -> None:
    _check(where, f"method {name}", result, _is_mapping, "a mapping")
    missing = [metric for metric in METRICS if metric not in result]
    if missing:
        raise ValueError(f"{where}: method {name} lacks {missing}")
    seeds = result.get("per_seed", [])
    _check(where, f"per_seed of {name}", seeds, _list_of(_is_mapping), "a list of mappings")
    for values in (result, *seeds):
        matrix = values.get("accuracy_matrix")
        if not _list_of(_list_of(_is_score))(matrix) or [len(row) for row in matrix] != [size] * size:
            raise ValueError(f"{where}: accuracy_matrix of {name} is not {size} x {size} numbers")
        for metric in (*OF_THE_MATRIX, "transfer", "base_kept"):
            _check(where, f"{metric} of {name}", values.get(metric), _is_score, "a number or null")
        _check(
            where, f"selection of {name}", values.get("selection"), _is_study, f"{list(STUDY)} for each of its tasks"
        )
        cut_off = values.get("cut_off") or {}
        _check(where, f"cut_off of {name}", cut_off, _is_mapping, "a mapping")
        _check(where, f"cut_off of {name}", list(cut_off.values()), _list_of(_is_number), "a number for each task")
        _check(
            where, f"order of {name}", values.get("order", 0), lambda n: n in range(max(1, orders)), "one of the orders"
        )
    for metric in METRICS[1:]:
        check = _is_number if metric == "seconds" else _is_score
        _check(where, f"{metric} of {name}", result[metric], check, "a number")
    losses, examples = result.get("losses", {}), result.get("examples", {})
    _check(where, f"losses of {name}", losses, _is_mapping, "a mapping")
    _check(where, f"losses of {name}", list(losses.values()), _list_of(_list_of(_is_number)), "numbers for each task")
    _check(where, f"examples of {name}", examples, _is_mapping, "a mapping")
    _check(where, f"examples of {name}", list(examples.values()), _list_of(_list_of(_is_mapping)), "lists of examples")
    for task, shown in examples.items():
        for example in shown:
            _check_example(example, where, name, task)


def _check_example(example: Mapping[str, Any], where: str, name: str, task: str) -> None:
    lacks = [key for key in ("question", "answers", "prediction", "score") if key not in example]
    if lacks:
        raise ValueError(f"{where}: an example of {name} on {brief(task)} lacks {lacks}")
    right = all(_is_text(example[key]) for key in ("question", "prediction")) and _is_number(example["score"])
    if not right or not _list_of(_is_text)(example["answers"]):
        raise ValueError(f"{where}: an example of {name} on {brief(task)} is {brief(example)}; expected texts, a score")


def _check(where: str, name: str, value: Any, check: Check, expected: str) -> None:
    if not check(value):
        raise ValueError(f"{where}: {name} is {brief(value)}; expected {expected}")


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18


def _is_score(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_study(value: Any) -> bool:
    """None, or what ``selection.selection_study`` returns: numbers for each task, then tables of task by task."""
    if value is None:
        return True
    if not _is_mapping(value) or not _list_of(_is_text)(value.get("tasks")):
        return False
    *lists, blocks, overlap = (value.get(key) for key in STUDY)
    if not all(map(_list_of(_is_number), lists)) or not all(map(_list_of(_list_of(_is_number)), (blocks, overlap))):
        return False
    return {len(row) for row in (*lists, blocks, overlap, *blocks, *overlap)} == {len(value["tasks"])}


def _is_deeper(value: Any, than: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(than == 0 or _is_deeper(part, than - 1) for part in parts)
