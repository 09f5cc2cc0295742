"""What a patched model does in a call: finds what acts on each sample, and hands it to the adapted linears.

The selection travels to the layers as a keyword argument, so that a layer recomputed by activation checkpointing sees
the selection of its own forward pass.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cllava_fast.methods import Selection
from cllava_fast.model import acting, answers, caches, paths
from cllava_fast.model.images import check_images, pooled_image
from cllava_fast.model.increments import Increments
from cllava_fast.model.selecting import Request, remember, select
from cllava_fast.pool import Factors

SELECTION = "increment_selection"  # the keyword argument that travels through the language model
STEP = "step_of_generate"  # and the one by which it reaches the steps of generate's own loop


@dataclass
class Adapter:
    """What an adapted linear knows. A plain object, so that the linear gains no submodule and no state-dict key."""

    increments: Increments
    factors: Factors

    def __reduce__(self) -> Any:  # pickle takes a method that is shadowed on an instance for that of its class
        raise TypeError(
            "a patched model cannot be pickled: it would come back as the frozen base; "
            "cllava_fast.save_pretrained(model, path) writes what it has learned, and "
            "cllava_fast.from_pretrained(path) brings it back"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        return Adapter(copy.deepcopy(self.increments, memo), copy.deepcopy(self.factors, memo))


def linear_forward(linear: Any, original: Any, x: Tensor) -> Tensor:
    adapter: Adapter = linear._adapter
    increments, factors = adapter.increments, adapter.factors
    selection = increments.call.active
    if selection is None:
        return original(x)
    decoded = acting.decode_as_before(x, linear, selection, factors, increments.config.scale)
    if decoded is not None:
        return decoded
    if increments.method.reads:
        return original(increments.read(x, factors))
    # what other libraries put on this instance (offloading, say) must keep its part
    if paths.is_plain(linear) and not getattr(linear.__dict__["forward"], "_is_over", True):
        return increments.inject(x, linear, None, factors)
    return increments.inject(x, None, original(x), factors)


def receive_selection(increments: Increments, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    call, handed = increments.call, SELECTION in kwargs
    if not handed and call.given:
        raise TypeError(
            f"a {type(module).__name__} is not handed its layer's keyword arguments, and no increments would act; "
            "expected Llama-like layers, and hooks within a forward pass that call the model itself, not model.model"
        )
    if not handed and increments.may_act:
        raise RuntimeError(
            f"a {type(module).__name__} was called from outside the model, and no increments would act; call the model "
            "itself, or model.model for what its head reads"
        )
    call.active = kwargs.pop(SELECTION, None)
    return args, kwargs


def catch_queries(increments: Increments, head_dim: Any, module: nn.Module, args: Any, output: Tensor) -> None:
    if increments.call.active is not None:
        increments.call.queries = output.reshape(*output.shape[:2], -1, head_dim)


def get_image_features(llava: Any, original: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Lets features that were computed before pass in place of pixels, which have one dimension more."""
    if pixel_values.dim() != 3:
        return original(pixel_values, *args, **kwargs)
    if pixel_values.shape[-1] != llava.config.get_text_config().hidden_size:
        raise ValueError(f"pixel_values is {list(pixel_values.shape)}; expected [images, 3, H, W]")
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=list(pixel_values))  # type: ignore[arg-type]


