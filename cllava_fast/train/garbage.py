"""Garbage collection while a stream is learned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_old_collected() -> Iterator[None]:
    """Keeps garbage collection to objects that are made meanwhile.

    A collection looks at every object, half a million behind ``import transformers``: a third of a second, which the
    Trainer asks for twice a task, and Python when it likes.
    """
    if gc.get_freeze_count():  # the program has done so itself, and what it keeps out is not ours to let in
        yield
        return
    gc.collect()  # garbage must not stay with what is in use
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
