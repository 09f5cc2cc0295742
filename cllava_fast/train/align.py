"""Alignment: the first stage of a task, in which the new block's keys move to the task's instructions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllava_fast import ops
from cllava_fast.pool import Pool
from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.progress import stage


def align_keys(
    pool: Pool, queries: Tensor, top_m: int, groups: int, args: ContinualArguments, seed: int, title: str
) -> float:
    """Trains the open block's keys, and nothing else, on ``-mean(similarity of e with its M selected keys)``.

    Args:
        queries: ``[n, D]``, the task's training instructions.
        seed: of the order of batches.

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
    losses: list[float] = []
    with stage(title, steps, args.progress) as advance:
        for _ in range(steps):
            if not len(order):
                order = torch.randperm(len(queries), generator=generator)
            batch, order = order[: args.align_batch_size], order[args.align_batch_size :]
            _, _, similarity = ops.select(
                queries[batch.to(keys.device)], keys, top_m, groups=groups, check_values=False
            )
            loss = -similarity.mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([keys], args.align_max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"{title}: the loss is {losses[-1]} at step {len(losses)}")
            advance(f"loss {losses[-1]:.4f}")
    recent = losses[-per_epoch:]
    return sum(recent) / max(len(recent), 1)
