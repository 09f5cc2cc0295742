"""Coefficient policies against their formulas, written out with loops in float64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import cllava_fast as cf
from cllava_fast.methods import (
    METHODS,
    ContinualLlava,
    IncrementConfig,
    JointLoraConfig,
    LoraConfig,
    Pairs,
    Selection,
    SequentialLora,
    config_from_dict,
    make_method,
    register,
)
from cllava_fast.methods.continual_llava import mean_weight, sample_keys
from cllava_fast.model import get_increments
from cllava_fast.pool import LinearShape, Pool
from tests.helpers import QUESTIONS, inputs, learn

D = 12


def trained_pool(config: IncrementConfig, tasks: int, generator: torch.Generator) -> tuple[ContinualLlava, Pool]:
    method = ContinualLlava(config)
    pool = Pool(rank=config.rank, key_dim=D, shapes={"o": LinearShape(6, 5)})
    for task in range(tasks):
        queries = torch.randn(30, D, generator=generator)
        method.open_task(pool, queries, generator)
        if pool.block_context is not None:
            torch.nn.init.normal_(pool.block_context, generator=generator)
        torch.nn.init.normal_(pool.factors("o").block_B, generator=generator)
        method.close_task(pool, f"task{task}", queries, 1)
    return method, pool


def weights_of(query: Tensor, keys: Tensor, rows: list[int], top_m: int) -> dict[int, float]:
    """Row -> weight by the definition: top-M cosines, negative counts as 0, even weights where nothing is left."""
    cosine = {n: float(torch.cosine_similarity(query.double(), keys[n].double(), dim=0)) for n in rows}
    best = sorted(rows, key=lambda n: (-cosine[n], n))[:top_m]
    total = sum(max(cosine[n], 0.0) for n in best)
    return {n: (max(cosine[n], 0.0) / total if total >= 1e-6 else 1 / top_m) for n in best}


def alpha_of(weights: dict[int, float], task: list[int], z: Tensor, w: Tensor) -> Tensor:
    """The formula of Continual LLaVA's coefficients, row by row."""
    alpha = torch.zeros(len(task), dtype=torch.float64)
    for m, weight in weights.items():
        alpha[m] += weight
        for n in range(len(task)):
            if task[n] < task[m]:
                alpha[n] += weight * float(w[task[m], task[n]]) * float(z[n])
    return alpha


def dense(selection: Selection, rows: int, first_block_row: int) -> Tensor:
    """``[B, N]`` coefficients of all rows, the open block's behind the committed ones."""
    alpha = torch.zeros(selection.batch_size, rows, dtype=torch.float64)
    for pairs, offset in ((selection.past, 0), (selection.block, first_block_row)):
        if pairs is not None:
            alpha.scatter_add_(1, pairs.index + offset, pairs.coefficient.detach().double())
    if selection.context is not None:
        alpha[:, : selection.context.shape[1]] += selection.context.detach().double()
    return alpha


@pytest.mark.parametrize("context", ["product", "none"])
def test_coefficients_at_inference(context: str, generator: torch.Generator) -> None:
    method, pool = trained_pool(IncrementConfig(context=context), tasks=4, generator=generator)
    query = torch.randn(9, D, generator=generator)
    selection = method.select(pool, query, groups=1, training=False)
    task, w = pool.row_task.tolist(), pool.context if context == "product" else torch.zeros(4, 4)
    for b in range(9):
        weights = weights_of(query[b], pool.keys, list(range(32)), 4)
        expected = alpha_of(weights, task, pool.row_mean, w)
        torch.testing.assert_close(dense(selection, 32, 32)[b], expected, atol=1e-6, rtol=1e-6)
        assert set(selection.index[b].tolist()) == set(weights)


