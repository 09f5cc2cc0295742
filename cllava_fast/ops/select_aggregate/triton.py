"""select_aggregate in Triton: the kernels of one op after those of the other."""

from __future__ import annotations

from cllava_fast.ops.aggregate.triton import aggregate
from cllava_fast.ops.select.triton import select
from cllava_fast.ops.select_aggregate.reference import one_after_the_other

select_aggregate = one_after_the_other(select, aggregate)
