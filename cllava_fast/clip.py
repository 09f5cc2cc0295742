"""DIKI as published (arXiv 2407.05342): prompts in both towers of a CLIP that tells classes apart, task after task.

With the prompts of task t, which act with strength lambda, an image's logits are

    logits_c = exp(s) cos(f_v(image; t, lambda), f_t(text_c; t, lambda)),    t = argmax_t log p_t(f_v(image))

for the texts of all classes c, CLIP's learned temperature s, and the Gaussian ``p_t`` of the frozen, L2-normalised
features of task t's training images. What a prompt does in an attention, and lambda, are in ``methods/diki.py``. The
public code has the commonest task and the mean lambda of a batch act on all its texts; here each image has its own.

This is for a CLIP alone. Where the language layers of a LLaVA are to be prompted, patch it with ``DikiConfig``.
"""

from __future__ import annotations

import os
from collections.abc import Sized
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPModel

from cllava_fast.methods import Selection, calibration, make_method
from cllava_fast.methods.diki import DikiConfig
from cllava_fast.model.card import clip_card
from cllava_fast.model.files import read_increments, write_increments
from cllava_fast.pool import Factors, LinearShape, OwnTensors, Pool
from cllava_fast.train.progress import stage

TOWERS = ("vision_model", "text_model")
Images = Dataset[tuple[Tensor, int]]  # ([3, H, W], class)


