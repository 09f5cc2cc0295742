"""The three ops under every method: `select` picks pool rows per sample, `aggregate` adds what earlier tasks left
behind, `inject` applies the chosen rows to a frozen linear without ever building a sample's dense offset.

`select_aggregate` is the first two in one call. `merge` does build that offset, once, for inference where one selection
serves all.
"""

from cllava_fast.ops import dispatch
from cllava_fast.ops.aggregate import aggregate, mix_factors
from cllava_fast.ops.dispatch import BackendError, backend
from cllava_fast.ops.inject import Past, inject, inject_add
from cllava_fast.ops.merge import merge
from cllava_fast.ops.select import select
from cllava_fast.ops.select_aggregate import select_aggregate

__all__ = [
    "BackendError",
    "Past",
    "aggregate",
    "backend",
    "dispatch",
    "inject",
    "inject_add",
    "merge",
    "mix_factors",
    "select",
    "select_aggregate",
]
