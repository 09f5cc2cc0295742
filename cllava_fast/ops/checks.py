"""Checks of arguments that the ops share: each names the argument, what came, what was expected, what to do.

Everything here is plain Python on shapes and dtypes, so that torch.compile folds it away; the few checks that read
values ask `can_read` first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

REMEMBERED = 4096  # calls that passed, of each check


def once(check: Callable[..., None]) -> Callable[..., None]:
    """A check of shapes, dtypes and devices alone need not look again at a call like one that has passed.

    Its Python costs most where other work has pushed it out of the caches: between large products, that is always.
    """
    passed: set[Hashable] = set()

    @wraps(check)
    def run(*arguments: Any) -> None:
        like = None if torch.compiler.is_dynamo_compiling() else _like(arguments)
        if like is None or like not in passed:
            check(*arguments)
            if like is not None:
                if len(passed) >= REMEMBERED:
                    passed.clear()
                passed.add(like)

    return run


_any_autocast = torch._C._is_any_autocast_enabled
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_BY_VALUE = frozenset((type(None), bool, int, str))


def _like(arguments: tuple[Any, ...]) -> Hashable:
    """What such a check sees of them; None where that cannot be told."""
    seen: list[Any] = []
    autocast = None
    for argument in arguments:
        kind = type(argument)
        if kind in _PLAIN:
            seen += (argument.shape, argument.dtype, argument.device, argument.requires_grad)
            if autocast is None:
                autocast = _any_autocast() and under_autocast(argument)
        elif kind in _BY_VALUE:
            seen.append(argument)
        elif kind is float:
            seen.append(kind)
        elif isinstance(argument, tuple) and (of_parts := _like(argument)) is not None:
            seen.append(of_parts)
        else:
            return None
    seen.append(autocast)
    return tuple(seen)


def tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}.")


def shape(name: str, tensor: Tensor, pattern: str, sizes: dict[str, int]) -> None:
    """`tensor` must look like `pattern` ("B S d_in"); `sizes` holds what earlier arguments said, and learns more."""
    tensors(**{name: tensor})
    names, found = pattern.split(), tensor.shape
    if len(found) != len(names):
        raise ValueError(
            f"{name}: expected {len(names)} dimensions [{', '.join(names)}], got shape {tuple(found)}. "
            f"Reshape {name} before the call."
        )
    for size_name, size in zip(names, found, strict=True):
        if sizes.setdefault(size_name, size) != size:
            raise ValueError(
                f"{name}: expected [{', '.join(names)}] with {size_name} = {sizes[size_name]} as in the arguments "
                f"before it, got shape {tuple(found)}. Give all arguments the same {size_name}."
            )


def scale(value: Any) -> None:
    if not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise ValueError(
            f"scale: expected a number, got {type(value).__name__}; it has no gradient. "
            "What is trained belongs into the coefficients."
        )


def count(name: str, value: Any) -> None:
    if not isinstance(value, torch.SymInt) and not hasattr(value, "__index__"):
        raise ValueError(f"{name}: expected a whole number, got {value!r}.")


def device(reference: Tensor, **others: Tensor | None) -> None:
    wanted = reference.device
    for name, tensor in others.items():
        if tensor is None:
            continue
        tensors(**{name: tensor})
        if tensor.device != wanted:
            raise ValueError(
                f"{name}: is on {tensor.device}, expected {wanted} like the first argument. "
                f"Move it with {name}.to({str(wanted)!r})."
            )


def floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}. Cast it with {name}.float().")


def integer(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name}: expected torch.int64, got {tensor.dtype}. Cast it with {name}.long().")


def full_precision(exact: bool, **tensors: Tensor) -> None:
    """Coefficients stay float32 whatever the model runs in; float64 only where the computation is float64 (`exact`)."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 and not (exact and tensor.dtype == torch.float64):
            wanted = "torch.float32 or torch.float64" if exact else "torch.float32"
            raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype}. Keep it in float32 or cast it back.")


def same_dtype(name: str, tensor: Tensor, like: str, reference: Tensor) -> None:
    if tensor.dtype != reference.dtype and not under_autocast(reference):
        raise ValueError(
            f"{name}: has dtype {tensor.dtype} but {like} has {reference.dtype}. "
            f"Cast one of them, or run under torch.autocast."
        )


def exact_dtype(*tensors: Tensor) -> torch.dtype:
    """What numbers are added up in: float64 where one of them is, else float32."""
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in tensors] else torch.float32


def under_autocast(tensor: Tensor) -> bool:
    """Whether a region casts what runs on the tensor's device; of meta tensors torch would not say."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def captured() -> bool:
    """Whether a compiler or a CUDA graph records what runs. Results then lie in memory that the next replay uses again,
    and may not be kept."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def can_read(tensor: Tensor, cuda: bool) -> bool:
    """Whether a check may look at values: never while tracing or capturing; on a GPU only if asked to (it waits)."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or torch._is_functional_tensor(tensor):
        return False
    if tensor.device.type == "cpu":
        return True
    return cuda and tensor.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def within(name: str, tensor: Tensor, limit: int, limit_name: str) -> None:
    """Every entry of an integer tensor is in [0, limit). Reads values, of a CPU's tensors."""
    if tensor.numel() == 0 or not can_read(tensor, cuda=False):
        return
    if tensor.numel() <= 4096:  # a list takes fewer calls, which is what costs between large products
        values = tensor.flatten().tolist()
        low, high = min(values), max(values)
    else:
        low, high = (bound.item() for bound in tensor.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(
            f"{name}: expected entries in [0, {limit_name}) = [0, {limit}), got {low}..{high}. "
            f"Check where {name} was built; pad with any valid entry and coefficient 0."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, without a mask of all: on a CPU that takes tens of times as long."""
    if tensor.numel() == 0:
        return True
    least, most = torch.aminmax(tensor)  # NaN if there is one
    return bool(torch.isfinite(least) & torch.isfinite(most))


def finite(name: str, tensor: Tensor) -> None:
    """No NaN and no infinity. Reads values."""
    if not is_finite(tensor):
        bad = ~torch.isfinite(tensor)
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: expected finite values, got {int(bad.sum())} NaN or infinite of {tensor.numel()}, "
            f"first at {first}. Check what computed {name}."
        )
