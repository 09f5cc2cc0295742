"""``share``: another model over the weights of one, which takes no memory of its own but for its increments."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cllava_fast.model import paths


@torch.inference_mode(False)  # parameters and rows made in inference mode could not be trained later
def share(model: Any) -> Any:
    """A copy of a model, patched or not, over the very weights of ``model``, which stay in memory once.

    Each has increments of its own: load others into the copy, merge or unpatch one of the two, and the other stays as
    it is. Moving or casting one (``to``) gives it weights of its own.

    Raises:
        TypeError: no model that can be patched.
        ValueError: weights are offloaded or quantised.
    """
    paths.check_supported(model)
    shared: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.startswith("increments."):
            continue
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded, and what offloads it would be copied; share a model in memory")
        if type(tensor) not in (nn.Parameter, nn.Buffer, Tensor):
            raise ValueError(
                f"{name} is a {type(tensor).__name__}; a quantised model keeps more than weights: load it twice"
            )
        # an object of its own, which can be merged into, frozen and cast
        own = nn.Parameter(tensor.detach(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else tensor
        shared[id(tensor)] = own
    if hasattr(model, "increments"):
        shared.update({id(weight): weight for weight in model.increments.pristine.values()})
    twin = copy.deepcopy(model, shared)
    if hasattr(twin, "increments"):
        twin.increments.swaps = 0
    return twin
