"""``patch`` and ``unpatch``: one transformers model learns to carry increments, in place, and back again.

Nothing is copied or subclassed: the methods of ``calls.py`` are put before those of this one instance.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from cllava_fast.methods import IncrementConfig, MethodConfig
from cllava_fast.model import calls, paths
from cllava_fast.model.increments import Increments
from cllava_fast.model.processors import check_processor, find_processor, prepared_otherwise


@dataclass
class _Patch:
    """What unpatch needs to restore the model that came in, the names of its forwards' parameters, and where each
    adapted linear is: the module that holds it, and its name there."""

    parameters: list[str]
    parameters_of_backbone: list[str]
    places: list[tuple[nn.Module, str]]
    requires_grad: dict[str, bool]
    hooks: list[Any]
    kept_from_repacking: list[Any]
    unwrapped_forward: Any  # what accelerate, which wrapped the model before, would put in the place of ours


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
        model: a transformers model of a class in ``paths.BASES``: LLaVA, its successors, Qwen-VL, InternVL, or a
            plain language model. It may be quantised, spread over devices or offloaded; it is never moved.
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
    check_processor(model, processor)
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
    parameters, of_backbone = (
        list(inspect.signature(type(module).forward).parameters)[1:]
        for module in (model, model.model)  # without self
    )
    places = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in linears]
    unwrapped = model.__dict__.pop("_original_forward", None)
    record = _Patch(parameters, of_backbone, places, requires_grad, [], paths.repacked_on_cpu(model), unwrapped)
    model.requires_grad_(False)
    for path, linear in linears.items():
        linear.__dict__["_adapter"] = calls.Adapter(increments, increments.pool.factors(path))
    for attention in attentions:
        receive = functools.partial(calls.receive_selection, increments)
        record.hooks.append(attention.register_forward_pre_hook(receive, with_kwargs=True))
    for attention, projection in zip(readers, projections, strict=True):
        catch = functools.partial(calls.catch_queries, increments, attention.head_dim)
        record.hooks.append(projection.register_forward_hook(catch))
    for linear in record.kept_from_repacking:
        linear.support_avx512bf16_for_cpu = False
    model.model.__dict__["_patched_model"] = model
    for module, name, function in _shadowed(model, linears):
        _shadow(module, name, function)
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
    shadowed = list(_shadowed(model, linears))
    for module, name, _ in shadowed:
        # what is wrapped around a method may carry its attributes
        if not isinstance(module.__dict__.get(name), MethodType) or not hasattr(module.__dict__[name], "_is_over"):
            raise ValueError(f"{name} of {type(module).__name__} was replaced after patch(); undo that first")
    increments.swaps += 2
    for module, name, _ in shadowed:
        del module.__dict__[name]
    for module, _, _ in shadowed:
        module.__dict__.update(module.__dict__.pop("_under", {}))
    for linear in linears.values():
        del linear.__dict__["_adapter"]
    del model.model.__dict__["_patched_model"]
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


def _shadowed(model: Any, linears: dict[str, nn.Module]) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Each method that is shadowed, and by what."""
    for name, function in calls.OF_THE_MODEL.items():
        yield model, name, function
    yield model.model, "forward", calls.backbone_forward
    if paths.base_of(model).takes_features:
        yield model.model, "get_image_features", calls.get_image_features
    for linear in linears.values():
        yield linear, "forward", calls.linear_forward


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
