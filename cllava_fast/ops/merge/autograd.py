"""merge in torch.library: schema and fake tensor; it is for inference and has no gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cllava_fast.ops import dispatch, library


def _site(weight: Tensor, A: Tensor, B: Tensor, index: Tensor, *_: Any) -> dispatch.Site:
    sizes = zip(("N", "R", "d_in", "d_out", "P"), (*A.shape, B.shape[2], index.shape[0]), strict=True)
    return dispatch.Site(weight.device, weight.dtype, tuple(sizes))


def _fake(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape)


MERGE = library.define(
    "merge",
    "(Tensor weight, Tensor A, Tensor B, Tensor index, Tensor coefficient, float scale) -> Tensor",
    site=_site,
    fake=_fake,
)
