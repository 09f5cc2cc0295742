"""What a cache of keys and values was filled with: the selection of its prompt, wherever its samples are moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cllava_fast.methods import Selection

if TYPE_CHECKING:
    from cllava_fast.model.increments import Increments

MOVES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")  # by which transformers moves samples
RESET = "reset"  # and by which it empties a cache
NAMES = ("cache", "past_key_values")  # of an argument and of an output: of transformers 5.24 and after, and before


@dataclass
class _Filled:
    """``loads``: of the pool, when its rows were selected. ``samples [rows]`` int64: whose selection each row of the
    cache now has; None until one was moved."""

    model: ref[Increments]
    loads: int
    selection: Selection
    samples: Tensor | None = None


_filled: WeakKeyDictionary[Any, _Filled] = WeakKeyDictionary()


def given(kwargs: Mapping[str, Any]) -> Any | None:
    """The cache among a call's arguments."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def returned(output: Any) -> Any | None:
    """The cache in what a model or ``generate`` returns: a tuple (``return_dict=False``), an output, tokens alone."""
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((part for part in parts if isinstance(part, Cache)), None)


def remember(cache: Any, increments: Increments, selection: Selection) -> None:
    """From now on the cache stands for ``selection``, whose samples follow those of the cache."""
    _filled[cache] = _Filled(ref(increments), increments.pool.loads, selection)
    for name in (*MOVES, RESET):
        if hasattr(cache, name) and name not in cache.__dict__:
            setattr(cache, name, _Move(cache, name))


def remembered(cache: Any, increments: Increments) -> Selection | None:
    """What ``increments`` filled the cache with, one sample for each of its rows; None if another model did, or other
    rows were loaded since."""
    found = _filled.get(cache)
    if found is None or found.model() is not increments or found.loads != increments.pool.loads:
        return None
    if found.samples is not None:
        found.selection, found.samples = found.selection.take(found.samples), None
    return found.selection


class _Move:
    """One of ``MOVES``, or ``RESET``, on one cache.

    It holds the cache weakly: one that held itself would keep its memory until the garbage collector comes by.
    """

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = ref(cache), name

    def __reduce__(self) -> tuple[type[_Move], tuple[Any, str]]:
        return _Move, (self.cache(), self.name)  # a copied cache moves its own samples

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        cache = self.cache()
        found = _filled.get(cache)
        rows = None if found is None else _rows(cache) or found.selection.batch_size
        getattr(type(cache), self.name)(cache, *args, **kwargs)
        if self.name == RESET:
            _filled.pop(cache, None)
            return
        if found is None or rows is None:
            return
        if found.samples is None and rows % found.selection.batch_size == 0:
            found.selection, found.samples = found.selection.expand(rows), torch.arange(rows)
        if found.samples is None or len(found.samples) != rows:  # it was emptied since, and is filled anew
            del _filled[cache]
            return
        (given,) = (*args, *kwargs.values())
        if self.name == "batch_repeat_interleave":
            found.samples = found.samples.repeat_interleave(given)
        else:
            given = torch.as_tensor(given)
            found.samples = found.samples.to(given.device)[given]


def _rows(cache: Any) -> int | None:
    """Samples of a cache; None where no layer can say, as quantised ones cannot."""
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return next((key.shape[0] for key in keys if key is not None and key.dim() == 4), None)
