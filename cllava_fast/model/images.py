"""A model's images: refused where it takes none, pooled, and told apart by their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cllava_fast.model import paths


def check_images(model: Any, kwargs: dict[str, Any], features: Tensor | None) -> None:
    base = paths.base_of(model)
    pixels = [name for name, value in kwargs.items() if name.startswith("pixel_values") and value is not None]
    if base.vision_tower is None and (pixels or features is not None):
        given = pixels[0] if pixels else "image_features"
        raise ValueError(f"{given} was given, but a {type(model).__name__} takes no images: it has no vision tower")
    if features is None:
        return
    if not base.takes_features:
        raise ValueError(f"a {type(model).__name__} takes no image_features; give pixel_values")
    if "pixel_values" in pixels:
        raise ValueError("pixel_values and image_features were both given; give one of them")
    width = model.config.get_text_config().hidden_size
    if features.dim() != 3 or features.shape[2] != width:
        raise ValueError(f"image_features is {list(features.shape)}; expected [images, tokens, {width}]")


def pooled_image(model: Any, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Tensor:
    """Mean of the frozen vision tower's last hidden state, ``[images, d]``, of ``[images, 3, H, W]``.

    Of an image in views, ``[images, views, 3, H, W]``, the first is looked at: the whole image, made small. Where the
    patches of all images are one sequence, ``image_grid_thw [images, 3]`` says how many each has.
    """
    if image_grid_thw is not None:
        tower, pixels = paths.vision_tower(model), to_vision_tower(model, pixel_values)
        hidden = tower(pixels, grid_thw=image_grid_thw.to(pixels.device)).last_hidden_state  # [patches, d]
        return torch.stack([image.mean(0) for image in hidden.split(image_grid_thw.prod(1).tolist())])
    if pixel_values.dim() == 5:
        pixel_values = pixel_values[:, 0]
    hidden = paths.vision_tower(model)(to_vision_tower(model, pixel_values)).last_hidden_state
    if len(hidden) != len(pixel_values):
        raise ValueError(f"the vision tower returned {list(hidden.shape)}; expected one row for each of the images")
    return hidden.mean(1)


def to_vision_tower(model: Any, pixel_values: Tensor) -> Tensor:
    """Pixels in the tower's dtype, and where it computes; an offloaded one fetches them itself."""
    tower = paths.vision_tower(model)
    pixels = pixel_values.to(tower.dtype)
    return pixels if tower.device.type == "meta" else pixels.to(tower.device)


def images_per_sample(tokens: Tensor, images: int, equal: bool) -> Tensor:
    """``[B]``: runs of image tokens, or, where images stand side by side, equal shares of them.

    Args:
        tokens: ``[B, S]`` bool, where an image token stands.
        images: how many came with the batch.
        equal: all images have equally many tokens.

    Raises:
        ValueError: shares may be wrong.
    """
    before = functional.pad(tokens[:, :-1], (1, 0))
    runs = (tokens & ~before).sum(1)
    if int(runs.sum()) == images:
        return runs
    shares = tokens.sum(1) * images / int(tokens.sum())
    clear = equal or int((shares > 0).sum()) == 1
    if not clear or not torch.equal(shares, shares.round()):
        raise ValueError(
            f"{images} images came with {int(tokens.sum())} image tokens in input_ids, and which are whose is not "
            "clear; pass query= [B, D]"
        )
    return shares.long()
