"""``patch`` and ``unpatch``: one transformers model learns to carry increments, in place, and back again.

Nothing is copied or subclassed: ``forward`` of the adapted linears and ``SHADOWED`` of the model are shadowed on this
instance, and the selection travels to the layers as a keyword argument, so that a layer recomputed by activation
checkpointing sees the selection of its own forward pass.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import warnings
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import Tensor, nn

from cllava_fast.methods import IncrementConfig, MethodConfig, Selection
from cllava_fast.model import acting, answers, caches, paths
from cllava_fast.model.image_settings import prepared_otherwise
from cllava_fast.model.images import check_images, pooled_image
from cllava_fast.model.increments import Increments
from cllava_fast.model.selecting import Request, remember, select
from cllava_fast.pool import Factors

SELECTION = "increment_selection"  # the keyword argument that travels through the language model
STEP = "step_of_generate"  # and the one by which it reaches the steps of generate's own loop
SHADOWED = ("forward", "generate", "prepare_inputs_for_generation", "save_pretrained", "init_continuous_batching")


@dataclass
class _Patch:
    """What unpatch needs to restore the model that came in, and the names of its forward's parameters."""

    parameters: list[str]
    requires_grad: dict[str, bool]
    hooks: list[Any]
    kept_from_repacking: list[Any]
    unwrapped_forward: Any  # what accelerate, which wrapped the model before, would put in the place of ours


