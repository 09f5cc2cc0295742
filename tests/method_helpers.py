"""What tests of one method share: its layers against loops in float64, and its life-cycle on a tiny stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cllava_fast as cf
from cllava_fast.methods import Selection
from cllava_fast.model import get_increments, paths
from tests.train_helpers import arguments, stream


def dense(selection: Selection | None, pool: Any, batch: int) -> Tensor:
    """``[B, N + n]`` float64: the coefficient of every row, the open block's behind the committed ones."""
    alpha = torch.zeros(batch, pool.num_rows + pool.block_rows, dtype=torch.float64)
    if selection is None:
        return alpha
    selection = selection.expand(batch)
    for pairs, offset in ((selection.past, 0), (selection.block, pool.num_rows)):
        if pairs is not None:
            alpha.scatter_add_(1, pairs.index + offset, pairs.coefficient.detach().double())
    if selection.context is not None:
        alpha[:, : selection.context.shape[1]] += selection.context.detach().double()
    return alpha


def check_layers(model: Any, selection: Selection | None, alpha: Tensor, rng: torch.Generator) -> None:
    """Output and gradients of every adapted linear against ``W0 x + scale sum_n alpha[b, n] B_n^T A_n x``."""
    increments = get_increments(model)
    for path, linear in paths.adapted_linears(model, increments.config.targets).items():
        factors = increments.pool.factors(path)
        x = torch.randn(len(alpha), 5, linear.in_features, generator=rng)
        towards = torch.randn(len(alpha), 5, linear.out_features, generator=rng)
        block = [factors.block_A, factors.block_B] if increments.pool.block_rows else []
        exact_block = [tensor.detach().double().requires_grad_() for tensor in block]
        A, B = (
            torch.cat([committed.double(), *exact_block[i : i + 1]])
            for i, committed in enumerate((factors.A, factors.B))
        )
        rows = []
        for b in range(len(alpha)):
            y = torch.nn.functional.linear(x[b].double(), linear.weight.double(), None)
            for n in range(alpha.shape[1]):
                y = y + increments.config.scale * alpha[b, n] * (x[b].double() @ A[n].t() @ B[n])
            rows.append(y)
        expected = torch.stack(rows)
        increments.call.active = selection and selection.expand(len(alpha))
        try:
            found = linear(x)
        finally:
            increments.call.active = None
        torch.testing.assert_close(found.double(), expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)
        if selection is not None and selection.block is not None:
            gradients = torch.autograd.grad((found * towards).sum(), block)
            wanted = torch.autograd.grad((expected * towards.double()).sum(), exact_block)
            for gradient, want in zip(gradients, wanted, strict=True):
                close = 1e-4 * want.abs().max().item() + 1e-12
                torch.testing.assert_close(gradient.double(), want, atol=close, rtol=1e-4)


def check_life_cycle(new_llava: Callable[[], Any], processor: Any, config: Any, folder: Path) -> Any:
    """Learns three tasks: only the open block trains, committed rows and the base stay to the bit, files and a resumed
    run too. Returns the result and the model."""
    model = cf.patch(new_llava(), config, processor=processor)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "increments" not in name}
    run = cf.ContinualTrainer(model, processor, stream(3, samples=12), arguments(folder / "run"))
    pool = get_increments(model).pool
    commit, after, trained = pool.commit, [], set()

    def spy(*args: Any) -> None:
        trained.update(name for name, p in model.named_parameters() if p.requires_grad)
        commit(*args)
        after.append({name: tensor.clone() for name, tensor in pool.named_buffers() if name.endswith((".A", ".B"))})

    pool.commit = spy
    result = run.train()
    assert {name.rpartition(".")[2] for name in trained} == {"block_A", "block_B"}
    assert len(after) == 3 and pool.task_names == ["task0", "task1", "task2"] and not pool.block_rows
    for early in after:
        assert all(torch.equal(after[-1][name][: len(tensor)], tensor) for name, tensor in early.items())
    assert all(tensor.abs().max() > 0 for name, tensor in after[-1].items() if name.endswith(".B"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())

    cf.save_pretrained(model, folder / "saved")
    again = cf.load_pretrained(new_llava(), folder / "saved", processor=processor)
    check_same_state(again, model)

    cut = cf.ContinualTrainer(
        cf.patch(new_llava(), config, processor=processor), processor, stream(3, samples=12), arguments(folder / "cut")
    )
    learn, number = cut._learn, iter(range(3))

    def fail_second(*args: Any) -> Any:
        if next(number) == 1:
            raise KeyboardInterrupt
        return learn(*args)

    cut._learn = fail_second  # type: ignore[method-assign]
    try:
        cut.train()
        raise AssertionError("the run was to be cut")
    except KeyboardInterrupt:
        pass
    resumed = cf.patch(new_llava(), config, processor=processor)
    second = cf.ContinualTrainer(
        resumed, processor, stream(3, samples=12), arguments(folder / "cut", resume=True)
    ).train()
    check_same_state(resumed, model)
    assert second.accuracy_matrix == result.accuracy_matrix
    return result, model


def check_same_state(model: Any, wanted: Any) -> None:
    state, expected = get_increments(model).pool.state(), get_increments(wanted).pool.state()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
