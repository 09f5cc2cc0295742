"""What the tests of the ops share: the backends there are, inputs, measures of error."""

from __future__ import annotations

import functools
import importlib
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from cllava_fast import ops
from cllava_fast.ops import dispatch, native, triton_backend
from cllava_fast.ops.inject import cases as inject_cases
from tests.interpreter import round_bfloat16_like_hardware

LIBRARY: Any = torch.ops.cllava_fast
LOW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float64)
GPU = "cuda" if torch.cuda.is_available() else "cpu"
INJECT = "cllava_fast.ops.inject"
INJECT_TRITON = "cllava_fast.ops.inject.triton"
INJECT_NATIVE = "cllava_fast.ops.inject.native"
SELECT_TRITON = "cllava_fast.ops.select.triton"


# Tests of several ops in one take a backend that has them all.
CHAIN = {"chain": ("select", "aggregate", "select_aggregate", "mix_factors", "inject", "inject_add")}


class Backend(NamedTuple):
    """What `ops.backend` calls it, where its tensors live, what runs the ops that it lacks (gradients, say), and which
    of its ways it goes, where there are several."""

    name: str
    device: str
    beside: str = ""
    way: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.way}" if self.way else self.name

    @property
    def asked(self) -> str:
        """What `ops.backend` is asked for."""
        return f"{self.name},{self.beside}" if self.beside else self.name

    def refusal(self, op: str, dtype: torch.dtype, sizes: dict[str, Any]) -> str | None:
        """Why it cannot run the op in this dtype and these sizes, or None."""
        whole = {name: size for name, size in sizes.items() if isinstance(size, int)}
        site = dispatch.Site(torch.device(self.device), dtype, tuple(whole.items()))
        with pytest.MonkeyPatch.context() as patch:
            self.take_way(op, patch)
            refusals = [dispatch._refusal(each, self.name, site, asked=True) for each in CHAIN.get(op, [op])]
        return next((refusal for refusal in refusals if refusal is not None), None)

    def take_way(self, op: str, patch: pytest.MonkeyPatch) -> None:
        if self.way:
            module, name, value = WAYS[self.name, op, self.way]
            patch.setattr(importlib.import_module(module), name, value)


# A new backend is one line here: the conformance test and every other test of the ops then run on it.
BACKENDS = (
    Backend("reference", GPU),
    Backend("triton", "cpu" if triton_backend.INTERPRETED else "cuda"),
    Backend("cpu", "cpu"),
    Backend("cuda", "cpu" if native.EMULATED else "cuda", beside="reference"),
)
# Ways between which the size of a call chooses, each tested at every size: name in a module, and what it then is.
WAYS = {
    (name, op, way): (INJECT, "plan", functools.partial(lambda way, *sizes: way, way))
    for name in ("reference", "triton", "cpu")
    for op in ("inject", "inject_add")
    for way in ("gather", "whole")
} | {
    ("triton", "select", "one"): (SELECT_TRITON, "ONE_LAUNCH_ROWS", 2**31),
    ("triton", "select", "split"): (SELECT_TRITON, "ONE_LAUNCH_ROWS", 16),
    ("cpu", "inject", "few"): (INJECT_NATIVE, "CPU_TOKENS", 2**31),
    ("cpu", "inject_add", "few"): (INJECT_NATIVE, "CPU_TOKENS", 2**31),
}


def backends(op: str) -> list[Backend]:
    found = []
    for backend in BACKENDS:
        ways = [way for name, of, way in WAYS if (name, of) == (backend.name, op)]
        found += [backend._replace(way=way) for way in ways or [""]]
    return found


def on_every_backend(op: str, only: str = "") -> Any:
    """Runs a test once on each backend that `op` has (whose name begins with `only`): see the fixture `backend`."""
    chosen = [backend for backend in backends(op) if str(backend).startswith(only)]
    parameters = [pytest.param((backend, op), id=str(backend)) for backend in chosen]

    def mark(test: Any) -> Any:
        return pytest.mark.usefixtures("backend")(pytest.mark.parametrize("backend", parameters, indirect=True)(test))

    return mark