def backbone_forward(backbone: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """``model.model``: a part of the model's own forward, or called by itself, as for embeddings or another head."""
    model = backbone.__dict__["_patched_model"]
    if SELECTION in kwargs or model.increments.call.given is not None:
        return original(*args, **kwargs)
    kwargs.update(zip(model._patch.parameters_of_backbone, args, strict=False))
    return _forward(model, original, **kwargs)


def _forward(
    model: Any,
    original: Any,
    *args: Any,
    instructions: list[str] | None = None,
    query: Tensor | None = None,
    image_features: Tensor | None = None,
    answer_positions: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    kwargs.update(zip(model._patch.parameters, args, strict=False))
    increments: Increments = model.increments
    pending, within = kwargs.pop(STEP, None), None
    if pending is None:
        within = increments.call.pending
        pending = within if increments.call.custom else None
    check_images(model, kwargs, image_features)
    selection = _select(model, kwargs, instructions, query, goes_on=True, pending=pending, within=within)
    if kwargs.get("labels") is not None and not increments.training and increments.is_within_a_task:
        _warn_of_earlier_tasks(selection)
    if image_features is not None:
        kwargs["pixel_values"] = image_features
    prompt = _length(kwargs) if instructions is None and query is None else None
    remember = _Remember(increments, kwargs, selection, prompt) if pending is None else None
    output, call = None, increments.call
    # a hook that calls the model within a layer must not end what acts in the rest of that layer
    outer = (None, None, None) if call.given is None else (call.given, call.active, call.queries)
    call.given = selection is not None
    try:
        with answers.for_loss_alone(model, kwargs, answer_positions):
            output = original(**kwargs, **{SELECTION: selection})
    finally:
        call.given, call.active, call.queries = outer
        if remember is not None:
            remember(output)
    return output


def _check_in_place(model: Any) -> None:
    for parent, name in model._patch.places:
        found = parent._modules[name]
        # adapters of another library may stand around it
        if "_adapter" not in found.__dict__ and not any("_adapter" in part.__dict__ for part in found.modules()):
            raise RuntimeError(
                f"the {name} of a {type(parent).__name__} was replaced after patch() by a {type(found).__name__}, in "
                "which no increments would act; quantise the base before you patch it"
            )


def _warn_of_earlier_tasks(selection: Selection | None) -> None:
    if selection is None or selection.block is None:
        warnings.warn(
            "a task is being learned, and in evaluation mode its rows do not act: this loss is that of the tasks "
            "before it, and has no gradient of its parameters. Call model.train() first; for a loss to look at, under "
            "torch.no_grad()",
            stacklevel=6,  # who called the model
        )


def _generate(
    model: Any,
    original: Any,
    inputs: Tensor | None = None,
    *args: Any,
    instructions: list[str] | None = None,
    query: Tensor | None = None,
    image_features: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if inputs is not None:
        kwargs["input_ids"] = inputs
    increments: Increments = model.increments
    call = increments.call
    # assistant_early_exit generates within generate, for the same prompt; others there have a question of their own
    assists = getattr(kwargs.get("generation_config"), "is_assistant", False)
    outer, custom = call.pending, call.custom
    check_images(model, kwargs, image_features)
    # with a cache, too, input_ids hold the whole conversation, and its last turn is what is asked now
    pending = _select(model, kwargs, instructions, query, goes_on=False, pending=outer if assists or custom else None)
    if image_features is not None:
        kwargs["pixel_values"] = image_features
    remember = _Remember(increments, kwargs, pending, _length(kwargs), _is_whole(kwargs))
    output, swaps = None, increments.swaps
    # images lie on the CPU, and what a compiled step is handed must not
    call.pending = pending and replace(pending, images=None)
    call.custom = kwargs.get("custom_generate") is not None
    try:
        output = original(None, *args, **kwargs)
    except Exception as error:
        _check_not_swapped(increments, swaps, error)
        raise
    finally:
        call.pending, call.custom = outer, custom
        if increments.swaps == swaps:
            remember(output)
    _check_not_swapped(increments, swaps)
    return output


def _check_not_swapped(increments: Increments, swaps: int, error: Exception | None = None) -> None:
    """An answer is of what acted when it began, from its first token to its last, or there is none."""
    if increments.swaps != swaps or swaps % 2:
        raise RuntimeError(
            "what acts was replaced (load_pretrained, merge, unmerge, scale_layers or unpatch) while generate was "
            "under way; ask again. To replace it without waiting for calls, load into cllava_fast.share(model), and "
            "ask that from then on"
        ) from error


def _prepare_inputs_for_generation(model: Any, original: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Only the loop of ``generate`` calls it, before each step; a streamer or a stopping criterion may ask, too.

    A compiled step is handed what acts: what it found in the model, a CUDA graph would take for as lasting as weights.
    """
    inputs: dict[str, Any] = original(*args, **kwargs)
    pending = model.increments.call.pending
    return inputs if pending is None else {**inputs, STEP: pending}


class _Remember:
    """Has the cache of a call stand for its selection, even where the call was cut off behind the prompt.

    ``prompt``: tokens of what was read, those in the cache among them where it is ``whole``; None where it was said.
    """

    def __init__(
        self,
        increments: Increments,
        kwargs: dict[str, Any],
        selection: Selection | None,
        prompt: int | None,
        whole: bool = False,
    ) -> None:
        self.increments, self.selection = increments, selection
        self.given = None if selection is None else caches.given(kwargs)
        if self.given is not None and caches.remembered(self.given, increments) is selection:
            self.given = None  # it stands for it already
        self.length = self._length()
        self.end = prompt if whole or prompt is None else self.length + prompt

    def __call__(self, output: Any) -> None:
        cache = caches.returned(output)
        # tokens alone may come out, or nothing, though a cache that came in was filled
        if cache is None and (output is not None or self._length() != self.length):
            cache = self.given
        remember(self.increments, cache, self.selection, self.length, self.end)

    def _length(self) -> int:
        return 0 if self.given is None else int(self.given.get_seq_length())


def _save_pretrained(model: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "model.save_pretrained would write the frozen base; cllava_fast.save_pretrained(model, path) writes what the "
        "model has learned, and after cllava_fast.unpatch(model) the base can be saved"
    )


def _init_continuous_batching(model: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate_batch`` and all else that packs requests into one sequence begins here."""
    if not model.increments.pristine:
        raise ValueError(
            "continuous batching packs requests into one sequence, which can have one selection alone; call "
            "model.generate, or cllava_fast.merge one selection for all requests first"
        )
    return original(*args, **kwargs)


def _tokens(kwargs: dict[str, Any]) -> Tensor | None:
    ids: Tensor | None = kwargs.get("input_ids")
    return ids if ids is not None else kwargs.get("inputs_embeds")


def _length(kwargs: dict[str, Any]) -> int:
    tokens = _tokens(kwargs)
    return 0 if tokens is None else tokens.shape[1]


def _is_whole(kwargs: dict[str, Any]) -> bool:
    """By what transformers goes in ``generate``: new tokens alone come with the mask of all."""
    mask = kwargs.get("attention_mask")
    return not isinstance(mask, Tensor) or mask.shape[1] == _length(kwargs)


def _select(
    model: Any,
    kwargs: dict[str, Any],
    instructions: list[str] | None,
    query: Tensor | None,
    goes_on: bool,
    pending: Selection | None,
    within: Selection | None = None,
) -> Selection | None:
    tokens = _tokens(kwargs)
    if tokens is None:
        return None  # the model says what it misses
    if query is not None and instructions is not None:
        raise ValueError("query and instructions were both given; give one of them")
    cache = caches.given(kwargs)
    request = Request(
        batch=len(tokens),
        input_ids=kwargs.get("input_ids"),
        attention_mask=kwargs.get("attention_mask"),
        labels=kwargs.get("labels"),
        pixel_values=kwargs.get("pixel_values"),
        image_grid_thw=kwargs.get("image_grid_thw"),
        instructions=instructions,
        query=query,
        cache=cache,
        whole=not goes_on and _is_whole(kwargs),
        position_ids=kwargs.get("position_ids"),
        packed=kwargs.get("cu_seq_lens_q") is not None or kwargs.get("seq_idx") is not None,
        by_hand=goes_on and (cache is not None or bool(kwargs.get("use_cache"))),
    )
    selection = select(model.increments, request, functools.partial(pooled_image, model), goes_on, pending, within)
    # a step of generate, which has looked already, need not wait for it
    if selection is not None and pending is None and not torch.compiler.is_compiling():
        _check_in_place(model)
    return selection


OF_THE_MODEL: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "generate": _generate,
    "prepare_inputs_for_generation": _prepare_inputs_for_generation,
    "save_pretrained": _save_pretrained,
    "init_continuous_batching": _init_continuous_batching,
}
