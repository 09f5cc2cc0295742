"""Processes that open images and make batches: workers of torch's ``DataLoader``."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

Batch = TypeVar("Batch")
Made = TypeVar("Made")


def made_of(batches: Iterable[Batch], make: Callable[[Batch], Made], workers: int) -> Iterator[Made]:
    """``make(batch)`` of each batch, in order, made by ``workers`` other processes ahead of time; by none, when it is
    asked for. What ``make`` raises is raised here."""
    loader: Any = DataLoader(
        _ByBatch(make),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(torch.get_default_device()),  # not the caller's, of which a number would be drawn
    )
    for made in loader:
        if isinstance(made, Exception):
            raise made
        yield made


class _ByBatch(Dataset[Any]):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, batch: Any) -> Any:
        try:
            return self.make(batch)
        except Exception as error:
            if get_worker_info() is None:
                raise
            error.add_note(traceback.format_exc())
            with suppress(Exception):  # in its own words, if it can be sent; torch buries them in the traceback
                return ForkingPickler.loads(ForkingPickler.dumps(error))
            raise


@functools.cache  # in each process once
def outlive_signals(*_: Any) -> None:
    """Called in a worker. Ctrl-C and SIGTERM, which a terminal and Slurm send to every process, are for the main one:
    it finishes its step, for which it may wait for this one's batch. The main one's own SIGTERM ends the worker; where
    a system does not say who sends a signal, as macOS does not, anyone's does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    if main is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of all threads that begin from here on
        threading.Thread(target=_end_with, args=(main.pid,), daemon=True).start()


def _end_with(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)  # as torch's own handler does
