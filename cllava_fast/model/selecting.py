"""Which selection acts on the samples of a call: by their instructions, or the one that their cache was filled with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cllava_fast.methods import Begun, Selection
from cllava_fast.methods.base import check_selection
from cllava_fast.model import acting, caches
from cllava_fast.model.answers import IGNORE
from cllava_fast.model.images import images_per_sample
from cllava_fast.model.increments import Increments
from cllava_fast.model.instructions import InstructionReader, text_ids
from cllava_fast.names import brief
from cllava_fast.ops import checks
from cllava_fast.pool import Factors
from cllava_fast.surrogate import BackboneSurrogate, TextImageSurrogate


class Request(NamedTuple):
    """What one call to the model says about its instructions.

    ``whole``: ``input_ids`` begin with what lies in ``cache``. ``packed``: the call says where samples begin in a row.
    ``by_hand``: a caller goes on with what a forward pass leaves in a cache.
    """

    batch: int
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    instructions: Sequence[str] | None = None
    query: Tensor | None = None
    cache: Any | None = None
    whole: bool = False
    position_ids: Tensor | None = None
    packed: bool = False
    by_hand: bool = False


def select(
    increments: Increments,
    request: Request,
    pooled_image: Any,
    goes_on: bool,
    pending: Selection | None = None,
    within: Selection | None = None,
) -> Selection | None:
    """What acts on each sample of the request; None where nothing has been learned.

    Args:
        pooled_image: function from pixel values and their grids to pooled vision features ``[images, d]``; called only
            if needed.
        goes_on: without a new turn, the request goes on with the selection that its cache was filled with.
        pending: what acts in the ``generate`` that the request is a step of.
        within: what acts in the ``generate`` that asks it; counts for a request that asks nothing.
    """
    learning = increments.training and increments.pool.block_rows > 0
    if increments.pristine:
        if learning or request.instructions is not None or request.query is not None:
            raise ValueError("one selection is merged into the weights; cllava_fast.unmerge(model) before another")
        return None
    if not learning and not increments.pool.num_tasks and increments.method.uses_query:
        return None
    if not increments.method.uses_query:
        # a step of an answer has its prompt's; a caller's own loop asks whatever it likes
        if pending is not None and not increments.method.routes and not increments.call.custom:
            return pending.expand(request.batch)
        selection = increments.method.select(increments.pool, None, 1, learning)
        check_selection(increments.method, increments.pool, selection, 1)
        return _on_batch(increments, selection, request)
    if request.query is None and request.instructions is None:
        if pending is not None:
            return pending.expand(request.batch)
        remembered = _remembered(increments, request) if goes_on else None
        if remembered is not None:
            return remembered
        if within is not None and not _asks(increments, request):
            return within.expand(request.batch)
    return select_by_instruction(increments, request, pooled_image)


def _asks(increments: Increments, request: Request) -> bool:
    return increments.reader is None or request.input_ids is None or increments.reader.has_turn(request.input_ids)


def select_by_instruction(increments: Increments, request: Request, pooled_image: Any) -> Selection | None:
    """What acts by the request's own instructions."""
    if request.instructions is None and request.query is None:
        _check_not_packed(request)
    images = images_of(increments, request, pooled_image)
    selection = increments.select_by_query(query_of(increments, request, images))
    return _on_batch(increments, selection and replace(selection, images=images), request)


def _check_not_packed(request: Request) -> None:
    """By what transformers goes: without a mask, where positions begin anew in a row, another sample does."""
    positions, packed = request.position_ids, request.packed
    if not packed and request.attention_mask is None and isinstance(positions, Tensor) and positions.dim() == 2:
        # the ids are read next, so a device is waited for in any case
        packed = checks.can_read(positions, cuda=True) and bool((positions.diff(dim=1) < 0).any())
    if packed:
        raise ValueError(
            "several samples are packed into one row (cu_seq_lens_q, seq_idx, or position_ids that begin anew), and a "
            "row has one selection alone, that of its last instruction; give each sample a row, padded, with an "
            "attention_mask"
        )


