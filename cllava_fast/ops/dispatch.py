"""Which backend runs an op, and the reason in words.

A backend is a name and one function per op that it implements; an op's folder registers it with one line:

    dispatch.register("reference", {"inject": reference.inject, "inject_add": reference.inject_add})

For each call the first registered backend of `ORDER` that is usable on this machine and accepts the call's device,
dtype and sizes is taken. `CLLAVA_BACKEND=name`, read at import, or `with backend("name"):` asks for one by name; if
that one cannot run, the call fails with the reason: there is no silent fall-back. Several names, "cuda,triton", ask for
the first of them that can run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from functools import lru_cache
from typing import Any, NamedTuple

import torch

# "cuda" and "cpu" are this library's own native code; "triton" its kernels; "reference" is plain PyTorch.
ORDER = ("cuda", "triton", "cpu", "reference")
AUTO = "auto"
VARIABLE = "CLLAVA_BACKEND"
# What kernels of this library are made for.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOWEST_CAPABILITY = (8, 0)
NOT_REGISTERED = "not registered"  # how a reason begins where there is no such kernel


class BackendError(RuntimeError):
    """The backend asked for does not exist, is not built, or cannot run this call."""


class Site(NamedTuple):
    """What the choice depends on: where the call's tensors live, the dtype it computes in, its sizes."""

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]


class Choice(NamedTuple):
    backend: str
    run: Callable[..., Any]
    reason: str


class Row(NamedTuple):
    """One line of `table()`."""

    op: str
    backend: str
    available: bool
    reason: str


Accepts = Callable[[str, Site, bool], str | None]  # see `register`


class _Kernel(NamedTuple):
    run: Callable[..., Any]
    usable: Callable[[], str | None]
    accepts: Accepts


_kernels: dict[str, dict[str, _Kernel]] = {}  # op -> backend -> kernel
# Each says why a backend that would volunteer for a call leaves it to another one, or None: see `tuned.py`.
_advice: list[Callable[[str, str, Site], str | None]] = []
# Process-wide rather than per thread or context: autograd runs backward ops on threads of its own.
_asked: list[str] = [os.environ.get(VARIABLE) or AUTO]


def above(site: Site, limits: Mapping[str, int]) -> str | None:
    """What a backend of limited sizes says of a site that exceeds them; None where it does not."""
    for name, size in site.sizes:
        if size > limits.get(name, size):
            return f"{name} = {size} is above {limits[name]}"
    return None


def other_dtype(dtype: torch.dtype) -> str | None:
    """What kernels say of a dtype that they are not made for; None of another."""
    return None if dtype in DTYPES else f"{dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"


def too_old(*devices: torch.device) -> str | None:
    """What kernels say of GPUs that they are not made for, of all there are by default; None if they are for one."""
    capability = max(map(torch.cuda.get_device_capability, devices or range(torch.cuda.device_count())))
    return None if capability >= LOWEST_CAPABILITY else f"compute capability {capability} is below {LOWEST_CAPABILITY}"


def register(
    backend: str,
    kernels: Mapping[str, Callable[..., Any]],
    usable: Callable[[], str | None] = lambda: None,
    accepts: Accepts = lambda op, site, asked: None,
) -> None:
    """Add a backend for some ops.

    `usable()` and `accepts(op, site, asked)` return None for yes, or why not in words; `asked` says that the backend
    was asked for by name, so that one may run whatever it can, but volunteer only where it wins.
    """
    _known(backend)
    for op, run in kernels.items():
        if backend in _kernels.setdefault(op, {}):
            raise BackendError(f"backend {backend!r} is already registered for {op!r}")
        _kernels[op][backend] = _Kernel(run, usable, accepts)
    forget()


def advise(advice: Callable[[str, str, Site], str | None]) -> None:
    """`advice(op, backend, site)` is heard before a backend volunteers, not where one was asked for by name."""
    _advice.append(advice)
    forget()


def forget() -> None:
    """Choices are made anew."""
    _choose.cache_clear()


