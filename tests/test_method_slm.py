"""SLM: rows chosen by groups of keys, for a whole batch as published or for each sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cllava_fast as cf
from cllava_fast.evaluate.predict import batches_of
from cllava_fast.methods.slm import Slm, SlmConfig
from cllava_fast.model import get_increments, paths, selecting
from cllava_fast.pool import LinearShape, Pool
from cllava_fast.train.align import align_keys
from tests.helpers import QUESTIONS, inputs, learn, take
from tests.method_helpers import check_layers, check_life_cycle, dense
from tests.train_helpers import arguments, stream

GROUPS, D = 3, 12


def cosines(query: torch.Tensor, keys: torch.Tensor, groups: int) -> list[list[float]]:
    """Of each sample with each key: the mean over groups of their parts' cosines, number by number."""
    width = keys.shape[1] // groups
    found = []
    for e in query.double().tolist():
        row = []
        for k in keys.double().tolist():
            total = 0.0
            for g in range(groups):
                a, b = e[g * width : (g + 1) * width], k[g * width : (g + 1) * width]
                dot = sum(x * y for x, y in zip(a, b, strict=True))
                total += dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
            row.append(total / groups)
        found.append(row)
    return found


def expected(query: torch.Tensor, keys: torch.Tensor, top_m: int, groups: int, by_batch: bool) -> torch.Tensor:
    """``[B, N]`` weights by the definition; negative similarities count as 0, even weights where nothing is left."""
    similarity = cosines(query, keys, groups)
    if by_batch:
        mean = [sum(row[n] for row in similarity) / len(similarity) for n in range(len(keys))]
        similarity = [mean] * len(similarity)
    alpha = torch.zeros(len(similarity), len(keys), dtype=torch.float64)
    for b, row in enumerate(similarity):
        best = sorted(range(len(row)), key=lambda n: -row[n])[:top_m]
        total = sum(max(row[n], 0.0) for n in best)
        for n in best:
            alpha[b, n] = max(row[n], 0.0) / total if total >= 1e-6 else 1 / top_m
    return alpha


@pytest.fixture(params=["batch", "sample"])
def reduce(request: pytest.FixtureRequest) -> Any:
    return request.param


def config(reduce: Any = "batch", **values: Any) -> SlmConfig:
    return SlmConfig(**{"rank": 4, "a_std": 0.1, "scale": 2.0, "groups": 6, "reduce": reduce, **values})


