"""What only a GPU can show of the ops: graph capture, streams, synchronisation, other devices, memory that runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops import native
from cllava_fast.ops.inject.cases import Case, make
from cllava_fast.ops.inject.native import decode
from tests.ops_helpers import Backend, backends, leaves, on
from tests.test_op_library import chain_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def every_gpu_backend() -> list[Any]:
    return [pytest.param(b, id=str(b)) for b in backends("chain") if b.device == "cuda"]


@pytest.fixture(params=every_gpu_backend())
def gpu_backend(request: pytest.FixtureRequest) -> Any:
    """Ops run on one backend, in memory as a user has it: filling it with NaN would launch kernels of its own."""
    backend: Backend = request.param
    refusal = backend.refusal("chain", torch.float32, {})
    if refusal is not None:
        pytest.skip(f"{backend}: {refusal}")
    with ops.backend(backend.asked):
        yield backend


@pytest.fixture
def tokens(gpu_backend: Backend) -> int:
    return 9 if gpu_backend.name == "cuda" else 33  # whose inject is for few


def chain(query, keys, row_task, row_mean, context, x, weight, A, B):
    """All of the ops, told to read no values: a check of values would wait for the device."""
    index, strength, similarity = ops.select(query, keys, 2, groups=2, check_values=False)
    index, coefficient = ops.aggregate(index, strength, row_task, row_mean, context, check_values=False)
    y = ops.inject(x, weight, A, B, index, coefficient, scale=0.5, check_values=False)
    A_mix, B_mix = ops.mix_factors(A, B, coefficient, index, check_values=False)
    own = torch.arange(len(x), device=x.device).unsqueeze(1)
    one = torch.ones(own.shape, device=x.device)
    return ops.inject_add(y, x, A_mix, B_mix, own, one, check_values=False), similarity


def forward_backward(inputs):
    outputs = chain(*inputs)
    grads = torch.autograd.grad([output.sum() for output in outputs], leaves(inputs))
    return [output.detach() for output in outputs] + list(grads)


def warm_up(inputs):
    """Compiles kernels and fills caches, on a stream of its own as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_backward(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def test_graph_replay_equals_eager_bit_for_bit(gpu_backend, tokens, rng):
    static = chain_inputs(rng, samples=4, tokens=tokens, device="cuda")
    warm_up(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(static)
    for _ in range(3):
        fresh = chain_inputs(rng, samples=4, tokens=tokens, device="cuda")
        with torch.no_grad():
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        for replayed, eager in zip(captured, forward_backward(fresh), strict=True):
            assert torch.equal(replayed, eager)


def test_two_streams_at_once(gpu_backend, tokens, rng):
    inputs = [chain_inputs(rng, samples=8, tokens=tokens, device="cuda") for _ in range(2)]
    alone = [forward_backward(each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(10):  # launches of the two alternate
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i] = forward_backward(inputs[i])
    torch.cuda.synchronize()
    for ours, wanted in zip(found, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_nothing_waits_for_the_device(gpu_backend, tokens, rng):
    inputs = chain_inputs(rng, samples=4, tokens=tokens, device="cuda")
    warm_up(inputs)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_the_current_one(gpu_backend, tokens, rng):
    first = chain_inputs(rng, samples=4, tokens=tokens, device="cuda:0")
    second = [tensor.detach().to("cuda:1").requires_grad_(tensor.requires_grad) for tensor in first]
    assert torch.cuda.current_device() == 0
    for here, there in zip(forward_backward(first), forward_backward(second), strict=True):
        assert there.device == torch.device("cuda:1")
        assert torch.allclose(here.cpu(), there.cpu(), atol=1e-4, rtol=1e-4)
    assert torch.cuda.current_device() == 0


def test_running_out_of_memory_leaves_the_process_usable(gpu_backend, tokens, rng):
    inputs = chain_inputs(rng, samples=8, tokens=tokens, device="cuda")
    wanted = forward_backward(inputs)
    x = torch.zeros(8, 2**15, 12, device="cuda", requires_grad=True)  # its output takes 10 MiB
    large = [x if i == 5 else tensor for i, tensor in enumerate(inputs)]
    forward_backward(large)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    try:  # a little more than there is now: enough to begin with, not enough to end with
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**24) / total)
        with pytest.raises(torch.OutOfMemoryError):
            forward_backward(large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for ours, before in zip(forward_backward(inputs), wanted, strict=True):
        assert torch.equal(ours, before)
    assert all(gradient.isfinite().all() for gradient in forward_backward(large))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [4, 60])
@pytest.mark.parametrize("samples", [1, 16])
def test_one_launch_decodes_as_float64_and_always_alike(samples, pairs, dtype, rng):
    """In one launch, whose last block of a sample, whichever that is, adds up what all have left."""
    refusal = native.cuda_usable()
    if refusal is not None:
        pytest.skip(refusal)
    case = Case(B=samples, S=1, d_in=4096, d_out=4096, N=64, R=8, P=pairs)
    x, weight, A, B, index, coefficient, bias = (tensor.to("cuda") for tensor in make(case, dtype, rng))
    arrived = torch.zeros(samples, dtype=torch.int32, device="cuda")

    def found():
        return decode(x, weight, bias, A, B, index, coefficient, 0.5, arrived)

    def form(x, weight, A, B, coefficient, bias):
        strength = 0.5 * coefficient.repeat_interleave(case.R, 1).unsqueeze(1)  # [B, 1, P * R]
        low = x @ A[index].flatten(1, 2).transpose(1, 2) * strength.to(x.dtype)
        return x @ weight.t() + bias + low @ B[index].flatten(1, 2)

    given = x, weight, A, B, coefficient, bias
    exact = form(*(tensor.double() for tensor in given))
    error = lambda y: (y.double() - exact).norm() / exact.norm()  # noqa: E731
    with torch.no_grad():
        first = found()
        assert error(first) <= 2 * error(form(*given))
        for _ in range(100):
            assert torch.equal(found(), first)
    assert not arrived.any()


def test_one_launch_in_a_graph(rng):
    """The counts are zeros again behind each replay, and the sums' memory is the graph's own."""
    refusal = native.cuda_usable()
    if refusal is not None:
        pytest.skip(refusal)
    case = Case(B=3, S=1, d_in=192, d_out=264, N=64, R=8, P=60)
    x, weight, A, B, index, coefficient, bias = on("cuda", make(case, torch.bfloat16, rng))
    arrived = torch.zeros(case.B, dtype=torch.int32, device="cuda")

    def layers(x):  # which share the counts, as those of a model do
        return [decode(x, weight, bias, A, B, index, scale * coefficient, 0.5, arrived) for scale in (1.0, 2.0)]

    with torch.no_grad():
        layers(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layers(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert all(map(torch.equal, captured, layers(x)))
            assert not arrived.any()