def test_coefficients_in_training_use_the_open_block_alone_and_all_earlier_context(generator: torch.Generator) -> None:
    method, pool = trained_pool(IncrementConfig(), tasks=2, generator=generator)
    method.open_task(pool, torch.randn(30, D, generator=generator), generator)
    torch.nn.init.normal_(pool.block_context, generator=generator)
    # the best keys of all belong to committed rows; training must not take them
    query = torch.cat([pool.keys[:3], torch.randn(4, D, generator=generator)])
    selection = method.select(pool, query, groups=1, training=True)
    keys = torch.cat([pool.keys, pool.block_keys.detach()])
    task = [*pool.row_task.tolist(), *[2] * 8]
    z = torch.cat([pool.row_mean, torch.zeros(8)])
    for b in range(7):
        expected = alpha_of(weights_of(query[b], keys, list(range(16, 24)), 4), task, z, pool.context_matrix().detach())
        torch.testing.assert_close(dense(selection, 24, 16)[b], expected, atol=1e-6, rtol=1e-6)
    assert selection.past is None
    assert selection.context.shape == (1, 16), "one for all samples, so that a layer can add it up"
    selection.context.sum().backward()
    assert pool.block_context.grad.abs().min() > 0 and pool.block_keys.grad is None


def test_rows_of_an_untrained_task_are_never_selected_at_inference(generator: torch.Generator) -> None:
    method, pool = trained_pool(IncrementConfig(), tasks=1, generator=generator)
    method.open_task(pool, torch.randn(30, D, generator=generator), generator)
    query = pool.block_keys.detach().clone()
    selection = method.select(pool, query, groups=1, training=False)
    assert selection.block is None and int(selection.index.max()) < 8 and int(selection.past.index.max()) < 8


def test_old_tasks_coefficients_do_not_change_when_a_task_is_added(generator: torch.Generator) -> None:
    method, pool = trained_pool(IncrementConfig(), tasks=2, generator=generator)
    pool.keys[:, 0] += 10.0  # a cone, and the new task on the other side
    query = pool.keys[:8].clone()
    before = dense(method.select(pool, query, 1, False), 16, 16)
    far = torch.randn(30, D, generator=generator) - 10.0 * torch.eye(D)[0]
    method.open_task(pool, far, generator)
    torch.nn.init.normal_(pool.block_context, generator=generator)
    method.close_task(pool, "later", far, 1)
    after = dense(method.select(pool, query, 1, False), 24, 24)
    assert torch.equal(after[:, :16], before) and torch.count_nonzero(after[:, 16:]) == 0


def test_nothing_acts_before_the_first_task_is_committed(generator: torch.Generator) -> None:
    method, pool = trained_pool(IncrementConfig(), tasks=0, generator=generator)
    assert method.select(pool, torch.randn(2, D), groups=1, training=False) is None


def test_mean_weight_is_the_mean_over_samples(generator: torch.Generator) -> None:
    keys, queries = torch.randn(8, D, generator=generator), torch.randn(50, D, generator=generator)
    expected = torch.zeros(8, dtype=torch.float64)
    for query in queries:
        for row, weight in weights_of(query, keys, list(range(8)), 4).items():
            expected[row] += weight / 50
    torch.testing.assert_close(mean_weight(queries, keys, 4, 1).double(), expected, atol=1e-6, rtol=1e-6)


def test_keys_are_born_as_distinct_instructions(generator: torch.Generator) -> None:
    distinct = torch.randn(20, D, generator=generator)
    keys = sample_keys(distinct.repeat(5, 1), 8, generator)
    assert len(torch.unique(keys, dim=0)) == 8
    assert all((distinct == key).all(1).any() for key in keys)
    few = sample_keys(distinct[:3].repeat(5, 1), 8, generator)
    assert len(torch.unique(few, dim=0)) == 8 and torch.cdist(few, distinct[:3]).min(1).values.max() < 0.2


def test_orthogonal_keys(generator: torch.Generator) -> None:
    method, pool = trained_pool(IncrementConfig(key_init="orthogonal"), tasks=0, generator=generator)
    method.open_task(pool, torch.randn(3, D), generator)
    torch.testing.assert_close(pool.block_keys @ pool.block_keys.T, torch.eye(8), atol=1e-5, rtol=0)


def test_lora_is_one_row_that_always_acts(generator: torch.Generator) -> None:
    method = make_method(LoraConfig(rank=3))
    pool = Pool(rank=3, key_dim=0, shapes={"o": LinearShape(6, 5)})
    assert method.select(pool, None, 1, training=False) is None
    method.open_task(pool, None, generator)
    first = pool.factors("o").block_A
    method.close_task(pool, "a", None, 1)
    method.open_task(pool, None, generator)
    assert pool.factors("o").block_A is first and pool.num_tasks == 0
    selection = method.select(pool, None, 1, training=False).expand(5)
    assert dense(selection, 1, 0).tolist() == [[1.0]] * 5
    assert make_method(JointLoraConfig()).joint


