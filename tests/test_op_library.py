"""The ops in torch.library: opcheck, compilation, autocast, checkpointing."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cllava_fast as cf
from cllava_fast import ops
from cllava_fast.model.paths import adapted_linears
from cllava_fast.ops import dispatch, library
from cllava_fast.ops.aggregate import cases as aggregate_cases
from cllava_fast.ops.inject import autograd as inject_autograd
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.merge import cases as merge_cases
from cllava_fast.ops.select import cases as select_cases
from cllava_fast.ops.select_aggregate import cases as select_aggregate_cases
from tests.helpers import learn
from tests.ops_helpers import LIBRARY, flat_acting, inject_inputs, leaf, leaves, on, on_every_backend, run

# all of a backend's ops in one: its "inject" goes the way that it chooses itself
everywhere = on_every_backend("chain")


def samples(rng, device, routers=True):
    """One call of each op, most with a gradient to compute; the backward ops too."""
    query, keys, allowed = on(device, select_cases.make(select_cases.CASES[4], torch.float32, rng))
    index, _, grad = (t.detach() for t in ops.select(query, keys, 2, allowed, 3))
    yield LIBRARY.select, (query, leaf(keys), 2, allowed, 3, False)
    yield LIBRARY.select, (query, leaf(keys), 4, None, 1, True)
    yield LIBRARY.select_backward, (grad, query, keys, index, 3, True)
    index, weight, *rest, context = on(device, aggregate_cases.make(aggregate_cases.CASES[1], torch.float32, rng))
    yield LIBRARY.aggregate, (index, leaf(weight), *rest, leaf(context))
    joined = on(device, select_aggregate_cases.make(select_aggregate_cases.CASES[3], torch.float32, rng))
    query, keys, allowed, row_task, row_mean, context_ = joined
    yield LIBRARY.select_aggregate, (query, keys, 2, allowed, 3, False, row_task, row_mean, leaf(context_))
    yield LIBRARY.select_aggregate, (query, keys, 4, None, 1, True, row_task, row_mean, context_)
    ones = lambda *shape: torch.ones(shape, device=device)  # noqa: E731
    yield LIBRARY.aggregate_backward, (ones(4, 28), index, weight, *rest, context, [True, True])
    mixed = on(device, aggregate_cases.make_mix(aggregate_cases.MIX_CASES[1], torch.bfloat16, rng))
    A, B, coefficient, index = mixed
    yield LIBRARY.mix_factors, (leaf(A), leaf(B), leaf(coefficient), index)
    grads = ones(3, 8, 40).bfloat16(), ones(3, 8, 24).bfloat16()
    yield LIBRARY.mix_factors_backward, (*grads, *mixed, [True, False, True])
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[1], torch.float32, rng, device)
    past_A, past_B, past_coefficient = on(
        device, inject_cases.make_past(inject_cases.CASES[1]._replace(past=3), torch.float32, rng)
    )
    y = ones(2, 3, 24)
    for past, whole in itertools.product(((None, None, None), (past_A, past_B, leaf(past_coefficient))), (False, True)):
        pairs = flat_acting(A, B, index, coefficient, 0.5, past, whole)
        yield LIBRARY.inject, (x, weight, bias, *pairs, True)
        yield LIBRARY.inject_add, (leaf(y), x, *pairs, True)
    yield LIBRARY.inject, (leaf(x.transpose(0, 1)[:2]), weight, None, leaf(A.bfloat16()), *pairs[1:], True)
    frozen = flat_acting(A.detach(), B.detach(), index, coefficient.detach(), 0.5)
    yield LIBRARY.inject_add, (leaf(y), x, *frozen, False)
    low, nothing = ones(2, 3, 32), ones(0)
    yield LIBRARY.inject_backward, (y, x.detach(), None, *frozen, low, nothing, [True, True, True, True, False])
    yield LIBRARY.inject_backward, (y, None, weight, *frozen, nothing, nothing, [True, False, False, False, False])
    past = past_A, past_B, past_coefficient
    frozen = flat_acting(A.detach(), B.detach(), index, coefficient.detach(), 0.5, past, True)
    low = ones(2, 3, 5 * 8 + 3 * 8)
    yield LIBRARY.inject_backward, (y, x.detach(), weight, *frozen, low, nothing, [True, True, True, True, True])
    by_token = coefficient.detach().unsqueeze(1).repeat(1, 3, 1)
    of_routers = (A, by_token, True), (A[:1], by_token, False), (A[:1], coefficient, True)
    for one, strengths, whole in of_routers if routers else ():
        pairs = flat_acting(leaf(one), B, index, leaf(strengths), 0.5, past, whole)
        yield LIBRARY.inject, (x, weight, bias, *pairs, True)
        frozen = flat_acting(one.detach(), B.detach(), index, strengths.detach(), 0.5, past, whole)
        lows = ones(2, 3, len(one) * 8 + (len(one) > 1) * 3 * 8), nothing if len(one) > 1 else ones(2, 3, 3 * 8)
        yield LIBRARY.inject_backward, (y, x.detach(), weight, *frozen, *lows, [True] * 5)


def test_opcheck_sees_every_op(rng):
    merge = LIBRARY.merge, (*merge_cases.make(merge_cases.CASES[1], torch.float32, rng), 0.5)
    opcheck(merge[0].default, merge[1])  # which no backend but the reference has
    seen = {op.default for op, _ in (*samples(rng, "cpu"), merge)}
    assert seen == set(library._kernels)


@everywhere
def test_opcheck(backend, rng):
    for op, args in samples(rng, backend.device, routers=backend.name != "cpu"):  # which refuses them
        opcheck(op.default, args)


def chain(query, keys, row_task, row_mean, context, x, weight, A, B):
    """All of the ops in one function, as a patched layer runs them."""
    index, strength, similarity = ops.select(query, keys, 2, groups=2)
    index, coefficient = ops.aggregate(index, strength, row_task, row_mean, context)
    y = ops.inject(x, weight, A, B, index, coefficient, scale=0.5)
    A_mix, B_mix = ops.mix_factors(A, B, coefficient, index)
    own = torch.arange(len(x), device=x.device).unsqueeze(1)
    return ops.inject_add(y, x, A_mix, B_mix, own, torch.ones_like(own, dtype=torch.float32)), similarity


def chain_inputs(rng, samples=3, tokens=4, device="cpu"):
    normal = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    query, keys, context = normal(samples, 8), normal(6, 8), normal(3, 3)
    x, weight, A, B = normal(samples, tokens, 12), normal(10, 12), normal(6, 2, 12), normal(6, 2, 10)
    row_task, row_mean = torch.arange(6) // 2, torch.rand(6, generator=rng)
    inputs = query, leaf(keys), row_task, row_mean, leaf(context), leaf(x), weight, leaf(A), leaf(B)
    return on(device, inputs)


def gradients(outputs, inputs):
    return torch.autograd.grad([out.float().sum() for out in outputs], leaves(inputs))


@everywhere
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_with_dynamic_shapes(autocast, backend, rng):
    torch._dynamo.reset()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True, dynamic=True)
    for samples_, tokens in ((3, 4), (2, 7)):
        inputs = chain_inputs(rng, samples_, tokens, backend.device)
        with torch.autocast(backend.device, torch.bfloat16, enabled=autocast):
            wanted, found = chain(*inputs), compiled(*inputs)
        assert found[0].dtype == wanted[0].dtype == (torch.bfloat16 if autocast else torch.float32)
        for a, b in zip((*wanted, *gradients(wanted, inputs)), (*found, *gradients(found, inputs)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    torch._dynamo.reset()


@everywhere
@pytest.mark.parametrize("factor", [False, True], ids=["product", "factor"])
def test_a_patched_layer_compiles_whole_with_dynamic_shapes(factor, backend, new_llava, processor, rng):
    context = "factor" if factor else "product"
    config = cf.IncrementConfig(a_std=0.1, rank=4, context=context, surrogate="backbone")
    llava = cf.patch(new_llava(), config, processor=processor)
    with ops.backend("auto"):
        increments = learn(llava, 3, rng, commit_last=False)
    llava.to(backend.device)
    increments.pool.train_keys(False)
    linear = next(iter(adapted_linears(llava, config.targets).values()))
    increments.train()
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    trained = [p for p in increments.pool.parameters() if p.requires_grad]
    for samples_, tokens in ((3, 4), (2, 7)):
        query = torch.randn(samples_, increments.pool.key_dim, generator=rng).to(backend.device)
        x = leaf(torch.randn(samples_, tokens, linear.in_features, generator=rng).to(backend.device))
        found = []
        for layer in (linear, compiled):
            increments.call.active = increments.method.select(increments.pool, query, increments.groups, True)
            y = layer(x)
            found.append([y, *torch.autograd.grad(y.sum(), [x, *trained], allow_unused=True)])
        assert found[0][1] is not None and any(grad is not None for grad in found[0][2:])
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, atol=1e-5)
    torch._dynamo.reset()


def test_autocast_follows_linear(rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[1], torch.float32, rng)
    upstream = torch.randn(2, 3, 24, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight.half(), bias).dtype == torch.bfloat16
        y, grads = run(ops.inject, (x, weight, A, B, index, coefficient, bias), upstream)  # backward inside as well
        added = ops.inject_add(F.linear(x, weight, bias), x, A, B, index, coefficient)
        index64, weights, similarity = ops.select(x[:, 0], A[:, 0].detach(), 2)
        _, mixed = ops.mix_factors(A, B, coefficient, index)
    half = leaf(x.detach().bfloat16()), weight.bfloat16(), A, B, index, coefficient, bias.bfloat16()
    wanted, wanted_grads = run(ops.inject, half, upstream)
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted) and torch.equal(added, y)
    assert [g.dtype for g in grads] == [torch.float32] * 4
    assert all(torch.equal(a, b.float()) for a, b in zip(grads, wanted_grads, strict=True))
    plain = ops.select(x[:, 0], A[:, 0].detach(), 2)
    assert all(torch.equal(a, b) for a, b in zip((index64, weights, similarity), plain, strict=True))
    assert torch.equal(mixed, ops.mix_factors(A, B, coefficient, index)[1]) and mixed.dtype == torch.float32


@everywhere
def test_activation_checkpointing(backend, rng):
    inputs = chain_inputs(rng, device=backend.device)
    plain, again = chain(*inputs), checkpoint(chain, *inputs, use_reentrant=False)
    for a, b in zip((*plain, *gradients(plain, inputs)), (*again, *gradients(again, inputs)), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused(rng):
    *inputs, A, B = chain_inputs(rng)
    similarity = ops.select(inputs[0], inputs[1], 2)[2]
    mixed = ops.mix_factors(A, B, torch.ones(1, 2), torch.zeros(1, 2).long())[0]
    _, past = ops.aggregate(torch.full((1, 1), 5), torch.ones(1, 1), *inputs[2:5])
    y = ops.inject(inputs[5], inputs[6], A, B, torch.zeros(3, 1).long(), torch.ones(3, 1))
    for output, tensor in ((similarity, inputs[1]), (mixed, A), (past, inputs[4]), (y, A)):
        square = output.square().sum()
        (grad,) = torch.autograd.grad(square, tensor, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            grad.sum().backward()


def test_forward_mode_is_refused(rng):  # torch would say zero
    *inputs, A, B = (tensor.detach() for tensor in chain_inputs(rng))
    index, coefficient = torch.zeros(3, 1).long(), torch.ones(3, 1)

    def injected(x):
        return ops.inject(x, inputs[6], A, B, index, coefficient)

    calls = (
        (injected, inputs[5]),
        (lambda keys: ops.select(inputs[0], keys, 2, check_values=False)[2], inputs[1]),
        (lambda A: ops.mix_factors(A, B, coefficient[:1], index[:1], check_values=False)[0], A),
    )
    for call, tensor in calls:
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(call, (tensor,), (torch.ones_like(tensor),))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(injected(inputs[5]), ops.inject(inputs[5], inputs[6], A, B, index, coefficient))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            injected(torch.autograd.forward_ad.make_dual(inputs[5], inputs[5]))


def test_a_backend_named_in_a_compiled_function_runs_or_is_refused(rng, monkeypatch):
    inputs = [tensor.detach() for tensor in chain_inputs(rng)]
    ran = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda op, site: ran.append(choose(op, site).backend) or choose(op, site))

    def named(*inputs):
        with ops.backend("reference"):
            return chain(*inputs)[0] + 1

    torch._dynamo.reset()
    torch.compile(named, backend="aot_eager")(*inputs)
    assert set(ran) == {"reference"}
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(named, backend="aot_eager", fullgraph=True)(*inputs)
    torch._dynamo.reset()


def test_values_are_checked_only_where_they_can_be_read(rng):
    inputs = list(chain_inputs(rng))
    inputs[0] = torch.full_like(inputs[0], math.nan)
    with pytest.raises(ValueError, match="query"):
        chain(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    assert compiled(*inputs)[1].isnan().all()  # visible, not hidden
    meta = [t.detach().to("meta") for t in chain_inputs(rng)]
    assert chain(*meta)[0].shape == (3, 4, 10)
    torch._dynamo.reset()


class _Seen(TorchDispatchMode):
    """Names of the ops that reach a dispatch mode."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_ops_and_gradients(rng):
    """Selective checkpointing, for one, decides by them."""
    inputs = chain_inputs(rng)
    wanted = gradients(chain(*inputs), inputs)
    with _Seen() as seen:
        found = gradients(chain(*inputs), inputs)
    forward = ["select", "aggregate", "inject", "mix_factors", "inject_add"]
    expected = forward + [f"{name}_backward" for name in ("inject", "mix_factors", "inject", "aggregate", "select")]
    ours = [name for name in seen.names if name in {*expected}]
    assert sorted(ours) == sorted(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class _Foreign(torch.Tensor):
    """A subclass, as other libraries have."""


SURROUNDINGS = {  # made where they are entered: some act from their making
    "plain": (contextlib.nullcontext, True),
    "no_grad": (torch.no_grad, True),
    "inference": (torch.inference_mode, True),
    "fake": (lambda: FakeTensorMode(allow_non_fake_inputs=True), False),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), False),
    "profiler": (torch.autograd.profiler.profile, False),
    "below autograd": (torch._C._AutoDispatchBelowAutograd, False),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_dispatcher_is_passed_by_only_where_it_would_do_nothing(name, monkeypatch, rng):
    arguments = inject_inputs(inject_cases.CASES[1], torch.float32, rng, "cpu")
    around, straight = SURROUNDINGS[name]
    asked, answers = library._nothing_between, []
    monkeypatch.setattr(library, "_nothing_between", lambda args: answers.append(asked(args)) or answers[-1])
    with around():
        ops.inject(*arguments, check_values=False)
    assert answers[0] == straight