def _on_batch(increments: Increments, selection: Selection | None, request: Request) -> Selection | None:
    if selection is None:
        if increments.training and increments.is_within_a_task:
            raise ValueError(
                f"{type(increments.method).__name__}.select returned None in training, and nothing of the task that is "
                "being learned would act; expected a Selection with its rows"
            )
        return None
    selection = selection.expand(request.batch)
    if not increments.method.routes:
        strength = acting.column_strength(selection, increments.pool, increments.config.scale)
        return replace(selection, column_strength=strength)
    selection = replace(selection, mask=_mask(request, counts=increments.training))
    if increments.training or not increments.method.by_first_token:
        return selection
    return replace(selection, memory={}, begun=_begun(increments, request.cache))


def _begun(increments: Increments, cache: Any | None) -> dict[Factors, Begun]:
    if cache is None or not cache.get_seq_length():
        return {}
    filled = caches.remembered(cache, increments, whole=False)
    if filled is None or filled.begun is None:
        raise ValueError(
            "the cache was not filled by this patched model with the increments that it has now, and "
            f"{increments.config.method} goes by a prompt's first token; pass the whole prompt without a cache"
        )
    return filled.begun


def remember(
    increments: Increments, cache: Any | None, selection: Selection | None, begin: int, end: int | None
) -> None:
    """Later calls with this cache carry no instruction; they go on with the selection of its prompt, which came at
    ``begin`` and ended at ``end``, if it was read."""
    if cache is not None and selection is not None and not increments.training:
        caches.remember(cache, increments, selection, begin, end)


def _remembered(increments: Increments, request: Request) -> Selection | None:
    cache = request.cache
    if cache is None:
        return None
    selection = caches.remembered(cache, increments)
    # the single token of a decoding step asks nothing, and is no image
    ids = None if request.input_ids is None or request.input_ids.shape[1] == 1 else request.input_ids
    # a cache that is compiled says its length on the device, and a step need not wait for it
    step = request.input_ids is not None and ids is None and getattr(cache, "is_compileable", False)
    if not (step and selection is not None) and not cache.get_seq_length():
        return None
    if ids is not None and increments.reader is not None and increments.reader.has_turn(ids):
        return None
    if selection is None:
        raise ValueError(
            "the cache was not filled by this patched model with the increments that it has now, so its "
            "instruction is unknown; pass instructions=[...] with one text for each sample"
        )
    if selection.images is not None and ids is not None and (ids == increments.image_token_id).any():
        selection = replace(selection, images=None)  # here, nobody looks
    selection, mask = selection.expand(request.batch), _mask(request)
    if mask is not None and increments.method.by_first_token:
        selection = replace(selection, mask=mask)  # longer than the one before, behind which a sample may begin
    return caches.goes_on(cache, selection)


def query_of(increments: Increments, request: Request, images: Tensor | None) -> Tensor:
    """Queries ``[B, D]`` float32 from what the request says, in this order: query, instructions, input_ids.

    ``images`` is what ``images_of`` returns.
    """
    if request.query is not None:
        return _check_query(increments, request.query, request.batch)
    if increments.method.uses_task:
        raise ValueError(
            f"{increments.config.method} must be told the task: pass query= [B, 1], each sample's task number; "
            f"learned: {dict(enumerate(increments.pool.task_names))}"
        )
    surrogate = increments.surrogate
    assert surrogate is not None
    if request.instructions is None and request.input_ids is None:
        raise ValueError("no instruction: input_ids is None; pass instructions=[...] with one text for each sample")
    if increments.reader is None and request.instructions is None:
        assert isinstance(surrogate, BackboneSurrogate) and request.input_ids is not None
        ids = text_ids(request.input_ids, request.attention_mask, request.labels, increments.special_ids)
        return surrogate.from_ids(ids)
    texts = _texts(increments, request)
    if images is None:
        return surrogate.query(texts)
    return surrogate.query(texts, (images[:, 1:] / images[:, :1].clamp(min=1)).float())


