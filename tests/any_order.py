"""A pytest plugin, ``-p tests.any_order``: tests in a random order, always the same. What breaks a part of them is then
found soon, wherever they stand."""

from __future__ import annotations

from random import Random

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    Random(0).shuffle(items)