def choose(op: str, site: Site) -> Choice:
    """The backend that runs `op` at `site`. Cached: a repeated site costs a dictionary look-up."""
    return _choose(op, site, _asked[-1])


def wanted() -> str:
    """The backend asked for, by the innermost block or else the environment; `AUTO` if by none."""
    return _asked[-1]


@lru_cache(maxsize=8192)
def _choose(op: str, site: Site, asked: str) -> Choice:
    if asked != AUTO:
        return _asked_for(op, site, asked)
    refusals: list[str] = []
    for name in ORDER:
        refusal = _refusal(op, name, site) or _advised(op, name, site)
        if refusal is None:
            reason = f"first that can run ({'; '.join(refusals)})" if refusals else "first in order"
            return Choice(name, _kernels[op][name].run, reason)
        refusals.append(f"{name}: {refusal}")
    raise BackendError(f"{op}: no backend can run on {site.device} with {site.dtype}: {'; '.join(refusals)}")


def _asked_for(op: str, site: Site, asked: str) -> Choice:
    refusals = []
    for name in _names(asked):
        refusal = _refusal(op, name, site, asked=True)
        if refusal is None:
            return Choice(name, _kernels[op][name].run, "asked for by name")
        refusals.append(f"backend {name!r} was asked for but cannot run: {refusal}")
    raise BackendError(
        f"{op}: {'; '.join(refusals)}. "
        f"Ask for another one, or start without {VARIABLE} / leave ops.backend(...) to choose automatically."
    )


def _names(asked: str) -> list[str]:
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        _known(name)
    return names


def _refusal(op: str, backend: str, site: Site | None, asked: bool = False) -> str | None:
    kernel = _kernels.get(op, {}).get(backend)
    if kernel is None:
        return f"{NOT_REGISTERED} for {op}"
    refusal = kernel.usable()
    if refusal is None and site is not None:
        refusal = kernel.accepts(op, site, asked)
    return refusal


def _advised(op: str, backend: str, site: Site) -> str | None:
    return next(filter(None, (advice(op, backend, site) for advice in _advice)), None)


def can_run(op: str, backend: str, site: Site) -> bool:
    """Whether a backend runs a call if it is asked for by name."""
    return _refusal(op, backend, site, asked=True) is None


def volunteers(op: str, site: Site) -> dict[str, Callable[..., Any]]:
    """All that would run a call if those before them could not, in order, whatever advice there is."""
    return {name: _kernels[op][name].run for name in ORDER if _refusal(op, name, site) is None}


def ops() -> list[str]:
    return sorted(_kernels)


def _known(backend: str) -> None:
    if backend not in ORDER:
        raise BackendError(f"unknown backend {backend!r}: expected one of {', '.join(ORDER)}")


class backend(ContextDecorator):
    """Run every op of this process on backend `name` inside the block; `"auto"` restores the automatic choice.

    Several names, such as `"cuda,triton"`, mean the first of them that can run a call.

    Takes precedence over `CLLAVA_BACKEND`. Raises at once if no op has that backend, and at the call if this op or
    this shape has not. A backward pass obeys the block that it runs in, not the one its forward ran in. Around a
    compiled function it holds for the ops inside; within one it breaks the graph, which `fullgraph=True` refuses.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @torch.compiler.disable  # traced, the block would be over before the compiled ops run
    def __enter__(self) -> None:
        for one in [] if self.name == AUTO else _names(self.name):
            if not any(one in kernels for kernels in _kernels.values()):
                registered = sorted({other for kernels in _kernels.values() for other in kernels})
                raise BackendError(f"backend {one!r} is not registered in this installation: there is {registered}")
        _asked.append(self.name)

    @torch.compiler.disable
    def __exit__(self, *error: object) -> None:
        _asked.pop()


def table() -> list[Row]:
    """Every op x backend, whether it can run on this machine at all, and why (not)."""
    rows = []
    for op in ops():
        for name in ORDER:
            refusal = _refusal(op, name, None)
            reason = refusal or ("plain PyTorch, any device and dtype" if name == "reference" else "usable")
            rows.append(Row(op, name, refusal is None, reason))
    return rows
