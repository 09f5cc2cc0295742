"""Results of runs that never were, for tests of reports and their pictures."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from cllava_fast.evaluate import metrics
from cllava_fast.evaluate.selection import selection_study


def method(matrix: list[list[float | None]]) -> dict[str, Any]:
    one = {
        "accuracy_matrix": matrix, **metrics.summarize(matrix), "selection_accuracy": None,
        "trainable_parameters": 24576, "seconds": 12.3,
    }  # fmt: skip
    lower = [[None if v is None else v - 0.1 for v in row] for row in matrix]
    two = {**one, "accuracy_matrix": lower, **metrics.summarize(lower)}
    return {**metrics.mean_over_seeds([one, two]), "per_seed": [one, two]}


def two_tasks() -> dict[str, Any]:
    return {
        "stream": ["chart", "icon"],
        "seeds": [0, 1],
        "methods": {
            "sequential_lora": method([[0.9, None], [0.2, 0.8]]),
            "joint_lora": method([[None, None], [0.85, 0.75]]),
            "continual_llava": method([[0.9, None], [0.9, 0.8]]),
        },
        "environment": {"torch": "2.13.0", "gpu": None},
        "config": {"split": "test"},
    }


EVIL = '<script>alert("x")</script> [/red] $a$ | `b` *c*'
LAST = r"$\nothing$"  # which mathtext cannot read
STUDY = selection_study({EVIL: [0.5, 0.3, 0.0, 0.2], "icon": [0.25, 0.0, 0.0, 0.75]}, [EVIL, EVIL, "icon", "icon"])


def strange_tasks() -> dict[str, Any]:
    """The same with what strangers may write, other metrics, losses, examples, and a task that is not learned yet."""
    picture = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 0, 0)).save(picture, "JPEG")
    examples = [
        {"question": EVIL, "answers": ["yes", EVIL], "prediction": "", "score": 0.0, "image": None},
        {"question": "who?", "answers": ["me"], "prediction": "mee", "score": 0.75,
         "image": base64.b64encode(picture.getvalue()).decode()},
        {"question": "what?", "answers": ["it"], "prediction": "it", "score": 1.0, "image": '"><img src=x>'},
    ]  # fmt: skip
    matrix = [[0.9, None, None], [0.5, 0.8, None], [None, None, None]]
    return {
        **two_tasks(),
        "stream": [EVIL, "icon", LAST],
        "metrics": {EVIL: "anls", "icon": "vqa_accuracy", LAST: "exact_match"},
        "seeds": [0],
        "methods": {
            "continual_llava": {
                **method(matrix)["per_seed"][0], "per_seed": [], "losses": {EVIL: [2.0, 1.0], "icon": [1.5]},
                "examples": {EVIL: examples}, "selection": STUDY,
            },
            "lora": {**method(matrix)["per_seed"][0], "per_seed": []},
        },
        "config": {"split": "validation", "note": "</pre>```"},
    }  # fmt: skip


def long_stream(size: int, methods: int) -> dict[str, Any]:
    names = [f"a long name of task {i}" for i in range(size)]
    matrix: list[list[float | None]] = [[i / size if j <= i else None for j in range(size)] for i in range(size)]
    study = {name: [1.0] * size for name in ("block_rows", "rows_used", "effective_rows")}
    study |= {name: [[0.5] * size for _ in names] for name in ("block_weight", "overlap")}
    result = {**method(matrix), "losses": {name: [2.0, 1.0] for name in names}, "selection": {"tasks": names, **study}}
    chosen = ["continual_llava", "slm", "diki"][:methods]
    return {
        "stream": names, "seeds": [0, 1], "methods": dict.fromkeys(chosen, result),
        "environment": {"torch": "2.13.0"}, "config": {},
    }  # fmt: skip


def two_orders() -> dict[str, Any]:
    """Two orders and three seeds; the second method is 10 points worse in all but one run."""
    chosen = [["chart", "icon", "digit"], ["digit", "chart", "icon"]]

    def runs(loss: list[float]) -> list[dict[str, Any]]:
        matrices = [
            [[0.9, None, None], [0.8, 0.7, None], [0.6, 0.5, 0.4]],
            [[0.4, None, None], [0.4, 0.9, None], [0.3, 0.8, 0.7]],
        ]
        found = []
        for place, drop in enumerate(loss):
            matrix = [[None if v is None else v - drop for v in row] for row in matrices[place % 2]]
            found.append(
                {"accuracy_matrix": matrix, **metrics.summarize(matrix), "selection_accuracy": None,
                 "trainable_parameters": 1, "seconds": 1.0, "seed": place // 2, "order": place % 2}
            )  # fmt: skip
        return found

    methods = {"continual_llava": runs([0.0] * 6), "lora": runs([0.1, 0.1, 0.1, 0.1, 0.1, 0.0])}
    return {
        "stream": chosen[0], "orders": chosen, "seeds": [0, 1, 2], "environment": {"torch": "2.13.0"},
        "methods": {
            name: {**metrics.mean_over_orders(values, chosen, chosen[0]), "per_seed": values}
            for name, values in methods.items()
        },
    }  # fmt: skip
