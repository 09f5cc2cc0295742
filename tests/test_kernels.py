"""Every Triton kernel that is launched compiles for sm_80 and sm_90, without a GPU: no spills, no excess of memory."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cllava_fast.ops.kernel_table import SHARED_LIMIT, Row, problems

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def kernel_table(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "cllava_fast.ops.kernel_table", *arguments]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@needs_triton
def test_every_shipped_kernel_compiles_and_fits():
    done = kernel_table("--quick")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert int(re.search(r"^(\d+) compiled for sm_80, sm_90, 0 problems$", done.stdout, re.M)[1]) > 20
    for op in ("select", "aggregate", "inject"):
        assert re.search(rf"^\W*{op}\b.*\bsm_[89]0\b", done.stdout, re.M), f"no kernel of {op}"


@needs_triton
def test_the_interpreter_cannot_compile_and_says_so():
    done = kernel_table(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"tensor_cores": "-"}, None),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": SHARED_LIMIT}, None),
        ({"shared": SHARED_LIMIT + 1}, "needs 101377 bytes of shared memory, the smallest chips have 101376"),
        ({"shared": SHARED_LIMIT + 1, "arch": 90}, "needs 101377 bytes"),  # the same tiles are launched on small ones
        ({"tensor_cores": "no"}, "claims tensor cores"),
        ({"error": "does not compile: ..."}, "does not compile"),
    ],
)
def test_what_counts_as_a_problem(change, message):
    row = Row("inject", "kernel", "fp16", 80, 64, 0, 1024, "yes")._replace(**change)
    found = problems(row)
    assert found == [] if message is None else len(found) == 1 and message in found[0]