def _texts(increments: Increments, request: Request) -> list[str]:
    if request.instructions is None:
        assert increments.reader is not None and request.input_ids is not None
        read = increments.reader.read(request.input_ids, request.attention_mask)
        if request.by_hand and not increments.training:
            _warn_of_half_a_turn(increments.reader, request.input_ids, request.attention_mask)
        return read
    texts = request.instructions
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"instructions is {texts!r}; expected a list with one text for each sample")
    if len(texts) != request.batch:
        raise ValueError(f"instructions holds {len(texts)} texts; expected {request.batch}, one for each sample")
    return [increments.reader.canonical(text) for text in texts] if increments.reader else list(texts)


def _warn_of_half_a_turn(reader: InstructionReader, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    half = reader.half_turn(input_ids, attention_mask)
    if half is not None:
        warnings.warn(
            f"input_ids end within a user turn, at {brief(half)}, and fill a cache: rows are selected by this part of "
            "the question, and act on what comes behind it, too. Pass instructions=[...] with each sample's whole "
            "question, or the whole prompt to generate, with prefill_chunk_size=",
            stacklevel=11,  # who called the model
        )


def _check_query(increments: Increments, query: Tensor, batch: int) -> Tensor:
    width = 1 if increments.surrogate is None else increments.surrogate.dim
    if not isinstance(query, Tensor):
        raise TypeError(f"query is a {type(query).__name__}; expected a tensor [{batch}, {width}]")
    if query.dim() != 2 or query.shape[1] != width or len(query) != batch:
        raise ValueError(f"query is {list(query.shape)}; expected [{batch}, {width}]")
    if checks.can_read(query, cuda=False) and not torch.isfinite(query).all():  # a GPU would have to be waited for
        raise ValueError("query holds NaN or Inf; check the surrogate's embeddings")
    return query.float()


def images_of(increments: Increments, request: Request, pooled_image: Any) -> Tensor | None:
    """``Selection.images`` behind the request, earlier turns' among them; None where its query needs none.

    Args:
        pooled_image: function from pixel values and their grids to pooled vision features ``[images, d]``; called only
            if needed.
    """
    if not isinstance(increments.surrogate, TextImageSurrogate) or request.query is not None:
        return None
    if request.input_ids is None:
        raise ValueError('surrogate "text+image" counts images in input_ids; pass them, or query= [B, D]')
    none = torch.zeros(request.batch, 1 + increments.surrogate.image_dim, dtype=torch.float64)
    ids, shown = _behind_cache(increments, request, request.input_ids, none)
    if not (ids == increments.image_token_id).any():
        return shown
    if request.pixel_values is None:
        raise ValueError('surrogate "text+image" needs pixel_values beside the image tokens, or query= [B, D]')
    pooled = pooled_image(request.pixel_values, request.image_grid_thw)
    counts = images_per_sample((ids == increments.image_token_id).cpu(), len(pooled), increments.equal_images)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return shown.index_add(0, owner, functional.pad(pooled.detach().double().cpu(), (1, 0), value=1))


def _behind_cache(increments: Increments, request: Request, ids: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
    """The part of ``ids`` that is not in the request's cache yet, and ``Selection.images`` of what is."""
    cache = request.cache
    length = 0 if cache is None else int(cache.get_seq_length())
    if not length:
        return ids, none
    filled, rest = caches.remembered(cache, increments, whole=False), ids[:, length:] if request.whole else ids
    if filled is not None and filled.images is not None:
        # beams of one sample have the same images, and there may be more of them here or in the cache
        return rest, filled.images[torch.arange(len(ids)) * len(filled.images) // len(ids)]
    if request.whole and not (ids[:, :length] == increments.image_token_id).any():
        return rest, none
    raise ValueError(
        'which images lie in the cache is not known, and surrogate "text+image" looks at them; pass '
        "query= [B, D], or the whole conversation without a cache"
    )


def _mask(request: Request, counts: bool = False) -> Tensor | None:
    """``[B, S]``, of all tokens so far; None where there is none, or none of that form. ``counts``: 0 in samples that
    are not learned, too."""
    mask = request.attention_mask
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if not counts or request.labels is None:
        return mask
    learned = (request.labels != IGNORE).any(1, keepdim=True)  # [B, 1]; without a label, a sample fills up a batch
    return learned.expand(request.labels.shape) if mask is None else mask * learned