@dataclass
class _Adapter:
    """What an adapted linear knows. A plain object, so that the linear gains no submodule and no state-dict key."""

    increments: Increments
    factors: Factors

    def __reduce__(self) -> Any:  # pickle takes a method that is shadowed on an instance for that of its class
        raise TypeError(
            "a patched model cannot be pickled: it would come back as the frozen base; "
            "cllava_fast.save_pretrained(model, path) writes what it has learned, and "
            "cllava_fast.from_pretrained(path) brings it back"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Adapter:
        return _Adapter(copy.deepcopy(self.increments, memo), copy.deepcopy(self.factors, memo))


def patch(model: Any, config: MethodConfig | None = None, *, processor: Any | None = None) -> Any:
    """Gives a model a pool of increments and freezes everything else. In place; this instance only; idempotent.

    Until a task is learned, outputs stay equal to the bit. ``forward`` and ``generate`` additionally take
    ``instructions`` (one text a sample; by default the last user turn is read back from ``input_ids``), ``query``
    (``[B, D]``, embeddings of the surrogate) and ``image_features`` (``[images, tokens, d]`` in place of
    ``pixel_values``: the projected features of the frozen vision tower, computed once; for LLaVA-1.5 and its like,
    which make one number of tokens of every image).

    In training, a ``forward`` with ``labels`` returns the ``logits`` of answer positions alone, ``[B, K, vocab]``; of
    all positions in evaluation mode, or if ``logits_to_keep=0`` is passed. ``answer_positions`` (``[B, K]``, see
    ``answers.answer_positions``) says which they are, where a collator knows; otherwise labels are read.

    Args:
        model: a transformers model of a class in ``paths.BASES``: LLaVA, its successors, or a plain language model.
            It may be quantised, spread over devices or offloaded; it is never moved.
        config: the method's configuration; ``IncrementConfig()`` by default.
        processor: the processor, or a plain language model's tokenizer; by default the one saved beside the weights.
            Without any, only ``surrogate="backbone"`` works.

    Returns:
        The same object.

    Raises:
        TypeError: the model's class is not supported, the config no method's, or the processor a tokenizer alone where
            the model takes images.
        ValueError: the model is patched with another config, chat template or preparation of images, or holds adapters
            of another library, or weights that were repacked for inference on a CPU.
    """
    paths.check_supported(model)
    _check_processor(model, processor)
    present = getattr(model, "increments", None)
    if isinstance(present, Increments):
        if config is not None and config != present.config:
            raise ValueError(f"the model is patched with {present.config}; unpatch(model) before another patch")
        if processor is not None and present.reader is None:
            raise ValueError("the model is patched without a processor; unpatch(model) before a patch with one")
        other = "" if processor is None else prepared_otherwise(processor, present.processor)
        if other:
            raise ValueError(
                f"the processor has another {other} than the one that the model was patched with; unpatch(model) "
                "before a patch with this one"
            )
        return model
    _check_not_adapted(model)
    attentions = paths.attentions(model)
    config = IncrementConfig() if config is None else config
    increments = Increments(model, config, find_processor(model) if processor is None else processor)
    linears = increments.linears(model)
    readers = attentions[: len(linears)] if increments.method.reads else []  # an o_proj each
    projections = [paths.query_projection(attention) for attention in readers]

    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    parameters = list(inspect.signature(type(model).forward).parameters)[1:]  # without self
    unwrapped = model.__dict__.pop("_original_forward", None)
    record = _Patch(parameters, requires_grad, [], paths.repacked_on_cpu(model), unwrapped)
    model.requires_grad_(False)
    for path, linear in linears.items():
        linear.__dict__["_adapter"] = _Adapter(increments, increments.pool.factors(path))
        _shadow(linear, "forward", _linear_forward)
    for attention in attentions:
        receive = functools.partial(_receive_selection, increments)
        record.hooks.append(attention.register_forward_pre_hook(receive, with_kwargs=True))
    for attention, projection in zip(readers, projections, strict=True):
        catch = functools.partial(_catch_queries, increments, attention.head_dim)
        record.hooks.append(projection.register_forward_hook(catch))
    for linear in record.kept_from_repacking:
        linear.support_avx512bf16_for_cpu = False
    if paths.base_of(model).takes_features:
        _shadow(model.model, "get_image_features", _get_image_features)
    _shadow(model, "forward", _forward)
    _shadow(model, "generate", _generate)
    _shadow(model, "prepare_inputs_for_generation", _prepare_inputs_for_generation)
    _shadow(model, "save_pretrained", _save_pretrained)
    _shadow(model, "init_continuous_batching", _init_continuous_batching)
    increments.train(model.training)
    model.increments = increments
    model.__dict__["_patch"] = record
    return model


def unpatch(model: Any) -> Any:
    """Restores exactly the model that came in; what was learned is dropped (``save_pretrained`` first).

    Raises:
        ValueError: the model is not patched, something else was patched over it since, a selection is merged, or a task
            is being learned.
    """
    increments = get_increments(model)
    linears = increments.linears(model)
    check_not_merged(increments)
    increments.check_not_learning("unpatch")
    shadowed = [(model, name) for name in SHADOWED]
    shadowed += [(model.model, "get_image_features")] if paths.base_of(model).takes_features else []
    shadowed += [(linear, "forward") for linear in linears.values()]
    for module, name in shadowed:
        # what is wrapped around a method may carry its attributes
        if not isinstance(module.__dict__.get(name), MethodType) or not hasattr(module.__dict__[name], "_is_over"):
            raise ValueError(f"{name} of {type(module).__name__} was replaced after patch(); undo that first")
    increments.swaps += 2
    for module, name in shadowed:
        del module.__dict__[name]
    for module, _ in shadowed:
        module.__dict__.update(module.__dict__.pop("_under", {}))
    for linear in linears.values():
        del linear.__dict__["_adapter"]
    record: _Patch = model.__dict__.pop("_patch")
    for hook in record.hooks:
        hook.remove()
    for linear in record.kept_from_repacking:
        linear.support_avx512bf16_for_cpu = True
    if record.unwrapped_forward is not None:
        model.__dict__["_original_forward"] = record.unwrapped_forward
    del model.increments
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.requires_grad.get(name, parameter.requires_grad))
    return model


def get_increments(model: Any) -> Increments:
    """The ``Increments`` of a patched model. Raises ValueError if the model is not patched."""
    increments = getattr(model, "increments", None)
    if not isinstance(increments, Increments):
        inner = getattr(model, "module", None)
        wraps = isinstance(getattr(inner, "increments", None), Increments)  # as DistributedDataParallel does
        do = "give the patched model inside it, its .module" if wraps else "call cllava_fast.patch(model) first"
        raise ValueError(f"the {type(model).__name__} is not patched; {do}")
    return increments


def check_not_merged(increments: Increments) -> None:
    if increments.pristine:
        raise ValueError("a selection is merged into the frozen weights; call cllava_fast.unmerge(model) first")


def check_nothing_over(model: Any) -> None:
    """Raises ValueError for a patched model that another library (PEFT, say) has put adapters over since."""
    over = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if over is not None:
        raise ValueError(f"{over} carries adapters of another library, put over the patch; remove them first")


def _check_not_adapted(model: Any) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "_adapter"):
            raise ValueError(f"{name} carries adapters of another patch already; remove them before patch(model)")


def _check_processor(model: Any, processor: Any) -> None:
    if processor is None or paths.vision_tower(model) is None or hasattr(processor, "image_processor"):
        return
    raise TypeError(
        f"processor is a {type(processor).__name__}, which has no image_processor; expected the whole processor of the "
        f"{type(model).__name__}, as transformers.AutoProcessor.from_pretrained loads it"
    )


