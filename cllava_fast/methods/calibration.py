"""What was known before stays known: an instruction unlike every learned task leaves the frozen model alone.

Each committed task keeps a Gaussian of its training queries: mean, K principal directions, and one variance for all
other directions (probabilistic PCA), which for 384 numbers a query is 25 KB instead of a covariance's 590. With
``l_t(e)`` the log-likelihood of a query under task t's Gaussian, divided by D, and ``m_t`` its mean over the task's own
training queries, a sample's coefficients are multiplied by

    max_t sigmoid((l_t(e) - m_t + MARGIN) / TEMPERATURE)

after the score of DIKI (arXiv 2407.05342), ``sigmoid(log p / D - 1)``, which knows no task's own level. The constants
were chosen on the demo's validation split, and tests/test_calibration.py holds them to it: the learned tasks' questions
lie above ``-MARGIN``, four of five wordings that were left out of the fit do, and no prompt of the base's pretraining.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllava_fast.pool import OwnTensors, Pool

DIRECTIONS = 16  # K
NOISE = 0.384  # variance beside what was seen, of all directions together: far is as far off in queries of any width
MARGIN, TEMPERATURE = 0.3, 0.03


def own_tensors(width: int, tasks: int) -> OwnTensors:
    """What the pool keeps, of queries ``[n, width]``, by name."""
    shapes = {
        "query_mean": [tasks, width],
        "query_directions": [tasks, DIRECTIONS, width],
        "query_variances": [tasks, DIRECTIONS + 1],  # the last is that of all other directions
        "query_level": [tasks],
    }
    return {name: (shape, torch.float32) for name, shape in shapes.items()}


def gaussian(queries: Tensor) -> list[Tensor]:
    """What is to be remembered of queries ``[n, D]``, in the order of ``own_tensors``, of one task."""
    exact = queries.double().cpu()
    mean = exact.mean(0)  # [D]
    off, width = (exact - mean) / math.sqrt(len(exact)), exact.shape[1]
    if len(exact) < width:  # what is not zero of [D, D] lies in [n, n], too
        values, vectors = torch.linalg.eigh(off @ off.t())  # ascending
        seen = values > 1e-9 * values[-1]  # other directions are nothing but rounding
        vectors = off.t() @ vectors * seen / values.where(seen, 1.0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(off.t() @ off)
    known = min(DIRECTIONS, len(values), width - 1)
    noise = NOISE / width
    top = values[len(values) - known :].flip(0).clamp(min=0)
    directions = torch.zeros(DIRECTIONS, width, dtype=torch.float64)
    directions[:known] = vectors[:, len(values) - known :].flip(1).t()
    rest = (values.sum() - top.sum()).clamp(min=0) / (width - known) + noise
    variances = rest.expand(DIRECTIONS + 1).clone()
    variances[:known] = top + noise
    one = [tensor[None].float() for tensor in (mean, directions, variances)]
    return [*one, log_likelihood(exact.float(), *one).mean(0)]


def keep(pool: Pool, remembered: list[Tensor]) -> None:
    """Adds what ``gaussian`` found for the newest task."""
    for name, value in zip(own_tensors(0, 1), remembered, strict=True):
        pool.keep_for_task(name, value)


def log_likelihood(query: Tensor, mean: Tensor, directions: Tensor, variances: Tensor) -> Tensor:
    """``[B, T]``: of queries ``[B, D]`` under each Gaussian, divided by D."""
    off = query[:, None] - mean  # [B, T, D]
    along = torch.einsum("btd,tkd->btk", off, directions)
    seen, rest = variances[:, :-1], variances[:, -1]
    width = query.shape[1]
    others = (off.square().sum(2) - along.square().sum(2)).clamp(min=0)
    distance = (along.square() / seen).sum(2) + others / rest
    volume = seen.log().sum(1) + (width - seen.shape[1]) * rest.log()
    return -0.5 * ((distance + volume) / width + math.log(2 * math.pi))


def likelihoods(pool: Pool, query: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, T]`` each: log-likelihoods of queries ``[B, D]`` divided by D, and how far they lie above ``m_t``."""
    mean, directions, variances, level = (getattr(pool, name) for name in own_tensors(0, 0))
    found = log_likelihood(query.float(), mean, directions, variances)
    return found, found - level


def score(above: Tensor) -> Tensor:
    """In 0..1, of likelihoods above their task's own level."""
    return torch.sigmoid((above + MARGIN) / TEMPERATURE)


def familiarity(pool: Pool, query: Tensor) -> Tensor:
    """``[B]`` in 0..1: how much queries ``[B, D]`` are like those of any learned task."""
    _, above = likelihoods(pool, query)
    return score(above).amax(1)
