"""How an op enters torch: schema, kernels behind `dispatch`, fake tensors, autocast, gradient; one call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C

from cllava_fast.ops import dispatch

NAMESPACE = "cllava_fast"
DEVICES = ("cpu", "cuda")

_kernels: dict[Any, Callable[..., Any]] = {}  # of each op
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # noqa: TOR901 (what it registers lives as long as it does)
_PLAIN = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)


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


def differentiable(op: Any, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
    """What `torch.library.register_autograd` does, for ops whose schema has no defaults, in half its time: where plain
    tensors have nothing between autograd and their device's kernel, the kernel is called rather than dispatched to."""
    kernel = _kernels[op]

    def below_autograd(keys: Any, args: tuple[Any, ...]) -> Any:
        if (keys & _C._after_ADInplaceOrView_keyset).highestPriorityTypeId() in _PLAIN:
            return kernel(*args)
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & _C._after_autograd_keyset, *args)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keys = args
            output = below_autograd(keys, tuple(inputs))
            if setup_context is not None:
                setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = backward(ctx, *grads)
            return (*found, None) if isinstance(found, tuple) else (found, None)

    def autograd(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and _C._any_requires_grad(*args):
            return Differentiable.apply(*args, keys)
        return below_autograd(keys, args)

    Differentiable.__name__ = f"{op._opname}_backward"
    _library.impl(op._opname, autograd, "Autograd", with_keyset=True)


def no_second_derivative(op: Any) -> None:
    """Make the gradient of a backward op a clear error instead of a silently wrong zero."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op} has no derivative of its own: second derivatives of this library's ops are not implemented. "
            "Call backward without create_graph=True."
        )

    differentiable(op, backward)


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
