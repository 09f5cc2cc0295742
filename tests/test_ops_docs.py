"""docs/ops.md tells the truth: each op is what the page computes beside it, and no op is missing."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from cllava_fast import ops
from tests.test_ops import OPS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "ops.md").read_text(encoding="utf-8")


def test_the_code_runs(rng: torch.Generator) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
        exec(code, {})


def test_every_op_is_told() -> None:
    told = set(re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE))
    assert told == set(ops.__all__) - {"BackendError", "Past", "backend", "dispatch"}


def test_every_op_is_held_to_float64() -> None:
    assert set(OPS) == set(re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE))
