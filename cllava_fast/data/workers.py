"""Processes that open images and make batches: workers of torch's ``DataLoader``."""

from __future__ import annotations

import functools
import signal
from typing import Any


@functools.cache  # in each process once
def outlive_signals(*_: Any) -> None:
    """Called in a worker. Ctrl-C and SIGTERM, which a terminal and Slurm send to every process, are for the main one:
    it finishes its step, for which it may wait for this one's batch. A second SIGTERM ends the worker, as torch may
    want of one that hangs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
