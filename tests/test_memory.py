"""How much memory `inject` takes beside the frozen linear that it extends, at a width where it matters.

On a CPU the launchers of the Triton kernels run with the kernels left out: what they allocate depends on sizes alone.
"""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import peak_memory
from cllava_fast import ops
from cllava_fast.ops import native, triton_backend
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.inject import reference
from cllava_fast.ops.inject.reference import Acting
from tests.ops_helpers import LIBRARY, close, flat_acting, inject_backward, leaf

ON_GPU = torch.cuda.is_available() and not triton_backend.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
WIDTH = 4096
SAMPLES, TOKENS, RANK = 4, 512, 8
SLACK = 1.15  # times what the frozen linear takes and the gradients that are returned


def measure(run):
    return peak_memory(run, ON_GPU)


@pytest.fixture(params=["reference", "cpu", "triton-gather", "triton-whole"])
def backend(request, monkeypatch):
    name, _, way = request.param.partition("-")
    if name == "cpu" and ON_GPU:
        pytest.skip("the tensors are on the GPU")
    if way:
        pytest.importorskip("triton")
        if triton_backend.usable() is not None:
            pytest.skip(triton_backend.usable())
        monkeypatch.setattr(importlib.import_module("cllava_fast.ops.inject"), "plan", lambda *sizes: way)
        if not ON_GPU:
            launch = importlib.import_module("cllava_fast.ops.inject.triton_launch")
            monkeypatch.setattr(launch, "_launch", lambda *arguments, **constants: None)
    with ops.backend(name):
        yield name


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request, backend):
    if request.param == torch.bfloat16 and not ON_GPU and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("products of bfloat16 take minutes on this CPU")
    return request.param


def rows(count, pairs, dtype, rng, trained, samples=SAMPLES):
    """A, B, index, coefficient."""
    A, B = (torch.zeros(count, RANK, WIDTH, device=DEVICE, dtype=dtype) for _ in range(2))
    index = torch.randint(count, (samples, pairs), generator=rng).to(DEVICE)
    coefficient = torch.rand(samples, pairs, generator=rng).to(DEVICE)
    return (leaf(A), leaf(B), index, leaf(coefficient)) if trained else (A, B, index, coefficient)


def new_layer(dtype):
    """x, the frozen weight, the upstream gradient."""
    x, upstream = (torch.zeros(SAMPLES, TOKENS, WIDTH, dtype=dtype, device=DEVICE) for _ in range(2))
    return x.requires_grad_(), torch.zeros(WIDTH, WIDTH, dtype=dtype, device=DEVICE), upstream


@pytest.fixture
def layer(dtype):
    return new_layer(dtype)


def backward(y, upstream, *trained):
    """Keeps y, as the next layer does."""
    return y, torch.autograd.grad(y, trained, upstream)


@functools.cache
def frozen_peak(dtype):
    """What the frozen linear alone takes, forward and backward to x."""
    x, weight, upstream = new_layer(dtype)
    took, (y, _) = measure(lambda: backward(F.linear(x, weight), upstream, x))
    assert took.peak >= x.nbytes + y.nbytes, (took, x.nbytes)
    return took.peak


def allowance(layer, gradients):
    return frozen_peak(layer[0].dtype) + sum(gradient.nbytes for gradient in gradients)


def inject(layer, block):
    x, weight, upstream = layer
    return backward(ops.inject(x, weight, *block), upstream, x, block[0], block[1], block[3])


def test_inject_takes_little_more_than_the_frozen_linear(layer, dtype, rng):
    block = rows(8, 4, dtype, rng, trained=True)
    took, (_, gradients) = measure(lambda: inject(layer, block))
    assert took.peak <= SLACK * allowance(layer, gradients[1:])
    assert took.largest < layer[1].nbytes


def test_float32_factors_under_a_bfloat16_layer(layer, dtype, rng):
    if dtype != torch.bfloat16:
        pytest.skip("the factors have the layer's dtype")
    block = rows(8, 4, torch.float32, rng, trained=True)
    took, (_, gradients) = measure(lambda: inject(layer, block))
    assert took.peak <= SLACK * allowance(layer, gradients[1:])


