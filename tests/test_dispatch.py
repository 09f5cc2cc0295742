"""Which backend runs, and that it is never another one than asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops import dispatch


@pytest.fixture
def registry(monkeypatch):
    """A registry that a test may add to; the real one is back afterwards."""
    monkeypatch.setattr(dispatch, "_asked", [dispatch.AUTO])
    plain = {op: {"reference": kernels["reference"]} for op, kernels in dispatch._kernels.items()}
    monkeypatch.setattr(dispatch, "_kernels", plain)
    dispatch._choose.cache_clear()
    yield
    monkeypatch.undo()
    dispatch._choose.cache_clear()


def call():
    index = torch.zeros(2, 1, dtype=torch.int64)
    return ops.inject_add(
        torch.zeros(2, 3, 4), torch.ones(2, 3, 4), torch.ones(1, 1, 4), torch.ones(1, 1, 4), index, torch.ones(2, 1)
    )


def marked(y, *args):
    return torch.full_like(y, 7.0), y.new_empty(0), y.new_empty(0)


def site(**sizes):
    return dispatch.Site(torch.device("cpu"), torch.float32, tuple(sizes.items()))


def test_reference_runs_by_default_and_says_why(registry):
    choice = dispatch.choose("inject", site(B=1))
    assert choice.backend == "reference"
    assert "triton" in choice.reason and "not registered" in choice.reason


def test_order_prefers_triton_to_reference_once_registered(registry):
    assert torch.equal(call(), torch.full((2, 3, 4), 4.0))
    dispatch.register("triton", {"inject_add": marked})
    assert torch.equal(call(), torch.full((2, 3, 4), 7.0))
    with ops.backend("reference"):
        assert torch.equal(call(), torch.full((2, 3, 4), 4.0))
        with ops.backend("auto"):
            assert torch.equal(call(), torch.full((2, 3, 4), 7.0))
    assert torch.equal(call(), torch.full((2, 3, 4), 7.0))


def test_a_refused_shape_falls_to_the_next_and_is_an_error_when_asked_for(registry):
    def accepts(op, where, asked):
        return None if dict(where.sizes)["S"] > 3 else "needs more than 3 tokens"

    dispatch.register("triton", {"inject_add": marked}, accepts=accepts)
    assert torch.equal(call(), torch.full((2, 3, 4), 4.0))
    assert "needs more than 3 tokens" in dispatch.choose("inject_add", site(S=3)).reason
    assert dispatch.choose("inject_add", site(S=4)).backend == "triton"
    with ops.backend("triton"), pytest.raises(ops.BackendError, match="needs more than 3 tokens"):
        call()


def test_an_unusable_backend_is_skipped_and_is_an_error_when_asked_for(registry, monkeypatch):
    dispatch.register("cuda", {"inject_add": marked}, usable=lambda: "no GPU in this machine")
    assert torch.equal(call(), torch.full((2, 3, 4), 4.0))
    with ops.backend("cuda"), pytest.raises(ops.BackendError, match="no GPU in this machine"):
        call()


def test_environment_variable(registry, monkeypatch):
    dispatch.register("triton", {"inject_add": marked})
    monkeypatch.setattr(dispatch, "_asked", ["reference"])  # as it is after an import under CLLAVA_BACKEND=reference
    assert torch.equal(call(), torch.full((2, 3, 4), 4.0))
    with ops.backend("triton"):  # the block wins
        assert torch.equal(call(), torch.full((2, 3, 4), 7.0))
    monkeypatch.setattr(dispatch, "_asked", ["fastest"])
    with pytest.raises(ops.BackendError, match="unknown backend 'fastest'"):
        call()


@pytest.mark.parametrize(("said", "wanted"), [("reference", "reference"), ("", "auto"), (None, "auto")])
def test_the_environment_is_read_at_import(said, wanted):
    variables = {name: value for name, value in os.environ.items() if name != "CLLAVA_BACKEND"}
    variables |= {} if said is None else {"CLLAVA_BACKEND": said}
    code = "from cllava_fast.ops import dispatch; print(dispatch.wanted())"
    found = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert found.stdout.strip() == wanted, found.stderr


def test_asking_for_what_is_not_there_is_an_error(registry, monkeypatch):
    with pytest.raises(ops.BackendError, match="unknown backend 'turbo'"), ops.backend("turbo"):
        pass
    with pytest.raises(ops.BackendError, match="'cpu' is not registered"), ops.backend("cpu"):
        pass
    monkeypatch.setattr(dispatch, "_asked", ["triton"])
    with pytest.raises(ops.BackendError, match="cannot run: not registered for inject_add"):
        call()
    dispatch.register("triton", {"select": marked})
    with ops.backend("triton"), pytest.raises(ops.BackendError, match="not registered for inject_add"):
        call()


def test_the_block_is_left_on_an_error(registry):
    with pytest.raises(KeyError), ops.backend("reference"):
        raise KeyError
    assert dispatch.wanted() == dispatch.AUTO


def test_backward_ops_are_dispatched_too(registry):
    def zero_grads(grad, *args):
        return torch.full_like(grad, 3.0), *(torch.empty(0) for _ in range(4))

    dispatch.register("triton", {"inject_backward": zero_grads})
    x = torch.ones(1, 2, 4, requires_grad=True)
    pair = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    y = ops.inject(x, torch.eye(4), torch.ones(1, 1, 4), torch.ones(1, 1, 4), *pair)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.full_like(grad, 3.0))


def test_registering_twice_or_under_an_unknown_name_is_an_error(registry):
    with pytest.raises(ops.BackendError, match="already registered"):
        dispatch.register("reference", {"inject": marked})
    with pytest.raises(ops.BackendError, match="unknown backend"):
        dispatch.register("metal", {"inject": marked})


def test_table_has_a_row_for_each_op_and_backend(registry):
    dispatch.register("cuda", {"inject": marked}, usable=lambda: "no GPU in this machine")
    rows = {(row.op, row.backend): row for row in dispatch.table()}
    for op in ("select", "aggregate", "mix_factors", "inject"):
        assert rows[op, "reference"].available and rows[f"{op}_backward", "reference"].available
        assert not rows[op, "triton"].available and "not registered" in rows[op, "triton"].reason
    assert rows["inject", "cuda"] == ("inject", "cuda", False, "no GPU in this machine")
    assert len(rows) == len(dispatch.ORDER) * len({row.op for row in dispatch.table()})
