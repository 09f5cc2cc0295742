"""Calibration: its Gaussian against torch's own, its score against the formula, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cllava_fast as cf
from cllava_fast.demo.skills import build_skills
from cllava_fast.demo.stream import build_stream
from cllava_fast.methods import Pairs, Selection, calibration
from cllava_fast.methods.calibration import DIRECTIONS, MARGIN, NOISE, TEMPERATURE
from cllava_fast.pool import LinearShape, Pool
from tests.helpers import learn

D = 24


def clusters(rng: torch.Generator, samples: int = 60, distinct: int = 5) -> Tensor:
    """Unit vectors of a few wordings, all as frequent, around a common direction, as a task's instructions are."""
    words = torch.randn(1, D, generator=rng) + 0.5 * torch.randn(distinct, D, generator=rng)
    words = torch.nn.functional.normalize(words, dim=1)
    return words[torch.randperm(samples, generator=rng) % distinct]


def remembering(*tasks: Tensor) -> Pool:
    pool = Pool(rank=2, key_dim=D, shapes={"o": LinearShape(6, 5)})
    for queries in tasks:
        calibration.keep(pool, calibration.gaussian(queries))
    return pool


def test_likelihood_is_the_gaussians(rng: torch.Generator) -> None:
    tasks = [clusters(rng), clusters(rng)]
    pool = remembering(*tasks)
    query = torch.nn.functional.normalize(torch.randn(7, D, generator=rng), dim=1)
    found = calibration.log_likelihood(query, pool.query_mean, pool.query_directions, pool.query_variances)
    for t, queries in enumerate(tasks):
        exact = queries.double()
        # five wordings span four directions, so nothing is left for the others but the noise
        covariance = torch.cov(exact.t(), correction=0) + NOISE / D * torch.eye(D, dtype=torch.float64)
        gaussian = torch.distributions.MultivariateNormal(exact.mean(0), covariance)
        torch.testing.assert_close(found[:, t].double(), gaussian.log_prob(query.double()) / D, rtol=1e-3, atol=1e-3)
        own = gaussian.log_prob(exact).mean() / D
        torch.testing.assert_close(pool.query_level[t].double(), own, rtol=1e-3, atol=1e-3)


def test_directions_beside_those_that_are_kept_share_what_is_left(rng: torch.Generator) -> None:
    queries = clusters(rng, distinct=20)  # 19 directions
    _, _, variances, _ = calibration.gaussian(queries)
    whole = variances[0, :-1].sum() + (D - DIRECTIONS) * variances[0, -1]
    trace = torch.cov(queries.double().t(), correction=0).trace() + NOISE
    torch.testing.assert_close(whole.double(), trace, rtol=1e-5, atol=0)


@pytest.mark.parametrize("samples, distinct", [(2, 2), (10, 5), (20, 20)])
def test_how_often_queries_stand_there_does_not_matter(samples: int, distinct: int, rng: torch.Generator) -> None:
    """Fewer of them than numbers in a query, or more: the Gaussian is the same."""
    queries = clusters(rng, samples, distinct)
    strange = torch.nn.functional.normalize(torch.randn(7, D, generator=rng), dim=1)
    few, many = remembering(queries), remembering(queries.repeat(D, 1))
    for query in (queries, strange):
        found, expected = (calibration.likelihoods(pool, query) for pool in (few, many))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_score_is_the_formula_of_the_most_familiar_task(rng: torch.Generator) -> None:
    tasks = [clusters(rng), clusters(rng)]
    both = remembering(*tasks)
    query = torch.cat([tasks[0][:3], tasks[1][:3], torch.nn.functional.normalize(torch.randn(3, D, generator=rng))])
    expected = torch.zeros(9)
    for queries in tasks:
        pool = remembering(queries)
        likelihood = calibration.log_likelihood(query, pool.query_mean, pool.query_directions, pool.query_variances)
        score = torch.sigmoid((likelihood[:, 0] - pool.query_level + MARGIN) / TEMPERATURE)
        expected = torch.maximum(expected, score)
    found = calibration.familiarity(both, query)
    torch.testing.assert_close(found, expected)
    assert (found[:6] > 0.99).all() and (found[6:] < 0.01).all()


def test_few_and_equal_queries_are_remembered(rng: torch.Generator) -> None:
    for queries in (clusters(rng, samples=1), clusters(rng, samples=40, distinct=1)):
        pool = remembering(queries)
        assert calibration.familiarity(pool, queries[:1]).item() > 0.99
        assert calibration.familiarity(pool, -queries[:1]).item() < 0.01