def test_a_long_past_takes_what_x_is_projected_to(layer, dtype, rng):
    """56 rows: for every token a few hundred numbers, kept for the backward pass, and their gradient there."""
    x, weight, upstream = layer
    block, (A, B, _, coefficient) = rows(8, 4, dtype, rng, trained=True), rows(56, 56, dtype, rng, trained=False)
    past = A, B, leaf(coefficient)

    def run():
        y = ops.inject(x, weight, *block, past=past)
        return backward(y, upstream, x, block[0], block[1], block[3], past[2])

    took, (_, gradients) = measure(run)
    low = x[..., : 56 * RANK].numel() * 4  # bytes in float32
    assert took.peak <= SLACK * (allowance(layer, gradients[1:]) + 4 * low)
    assert took.largest < weight.nbytes


def test_a_past_that_acts_alike_takes_no_projections_of_x(dtype, rng):
    """Its sum, the weight with it, the factors times their coefficients and their gradient; not what is written for
    every token, which would be more."""
    width, columns = 1024, 2048
    x, upstream = (torch.zeros(4, 512, width, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.zeros(width, width, dtype=dtype, device=DEVICE)
    A, B = (torch.zeros(columns // RANK, RANK, width, dtype=dtype, device=DEVICE) for _ in range(2))
    coefficient = leaf(torch.rand(1, len(A), generator=rng).to(DEVICE))
    none = A[:1], B[:1], torch.zeros(4, 0, dtype=torch.int64, device=DEVICE), torch.zeros(4, 0, device=DEVICE)

    def peak(coefficient):
        past = A, B, coefficient
        return measure(lambda: backward(ops.inject(x, weight, *none, past=past), upstream, x, coefficient))[0].peak

    frozen = measure(lambda: backward(F.linear(x, weight), upstream, x))[0].peak
    alike = peak(coefficient)
    assert alike <= SLACK * frozen + 3 * weight.nbytes + 2 * B.numel() * 4
    assert alike < peak(leaf(coefficient.detach().expand(4, -1)))


def test_many_samples_with_a_long_past_gather_less_than_the_weight(layer, dtype, rng):
    """All their rows of factors at once would be larger than the frozen weight."""
    x, upstream = (torch.zeros(16, 2, WIDTH, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = layer[1]
    past = rows(56, 56, dtype, rng, trained=False, samples=16)
    assert past[0][past[2]].nbytes > weight.nbytes
    took, _ = measure(lambda: backward(ops.inject(x, weight, *past), upstream, x))
    assert took.peak < weight.nbytes


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float32)], indirect=True)
def test_a_dense_offset_inside_the_op_would_be_seen(layer, dtype, rng, monkeypatch):
    shrink = reference.shrink

    def wasteful(*arguments):
        torch.zeros(WIDTH, WIDTH, dtype=dtype, device=DEVICE)
        return shrink(*arguments)

    monkeypatch.setattr(reference, "shrink", wasteful)
    block = rows(8, 4, dtype, rng, trained=True)
    took, (_, gradients) = measure(lambda: inject(layer, block))
    assert took.peak > SLACK * allowance(layer, gradients[1:])
    assert ON_GPU or took.largest >= layer[1].nbytes


@pytest.mark.parametrize("dtype", [torch.float32], indirect=True)
def test_results_are_no_views(layer, dtype, rng):
    """Autograd adds up gradients in place only where they are none, and nobody may write into a custom op's view."""
    x, weight, _ = (t.detach()[..., :64].contiguous() for t in layer)
    A, B, index, coefficient = rows(4, 3, dtype, rng, trained=False)
    y = ops.inject(leaf(x), weight, A[..., :64], B, index, coefficient)
    grads = inject_backward(y.detach(), x, weight, flat_acting(A[..., :64], B, index, coefficient), [True] * 5)
    assert not any(t._is_view() for t in (y, *grads))
    y += 1


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_inject_is_the_same_where_samples_take_turns(name, together, rng, monkeypatch):
    if name == "cpu" and (refusal := native.cpu_usable()) is not None:
        pytest.skip(refusal)
    case = inject_cases.Case(B=3, S=5, d_in=24, d_out=16, N=6, R=2, P=4)
    x, weight, A, B, index, coefficient, bias = inject_cases.make(case, torch.float32, rng)
    increments = flat_acting(*(t.detach() for t in (A, B, index, coefficient)), scale=0.5)

    def results():
        with ops.backend(name):
            y, *lows = LIBRARY.inject(x.detach(), weight, bias, *increments, True)
            return y, *inject_backward(y, x.detach(), weight, increments, [True] * 5)

    wanted = results()
    monkeypatch.setattr(reference, "GATHERED", together * case.P * case.R * case.d_in)
    assert len(list(reference._turns(A, Acting(*increments), x))) == -(-case.B // together)
    for found, exact in zip(results(), wanted, strict=True):
        close(found, exact.double(), 1e-6)
