"""Numbers that go wrong in tuning: NaN, Inf, samples without a label, a loss that leaves for good.

What depends on values stays on the device until the next reading, so that no step waits for one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cllava_fast import distributed
from cllava_fast.data.stream import Sample

Policy = Literal["stop", "skip"]

START_STEPS = 10  # their mean loss is where a task began
# a task diverges once so many steps in a row lie so far above it, in times and in nats
DIVERGED_STEPS, DIVERGED_TIMES, DIVERGED_NATS = 20, 3.0, 3.0
NAMED = 16  # sample ids in a message


class Samples(NamedTuple):
    """Who is in a batch, by id, and who of them has no label at all."""

    ids: list[str]
    unlabelled: list[str]


@dataclass
class BadNumbers:
    """What was left out of a task's tuning, and when it diverged: steps from 1, sample ids."""

    skipped_steps: list[int] = field(default_factory=list)
    unlabelled_samples: list[str] = field(default_factory=list)
    diverged_at: int | None = None

    def __bool__(self) -> bool:
        return bool(self.skipped_steps or self.unlabelled_samples or self.diverged_at)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        parts = []
        if self.skipped_steps:
            parts.append(f"{len(self.skipped_steps)} step(s) skipped for NaN or Inf: {_some(self.skipped_steps)}")
        if self.unlabelled_samples:
            parts.append(f"{len(self.unlabelled_samples)} sample(s) without a label: {_some(self.unlabelled_samples)}")
        if self.diverged_at:
            parts.append(f"diverged at step {self.diverged_at}")
        return "; ".join(parts)


class _Batch(NamedTuple):
    ids: list[str]
    loss: Tensor  # its share of the step's


class _Step(NamedTuple):
    number: int
    batches: list[_Batch]
    loss: Tensor  # over all processes
    bad: Tensor  # bool


