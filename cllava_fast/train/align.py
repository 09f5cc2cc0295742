"""Alignment: the first stage of a task, in which the new block's keys move to the task's instructions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cllava_fast.pool import Pool
from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.checkpoint import TaskSaver
from cllava_fast.train.progress import stage

READ_EVERY = 10  # steps


def align_keys(
    pool: Pool,
    queries: Tensor,
    groups: int,
    args: ContinualArguments,
    seed: int,
    title: str,
    loss_of: Callable[[Pool, Tensor, int, torch.Generator], Tensor],
    saver: TaskSaver | None = None,
) -> float:
    """Trains the open block's keys, and nothing else.

    Args:
        queries: ``[n, D]``, the task's training instructions.
        seed: of the order of batches.
        loss_of: ``Method.alignment_loss``.
        saver: keeps the stage on disk, and says from which step it goes on.

    Returns:
        The last epoch's mean loss.

    Raises:
        FloatingPointError: the loss is NaN or Inf; the pool's committed rows are untouched.
    """
    keys = pool.block_keys
    assert keys is not None
    pool.train_keys(True)
    queries = queries.to(keys.device)
    per_epoch = math.ceil(len(queries) / args.align_batch_size)
    steps = round(args.align_epochs * per_epoch) if args.align_steps is None else args.align_steps
    decay_every = per_epoch if args.align_steps is None else max(1, math.ceil(steps / 3))
    optimizer = torch.optim.AdamW([keys], lr=args.align_learning_rate, weight_decay=args.align_weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=decay_every, gamma=0.1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    losses: list[Tensor] = []  # on the device; read every READ_EVERY steps, since reading waits for it
    note, done = "", 0
    if saver is not None and (saved := saver.saved("align")):
        done, losses = saved["step"], list(saved["losses"].to(keys.device))
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        saver.restore_random_state()
    with stage(title, steps, args.progress) as advance:
        for step in range(1, steps + 1):
            if not len(order):
                order = torch.randperm(len(queries), generator=generator).to(keys.device)
            batch, order = order[: args.align_batch_size], order[args.align_batch_size :]
            if step <= done:
                with torch.no_grad():
                    loss_of(pool, queries[batch], groups, generator)  # which may draw
                advance(note)
                continue
            loss = loss_of(pool, queries[batch], groups, generator)
            optimizer.zero_grad()
            loss.backward()
            if args.align_max_grad_norm:
                torch.nn.utils.clip_grad_norm_([keys], args.align_max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if step % READ_EVERY == 0 or step == steps:
                note = f"loss {_check(losses[-READ_EVERY:], step, title):.4f}"
            advance(note)
            if saver is not None:
                saver.step("align", step, lambda: {
                    "losses": torch.stack(losses), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                })  # fmt: skip
    recent = losses[-per_epoch:]
    return torch.stack(recent).mean().item() if recent else 0.0


def _check(losses: list[Tensor], step: int, title: str) -> float:
    """The last of the losses that end at ``step``."""
    values = torch.stack(losses).tolist()
    for number, value in enumerate(values, start=step - len(values) + 1):
        if not math.isfinite(value):
            raise FloatingPointError(f"{title}: the loss is {value} at step {number}")
    return values[-1]