class PromptedClip(nn.Module):
    """A frozen CLIP with a pool of prompts, one row of ``Pool`` for each task and layer.

    Args:
        clip: is frozen and gets hooks, in place; outputs stay equal to the bit until a task is learned. ``remove``
            takes the hooks away again.
        config: ``layers`` of each tower get prompts; ``surrogate`` is not read, since the CLIP's own image features
            tell tasks apart.

    Raises:
        TypeError: ``clip`` is no ``transformers.CLIPModel``.
        ValueError: it has prompts already, or recomputes activations, which the hooks do not see.
    """

    def __init__(self, clip: CLIPModel, config: DikiConfig | None = None) -> None:
        super().__init__()
        if not isinstance(clip, CLIPModel):
            raise TypeError(f"clip is a {type(clip).__name__}; expected a transformers.CLIPModel")
        if getattr(clip, "has_prompts", False):
            raise ValueError("the CLIP has prompts already; remove() them before others")
        recomputes = ("activation_checkpointing", "gradient_checkpointing")  # its name in older transformers
        if any(getattr(module, name, False) for module in clip.modules() for name in recomputes):
            raise ValueError("the CLIP recomputes activations; gradient_checkpointing_disable() it first")
        self.config = replace(config or DikiConfig(), surrogate="image")
        self.method: Any = make_method(self.config)
        layers: list[tuple[str, Any]] = [
            (f"{tower}.encoder.layers.{number}.self_attn.out_proj", layer.self_attn)
            for tower in TOWERS
            for number, layer in enumerate(clip.get_submodule(f"{tower}.encoder.layers").children())
            if number < self.config.layers
        ]
        clip.requires_grad_(False)
        self.clip = clip.eval()
        self.pool = Pool(
            self.config.rank,
            cast(int, clip.projection_dim),
            {path: _shape(attention) for path, attention in layers},
            own_tensors=self._own_tensors,
        )
        clip.__dict__["has_prompts"] = True
        self._active: Selection | None = None
        self._queries: Tensor | None = None
        self._hooks: list[Any] = []
        for path, attention in layers:
            factors, head_dim = self.pool.factors(path), attention.head_dim
            self._hooks += [
                attention.q_proj.register_forward_hook(partial(self._keep_queries, head_dim)),
                attention.out_proj.register_forward_pre_hook(partial(self._branch, factors)),
            ]
        self.eval()

    def _own_tensors(self, shape: LinearShape | None, tasks: int, rows: int, block_rows: int) -> OwnTensors:
        return calibration.own_tensors(self.pool.key_dim, tasks) if shape is None and tasks else {}

    def train(self, mode: bool = True) -> PromptedClip:
        super().train(mode)
        self.clip.eval()  # what is frozen drops nothing
        return self

    def remove(self) -> CLIPModel:
        """Takes the hooks away and returns the CLIP as it came, still frozen."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.clip.__dict__["has_prompts"] = False
        return self.clip

    # -- in the towers -------------------------------------------------------------------------------------------

    def _keep_queries(self, head_dim: int, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._active is not None:
            self._queries = output.unflatten(-1, (-1, head_dim))  # [B, S, H, head_dim]

    def _branch(self, factors: Factors, module: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        if self._active is None:
            return None
        queries, self._queries = self._queries, None
        return cast(Tensor, self.method.read(self._active, factors, args[0], queries))

    @contextmanager
    def _acting(self, selection: Selection | None) -> Any:
        self._active = selection
        try:
            yield
        finally:
            self._active = self._queries = None

    def _images(self, pixel_values: Tensor, selection: Selection | None) -> Tensor:
        """Unit features ``[B, D]``."""
        with self._acting(selection):
            return F.normalize(self.clip.get_image_features(pixel_values).pooler_output, dim=-1)

    def _texts(self, input_ids: Tensor, attention_mask: Tensor | None, selection: Selection | None) -> Tensor:
        """Unit features ``[C, D]``."""
        with self._acting(selection and selection.expand(len(input_ids))):
            features = self.clip.get_text_features(input_ids, attention_mask=attention_mask)
            return F.normalize(features.pooler_output, dim=-1)

    # -- what is asked -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def query(self, pixel_values: Tensor) -> Tensor:
        """``[B, D]`` float32: the frozen CLIP's image features, of length 1, which tell tasks apart."""
        return F.normalize(self._images(pixel_values, None).double(), dim=-1).float()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, C]`` of images ``[B, 3, H, W]`` for classes whose texts are ``input_ids [C, L]``.

        At inference each image finds its own task, and all texts are encoded with the prompts of each. In training
        mode, while a task is being learned, that task's prompts act on all.
        """
        scale = self.clip.logit_scale.exp()
        if self.training and self.pool.block_rows:
            learning = self.method.select(self.pool, pixel_values.new_zeros(1, 1), 1, True)
            images = self._images(pixel_values, learning.expand(len(pixel_values)))
            return scale * images @ self._texts(input_ids, attention_mask, learning).t()
        query = self.query(pixel_values).to(self.pool.keys.device)
        selection = self.method.select(self.pool, query, 1, False)
        images = self._images(pixel_values, selection)
        if selection is None:
            return scale * images @ self._texts(input_ids, attention_mask, None).t()
        logits = []
        for number, image in enumerate(images):  # one image's texts at a time are a batch of C
            own = Selection(past=selection.past.map(lambda pair, n=number: pair[n : n + 1]))
            logits.append(scale * self._texts(input_ids, attention_mask, own) @ image)
        return torch.stack(logits)

    # -- tasks ---------------------------------------------------------------------------------------------------

    def learn(
        self,
        name: str,
        images: Images,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        epochs: int = 10,
        batch_size: int = 128,
        learning_rate: float = 5.0,
        seed: int = 0,
        progress: bool = True,
    ) -> list[float]:
        """Learns a task by cross-entropy over its classes, with SGD on a cosine schedule: the source's defaults.

        Args:
            name: the task's name, not used before.
            images: a dataset of ``([3, H, W], class)``, as torchvision's are.
            input_ids, attention_mask: ``[C, L]``, the texts of the task's classes in order.
            seed: of the prompts at birth and of the images' order.

        Returns:
            The loss of each step.

        Raises:
            ValueError: no image, a class without a text, or a name that is taken. Nothing is changed then.
            FloatingPointError: the loss is NaN or Inf. Nothing of the task is kept then.
        """
        size = len(cast(Sized, images))
        if not size:
            raise ValueError(f"task {name!r} has no image")
        if name in self.pool.task_names:
            raise ValueError(f"task {name!r} was learned already; learned: {self.pool.task_names}")
        device = self.clip.device
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        order = torch.Generator().manual_seed(seed)
        in_order = DataLoader(images, batch_size)
        queries = torch.cat([self.query(self._pixels(pixels)).cpu() for pixels, _ in in_order])
        self.method.open_task(self.pool, queries, torch.Generator().manual_seed(seed))
        try:
            losses = self._tune(
                name, DataLoader(images, batch_size, shuffle=True, generator=order), input_ids, attention_mask,
                epochs, learning_rate, progress,
            )  # fmt: skip
            self.method.close_task(self.pool, name, queries, 1)
            calibration.remember(self.pool, queries)
        except BaseException:
            # what is committed stays usable, and half a task never is
            self.pool.drop_block()
            raise
        finally:
            self.eval()
        return losses

    def _tune(
        self, name: str, batches: DataLoader[Any], input_ids: Tensor, attention_mask: Tensor | None,
        epochs: int, learning_rate: float, progress: bool,
    ) -> list[float]:  # fmt: skip
        self.pool.train_keys(False)
        prompts = [parameter for parameter in self.pool.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(prompts, lr=learning_rate)
        steps = epochs * len(batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        self.train()
        losses = []
        with stage(f"{name}: tune", steps, progress) as advance:
            for _ in range(epochs):
                for pixels, classes in batches:
                    if not 0 <= int(classes.min()) <= int(classes.max()) < len(input_ids):
                        raise ValueError(
                            f"task {name!r} has classes {int(classes.min())} to {int(classes.max())}; expected 0 to "
                            f"{len(input_ids) - 1}, one text each"
                        )
                    logits = self(self._pixels(pixels), input_ids, attention_mask)
                    loss = F.cross_entropy(logits.float(), classes.to(logits.device))
                    losses.append(loss.item())
                    if not torch.isfinite(loss):
                        raise FloatingPointError(f"task {name!r}: loss is {losses[-1]} at step {len(losses)}")
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    advance(f"loss {losses[-1]:.3f}")
        return losses

    @torch.no_grad()
    def accuracy(
        self, images: Images, input_ids: Tensor, attention_mask: Tensor | None = None, batch_size: int = 128
    ) -> float:
        """Share of images whose class has the highest logit, each with the task that it finds itself."""
        self.eval()
        device, right = self.clip.device, 0
        for pixels, classes in DataLoader(images, batch_size):
            mask = None if attention_mask is None else attention_mask.to(device)
            found = self(self._pixels(pixels), input_ids.to(device), mask).argmax(1).cpu()
            right += int((found == classes).sum())
        return right / len(cast(Sized, images))

    def _pixels(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.clip.device, self.clip.dtype)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the prompts and what tasks remember of their images, never the CLIP; as ``cf.save_pretrained``."""
        return write_increments(self.clip, self.pool, self.config, None, Path(path), card=clip_card)

    @classmethod
    def load(cls, clip: CLIPModel, path: str | os.PathLike[str]) -> PromptedClip:
        """The prompts that ``save`` wrote, in the CLIP that they were learned in. Outputs are bit-equal.

        Raises what ``cf.load_pretrained`` does; the CLIP has no hooks then.
        """
        saved, state = read_increments(clip, Path(path))
        if not isinstance(saved.config, DikiConfig):
            raise ValueError(f"{path} holds increments of {saved.config.method}; expected those of PromptedClip.save")
        prompted = cls(clip, saved.config)
        try:
            prompted.pool.load_state(state, saved.tasks)
        except BaseException:
            prompted.remove()
            raise
        return prompted


def _shape(attention: Any) -> LinearShape:
    weight = attention.out_proj.weight
    return LinearShape(weight.shape[1], weight.shape[1], weight.dtype, weight.device)
