"""How an op enters torch: schema, kernels behind `dispatch`, fake tensors, autocast, gradient; one call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C
from torch.autograd import forward_ad

from cllava_fast.ops import dispatch

NAMESPACE = "cllava_fast"
NO_SECOND_DERIVATIVE = (
    "second derivatives of this library's ops are not implemented. Call backward without create_graph=True."
)
DEVICES = ("cpu", "cuda")

_kernels: dict[Any, Callable[..., Any]] = {}  # of each op
_nothing_between_in: dict[tuple[int, bool], bool] = {}  # the dispatcher's keys, and whether gradients are on
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # what it registers lives as long as it does
_PLAIN = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)
_AUTOGRAD = (_C.DispatchKey.AutogradCPU, _C.DispatchKey.AutogradCUDA)
_BELOW_AUTOGRAD = (*_PLAIN, _C.DispatchKey.ADInplaceOrView)
_profiler_enabled, _has_torch_function = torch.autograd._profiler_enabled, torch.overrides.has_torch_function
_included, _excluded = _C._dispatch_tls_local_include_set, _C._dispatch_tls_local_exclude_set
_keys_of, _is_wrapped = _C._dispatch_keys, _C._functorch.is_functorch_wrapped_tensor
_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_PLAIN_TYPES = frozenset((type(None), bool, int, float, list))


def define(
    name: str,
    schema: str,
    *,
    site: Callable[..., dispatch.Site],
    fake: Callable[..., Any],
    autocast: tuple[str, ...] = (),
    pack: Callable[..., tuple[Any, ...]] | None = None,
) -> Any:
    """Define `cllava_fast::name` and return its overload.

    `site(*args)` says what the backend is chosen by; `fake(*args)` allocates the outputs; `autocast` names the
    arguments that an autocast region casts to its dtype (as it does for `F.linear`); the rest keep their own.
    `pack(*args)` turns the schema's arguments into what backends take, where that is not the same.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def kernel(*args: Any) -> Any:
        # A result must not remember that it is a view of some local tensor: users may not write into such a one, and
        # autograd adds up gradients in place only where it is none.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            packed = args if pack is None else pack(*args)
            return dispatch.choose(name, site(*args)).run(*packed)

    _kernels[op] = kernel
    torch.library.impl(qualified, DEVICES, kernel)
    torch.library.register_fake(qualified, fake)
    casts = frozenset(i for i, argument in enumerate(op._schema.arguments) if argument.name in autocast)
    for device in DEVICES:
        torch.library.impl(qualified, f"Autocast{device.upper()}", _under_autocast(op, device, casts))
    return op


def differentiable(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Registers an op's gradient, and returns the function that callers should call in the op's place.

    It does what `torch.library.register_autograd` makes of an op whose schema has no defaults. In eager mode on plain
    tensors, where the dispatcher would find autograd and the kernel and nothing else, it goes to these two straight,
    without boxing all arguments there and back.
    """
    kernel = _kernels[op]

    def below_autograd(keys: Any, args: tuple[Any, ...]) -> Any:
        if (keys & _C._after_ADInplaceOrView_keyset).highestPriorityTypeId() in _PLAIN:
            return kernel(*args)
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & _C._after_autograd_keyset, *args)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            inputs, keys = args[:-1], args[-1]
            output = kernel(*inputs) if keys is None else below_autograd(keys, inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = backward(ctx, *grads)
            return (*found, None) if isinstance(found, tuple) else (found, None)

    straight = apply_of(Differentiable)

    def autograd(keys: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if torch.is_grad_enabled() and _C._any_requires_grad(*args):
            return Differentiable.apply(*args, keys)
        return below_autograd(keys, args)

    def call(*args: Any) -> Any:
        if not _nothing_between(args):
            return op(*args)
        if torch.is_grad_enabled() and _C._any_requires_grad(*args):
            return straight(*args, None)
        return kernel(*args)

    Differentiable.__name__ = f"{op._opname}_backward"
    _library.impl(op._opname, autograd, "Autograd", with_keyset=True)
    return call


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its `apply` without the care for functorch, for which that goes through all arguments in Python: for callers who
    have made sure that no transform has a part in the call."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def _refuse_tangents(op: Any, args: tuple[Any, ...]) -> None:
    """Torch would take the derivative of an op that has no rule for it to be zero."""
    for argument in args:
        if isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative (jvp, jacfwd, dual numbers). Take the gradient by backward."
            )


def _nothing_between(args: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd has a part in a call: no compiler, mode, transform, autocast, profiler, subclass.

    In few calls, for the reason that `checks.once` has.
    """
    if torch.compiler.is_dynamo_compiling() or _profiler_enabled() or forward_ad._current_level >= 0:
        return False
    if _has_torch_function(args):
        return False
    for argument in args:
        kind = type(argument)
        if kind in _TENSORS:
            if _is_wrapped(argument):
                return False  # by a transform that is over
        elif kind not in _PLAIN_TYPES:
            return False
    keys = (_included() | _keys_of(args[0])) - _excluded()
    situation = keys.raw_repr(), torch.is_grad_enabled()
    known = _nothing_between_in.get(situation)
    if known is None:
        known = _nothing_between_in[situation] = _no_key_between(keys)
    return known


def _no_key_between(keys: Any) -> bool:
    keys = keys.remove(_C.DispatchKey.BackendSelect)  # is for factories alone
    if (keys & _C._after_ADInplaceOrView_keyset).highestPriorityTypeId() not in _PLAIN:
        return False
    highest = keys.highestPriorityTypeId()
    return highest in _AUTOGRAD or (highest in _BELOW_AUTOGRAD and not torch.is_grad_enabled())


def no_second_derivative(op: Any) -> Callable[..., Any]:
    """`differentiable` for a backward op, whose gradient is a clear error instead of a silently wrong zero."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{op} has no derivative of its own: {NO_SECOND_DERIVATIVE}")

    return differentiable(op, backward)


def _under_autocast(op: Any, device: str, casts: frozenset[int]) -> Callable[..., Any]:
    # Backward ops need this as well, with nothing to cast: a loss.backward() inside the region would otherwise have
    # the matmuls of the reference recast under our feet.
    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [_cast(argument, dtype) if i in casts else argument for i, argument in enumerate(args)]
        with torch.autocast(device, enabled=False):
            return op(*cast)

    return run


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    if not isinstance(argument, torch.Tensor) or argument.dtype == torch.float64 or not argument.is_floating_point():
        return argument
    return argument.to(dtype)