def test_transforms_and_subclasses_take_the_dispatcher(rng):
    x = torch.randn(3, generator=rng)
    seen = []
    torch.func.grad(lambda t: (seen.append(library._nothing_between((t,))), t.sum())[1])(x)
    torch.func.vmap(lambda t: (seen.append(library._nothing_between((t,))), t)[1])(torch.randn(2, 3, generator=rng))
    torch.jit.trace(lambda t: (seen.append(library._nothing_between((t,))), t + 1)[1], x, check_trace=False)
    seen += [
        library._nothing_between((x, odd)) for odd in (x.as_subclass(_Foreign), x.to("meta").as_subclass(_Foreign))
    ]
    seen.append(library._nothing_between((x.to("meta"),)))
    assert not any(seen)


def test_what_a_transform_left_behind_keeps_its_gradient(rng):
    """functorch's wrapper of a tensor outlives its transform, and looks like any tensor."""
    x, weight, A, B, index, coefficient, _ = inject_inputs(inject_cases.CASES[1], torch.float32, rng, "cpu")
    trained, left = leaf(coefficient), []
    torch.func.grad(lambda t: (left.append(t * 2), t.sum())[1])(trained)
    ops.inject(leaf(x), weight, A, B, index, left[0]).sum().backward()
    (wanted,) = torch.autograd.grad(ops.inject(x, weight, A, B, index, trained * 2).sum(), trained)
    assert torch.equal(trained.grad, wanted)


def test_straight_and_dispatched_calls_give_the_same_bits(rng):
    case = inject_cases.CASES[1]
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, torch.float32, rng, "cpu")
    trained = [leaf(t) for t in (x, A, B, coefficient)]
    pairs = flat_acting(*trained[1:3], index, trained[3], 0.5)
    found = []
    for call in (inject_autograd.inject, LIBRARY.inject):
        y = call(trained[0], weight, bias, *pairs, True)[0]
        found.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    for straight, dispatched in zip(*found, strict=True):
        assert torch.equal(straight, dispatched)
    with torch.profiler.profile() as profile:
        inject_autograd.inject(trained[0], weight, bias, *pairs, True)
    assert "cllava_fast::inject" in {event.key for event in profile.key_averages()}
