"""What was computed from texts, kept for those that come again."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Generic, TypeVar

from torch import Tensor

CACHE_BYTES = 256 << 20
V = TypeVar("V", str, Tensor)


class RecentTexts(Generic[V]):
    """A text or a tensor for each text; those that were not asked for longest go first, above ``CACHE_BYTES`` bytes.

    Several threads take a lock of their own around it.
    """

    def __init__(self) -> None:
        self._values: OrderedDict[str, V] = OrderedDict()
        self._bytes = 0

    def get(self, text: str) -> V | None:
        if text in self._values:
            self._values.move_to_end(text)
        return self._values.get(text)

    def keep(self, text: str, value: V) -> V:
        """The value from now on: the one that was there before, if there was one."""
        found = self.get(text)
        if found is not None:
            return found
        self._values[text] = value
        self._bytes += _size(text, value)
        while self._bytes > CACHE_BYTES:
            self._bytes -= _size(*self._values.popitem(last=False))
        return value


def _size(text: str, value: str | Tensor) -> int:
    own = value.untyped_storage().nbytes() if isinstance(value, Tensor) else 0
    return sys.getsizeof(text) + sys.getsizeof(value) + own