@pytest.mark.parametrize("width", [64, 384, 2048])
def test_how_far_is_far_does_not_depend_on_the_width(width: int, rng: torch.Generator) -> None:
    """Queries are those of a sentence encoder, or a 7B model's own embeddings, or either beside an image's."""

    def directions(count: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(count, width, generator=rng), dim=1)

    def moved(aside: float) -> Tensor:
        """The task's own queries, moved to where none of them lies."""
        away = directions(50)
        away = torch.nn.functional.normalize(away - away @ within @ within.T, dim=1)
        return torch.nn.functional.normalize(queries + aside * away, dim=1)

    (center,), spread = directions(1), directions(6)
    queries = center + 0.2 * torch.randn(50, len(spread), generator=rng) @ spread
    within = torch.linalg.qr(torch.cat([center[None], spread]).T).Q
    pool = Pool(rank=2, key_dim=width, shapes={"o": LinearShape(6, 5)})
    calibration.keep(pool, calibration.gaussian(moved(aside=0.0)))
    assert calibration.familiarity(pool, moved(aside=0.25)).min() > 0.9
    assert calibration.familiarity(pool, moved(aside=1.2)).max() < 0.1


@pytest.mark.parametrize("mix", [False, True])
def test_scaled_selection_scales_increments(mix: bool, rng: torch.Generator) -> None:
    index, coefficient = torch.tensor([[0, 1], [2, 0]]), torch.rand(2, 2, generator=rng)
    context, strength = torch.rand(2, 2, generator=rng), torch.rand(2, generator=rng)
    A, B = torch.randn(3, 1, 6, generator=rng), torch.randn(3, 1, 5, generator=rng)

    def increment(selection: Selection) -> Tensor:
        assert selection.past is not None and selection.context is not None
        alpha = torch.zeros(2, 3).scatter_add_(1, selection.past.index, selection.past.coefficient)
        alpha[:, :2] += selection.context
        if mix:
            return torch.einsum("bn,nri,bm,mro->boi", alpha, A, alpha, B)
        return torch.einsum("bn,nri,nro->boi", alpha, A, B)

    selection = Selection(past=Pairs(index, coefficient), context=context, mix=mix)
    torch.testing.assert_close(increment(selection.scaled(strength)), strength[:, None, None] * increment(selection))


def test_strange_instruction_leaves_the_frozen_model_alone(
    new_llava: Callable[[], Any], processor: Any, tmp_path: Path, rng: torch.Generator
) -> None:
    def patched(calibrate: bool) -> Any:
        model = cf.patch(new_llava(), cf.IncrementConfig(calibrate=calibrate), processor=processor)
        learn(model, 2, torch.Generator().manual_seed(0))
        return model

    frozen, plain, calibrated = new_llava(), patched(False), patched(True)
    ids = torch.randint(10, 60, (2, 7), generator=rng)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    known = calibrated.increments.pool.query_mean[:1]
    query = torch.cat([torch.nn.functional.normalize(known), -torch.nn.functional.normalize(known)])
    with torch.no_grad():
        base, without, with_ = (
            frozen(**inputs).logits,
            plain(**inputs, query=query).logits,
            calibrated(**inputs, query=query).logits,
        )
    strength = calibration.familiarity(calibrated.increments.pool, query)
    assert strength[1] < 1e-6
    torch.testing.assert_close(with_[1], base[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without[1], base[1], atol=1e-3) and not torch.allclose(without[0], base[0], atol=1e-3)
    cf.save_pretrained(calibrated, tmp_path / "saved")
    again = cf.load_pretrained(new_llava(), tmp_path / "saved", processor=processor)
    with torch.no_grad():
        assert torch.equal(again(**inputs, query=query).logits, with_)


def above_level(fit: Tensor, asked: Tensor) -> Tensor:
    """``l(e) - m`` of queries ``asked`` under the Gaussian of ``fit``."""
    pool = Pool(rank=2, key_dim=fit.shape[1], shapes={"o": LinearShape(6, 5)})
    calibration.keep(pool, calibration.gaussian(fit))
    return calibration.likelihoods(pool, asked)[1][:, 0]


def test_the_margin_lies_between_the_demos_tasks_and_what_the_base_knew(llava: Any, processor: Any) -> None:
    increments = cf.patch(llava, processor=processor).increments

    def queries(samples: Any) -> Tensor:
        return increments.surrogate.query([increments.reader.canonical(sample.instruction) for sample in samples])

    known, left_out = [], []
    skills = queries(build_skills(processor, seed=0, size=100).stream.tasks[0].test)
    familiar = torch.full((len(skills),), -torch.inf)
    for task in build_stream(0, train=240, validation=60, test=1):
        train = queries(task.train)
        known.append(above_level(train, queries(task.validation)))
        familiar = torch.maximum(familiar, above_level(train, skills))
        wordings, which = torch.unique(train, dim=0, return_inverse=True)
        for number in range(0, len(wordings), 4):
            left_out.append(above_level(train[which != number], wordings[number : number + 1]))
    assert torch.cat(known).min() > -0.75 * MARGIN and torch.cat(known).median() > -0.1
    assert torch.cat(left_out).quantile(0.8) > -MARGIN
    assert familiar.max() < -MARGIN and familiar.median() < -2 * MARGIN
