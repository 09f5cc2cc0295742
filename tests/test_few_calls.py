"""Training in few calls: values and gradients, and where a patched model goes that way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cllava_fast as cf
from cllava_fast import ops
from cllava_fast.methods import METHODS, Pairs, Selection
from cllava_fast.model import acting, get_increments
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.inject import few_calls
from tests.helpers import QUESTIONS, inputs, learn
from tests.ops_helpers import GPU, Backend, nan_in_empty_memory
from tests.test_ops import OPS, SCALE, check

CASES = (*inject_cases.CASES, *inject_cases.ODD[:3], *inject_cases.ODD[-2:])
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# methods whose rows act alike in all layers and on all tokens of a sample
ONE_LIST = {"continual_llava", "joint_lora", "o_lora", "per_task_lora", "sequential_lora", "slm"}
HERE = Backend("reference", GPU)


def by_columns(
    x: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, *past: Tensor, **frozen: Any
) -> Any:
    past_A, past_B, past_coefficient = past or (None, None, None)
    past_rank = 0 if past_B is None else past_B.shape[1]
    strength = few_calls.column_strength(index, coefficient, len(B), B.shape[1], past_coefficient, past_rank, SCALE)
    given = {"weight": None, "bias": None, "base": None, **frozen}
    return (few_calls.inject(x, A=A, B=B, past_A=past_A, past_B=past_B, strength=strength, **given),)


def on_linear(
    case: Any, x: Any, weight: Any, A: Any, B: Any, index: Any, coefficient: Any, bias: Any, *past: Any
) -> Any:
    return by_columns(x, A, B, index, coefficient, *past, weight=weight, bias=bias)


def on_base(case: Any, y: Any, x: Any, A: Any, B: Any, index: Any, coefficient: Any, *past: Any) -> Any:
    return by_columns(x, A, B, index, coefficient, *past, base=y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("op", "call"), [("inject", on_linear), ("inject_add", on_base)])
def test_as_exact_as_the_op(op, call, case, dtype, rng):
    with nan_in_empty_memory():
        check(OPS[op]._replace(call=call), case, dtype, HERE, rng)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 4)])
def test_gradients_one_by_one(wanted, rng):
    case = inject_cases.CASES[9]
    x, weight, A, B, index, coefficient, bias = inject_cases.make(case, torch.float64, rng)
    past = inject_cases.make_past(case, torch.float64, rng)
    trained = [x, A, B, coefficient, past.coefficient]
    for number in wanted:
        trained[number].requires_grad_()
    ours = on_linear(case, x, weight, A, B, index, coefficient, bias, *past)[0]
    theirs = ops.inject(x, weight, A, B, index, coefficient, bias, SCALE, past=past)
    upstream = torch.randn(ours.shape, generator=rng, dtype=torch.float64)
    for found in zip(
        *(torch.autograd.grad(y, [trained[n] for n in wanted], upstream) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(*found)


def test_keeps_no_input_where_its_factor_is_frozen(rng):
    x, weight, A, B, index, coefficient, bias = inject_cases.make(inject_cases.CASES[1], torch.float32, rng)
    x, B = x.requires_grad_(), B.requires_grad_()
    moved = x * 1
    for trained in (False, True):
        y = by_columns(moved, A.requires_grad_(trained), B, index, coefficient, weight=weight, bias=bias)[0]
        kept = any(tensor is not None and tensor.data_ptr() == moved.data_ptr() for tensor in y.grad_fn.saved_tensors)
        assert kept == trained


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()])
def test_no_second_derivative(loss, rng):
    """Not even one that is silently zero, where the first does not depend on y's gradient."""
    x, weight, A, B, index, coefficient, bias = inject_cases.make(inject_cases.CASES[1], torch.float32, rng)
    y = by_columns(x.requires_grad_(), A.requires_grad_(), B, index, coefficient, weight=weight, bias=bias)[0]
    (first,) = torch.autograd.grad(loss(y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(first.sum(), A)


# -- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch) -> Counter:
    """How often layers went that way, here where no GPU waits."""
    count: Counter = Counter()
    way = few_calls.inject

    def counted(*args: Any) -> Tensor:
        count["layers"] += 1
        return way(*args)

    monkeypatch.setattr(few_calls, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(few_calls, "inject", counted)
    return count


def config(**changes: Any) -> cf.IncrementConfig:
    return cf.IncrementConfig(rows_per_task=4, top_m=2, rank=2, a_std=0.1, scale=8.0, surrogate="backbone", **changes)


def loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # of SLM's own dropout
    loss = model(**batch, labels=batch["input_ids"]).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    found = {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}
    return {"loss": loss.detach(), **found}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(found) > 2
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4 * float(tensor.abs().max()), rtol=1e-3, msg=name)


@pytest.mark.parametrize("changes", [{}, {"context": "none"}, {"context_rank": 3}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same(checkpointing, changes, llava, processor, generator, taken):
    cf.patch(llava, config(**changes), processor=processor)
    learn(llava, 3, generator, commit_last=False)
    llava.train()
    if checkpointing:
        llava.enable_input_require_grads()
        llava.gradient_checkpointing_enable({"use_reentrant": False})
    batch = inputs(processor, QUESTIONS, generator)
    found = loss_and_gradients(llava, batch)
    layers = len(get_increments(llava).pool.layers)
    assert taken["layers"] == layers * (1 + checkpointing)
    with ops.backend("reference"):
        same(found, loss_and_gradients(llava, batch))
    assert taken["layers"] == layers * (1 + checkpointing)  # a backend asked for by name is what runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_in_an_autocast_region(dtype, llava, processor, generator, taken):
    """Which casts products, but not those that are added in place."""
    cf.patch(llava.to(dtype), config(), processor=processor)
    learn(llava, 3, generator, commit_last=False)
    batch = inputs(processor, QUESTIONS, generator)
    trained = [p for p in llava.train().parameters() if p.requires_grad]
    found = []
    for region in (False, True):
        loss = llava(**batch, labels=batch["input_ids"]).loss
        with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else torch.float16, enabled=region):
            found.append(torch.autograd.grad(loss, trained, allow_unused=True))
    assert taken["layers"]
    for plain, cast in zip(*found, strict=True):
        if plain is not None:  # what is no work of this library is cast
            torch.testing.assert_close(cast, plain, atol=0.05 * float(plain.abs().max()), rtol=0.05)


@pytest.mark.parametrize("asked", [("reference", "auto"), ("auto", "reference")])
def test_a_layer_goes_the_same_way_when_it_is_computed_again(asked, llava, processor, generator, taken):
    cf.patch(llava, config(), processor=processor)
    learn(llava, 3, generator, commit_last=False)
    llava.train().enable_input_require_grads()
    llava.gradient_checkpointing_enable({"use_reentrant": False})
    batch = inputs(processor, QUESTIONS, generator)
    wanted = loss_and_gradients(llava, batch)
    taken.clear()
    forward, backward = asked
    with ops.backend(forward):
        loss = llava(**batch, labels=batch["input_ids"]).loss
    with ops.backend(backward):
        loss.backward()
    found = {name: p.grad for name, p in llava.named_parameters() if p.grad is not None}
    same({"loss": loss.detach(), **found}, wanted)
    assert taken["layers"] == (2 * len(get_increments(llava).pool.layers) if forward == "auto" else 0)


class Doubled(nn.Linear):
    """A linear that is no plain one, such as a quantised one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_on_top_of_any_linear(llava, processor, generator, taken):
    for module in llava.modules():
        if type(module) is nn.Linear:
            module.__class__ = Doubled
    cf.patch(llava, config(), processor=processor)
    learn(llava, 2, generator, commit_last=False)
    batch = inputs(processor, QUESTIONS, generator)
    found = loss_and_gradients(llava.train(), batch)
    assert taken["layers"] == len(get_increments(llava).pool.layers)
    with ops.backend("reference"):
        same(found, loss_and_gradients(llava, batch))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_learns_the_same(method, llava, processor, generator, taken):
    kind = METHODS[method][0]
    small = {
        "rank": 2,
        "a_std": 0.1,
        "scale": 8.0,
        "surrogate": "backbone",
        "rows_per_task": 4,
        "top_m": 2,
        "groups": 4,
    }
    cf.patch(
        llava, kind(**{name: small[name] for name in small if name in kind.__dataclass_fields__}), processor=processor
    )
    learn(llava, 2, generator, commit_last=False)
    batch = inputs(processor, QUESTIONS, generator)
    if get_increments(llava).method.uses_task:
        batch["query"] = torch.full((len(QUESTIONS), 1), 1.0)  # the open task
    found = loss_and_gradients(llava.train(), batch)
    assert bool(taken["layers"]) == (method in ONE_LIST)
    with ops.backend("reference"):
        same(found, loss_and_gradients(llava, batch))


def work(model: Any, batch: dict[str, Tensor], columns: int = 2 * 4) -> int:
    """Multiplications of an adapted linear, which are all of one size; beside a task of four rows of rank 2."""
    linear = next(iter(get_increments(model).linears(model).values()))
    d_in, d_out = linear.in_features, linear.out_features
    return batch["input_ids"].numel() * (d_in * d_out + columns * (d_in + d_out))


def test_not_within_a_transform(monkeypatch):
    """Which knows the op, and would go past a function of autograd's."""
    monkeypatch.setattr(few_calls, "DEVICES", ("cpu",))
    x = torch.ones(3, 1, 2, 8)
    wins = [few_calls.wins(x[0], 8, 4)]
    torch.vmap(lambda one: wins.append(few_calls.wins(one, 8, 4)) or one)(x)
    assert wins == [True, False]


def test_in_an_autocast_region_that_casts_nothing(llava, processor, generator, taken):
    """As where a bfloat16 base is tuned with --bf16."""
    cf.patch(llava.bfloat16(), config(), processor=processor)
    learn(llava, 2, generator, commit_last=False)
    linear = next(iter(get_increments(llava).linears(llava).values()))
    x = torch.randn(2, 5, linear.in_features, generator=generator).bfloat16().requires_grad_()
    factors = linear._adapter.factors
    pairs = Pairs(torch.tensor([[0, 3], [1, 1]]), torch.rand(2, 2, generator=generator).requires_grad_())
    selection = Selection(block=pairs, context=torch.rand(2, 4, generator=generator))
    found = []
    for dtype in (None, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            strength = acting.column_strength(selection, get_increments(llava).pool, 8.0)
            y = acting.train_in_few_calls(x, linear, None, replace(selection, column_strength=strength), factors)
            if y is not None:
                wanted = x, factors.block_A, factors.block_B, pairs.coefficient
                found.append([y, *torch.autograd.grad(y.float().square().sum(), wanted)])
    assert taken["layers"] == len(found) == 2
    assert all(map(torch.equal, *found))


WHYS = ["evaluates", "much work", "many columns", "without gradients", "autocast", "float16", "factors are summed"]


@pytest.mark.parametrize("why", WHYS)
def test_the_op_runs_where(why, llava, processor, generator, taken, monkeypatch):
    if why == "float16":
        llava.half()
    cf.patch(llava, config(context="factor" if why == "factors are summed" else "product"), processor=processor)
    learn(llava, 2, generator, commit_last=False)
    batch = inputs(processor, QUESTIONS, generator)
    monkeypatch.setattr(few_calls, "WORK", work(llava, batch) - (why == "much work"))
    if why == "many columns":
        monkeypatch.setattr(few_calls, "WORK", work(llava, batch, columns=1))
    with torch.set_grad_enabled(why != "without gradients"), torch.autocast("cpu", enabled=why == "autocast"):
        llava.train(why != "evaluates")(**batch)
    assert not taken["layers"]


def test_what_one_list_of_columns_cannot_say(taken):
    pairs, pool = (
        Pairs(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)),
        SimpleNamespace(block_rows=3, rank=2, context_rank=0, shares_A=False),
    )
    selection = Selection(block=pairs)
    found = acting.column_strength(selection, pool, 2.0)
    assert found.tolist() == [[[2.0, 2.0, 0.0, 0.0, 0.0, 0.0]]] * 2
    by_token = Pairs(pairs.index, torch.ones(2, 5, 1))
    for other in (
        Selection(past=pairs), replace(selection, past=pairs), replace(selection, mix=True),
        replace(selection, block=by_token), replace(selection, rows=(torch.ones(3, 2, 4),) * 2),
    ):  # fmt: skip
        assert acting.column_strength(other, pool, 2.0) is None
    pool.shares_A = True
    assert acting.column_strength(selection, pool, 2.0) is None
    pool.shares_A = False
    with torch.no_grad():
        assert acting.column_strength(selection, pool, 2.0) is None
    weaker = replace(selection, column_strength=found).scaled(torch.tensor([0.5, 0.5]))
    assert weaker.column_strength is None  # of what acted before


def test_as_much_work_as_there_may_be(llava, processor, generator, taken, monkeypatch):
    cf.patch(llava, config(), processor=processor)
    learn(llava, 2, generator, commit_last=False)
    batch = inputs(processor, QUESTIONS, generator)
    monkeypatch.setattr(few_calls, "WORK", work(llava, batch))
    llava.train()(**batch)
    assert taken["layers"]


def test_a_past_that_is_added_up_is_the_ops(llava, processor, generator, taken):
    cf.patch(llava, config(), processor=processor)
    learn(llava, 40, generator, commit_last=False)
    batch = inputs(processor, QUESTIONS, generator)
    llava.train()(**batch)
    assert not taken["layers"]


def test_a_trained_linear_is_refused(llava, processor, generator, taken):
    cf.patch(llava, config(), processor=processor)
    increments = learn(llava, 2, generator, commit_last=False)
    batch = inputs(processor, QUESTIONS, generator)
    next(iter(increments.linears(llava).values())).weight.requires_grad_()
    with pytest.raises(ValueError, match="weight: requires a gradient"):
        llava.train()(**batch)
