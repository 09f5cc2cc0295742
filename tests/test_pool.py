"""The pool: growth by blocks, what is frozen, what trains, state."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from cllava_fast.pool import LinearShape, Pool

SHAPES = {"a.0.o": LinearShape(6, 10), "a.1.o": LinearShape(4, 8)}


def make_pool(tasks: int = 0, rows: int = 3, seed: int = 0) -> Pool:
    pool = Pool(rank=2, key_dim=5, shapes=SHAPES)
    generator = torch.Generator().manual_seed(seed)
    for task in range(tasks):
        pool.open_block(
            rows, keys=torch.randn(rows, 5, generator=generator), a_std=1.0, context_init=0.25, generator=generator
        )
        for factors in pool.layers.values():
            torch.nn.init.normal_(factors.block_B, generator=generator)
        pool.commit(f"task{task}", torch.rand(rows, generator=generator))
    return pool


def open_block(pool: Pool, rows: int = 3) -> None:
    generator = torch.Generator().manual_seed(9)
    pool.open_block(rows, keys=torch.randn(rows, 5), a_std=1.0, context_init=0.25, generator=generator)


def test_grows_by_a_block_a_task() -> None:
    pool = make_pool(tasks=3)
    assert pool.num_rows == 9 and pool.num_tasks == 3
    assert pool.row_task.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert pool.keys.shape == (9, 5) and pool.context.shape == (3, 3) and pool.last_block_start == 6
    assert pool.factors("a.1.o").A.shape == (9, 2, 4) and pool.factors("a.1.o").B.shape == (9, 2, 8)


def test_a_new_block_changes_nothing_and_draws_A_with_the_asked_deviation() -> None:
    pool = Pool(rank=8, key_dim=0, shapes={"o": LinearShape(512, 16)})
    pool.open_block(8, keys=None, a_std=0.5, context_init=None, generator=torch.Generator().manual_seed(0))
    factors = pool.factors("o")
    assert torch.count_nonzero(factors.block_B) == 0
    assert factors.block_A.std().item() == pytest.approx(0.5, rel=0.02)


def test_only_the_open_block_trains() -> None:
    pool = make_pool(tasks=2)
    assert list(pool.parameters()) == []
    open_block(pool)
    assert {name.split(".")[-1] for name, _ in pool.named_parameters()} == {
        "block_keys", "block_context", "block_A", "block_B",
    }  # fmt: skip
    pool.train_keys(True)
    assert [n for n, p in pool.named_parameters() if p.requires_grad] == ["block_keys"]
    pool.train_keys(False)
    assert not pool.block_keys.requires_grad and pool.block_context.requires_grad
    pool.commit("third", torch.rand(3))
    assert list(pool.parameters()) == []
    assert not any(buffer.requires_grad for buffer in pool.buffers())


def test_a_tensor_of_a_methods_own_trains_in_float32() -> None:
    factors = make_pool().factors("a.0.o")
    factors.keep("block_own", torch.ones(2, dtype=torch.bfloat16))
    factors.keep("own", torch.ones(2, dtype=torch.bfloat16))
    assert [(name, p.dtype) for name, p in factors.named_parameters()] == [("block_own", torch.float32)]
    assert factors.own.dtype == torch.bfloat16


def test_optimizer_steps_leave_committed_rows_alone() -> None:
    pool = make_pool(tasks=2)
    before = {name: tensor.clone() for name, tensor in pool.named_buffers()}
    open_block(pool)
    optimizer = torch.optim.AdamW(pool.parameters(), lr=0.1)
    for _ in range(3):
        loss = pool.context_matrix().sum() + sum(p.square().sum() for p in pool.parameters())
        loss.backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pool.named_buffers())
    pool.commit("third", torch.rand(3))
    after = dict(pool.named_buffers())
    for name, tensor in before.items():
        kept = after[name][: len(tensor)] if name != "context" else after[name][:2, :2]
        assert torch.equal(kept, tensor), name


def test_context_rows_are_kept_per_task() -> None:
    pool = make_pool(tasks=3)
    expected = torch.tensor([[0, 0, 0], [0.25, 0, 0], [0.25, 0.25, 0]])
    assert torch.equal(pool.context, expected)
    open_block(pool)
    matrix = pool.context_matrix()
    assert matrix.shape == (4, 4) and torch.equal(matrix[:3, :3], expected)
    matrix.sum().backward()
    assert torch.equal(pool.block_context.grad, torch.ones(3))


def test_state_round_trips_through_safetensors() -> None:
    pool = make_pool(tasks=2)
    open_block(pool)
    copy = make_pool()
    copy.load_state(load(save(pool.state())), pool.task_names)
    assert copy.task_names == pool.task_names and copy.last_block_start == 3 and copy.block_rows == 3
    for name, tensor in pool.state().items():
        assert torch.equal(copy.state()[name], tensor), name
    copy.commit("third", torch.rand(3))
    assert copy.num_tasks == 3


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "dtype", "nan", "order"])
def test_a_wrong_state_is_refused_before_anything_is_written(damage: str) -> None:
    state, pool = make_pool(tasks=2).state(), make_pool(tasks=1, seed=5)
    before = pool.state()
    if damage == "missing":
        del state["keys"]
    elif damage == "unexpected":
        state["more"] = torch.zeros(1)
    elif damage == "shape":
        state["keys"] = torch.zeros(6, 4)
    elif damage == "dtype":
        state["row_mean"] = state["row_mean"].double()
    elif damage == "nan":
        state["layers.a/0/o.B"][0, 0, 0] = float("nan")
    else:
        state["row_task"] = state["row_task"].flip(0)
    with pytest.raises(ValueError):
        pool.load_state(state, ["task0", "task1"])
    assert all(torch.equal(pool.state()[name], tensor) for name, tensor in before.items())


def test_misuse_is_refused() -> None:
    pool = make_pool(tasks=1)
    with pytest.raises(RuntimeError, match="no block is open"):
        pool.commit("x", torch.rand(3))
    with pytest.raises(ValueError, match=r"keys is \[3, 4\]; expected \[3, 5\]"):
        pool.open_block(3, keys=torch.randn(3, 4), a_std=1.0, context_init=None, generator=torch.Generator())
    with pytest.raises(ValueError, match="NaN"):
        pool.open_block(
            1, keys=torch.full((1, 5), float("nan")), a_std=1.0, context_init=None, generator=torch.Generator()
        )
    open_block(pool)
    with pytest.raises(RuntimeError, match="open already"):
        open_block(pool)
    with pytest.raises(ValueError, match="in the pool already"):
        pool.commit("task0", torch.rand(3))
    with pytest.raises(ValueError, match="row_mean"):
        pool.commit("task1", torch.rand(2))
    pool.factors("a.0.o").block_B.data[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="nothing was committed"):
        pool.commit("task1", torch.rand(3))
    assert pool.num_tasks == 1 and pool.num_rows == 3
    with pytest.raises(ValueError, match="at least one adapted linear"):
        Pool(rank=1, key_dim=1, shapes={})


def test_parameters_have_one_order_whatever_that_of_the_file(generator: torch.Generator) -> None:
    """It decides how norms of gradients are summed, and so the last bit of a run that is resumed."""
    pool = Pool(rank=2, key_dim=0, shapes={"a": LinearShape(4, 5), "b": LinearShape(4, 5)})
    pool.open_block(3, keys=None, a_std=1.0, context_init=None, generator=generator)
    loaded = Pool(rank=2, key_dim=0, shapes={"a": LinearShape(4, 5), "b": LinearShape(4, 5)})
    loaded.load_state(dict(reversed(pool.state().items())), [])
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in pool.named_parameters()]


def test_a_task_may_leave_no_rows(generator: torch.Generator) -> None:
    pool = Pool(rank=2, key_dim=0, shapes={"a": LinearShape(4, 5)})
    pool.open_block(3, keys=None, a_std=1.0, context_init=None, generator=generator)
    pool.count_task("first")
    assert (pool.task_names, pool.num_tasks, pool.num_rows, pool.block_rows) == (["first"], 1, 0, 3)
    with pytest.raises(ValueError, match="'first' is in the pool already"):
        pool.count_task("first")
    loaded = Pool(rank=2, key_dim=0, shapes={"a": LinearShape(4, 5)})
    loaded.load_state(pool.state(), ["first"])
    assert (loaded.task_names, loaded.num_tasks) == (["first"], 1)
    rows_lost = {name: t for name, t in pool.state().items() if ".block_" not in name}
    with pytest.raises(ValueError, match="row_task does not number 1 tasks"):
        loaded.load_state(rows_lost, ["first"])
