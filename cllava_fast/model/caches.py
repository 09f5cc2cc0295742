"""What a cache of keys and values was filled with: the selection of its prompt, wherever its samples are moved."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cllava_fast.methods import Selection

if TYPE_CHECKING:
    from cllava_fast.model.increments import Increments

MOVES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")  # by which transformers moves samples
RESET, CROP = "reset", "crop"  # and by which it empties a cache, and takes its last tokens off
FILLED = "_filled_with_increments"  # attribute of a cache: what is compiled must not depend on other caches
NAMES = ("cache", "past_key_values")  # of an argument and of an output: of transformers 5.24 and after, and before


@dataclass
class _Turn:
    """What acts behind one prompt, before which the cache had ``begin`` tokens, and ``end`` with it; None where its
    instruction was said, which no part of its tokens tells. ``open``: what goes on there may do so with
    ``selection``."""

    begin: int
    end: int | None
    selection: Selection
    open: bool = True


@dataclass
class _Filled:
    """``loads``: of the pool, when rows were selected. ``rows``: the samples of the cache. ``going_on``: what acts in a
    call that goes on with the last turn. ``moving``: a method of the cache calls those of its layers."""

    model: ref[Increments]
    loads: int
    turns: list[_Turn]
    rows: int | None
    going_on: Selection | None = None
    moving: bool = False

    def is_of(self, increments: Increments) -> bool:
        return self.model() is increments and self.loads == increments.pool.loads

    def was_edited(self, cache: Any) -> bool:
        """Other keys of as many samples may be the same ones, moved to another device and back: nobody can tell."""
        rows = _rows(cache)
        return rows is not None and self.rows is not None and rows != self.rows


def given(kwargs: Mapping[str, Any]) -> Any | None:
    """The cache among a call's arguments."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def returned(output: Any) -> Any | None:
    """The cache in what a model or ``generate`` returns: a tuple (``return_dict=False``), an output, tokens alone."""
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((part for part in parts if isinstance(part, Cache)), None)


def remember(cache: Any, increments: Increments, selection: Selection, begin: int, end: int | None) -> None:
    """From now on the cache stands for ``selection``, whose samples follow those of the cache: for that of a prompt
    that came at ``begin`` and ended at ``end``, or what ``goes_on`` with the one before.

    Args:
        end: None where its instruction was said: a caller may have edited the cache, and what it was is void.
    """
    found = _found(cache)
    if found is None or not found.is_of(increments):
        found = _Filled(ref(increments), increments.pool.loads, [], None)
        setattr(cache, FILLED, found)
    last = found.turns[-1] if found.turns else None
    if last is not None and (selection is last.selection or selection is found.going_on):
        last.selection = selection
    else:
        if not increments.method.uses_query:
            begin = 0  # every call selects anew, and the cache says how its prompt began
        before = [turn for turn in found.turns if turn.begin < begin]
        if end is None:
            for turn in before:
                turn.open = False
            if len(before) > 1 and _same(before[-1].selection.images, before[-2].selection.images):
                before.pop()  # a caller may say it at every step, and a crop finds as much in the one before
        found.turns = [*before, _Turn(begin, end, selection)]
    found.rows, found.going_on = _rows(cache), None
    for owner in (cache, *_layers(cache)[:1]):
        for name in (*MOVES, RESET, CROP):
            hook = owner.__dict__.get(name)
            if hasattr(owner, name) and (hook is None or isinstance(hook, _Move) and hook.cache() is None):
                setattr(owner, name, _Move(cache, owner, name))
        if "__getstate__" not in owner.__dict__:
            owner.__getstate__ = _State(owner)


def remembered(cache: Any, increments: Increments, whole: bool = True) -> Selection | None:
    """What ``increments`` filled the cache with, one sample for each of its rows; None if another model did, other rows
    were loaded since, or it was edited.

    Args:
        whole: False asks for its beginning and its images alone, which it has where a part of the prompt was taken off.
    """
    found = _found(cache)
    if found is None or not found.is_of(increments):
        return None
    if found.was_edited(cache):
        cache.__dict__.pop(FILLED, None)
        return None
    return found.turns[-1].selection if found.turns[-1].open or not whole else None


