"""Words that a report's table, pictures and pages share: names of methods and metrics, and what the numbers mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cllava_fast.evaluate.metrics import MIN_PAIRS, learned_tasks
from cllava_fast.evaluate.scores import SCORES
from cllava_fast.evaluate.selection import USED
from cllava_fast.methods import METHODS, IncrementConfig

VARIANTS = {"calibrate": "calibrated"}  # of a method: what its name says behind a +, in words
P_VALUE = "p"
TITLE_TASKS = 30  # that a title names


def title_of(method: str) -> str:
    name, _, variant = method.partition("+")
    if name not in METHODS:
        return "Frozen" if method == "frozen" else method  # or what a report was told to call it
    title = METHODS[name][0].title
    return f"{title}, {VARIANTS.get(variant, variant)}" if variant else title


def only_exact(results: Mapping[str, Any]) -> bool:
    """Whether every task is measured by exact match, as all are in files that name no metrics."""
    return set(results.get("metrics", {}).values()) <= {"exact_match"}


def quantity(results: Mapping[str, Any]) -> str:
    """What the numbers are: "accuracy", or "score" where metrics differ or are graded."""
    return "accuracy" if only_exact(results) else "score"


def metric_title(name: str) -> str:
    return SCORES[name].title if name in SCORES else name


def learned(results: Mapping[str, Any]) -> tuple[int, int]:
    """How many tasks were learned, of how many: an evaluation says it, of the run that it measured."""
    config = results.get("config", {})
    if isinstance(config.get("learned"), int) and isinstance(config.get("tasks"), int):
        return config["learned"], config["tasks"]
    count = min(learned_tasks(result["accuracy_matrix"]) for result in results["methods"].values())
    return count, len(results["stream"])


def yardstick(results: Mapping[str, Any]) -> str | None:
    """The method that others are compared with, run by run: Continual LLaVA, or else the first; of those that have
    several runs. None where there is nothing to compare."""
    several = [name for name, result in results["methods"].items() if len(result.get("per_seed", [])) > 1]
    if len(results["methods"]) < 2 or not several:
        return None
    return IncrementConfig.method if IncrementConfig.method in several else several[0]


def over_runs(results: Mapping[str, Any]) -> str:
    orders = len(results.get("orders") or [])
    return f"{len(results['seeds'])} seed(s)" + (f" and {orders} orders of the tasks" if orders else "")


def measures_base(results: Mapping[str, Any]) -> bool:
    return any(result.get("base_kept") is not None for result in results["methods"].values())


def measures_transfer(results: Mapping[str, Any]) -> bool:
    return any(result.get("transfer") is not None for result in results["methods"].values())


def cut_off(result: Mapping[str, Any]) -> float | None:
    """Mean over the tasks of the share of a method's answers that were cut off; None where nobody says."""
    shares = list((result.get("cut_off") or {}).values())
    return sum(shares) / len(shares) if shares else None


def cuts_off(results: Mapping[str, Any]) -> bool:
    return any(cut_off(result) for result in results["methods"].values())


def headline(results: Mapping[str, Any]) -> str:
    between = ", " if results.get("orders") else " → "
    tasks = results["stream"]
    if len(tasks) <= TITLE_TASKS:
        return f"Continual tuning: {between.join(tasks)}"
    return f"Continual tuning: {between.join([*tasks[:3], '…', tasks[-1]])} ({len(tasks)} tasks)"


def explanations(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the table's numbers mean: a text, or a column's name and what it says."""
    split = results.get("config", {}).get("split", "test")
    what, (steps, size), compared_with = quantity(results), learned(results), yardstick(results)
    plural = "Accuracies" if what == "accuracy" else "Scores"
    judged = "exact match" if only_exact(results) else "each task's metric"
    texts = [("", f"{plural} in %, measured on the {split} split over {over_runs(results)}, by greedy generation and "
                  f"{judged}, without telling the model which task a question belongs to.")]  # fmt: skip
    told = [METHODS[name][0].title for name in results["methods"] if name in METHODS and METHODS[name][1].uses_task]
    if told:
        texts.append(("", f"Except {', '.join(told)}: told each question's task, so an oracle."))
    if steps < size:
        measured = min(learned_tasks(result["accuracy_matrix"]) for result in results["methods"].values())
        over = "these" if measured == steps else f"all {measured} that were measured"
        texts.append(("", f"The run has learned {steps} of {size} tasks; all numbers are over {over}."))
    texts.append(
        ("average", "over all tasks after the last one, ± standard deviation over the runs where there are several.")
    )
    if compared_with is not None:
        texts.append((P_VALUE, (
            f"of a difference in average from {title_of(compared_with)} as large by chance: two-sided permutation test "
            "by flipping signs, runs paired by seed and order, not corrected for the number of methods. With fewer "
            f"than {MIN_PAIRS} pairs, none below 0.05 is possible: n too small."
        )))  # fmt: skip
    texts += [
        ("forgetting", f"best {what} on a task before the last one was learned, minus that at the end; mean over the "
                       "earlier tasks, negative where they gained."),
        ("BWT", f"last {what} minus the one just after learning."),
        ("MAA", "mean over the steps of the average on the tasks seen so far."),
    ]  # fmt: skip
    if measures_transfer(results):
        texts.append(("transfer", f"mean {what} on a task before it was learned; mean over all tasks but the first."))
    right = "share of the selection weight that falls into the rows of the question's own task."
    texts.append(("right block", right))
    if measures_base(results):
        texts.append(("base kept", "what the base could do before and no task asks for (captions, listings), as a "
                                   "share of what the frozen model does."))  # fmt: skip
    if cuts_off(results):
        texts.append(("cut off", "share of the last answers that the model would have gone on with behind "
                                 "max_new_tokens, mean over the tasks."))  # fmt: skip
    texts += [
        ("trainable", "parameters of the block that a task learns, keys included."),
        ("seconds", "of learning and evaluation; of an evaluation in place of a run, its own."),
        ("–", "was not measured, or has no meaning for the method."),
    ]
    if results.get("orders"):
        texts += [("", f"Order {i}: {' → '.join(order)}.") for i, order in enumerate(results["orders"])]
    if results.get("note"):
        texts.append(("", results["note"]))
    return texts


def selection_explanations() -> list[tuple[str, str]]:
    """What the numbers of a selection study mean, see ``selection.selection_study``."""
    return [
        ("right block", "share of the weight of the task's questions that falls into its own rows, in %."),
        ("rows used", f"rows of its own that get more than {100 * USED:.0f} % of it."),
        ("effective rows", "exp of the entropy of its weight over all rows: n where n rows share it alike."),
        ("largest overlap", "with another task, the weight that both put on the same rows, in %."),
    ]
