"""DIKI as published (arXiv 2407.05342): prompts in both towers of a CLIP that tells classes apart, task after task.

With the prompts of task t, which act with strength lambda, an image's logits are

    logits_c = exp(s) cos(f_v(image; t, lambda), f_t(text_c; t, lambda)),    t = argmax_t log p_t(f_v(image))

for the texts of all classes c, CLIP's learned temperature s, and the Gaussian ``p_t`` of the frozen, L2-normalised
features of task t's training images, mean and full covariance. What a prompt does in an attention is in
``methods/diki.py``; lambda is ``sigmoid(log p_t / D - 1)``, and 1 in training. In the public code
the commonest task of a batch acts on all of it, on the texts with the mean lambda; here each image has its own.

This is for a CLIP alone. Where the language layers of a LLaVA are to be prompted, patch it with ``DikiConfig``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPModel

from cllava_fast.methods import Pairs, Selection, make_method
from cllava_fast.methods.diki import DikiConfig
from cllava_fast.model.card import clip_card
from cllava_fast.model.files import read_increments, write_increments
from cllava_fast.model.increments import Call, linear_shape
from cllava_fast.pool import Factors, LinearShape, OwnTensors, Pool
from cllava_fast.train.progress import stage

TOWERS = ("vision_model", "text_model")
MEAN, FACTOR = "image_mean", "image_factor"  # of a task's Gaussian; the factor is Cholesky's, of the covariance
NOISE = 1e-7  # variance that every direction has beside what was seen, as in the public code
Images = Dataset[tuple[Tensor, int]]  # ([3, H, W], class)


class PromptedClip(nn.Module):
    """A frozen CLIP with a pool of prompts, one row of ``Pool`` for each task and layer.

    Args:
        clip: is frozen, put into evaluation mode and given hooks, in place; what it computes by itself stays equal to
            the bit. The pool is its ``increments``, and goes with it to other devices and dtypes. ``remove`` takes both
            away.
        config: ``layers`` of each tower get prompts. Two fields are not read: ``surrogate``, since the CLIP's own image
            features tell tasks apart, and ``strength``, which is the paper's.

    Raises:
        TypeError: ``clip`` is no ``transformers.CLIPModel``.
        ValueError: it has prompts already, or recomputes activations, which the hooks do not see.
    """

    def __init__(self, clip: CLIPModel, config: DikiConfig | None = None) -> None:
        super().__init__()
        if not isinstance(clip, CLIPModel):
            raise TypeError(f"clip is a {type(clip).__name__}; expected a transformers.CLIPModel")
        if hasattr(clip, "increments"):
            raise ValueError("the CLIP has prompts already; remove() them before others")
        if any(getattr(module, "gradient_checkpointing", False) for module in clip.modules()):
            raise ValueError("the CLIP recomputes activations; gradient_checkpointing_disable() it first")
        self.config = replace(config or DikiConfig(), surrogate="image", strength="likelihood")
        self.method: Any = make_method(self.config)
        layers: list[tuple[str, Any]] = [
            (f"{tower}.encoder.layers.{number}.self_attn", layer.self_attn)
            for tower in TOWERS
            for number, layer in enumerate(clip.get_submodule(f"{tower}.encoder.layers").children())
            if number < self.config.layers
        ]
        clip.requires_grad_(False)
        self.clip = clip.eval()
        shapes = {
            f"{path}.out_proj": self.method.row_shape(linear_shape(attention.out_proj, clip))
            for path, attention in layers
        }
        width = cast(int, clip.projection_dim)
        self.pool = clip.increments = Pool(self.config.rank, width, shapes, own_tensors=self._own_tensors)
        self._call = Call()
        self._hooks: list[Any] = []
        for path, attention in layers:
            factors = self.pool.factors(f"{path}.out_proj")
            self._hooks += [
                attention.q_proj.register_forward_hook(partial(self._keep_queries, attention.head_dim)),
                attention.out_proj.register_forward_pre_hook(partial(self._branch, factors)),
            ]
        self.eval()

    def _own_tensors(self, shape: LinearShape | None, tasks: int, rows: int, block_rows: int) -> OwnTensors:
        if shape is not None or not tasks:
            return {}
        width = self.pool.key_dim
        return {MEAN: ([tasks, width], torch.float32), FACTOR: ([tasks, width, width], torch.float32)}

    def train(self, mode: bool = True) -> PromptedClip:
        super().train(mode)
        self.clip.eval()  # what is frozen drops nothing
        return self

    def remove(self) -> CLIPModel:
        """Takes hooks and pool away and returns the CLIP, still frozen. This object can answer nothing any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        del self.clip.increments
        return self.clip

    # -- in the towers -------------------------------------------------------------------------------------------

    def _keep_queries(self, head_dim: int, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._call.active is not None:
            self._call.queries = output.unflatten(-1, (-1, head_dim))  # [B, S, H, head_dim]

    def _branch(self, factors: Factors, module: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        active, queries = self._call.active, self._call.queries
        if active is None:
            return None
        self._call.queries = None
        return cast(Tensor, self.method.read(active, factors, args[0], queries))

    @contextmanager
    def _acting(self, selection: Selection | None) -> Iterator[None]:
        if not self._hooks:
            raise RuntimeError("the prompts were taken out of the CLIP by remove()")
        self._call.active = selection
        try:
            yield
        finally:
            self._call.active = self._call.queries = None

    def _images(self, pixel_values: Tensor, selection: Selection | None) -> Tensor:
        """Unit features ``[B, D]``."""
        with self._acting(selection):
            pixels = pixel_values.to(self.clip.device, self.clip.dtype)
            return _unit(self.clip.get_image_features(pixels).pooler_output)

    def _texts(self, input_ids: Tensor, attention_mask: Tensor | None, selection: Selection | None) -> Tensor:
        """Unit features ``[C, D]``."""
        with self._acting(selection and selection.expand(len(input_ids))):
            return _unit(self.clip.get_text_features(input_ids, attention_mask=attention_mask).pooler_output)

    # -- what is asked -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def query(self, pixel_values: Tensor) -> Tensor:
        """``[B, D]`` float32: the frozen CLIP's image features, of length 1, which tell tasks apart."""
        return self._images(pixel_values, None).float()

    def select(self, query: Tensor) -> Selection | None:
        """The likeliest task of each image and how strongly it acts, from ``query [B, D]``; None before the first."""
        if not self.pool.num_tasks:
            return None
        mean, factor = (getattr(self.pool, name).double() for name in (MEAN, FACTOR))  # [T, D], [T, D, D]
        gaussians = MultivariateNormal(mean, scale_tril=factor, validate_args=False)
        likelihood = gaussians.log_prob(query.to(mean.device).double()[:, None]) / query.shape[1]  # [B, T]
        best, task = likelihood.max(1, keepdim=True)
        strength = torch.sigmoid(best - 1).float()
        return Selection(past=Pairs(task, strength), index=task, weight=torch.ones_like(strength))

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, C]``, float32, of images ``[B, 3, H, W]`` for classes whose texts are ``input_ids [C, L]``.

        At inference each image finds its own task, and all texts are encoded with the prompts of each. In training
        mode, while a task is being learned, that task's prompts act on all.
        """
        device = self.clip.device
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        scale = self.clip.logit_scale.float().exp()
        learning = self.training and self.pool.block_rows > 0
        if learning:
            selection = self.method.select(self.pool, self.pool.keys.new_zeros(1, 1), 1, True)
        else:
            selection = self.select(self.query(pixel_values))
        images = self._images(pixel_values, selection and selection.expand(len(pixel_values)))
        if selection is None or learning:
            return scale * images @ self._texts(input_ids, attention_mask, selection).t()
        logits = images.new_empty(len(images), len(input_ids))
        for number, image in enumerate(images):  # the texts of one image at a time
            own = Selection(past=selection.past.map(lambda pair, n=number: pair[n : n + 1]))
            logits[number] = scale * self._texts(input_ids, attention_mask, own) @ image
        return logits

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
            ValueError: no image, an image of NaN, a class without a text, no epoch, or a name that is taken. Nothing of
                the task is kept then.
            FloatingPointError: the loss is NaN or Inf, likewise.
        """
        if name in self.pool.task_names:
            raise ValueError(f"task {name!r} was learned already; learned: {self.pool.task_names}")
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; expected at least 1")
        queries = []
        for pixels, classes in _batches(images, batch_size):
            _check_classes(classes, input_ids)
            queries.append(self.query(pixels).cpu())
        query = torch.cat(queries)  # [n, D]
        if not torch.isfinite(query).all():
            raise ValueError(f"task {name!r} has images whose features are NaN or Inf; are their pixels?")
        gaussian = _gaussian(query)
        self.method.open_task(self.pool, query, torch.Generator().manual_seed(seed))
        try:
            order = torch.Generator().manual_seed(seed)
            shuffled = DataLoader(images, batch_size, shuffle=True, generator=order)
            losses = self._tune(name, shuffled, input_ids, attention_mask, epochs, learning_rate, progress)
            self.method.close_task(self.pool, name, query, 1)
            for field, value in gaussian.items():  # nothing that may fail lies between
                self.pool.keep_for_task(field, value)
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
        optimizer = torch.optim.SGD(self.pool.parameters(), lr=learning_rate)
        steps = epochs * len(batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        self.train()
        losses = []
        with stage(f"{name}: tune", steps, progress) as advance:
            for _ in range(epochs):
                for pixels, classes in batches:
                    logits = self(pixels, input_ids, attention_mask)
                    loss = F.cross_entropy(logits, classes.to(logits.device))
                    losses.append(loss.item())
                    if not math.isfinite(losses[-1]):
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
        """Share of images whose class has the highest logit, each with the task that it finds itself.

        Raises ValueError for no image, or a class without a text.
        """
        self.eval()
        right = 0
        for pixels, classes in _batches(images, batch_size):
            _check_classes(classes, input_ids)
            right += int((self(pixels, input_ids, attention_mask).argmax(1).cpu() == classes).sum())
        return right / len(cast(Sized, images))

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the prompts and what tasks remember of their images, never the CLIP; as ``cf.save_pretrained``."""
        return write_increments(self.clip, self.pool, self.config, None, Path(path), clip_card)

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


def _unit(features: Tensor) -> Tensor:
    # in half precision, cosines of many classes would tie
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _batches(images: Images, batch_size: int) -> DataLoader[Any]:
    if not len(cast(Sized, images)):
        raise ValueError("there is no image in the dataset; expected at least one")
    return DataLoader(images, batch_size)


def _check_classes(classes: Tensor, input_ids: Tensor) -> None:
    if not 0 <= int(classes.min()) <= int(classes.max()) < len(input_ids):
        raise ValueError(
            f"the dataset has classes {int(classes.min())} to {int(classes.max())}; expected 0 to "
            f"{len(input_ids) - 1}, one text each"
        )


def _gaussian(query: Tensor) -> dict[str, Tensor]:
    """Mean, and Cholesky factor of the covariance, of ``query [n, D]``, for one task each."""
    exact = query.double()
    off = exact - exact.mean(0)
    covariance = off.t() @ off / max(1, len(exact) - 1)
    covariance.diagonal().add_(NOISE)
    return {MEAN: exact.mean(0)[None].float(), FACTOR: torch.linalg.cholesky(covariance)[None].float()}
