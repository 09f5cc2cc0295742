"""What the processes of one run need from each other. With one process every function here is free of cost.

``accelerate launch`` and ``torchrun`` start the processes, accelerate connects them, and transformers' ``Trainer``
averages gradients. What is left: work that one process does for all, answers that are gathered, and errors, which must
end every process instead of leaving the others waiting.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

FAILURE = "cllava_fast/failure"  # the first failure of a run, in the store that all processes share
_failed = False  # whether a run on several processes has: that store cannot connect them for another


def start() -> None:
    """Connects the processes that a launcher started; does nothing without one."""
    if _failed:
        raise RuntimeError("a run on several processes has failed in this script; start the processes again")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _state()


def finish() -> None:
    """Parts from the other processes: their connections must not last until the interpreter ends."""
    if count() > 1:
        dist.destroy_process_group()


def device() -> torch.device:
    """Where this process computes, as accelerate decides it."""
    return _state().device


def _state() -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # asked anew each time: TrainingArguments resets it
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def on_main(work: Callable[[], T]) -> T:
    """Lets the main process work while the others wait; all return what it returned, or raise what it raised."""
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main():
        try:
            outcome[0] = work()
        except Exception as error:
            failure = error
            outcome[1] = _portable(error)
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(value: T) -> list[T]:
    """Every process's value, in the order of processes."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def highest(value: int) -> int:
    """The largest of all processes' values. It travels between CPUs: no process waits for its GPU."""
    if count() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_cpu_group(dist.group.WORLD))
    return int(tensor)


@functools.lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    return world if "gloo" in dist.get_backend(world) else dist.new_group(backend="gloo")


def from_main(tensor: Tensor) -> Tensor:
    """The main process's tensor, bit by bit; the others' must have its shape and dtype."""
    if count() == 1:
        return tensor
    sent = tensor.to(device()).contiguous()
    dist.broadcast(sent, src=0)
    return sent.to(tensor.device)


def average(tensor: Tensor | None) -> None:
    """Puts the mean over all processes in the place of ``tensor``."""
    if count() > 1 and tensor is not None:
        dist.all_reduce(tensor)
        tensor.div_(count())


def uses_fsdp() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of the parameters, so that all must call the model together."""
    from torch.distributed.tensor import DTensor

    return count() > 1 and any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_equal(value: Any, what: str) -> None:
    """Raises ValueError on every process if ``value`` is not the same on all of them."""
    values = gather(value)
    strangers = [number for number, other in enumerate(values) if other != values[0]]
    if strangers:
        raise ValueError(f"{what} of process {strangers[0]} is not that of process 0; every process needs the same")


@contextmanager
def failing_together() -> Iterator[None]:
    """An exception on one process ends all: the others leave what they wait for and raise, with its message.

    How soon depends on the backend: gloo notices at once that a process has left; with NCCL, the launcher ends the
    others.
    """
    start()  # refuses a second try
    if count() == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    me, processes = rank(), count()
    try:
        yield
    except Exception as error:
        own = f"{type(error).__name__}: {error}"
        try:
            first = store.compare_set(FAILURE, "", f"{me} {own}").decode()
        except Exception:  # the store went with the process that kept it
            raise error from None
        leave()
        if me == 0:
            # it may keep the store, which the others still have to read
            with suppress(Exception):
                store.wait([f"{FAILURE}/{other}" for other in range(1, processes)], timedelta(seconds=10))
        else:
            store.set(f"{FAILURE}/{me}", "seen")
        number, _, message = first.partition(" ")
        if int(number) == me or message == own:
            raise
        raise RuntimeError(f"process {number} failed: {message}") from error


def leave() -> None:
    """Ends this process's part, so that no other waits for it."""
    from accelerate.state import AcceleratorState

    global _failed
    _failed = True
    if dist.is_initialized():
        with suppress(Exception):
            dist.distributed_c10d._get_default_group().abort()
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def _portable(error: Exception) -> Exception:
    """The error itself where it can travel, otherwise its words."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