def test_coefficients(reduce: Any, rng: torch.Generator) -> None:
    method = Slm(SlmConfig(reduce=reduce, groups=GROUPS))
    pool = Pool(rank=8, key_dim=D, shapes={"o": LinearShape(6, 5)})
    for task in range(3):
        queries = torch.randn(20, D, generator=rng)
        method.open_task(pool, queries, rng)
        torch.nn.init.normal_(pool.block_keys, generator=rng)
        if task == 2:
            query = torch.cat([pool.keys[:3], torch.randn(4, D, generator=rng)])  # nearer to rows it may not take
            selection = method.select(pool, query, GROUPS, True)
            wanted = torch.zeros(7, 12, dtype=torch.float64)
            wanted[:, 8:] = expected(query, pool.block_keys.detach(), 2, GROUPS, reduce == "batch")
            torch.testing.assert_close(dense(selection, pool, 7), wanted, atol=1e-6, rtol=1e-6)
        z = expected(queries, pool.block_keys.detach(), 2, GROUPS, reduce == "batch").mean(0)
        method.close_task(pool, f"task{task}", queries, GROUPS)
        torch.testing.assert_close(pool.row_mean[-4:].double(), z, atol=1e-6, rtol=1e-6)
    query = torch.randn(7, D, generator=rng)
    selection = method.select(pool, query, GROUPS, False)
    wanted = expected(query, pool.keys, 2, GROUPS, reduce == "batch")
    torch.testing.assert_close(dense(selection, pool, 7), wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(selection.past.index, selection.index) and torch.equal(
        selection.past.coefficient, selection.weight
    )
    alone = method.select(pool, query[:1], GROUPS, False)
    assert torch.equal(dense(alone, pool, 1), dense(selection, pool, 7)[:1]) == (reduce == "sample")


def test_layers(reduce: Any, llava: Any, processor: Any, rng: torch.Generator) -> None:
    cf.patch(llava, config(reduce), processor=processor)
    increments = learn(llava, 3, rng, b_std=0.1, commit_last=False)
    query = torch.randn(3, increments.pool.key_dim, generator=rng)
    for training in (True, False):
        selection = increments.method.select(increments.pool, query, 6, training)
        check_layers(llava, selection, dense(selection, increments.pool, 3), rng)


def test_keys_are_born_orthogonal_in_every_group(rng: torch.Generator) -> None:
    method, pool = Slm(SlmConfig(groups=GROUPS)), Pool(rank=8, key_dim=D, shapes={"o": LinearShape(6, 5)})
    method.open_task(pool, None, rng)
    for part in pool.block_keys.detach().unflatten(1, (GROUPS, -1)).unbind(1):
        torch.testing.assert_close(part @ part.t(), torch.eye(4), atol=1e-5, rtol=0)


def test_keys_may_be_born_as_instructions(rng: torch.Generator) -> None:
    method = Slm(SlmConfig(groups=GROUPS, key_init="instructions"))
    pool, queries = Pool(rank=8, key_dim=D, shapes={"o": LinearShape(6, 5)}), torch.randn(9, D, generator=rng)
    method.open_task(pool, queries, rng)
    assert all((queries == key).all(1).any() for key in pool.block_keys) and len(pool.block_keys.unique(dim=0)) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_alignment_loss(dropout: float, rng: torch.Generator) -> None:
    method = Slm(SlmConfig(groups=GROUPS, key_dropout=dropout))
    pool = Pool(rank=8, key_dim=D, shapes={"o": LinearShape(6, 5)})
    method.open_task(pool, None, rng)
    torch.nn.init.normal_(pool.block_keys, generator=rng)
    query = torch.randn(5, D, generator=rng)
    keys = pool.block_keys.detach().double().requires_grad_()
    masked = torch.rand(5, GROUPS, 4, generator=torch.Generator().manual_seed(3)) < dropout
    loss, width = torch.zeros((), dtype=torch.float64), D // GROUPS
    for b in range(5):
        for g in range(GROUPS):
            part = slice(g * width, (g + 1) * width)
            near = torch.stack([torch.cosine_similarity(query[b, part].double(), key[part], dim=0) for key in keys])
            best = sorted(range(4), key=lambda n: (bool(masked[b, g, n]), -near[n].item()))[:2]
            loss = loss - near[best].sum() / (5 * GROUPS * 2)
    found = method.alignment_loss(pool, query, GROUPS, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.double(), loss, atol=1e-6, rtol=1e-5)
    gradient = torch.autograd.grad(found, pool.block_keys)[0]
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(loss, keys)[0], atol=1e-6, rtol=1e-4)


def test_alignment_uses_it(rng: torch.Generator, tmp_path: Path) -> None:
    method, pool = (
        Slm(SlmConfig(groups=GROUPS, key_dropout=0.0)),
        Pool(rank=8, key_dim=D, shapes={"o": LinearShape(6, 5)}),
    )
    queries = torch.randn(40, D, generator=rng)
    method.open_task(pool, queries, rng)
    with torch.no_grad():
        before = method.alignment_loss(pool, queries, GROUPS, rng).item()
    seen: list[float] = []

    def spy(*batch: Any) -> torch.Tensor:
        loss = method.alignment_loss(*batch)
        seen.append(loss.item())
        return loss

    args = arguments(tmp_path, align_steps=40, align_learning_rate=1e-2)
    last = align_keys(pool, queries, GROUPS, args, 0, "align", spy)
    assert len(seen) == 40 and min(seen) <= last <= max(seen)
    with torch.no_grad():
        assert method.alignment_loss(pool, queries, GROUPS, rng).item() < before