@contextmanager
def running_on(backend: Backend, op: str, monkeypatch: pytest.MonkeyPatch):
    """Ops run on `backend`, and empty memory holds NaN."""
    backend.take_way(op, monkeypatch)
    if backend.name == "triton" and triton_backend.INTERPRETED:
        round_bfloat16_like_hardware(monkeypatch)
    with nan_in_empty_memory(), ops.backend(backend.asked):
        yield


@contextmanager
def nan_in_empty_memory():
    """What torch.empty and its like return holds NaN: an output that is not written completely shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which also fills what is uninitialised
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.ones(0).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def on(device: str, data: Any) -> Any:
    """The same tensors on a device; those that ask for a gradient are leaves there."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    return tree_map_only(torch.Tensor, move, data)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def error(tensor, exact):
    """Largest error against float64, relative to the largest entry."""
    assert tensor.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    tensor, exact = tensor.detach().double().cpu(), exact.detach().cpu()
    found = ((tensor - exact).abs().max() / exact.abs().max().clamp(min=1e-12)).item()
    return found if found == found else float("inf")


def close(tensor, exact, limit=1e-12):
    assert error(tensor, exact) <= limit


def transposed(tensor):
    """The same values with other strides, from an offset on."""
    wide = torch.stack([tensor, tensor]).transpose(0, -1).contiguous().transpose(0, -1)
    return wide[1]


def framed(tensor):
    """The same values amid ones that nothing may read: NaN, and indices that are out of range."""
    poison = torch.nan if tensor.is_floating_point() else tensor.dtype == torch.bool or 2**40
    frame = torch.full([size + 3 for size in tensor.shape], poison, dtype=tensor.dtype, device=tensor.device)
    view = frame[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


def far_apart(tensor, apart=2**31):
    """The same values, the parts along the first dimension so far apart that 32 bits do not count to them."""
    size = (len(tensor) - 1) * apart + tensor[0].numel()
    if tensor.device.type == "cpu":
        # through numpy, because torch.empty fills with NaN here: pages that nobody touches cost nothing
        memory = torch.from_numpy(np.empty(size * tensor.element_size(), np.uint8)).view(tensor.dtype)
    else:
        memory = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, (apart, *tensor[0].contiguous().stride())).copy_(tensor)


def leaves(data: Any) -> list[torch.Tensor]:
    """The tensors in `data` that ask for a gradient."""
    return [t for t in tree_leaves(data) if isinstance(t, torch.Tensor) and t.requires_grad]


def inject_inputs(case, dtype, rng, device="cpu"):
    x, weight, A, B, index, coefficient, bias = on(device, inject_cases.make(case, dtype, rng))
    return leaf(x), weight, leaf(A), leaf(B), index, leaf(coefficient), bias


def flat_acting(A, B, index, coefficient, scale=1.0, past=(None, None, None), whole=False):
    """As the library's ops take them."""
    return A, B, index, coefficient, *past, scale, whole


def inject_backward(upstream, x, weight, increments, needed):
    """The op, given what the forward pass keeps for it."""
    given = x if x is not None else upstream.new_zeros(*upstream.shape[:2], increments[0].shape[2])
    _, *lows = LIBRARY.inject_add(upstream, given, *increments, True)
    return LIBRARY.inject_backward(upstream, x, weight, *increments, *lows, needed)


def trained(inputs):
    return inputs[0], inputs[2], inputs[3], inputs[5]


def run(function, inputs, upstream, **options):
    y = function(*inputs, **options)
    grads = torch.autograd.grad(y, trained(inputs), upstream.to(y.dtype), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, trained(inputs), strict=True)]
    return y.detach(), grads