def goes_on(cache: Any, selection: Selection) -> Selection:
    """Says that ``selection`` is made of what the cache stands for, and is no new turn."""
    found: _Filled = cache.__dict__[FILLED]
    if selection is not found.turns[-1].selection:
        found.going_on = selection
    return selection


class _Move:
    """One of ``MOVES``, ``RESET`` or ``CROP``, on one cache or on its first layer, where callers move layer by layer.

    It holds them weakly: what held itself would keep its memory until the garbage collector comes by.
    """

    def __init__(self, cache: Any, owner: Any, name: str) -> None:
        self.cache, self.owner, self.name = ref(cache), ref(owner), name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        owner, cache = self.owner(), self.cache()
        found = None if cache is None else _found(cache)
        move = functools.partial(getattr(type(owner), self.name), owner, *args, **kwargs)
        if found is None or found.moving:
            return move()
        edited, rows = found.was_edited(cache), _rows(cache) or found.turns[-1].selection.batch_size
        found.moving = True
        try:
            move()
        finally:
            found.moving = False
        if self.name == CROP:
            lasts = _crop(found, cache)
        else:
            lasts = self.name in MOVES and self._take(found, rows, *args, **kwargs)
        found.rows = _rows(cache)
        if edited or not lasts:
            cache.__dict__.pop(FILLED, None)

    def _take(self, found: _Filled, rows: int, *args: Any, **kwargs: Any) -> bool:
        """False where the cache was emptied since, and may be filled anew."""
        (given,) = (*args, *kwargs.values())
        repeats = self.name == "batch_repeat_interleave"
        samples = torch.arange(rows).repeat_interleave(given) if repeats else torch.as_tensor(given)
        for turn in found.turns:
            if not turn.selection.batch_size or rows % turn.selection.batch_size:
                return False
            turn.selection = turn.selection.expand(rows).take(samples)
        return True


class _State:
    """What copies and pickles take along of a cache or a layer: a copy moves its own samples, and is not known.

    ``copy.copy``, too, asks the instance, and would take along moves of what it copied.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = ref(owner)

    def __call__(self) -> Any:
        owner: Any = self.owner()
        kind: Any = type(owner)
        state = kind.__getstate__(owner).items()
        return {name: value for name, value in state if not isinstance(value, (_Filled, _Move, _State))}


def _crop(found: _Filled, cache: Any) -> bool:
    """Takes back the turns of which nothing is left; False where none is."""
    length = int(cache.get_seq_length())
    found.turns = [turn for turn in found.turns if turn.begin < length]
    if not found.turns:
        return False
    *before, last = found.turns
    if last.end is not None and length < last.end - 1:  # its last token may be read once more
        images, earlier = last.selection.images, before[-1].selection.images if before else None
        if images is not None and not _same(images, torch.zeros_like(images) if earlier is None else earlier):
            last.selection = replace(last.selection, images=None)
        last.open = False
    return True


def _same(images: Tensor | None, others: Tensor | None) -> bool:
    if images is None or others is None:
        return images is others
    # beams of one sample have the same images, and one of both may be of a time before they were added
    return torch.equal(images, others[torch.arange(len(images)) * len(others) // len(images)])


def _found(cache: Any) -> _Filled | None:
    found: _Filled | None = cache.__dict__.get(FILLED)
    return found


def _layers(cache: Any) -> list[Any]:
    return getattr(cache, "layers", None) or []


def _rows(cache: Any) -> int | None:
    """Samples of a cache; None where no layer can say, as quantised ones cannot."""
    keys = (getattr(layer, "keys", None) for layer in _layers(cache))
    return next((key.shape[0] for key in keys if key is not None and key.dim() == 4), None)
