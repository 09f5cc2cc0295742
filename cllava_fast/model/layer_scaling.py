"""LiNeS (arXiv 2410.17146): after training, what was learned counts less in shallow layers and more in deep ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cllava_fast.model import paths
from cllava_fast.model.increments import Increments
from cllava_fast.model.patching import check_not_merged, get_increments
from cllava_fast.pool import Factors


class LayerScaling:
    """What ``scale_layers`` did, which ``undo`` takes back; leaving a ``with`` does, too.

    Attributes:
        scales: the factor of each adapted linear's increments, by path.
    """

    def __init__(self, model: Any, scales: dict[str, float]) -> None:
        self.scales = scales
        self._model = model
        self._before: dict[str, dict[str, Tensor]] = {}
        with torch.inference_mode(False), torch.no_grad(), _replacing(get_increments(model)):
            for path, scale in scales.items():
                factors = self._factors(path)
                self._before[path] = _outputs(factors)
                _put(factors, {name: B * scale for name, B in self._before[path].items()})

    def undo(self) -> None:
        """Puts the rows back, bit for bit. Raises ValueError if they were changed since, or a selection is merged."""
        increments = get_increments(self._model)
        check_not_merged(increments)
        if not self.scales:
            return
        for path, scale in self.scales.items():
            present, before = _outputs(self._factors(path)), self._before[path]
            if present.keys() != before.keys() or not all(_is_equal(present[n], before[n] * scale) for n in before):
                raise ValueError(f"rows of {path} were learned, loaded or cast since; load what was saved before")
        with _replacing(increments):
            for path in self.scales:
                factors = self._factors(path)
                _put(factors, {name: B.to(factors.B.device) for name, B in self._before[path].items()})
        self.scales = {}

    def _factors(self, path: str) -> Factors:
        return get_increments(self._model).pool.factors(path)

    def __enter__(self) -> LayerScaling:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()


def scale_layers(model: Any, *, alpha: float, beta: float) -> LayerScaling:
    """Multiplies the learned increments of language layer l = 0 ... L - 1 by ``alpha + beta * l / (L - 1)``.

    LiNeS, equation of section 3 (which counts from 1): a small ``alpha`` brings shallow layers back towards the base,
    whose general skills they hold, and deep layers keep what they learned; the paper's single-task setting has
    ``alpha + beta = 1``. No data is needed. It acts at once, on all rows and shortened means, by their ``B``:
    evaluation, ``merge``, ``export_peft`` and ``save_pretrained`` see the scaled rows. Two scalings multiply.

    Args:
        model: a patched model that has learned something.
        alpha: factor of the first layer (of the only one, where L = 1).
        beta: what the last layer's factor is more than that.

    Returns:
        An object whose ``undo()`` puts the very rows back: ``with cf.scale_layers(model, alpha=0.3, beta=0.7): ...``

    Raises:
        ValueError: the model is not patched, has nothing learned, is learning, or holds a merged selection; or a
            factor is no finite number.
    """
    increments = get_increments(model)
    check_not_merged(increments)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; expected a finite number")
    pool = increments.pool
    if increments.is_within_a_task:
        raise ValueError("a task is being learned; finish it first")
    if not pool.num_rows and not pool.block_rows:
        raise ValueError("nothing has been learned yet")
    layers = paths.base_of(model).layers
    last = max(len(list(model.get_submodule(layers).children())) - 1, 1)
    numbers = {path: int(path.removeprefix(f"{layers}.").partition(".")[0]) for path in increments.linears(model)}
    return LayerScaling(model, {path: alpha + beta * number / last for path, number in numbers.items()})


@contextmanager
def _replacing(increments: Increments) -> Iterator[None]:
    """Around what changes rows: calls under way give no answer, and caches that were filled before are not known."""
    with increments.swapping():
        increments.pool.loads += 1
        yield


def _outputs(factors: Factors) -> dict[str, Tensor]:
    """What every increment is linear in: ``B`` of all rows, and of the tasks' shortened means."""
    names = ("B", "mean_B", "block_B")
    return {name: tensor.detach() for name in names if (tensor := getattr(factors, name, None)) is not None}


def _is_equal(now: Tensor, wanted: Tensor) -> bool:
    return now.shape == wanted.shape and now.dtype == wanted.dtype and torch.equal(now, wanted.to(now.device))


def _put(factors: Factors, outputs: dict[str, Tensor]) -> None:
    for name, tensor in outputs.items():
        if name == "block_B":
            assert factors.block_B is not None
            factors.block_B.data = tensor
        else:
            setattr(factors, name, tensor)