def test_what_a_batch_asks_together_decides_or_does_not(
    reduce: Any, llava: Any, processor: Any, rng: torch.Generator
) -> None:
    cf.patch(llava, config(reduce), processor=processor)
    learn(llava, 3, rng, b_std=0.1)
    batch = inputs(processor, QUESTIONS[:3], rng)
    with torch.no_grad():
        together = llava(**batch).logits[:, -1]
        alone = torch.cat([llava(**take(batch, i)).logits[:, -1] for i in range(3)])
    apart = (together - alone).abs().amax(1)
    assert (apart.max() < 1e-3) == (reduce == "sample"), apart
    images = [llava.config.image_token_id]  # a random model may write one, which no picture comes with
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "suppress_tokens": images}
    assert torch.equal(llava.generate(**batch, **options), llava.generate(**batch, use_cache=False, **options))


def test_evaluation_reports_what_each_batch_selected(
    reduce: Any, llava: Any, processor: Any, rng: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cf.patch(llava, config(reduce), processor=processor)
    learn(llava, 3, rng, b_std=0.1)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    choose = selecting.select_by_instruction

    def spy(increments: Any, request: Any, pooled_image: Any) -> Any:
        selection = choose(increments, request, pooled_image)
        seen.append((selection.index, selection.weight))
        return selection

    monkeypatch.setattr(selecting, "select_by_instruction", spy)
    data = cf.PreparedStream(stream(2), processor)
    cf.evaluate_stream(llava, processor, data, tmp_path / "eval", batch_size=5, max_new_tokens=2, progress=False)
    lines = [(tmp_path / "eval" / "predictions" / f"task{k}.jsonl").read_text().splitlines() for k in range(2)]
    records = [json.loads(line) for task in lines for line in task]
    tasks = [list(data.examples(f"task{k}", "test", llava)) for k in range(2)]
    if reduce == "batch":  # one selection for a batch presumes that its questions come from one task
        batches = [[6 * k + row for row in rows] for k in range(2) for rows in batches_of(tasks[k], 5)]
    else:
        batches = batches_of(tasks[0] + tasks[1], 5)
    assert len(seen) == len(batches) == (4 if reduce == "batch" else 3) and len(records) == 12
    for rows, (index, weight) in zip(batches, seen, strict=True):
        assert [records[row]["rows"] for row in rows] == index.tolist()
        for row, wanted in zip(rows, weight.tolist(), strict=True):
            assert records[row]["weights"] == pytest.approx(wanted, abs=1e-3)


def test_life_cycle(reduce: Any, new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    _, model = check_life_cycle(new_llava, processor, config(reduce), tmp_path)
    assert get_increments(model).pool.num_rows == 12


def test_a_task_merges_as_its_mean(reduce: Any, llava: Any, processor: Any, rng: torch.Generator) -> None:
    cf.patch(llava, config(reduce), processor=processor)
    pool = learn(llava, 2, rng, b_std=0.1).pool
    linears = paths.adapted_linears(llava, llava.increments.config.targets)
    before = {path: linear.weight.double() for path, linear in linears.items()}
    cf.merge(llava, task="task1")
    for path, linear in linears.items():
        factors = pool.factors(path)
        z = pool.row_mean[4:].double()
        exact = before[path] + 2.0 * torch.einsum("n,nro,nri->oi", z, factors.B[4:].double(), factors.A[4:].double())
        torch.testing.assert_close(linear.weight.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_m": 5}, r"top_m is 5; expected 1 to 4 \(rows_per_task\)"),
        ({"rows_per_task": 0}, "rows_per_task is 0; expected at least 1"),
        ({"groups": 0}, "groups is 0"),
        ({"reduce": "task"}, "reduce is 'task'; expected one of"),
        ({"key_init": "zeros"}, "key_init is 'zeros'"),
        ({"key_dropout": 1.0}, "key_dropout is 1.0"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlmConfig(**fields)


def test_groups_must_divide_the_query(llava: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match="groups is 5; expected a divisor of the query's width, 384"):
        cf.patch(llava, config(groups=5), processor=processor)
    assert not hasattr(llava, "increments")