class NumberWatch:
    """Watches the steps of one task.

    Args:
        title: begins every message.
        policy: "stop" raises; "skip" leaves a step's update out and counts it, on every process the same.
        read_every: steps between two readings.
    """

    def __init__(self, title: str, policy: Policy, read_every: int) -> None:
        self.title, self.policy, self.read_every = title, policy, read_every
        self.found = BadNumbers()
        self._batches: list[_Batch] = []
        self._unread: list[_Step] = []
        self._shown: Tensor | None = None
        self._first: list[float] = []
        self._above = 0

    def after_batch(self, step: int, samples: Samples, loss: Tensor) -> Tensor:
        """Takes a batch's loss once its backward pass is done; returns what the log may show of it.

        Raises:
            ValueError: a sample has no label, and the policy is to stop.
        """
        if samples.unlabelled:
            self._without_label(step, samples.unlabelled)
        # a compiled model's may lie where a CUDA graph writes the next one
        self._batches.append(_Batch(samples.ids, loss.clone()))
        if self.policy == "stop":
            return loss
        # one NaN would hide all losses of its logging interval
        last = loss.new_zeros(()) if self._shown is None else self._shown.to(loss)
        self._shown = torch.where(torch.isfinite(loss), loss, last)
        return self._shown

    def end_step(self, step: int, optimizer: Any, scaler: Any | None) -> None:
        """Judges the step whose gradients are complete, before they are clipped.

        Args:
            optimizer: torch's; the fused ones skip a step on the device, others need an answer at once.
            scaler: float16's gradient scaler, which looks at gradients itself, or None.

        Raises:
            FloatingPointError: at a reading, for a step since the last one, and the policy is to stop.
        """
        batches, self._batches = self._batches, []
        loss = torch.stack([batch.loss for batch in batches]).sum()
        distributed.average(loss)
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        good = torch.isfinite(loss)
        if scaler is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
            good = good & torch.isfinite(norm).to(good.device)
        if self.policy == "skip" and scaler is None:
            _skip(~good, trained, optimizer)
        self._unread.append(_Step(step, batches, loss, ~good))
        if step % self.read_every == 0:
            self.read()

    def read(self) -> None:
        """Reads what has gathered since the last time: the one place that waits for the device."""
        steps, self._unread = self._unread, []
        if not steps:
            return
        values = torch.stack([torch.stack((step.bad.float(), step.loss.float())) for step in steps]).tolist()
        for step, (bad, loss) in zip(steps, values, strict=True):
            if bad:
                self._bad_step(step, loss)
            else:
                self._check_divergence(step.number, loss)

    def finish(self) -> BadNumbers:
        """The last reading; warns of what was skipped. Raises as ``end_step`` does."""
        self.read()
        self.found.unlabelled_samples = list(dict.fromkeys(_of_all(self.found.unlabelled_samples)))
        if self.found:
            warnings.warn(f"{self.title}: {self.found}", stacklevel=3)
        return self.found

    def state(self) -> dict[str, Any]:
        """What a resumed task goes on with, after a reading. Raises as ``end_step`` does."""
        self.read()
        found = {**self.found.to_dict(), "unlabelled_samples": _of_all(self.found.unlabelled_samples)}
        return {"found": found, "first": self._first, "above": self._above, "shown": self._shown}

    def load_state(self, state: dict[str, Any]) -> None:
        self.found = BadNumbers(**state["found"])
        self._first, self._above, self._shown = list(state["first"]), state["above"], state["shown"]

    def _without_label(self, step: int, ids: list[str]) -> None:
        if self.policy == "stop":
            raise ValueError(
                f"{self.title}: nothing is to be learned from {_some(ids)} in step {step}: all labels are ignored; "
                'mend or remove the sample, or set on_bad_numbers="skip" to leave such samples out'
            )
        self.found.unlabelled_samples += [name for name in ids if name not in self.found.unlabelled_samples]

    def _bad_step(self, step: _Step, loss: float) -> None:
        if self.policy == "skip":
            self.found.skipped_steps.append(step.number)
            return
        losses = torch.stack([batch.loss for batch in step.batches]).isfinite().tolist()
        guilty = _of_all([batch.ids for batch, fine in zip(step.batches, losses, strict=True) if not fine])
        guilty = guilty or _of_all([batch.ids for batch in step.batches])
        what = "the gradient holds NaN or Inf" if math.isfinite(loss) else f"the loss is {loss}"
        raise FloatingPointError(
            f"{self.title}: {what} at step {step.number}, samples {_some([name for ids in guilty for name in ids])}; "
            'look at them, lower learning_rate, or set on_bad_numbers="skip" to leave such steps out'
        )

    def _check_divergence(self, step: int, loss: float) -> None:
        if len(self._first) < START_STEPS:
            self._first.append(loss)
            return
        start = sum(self._first) / len(self._first)
        limit = max(DIVERGED_TIMES * start, start + DIVERGED_NATS)
        self._above = self._above + 1 if loss > limit else 0
        if self._above < DIVERGED_STEPS or self.found.diverged_at:
            return
        if self.policy == "stop":
            raise FloatingPointError(
                f"{self.title}: diverges: the loss was above {limit:.3g} for {self._above} steps, up to step {step}, "
                f'and began at {start:.3g}; lower learning_rate, or set on_bad_numbers="skip" to go on all the same'
            )
        self.found.diverged_at = step


def check_queries(queries: Tensor, samples: Sequence[Sample], title: str) -> None:
    """Raises FloatingPointError, naming samples, for ``queries [n, D]`` that hold NaN or Inf."""
    fine = torch.isfinite(queries).all(1)
    if fine.all():
        return
    names = [sample.id or f"number {i}" for i, sample in enumerate(samples) if not fine[i]]
    raise FloatingPointError(f"{title}: queries hold NaN or Inf, of samples {_some(names)}; check the surrogate")


def _skip(bad: Tensor, trained: Sequence[Tensor], optimizer: Any) -> None:
    """Keeps the coming ``optimizer.step()`` from changing anything where ``bad``."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # torch's own way for gradient scalers: the kernel leaves parameters, moments and count of steps as they are
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
    elif bad.item():
        for parameter in trained:
            parameter.grad = None


def _of_all(own: list[Any]) -> list[Any]:
    """The lists of all processes, one after another."""
    return [one for each in distributed.gather(own) for one in each]


def _some(names: Sequence[Any]) -> str:
    more = len(names) - NAMED
    return ", ".join(map(str, names[:NAMED])) + (f" and {more} more" if more > 0 else "")