def find_processor(model: Any, **options: Any) -> Any | None:
    """The processor, or a plain language model's tokenizer, saved beside the weights; None where there is none.

    ``options`` are for transformers; by default nothing is downloaded, and a hub's name is looked up in its cache.
    """
    name, with_images = model.name_or_path or "", paths.vision_tower(model) is not None
    files = ("processor_config.json", "preprocessor_config.json") if with_images else ("tokenizer_config.json",)
    is_folder = os.path.isdir(name)
    if not name or is_folder and not any(os.path.isfile(os.path.join(name, file)) for file in files):
        return None
    from transformers import AutoProcessor, AutoTokenizer

    kind = AutoProcessor if with_images else AutoTokenizer
    try:
        return kind.from_pretrained(name, **{"local_files_only": True, **options, "trust_remote_code": False})
    except (OSError, ValueError):  # a language model without a tokenizer is the latter
        if is_folder:
            raise
        return None


def _shadow(module: nn.Module, name: str, function: Any) -> None:
    """Puts ``function`` before the method ``name`` of this one instance; ``copy.deepcopy`` keeps working."""
    of_class = getattr(type(module), name)
    is_over = name in module.__dict__  # another library's
    if is_over:
        module.__dict__.setdefault("_under", {})[name] = module.__dict__[name]
    original = module.__dict__.get(name, of_class)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # looked up where it is called: a copied model must call its own parts
        call = self.__dict__["_under"][name] if is_over else functools.partial(of_class, self)
        return function(self, call, *args, **kwargs)

    # callers inspect the signature, but who takes wrappers off (accelerate) must not go past this one
    signature = inspect.signature(original)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    method.__signature__ = signature.replace(parameters=[own, *parameters])  # type: ignore[attr-defined]
    del method.__wrapped__
    method._is_over = is_over  # type: ignore[attr-defined]
    module.__dict__[name] = MethodType(method, module)


def _linear_forward(linear: Any, original: Any, x: Tensor) -> Tensor:
    adapter: _Adapter = linear._adapter
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


def _receive_selection(increments: Increments, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    increments.call.active = kwargs.pop(SELECTION, None)
    if increments.call.given and increments.call.active is None:
        raise TypeError(
            f"a {type(module).__name__} is not handed its layer's keyword arguments, and no increments would act; "
            "expected Llama-like layers"
        )
    return args, kwargs


def _catch_queries(increments: Increments, head_dim: Any, module: nn.Module, args: Any, output: Tensor) -> None:
    if increments.call.active is not None:
        increments.call.queries = output.reshape(*output.shape[:2], -1, head_dim)


def _get_image_features(llava: Any, original: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Lets features that were computed before pass in place of pixels, which have one dimension more."""
    if pixel_values.dim() != 3:
        return original(pixel_values, *args, **kwargs)
    if pixel_values.shape[-1] != llava.config.get_text_config().hidden_size:
        raise ValueError(f"pixel_values is {list(pixel_values.shape)}; expected [images, 3, H, W]")
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=list(pixel_values))  # type: ignore[arg-type]


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
    output = None
    increments.call.given = selection is not None
    try:
        with answers.for_loss_alone(model, kwargs, answer_positions):
            output = original(**kwargs, **({} if selection is None else {SELECTION: selection}))
    finally:
        increments.call.given, increments.call.active, increments.call.queries = False, None, None
        if remember is not None:
            remember(output)
    return output


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
    ids, tokens = kwargs.get("input_ids"), _tokens(kwargs)
    if tokens is None:
        return None  # the model says what it misses
    if query is not None and instructions is not None:
        raise ValueError("query and instructions were both given; give one of them")
    request = Request(
        batch=len(tokens),
        input_ids=ids,
        attention_mask=kwargs.get("attention_mask"),
        labels=kwargs.get("labels"),
        pixel_values=kwargs.get("pixel_values"),
        instructions=instructions,
        query=query,
        cache=caches.given(kwargs),
        whole=not goes_on and _is_whole(kwargs),
        position_ids=kwargs.get("position_ids"),
        packed=kwargs.get("cu_seq_lens_q") is not None or kwargs.get("seq_idx") is not None,
        by_hand=goes_on and (caches.given(kwargs) is not None or bool(kwargs.get("use_cache"))),
    )
    return select(model.increments, request, functools.partial(pooled_image, model), goes_on, pending, within)