def test_a_method_that_looks_at_activations_says_so_by_what_it_overrides() -> None:
    """No flag that could be forgotten: merged, such a method would answer with one selection of its own."""

    class Routed(SequentialLora):
        def route(self, selection: Any, factors: Any, x: torch.Tensor) -> Any:
            return selection

    class Read(SequentialLora):
        def read(self, selection: Any, factors: Any, x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
            return x

    config = LoraConfig()
    assert [(kind(config).routes, kind(config).reads) for kind in (SequentialLora, Routed, Read)] == [
        (False, False), (True, False), (True, True),
    ]  # fmt: skip


def test_expand_repeats_each_sample_for_its_beams(generator: torch.Generator) -> None:
    method, pool = trained_pool(IncrementConfig(), tasks=1, generator=generator)
    selection = method.select(pool, torch.randn(2, D, generator=generator), 1, training=False)
    expanded = selection.expand(6)
    assert torch.equal(expanded.past.index[3:], selection.past.index[1:].expand(3, -1))
    with pytest.raises(ValueError, match="batch holds 3 samples; instructions were selected for 2"):
        selection.expand(3)
    method.open_task(pool, torch.randn(30, D, generator=generator), generator)
    expanded = method.select(pool, torch.randn(2, D, generator=generator), 1, training=True).expand(6)
    assert expanded.context.shape == (1, 8) and expanded.context_pairs().coefficient.shape == (6, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_m": 9}, "top_m is 9; expected 1 to 8"),
        ({"top_m": 0}, "top_m is 0"),
        ({"rows_per_task": 0}, "rows_per_task is 0; expected at least 1"),
        ({"context": "sum"}, "context is 'sum'; expected one of"),
        ({"key_init": "zeros"}, "key_init"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_a_config_refuses_what_it_cannot_do(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IncrementConfig(**fields)


@pytest.mark.parametrize("config", [IncrementConfig(top_m=2), LoraConfig(rank=5), JointLoraConfig()])
def test_configs_round_trip(config: IncrementConfig) -> None:
    assert config_from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown fields"):
        config_from_dict({**config.to_dict(), "colour": 1})
    with pytest.raises(ValueError, match="method is 'x'"):
        config_from_dict({"method": "x"})


def test_a_foreign_config_is_refused() -> None:
    with pytest.raises(TypeError, match="config is a dict; expected one of"):
        make_method({})


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_every_method_has_its_row_in_the_documentation() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) >= set(METHODS)


def test_rehearsal_as_documented_learns_some_of_each_earlier_task_again() -> None:
    def samples(task: str, size: int) -> list[cf.Sample]:
        return [cf.Sample(f"{task} {number}?", "yes") for number in range(size)]

    sizes = {"a": 120, "b": 7, "c": 5}
    whole = cf.Stream([cf.Task(name, samples(name, size), samples(f"{name} test", 2)) for name, size in sizes.items()])
    (code,) = re.findall(r"```python\n(import random.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"cf": cf, "stream": whole}
    exec(code, names)
    *_, last = names["stream"]
    assert [sample in last.train for sample in whole.tasks[0].train].count(True) == 100
    assert {sample.instruction for sample in last.train} >= {
        s.instruction for task in whole.tasks[1:] for s in task.train
    }
    assert len(last.train) == 100 + 7 + 5 and last.test == whole.tasks[2].test
    assert names["stream"].tasks[0].train == whole.tasks[0].train


def test_what_is_registered_has_a_name_of_its_own() -> None:
    @dataclass(frozen=True)
    class Nameless(LoraConfig):
        pass

    class Plain(LoraConfig):
        method: ClassVar[str] = "plain"
        title: ClassVar[str] = "Plain"

    @dataclass(frozen=True)
    class Taken(LoraConfig):
        method: ClassVar[str] = "sequential_lora"
        title: ClassVar[str] = "Another"

    before = dict(METHODS)
    for config in (Nameless, Plain):
        with pytest.raises(TypeError, match=f"{config.__name__} is not what a method needs: expected a @dataclass"):
            register(config)
    with pytest.raises(ValueError, match="Taken has method 'sequential_lora', which is that of .*LoraConfig; give it"):
        register(Taken)
    LoraConfig.__module__, Taken.__module__ = "__main__", "__main__"  # cells of a notebook
    try:
        register(Taken)
    finally:
        LoraConfig.__module__ = "cllava_fast.methods.lora"
    Namesake = dataclass(frozen=True)(type("LoraConfig", (LoraConfig,), {"method": "sequential_lora", "title": "My"}))
    with pytest.raises(ValueError, match="LoraConfig has method 'sequential_lora', which is that of cllava_fast"):
        register(Namesake)
    assert METHODS == before
    register(LoraConfig)(METHODS["sequential_lora"][1])  # a cell of a notebook that runs again
    assert METHODS == before


@pytest.mark.parametrize("name", sorted(name for name in METHODS if name not in ("continual_llava", "slm", "diki")))
def test_a_task_that_fails_leaves_what_can_be_saved(name: str, generator: torch.Generator) -> None:
    config_class, policy = METHODS[name]
    config = config_class(targets=("o",))
    method = policy(config)
    key_dim = D if getattr(config, "surrogate", None) else 0

    def new_pool() -> Pool:
        return Pool(
            config.rank, key_dim, {"o": LinearShape(6, 5)}, shares_A=method.shares_A, own_tensors=method.own_tensors,
            shared_rows=method.shared_rows,
        )  # fmt: skip

    pool, queries = new_pool(), torch.randn(8, D, generator=generator)
    method.open_task(pool, queries, generator)
    method.close_task(pool, "first", queries, 1)
    method.open_task(pool, queries, generator)
    pool.drop_block()
    again = new_pool()
    again.load_state(pool.state(), pool.task_names)
    assert again.task_names == pool.task_names and again.state().keys() == pool.state().keys()
    for key, tensor in again.state().items():
        assert torch.equal(tensor, pool.state()[key]), key


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "config",
    [
        *(config() for config, _ in METHODS.values()),
        IncrementConfig(context_rank=2),
        IncrementConfig(key_init="orthogonal"),
    ],
    ids=lambda config: config.method,
)
def test_what_a_pool_holds_does_not_depend_on_torchs_default(config: Any) -> None:
    queries = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    groups = getattr(config, "groups", 1)

    def states(dtype: torch.dtype) -> list[dict[str, Tensor]]:
        method, generator, found = make_method(config), torch.Generator().manual_seed(2), []
        with default(dtype):
            pool = Pool(
                config.rank, D if getattr(config, "surrogate", None) else 0, {"o": LinearShape(6, 5)},
                shares_A=method.shares_A, own_tensors=method.own_tensors, shared_rows=method.shared_rows,
                context_rank=getattr(config, "context_rank", None) or 0,
            )  # fmt: skip
            for name in ("first", "second"):
                method.open_task(pool, queries, generator)
                found.append({key: tensor.clone() for key, tensor in pool.state().items()})
                if method.aligns_keys:
                    found.append({"loss": method.alignment_loss(pool, queries, groups, generator).detach()})
                method.close_task(pool, name, queries, groups)
        pool.check_state(pool.state(), pool.num_tasks)
        return [*found, pool.state()]

    for plain, other in zip(states(torch.float32), states(torch.bfloat16), strict=True):
        assert plain.keys() == other.keys()
        for key, tensor in plain.items():
            assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key


def test_what_acts_does_not_depend_on_torchs_default(llava: Any, processor: Any, rng: torch.Generator) -> None:
    learn(cf.patch(llava, IncrementConfig(context="factor"), processor=processor), 2, rng)
    batch = inputs(processor, QUESTIONS[:1], rng)
    expected = llava(**batch).logits
    with default(torch.bfloat16), torch.no_grad():
        assert torch.equal(llava(**batch).logits, expected)
        cf.merge(llava, instruction=QUESTIONS[0])
        torch.testing.assert_close(llava(**batch).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # torch's default, as who loads a model may set it
@pytest.mark.parametrize("name", METHODS)
def test_every_method_selects_what_layers_can_take(
    name: str, dtype: torch.dtype, llava: Any, processor: Any, rng: torch.Generator
) -> None:
    """In training and behind it, for one task after another, more of them than any default has rows for."""
    config, policy = METHODS[name]
    increments = get_increments(cf.patch(llava, config(), processor=processor))
    batch = inputs(processor, QUESTIONS[:2], rng)
    for task in range(1 if policy.joint else 10):
        queries = torch.randn(8, increments.pool.key_dim or 1, generator=rng)
        told = {"query": increments.task_query([f"task{task}"] * 2)} if policy.uses_task else {}
        increments.open_task(queries, rng)
        for mode in (True, False):
            if mode or task or not policy.uses_task:
                with torch.no_grad(), default(dtype):
                    assert llava.train(mode)(**batch, **told).logits.isfinite().all()
        increments.close_task(f"task{task}", queries)
        with torch.no_grad():
            assert llava(**batch, **told).logits.isfinite().all()


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda found: (found.past, found.context), TypeError, "returned a tuple; expected a Selection"),
        (lambda found: replace(found, past=Pairs(found.past.index[:1], found.past.coefficient[:1])), ValueError,
         r"past has an index \[1, 4\] and a coefficient \[1, 4\]; expected 2 samples"),
        (lambda found: replace(found, past=Pairs(found.past.index, found.past.coefficient[:1])), ValueError,
         "expected 2 samples"),
        (lambda found: replace(found, past=Pairs(found.past.index.int(), found.past.coefficient)), TypeError,
         "an index of torch.int32"),
        (lambda found: replace(found, past=Pairs(found.past.index, found.past.coefficient.double())), TypeError,
         "a coefficient of torch.float64; expected torch.int64 and torch.float32"),
        (lambda found: replace(found, past=Pairs(found.past.index[:, :1], found.past.coefficient[:, :2])), ValueError,
         r"past has an index \[2, 1\] and a coefficient \[2, 2\]; expected one shape for both, \[2, P\]"),
        (lambda found: replace(found, past=Pairs(found.past.index + 8, found.past.coefficient)), ValueError,
         r"past.index: expected entries in \[0, rows\) = \[0, 16\)"),
        (lambda found: replace(found, past=None, block=found.past), ValueError, r"block.index: .* = \[0, 0\)"),
    ],
)  # fmt: skip
def test_a_selection_that_cannot_be_meant_is_refused_at_once(
    broken: Any, error: type[Exception], message: str, llava: Any, processor: Any, generator: torch.Generator
) -> None:
    """By the name of the method's own function: layers take what they are handed."""
    increments = learn(cf.patch(llava, IncrementConfig(), processor=processor), 2, generator)
    query = increments.surrogate.query(["what color is it?", "which digit is it?"])
    found = increments.select_by_query(query)
    assert found.past.index.max() > 8 and found.block is None
    increments.method.select = lambda *_: broken(found)
    with pytest.raises(error, match=f"ContinualLlava.select.*{message}"):
        increments.select_by_query(query)


def test_a_selection_for_all_samples_is_checked_too(llava: Any, processor: Any, generator: torch.Generator) -> None:
    increments = learn(cf.patch(llava, LoraConfig(), processor=processor), 1, generator)
    increments.method.select = lambda *_: Selection(block=Pairs(torch.tensor([[0]]), torch.ones(1, 2)))
    with pytest.raises(ValueError, match=r"SequentialLora.select: block has an index \[1, 1\] .* both, \[1, P\]"):
        llava(**inputs(processor, QUESTIONS[:2], generator))


@pytest.mark.parametrize("config", [IncrementConfig(), LoraConfig()])
def test_a_task_is_not_trained_by_nothing(config: Any, llava: Any, processor: Any, generator: torch.Generator) -> None:
    increments = get_increments(cf.patch(llava, config, processor=processor))
    batch, surrogate = inputs(processor, QUESTIONS[:2], generator), increments.surrogate
    increments.open_task(None if surrogate is None else surrogate.query(QUESTIONS), generator)
    increments.method.select = lambda *_: None
    with torch.no_grad():
        llava.eval()(**batch)
        with pytest.raises(ValueError, match=r"\.select returned None in training, and nothing of the task"):
            llava.train()(**batch)
