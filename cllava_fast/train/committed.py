"""Committed rows never change: sums over all their bits, taken after a task and compared after the next."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cllava_fast.pool import Pool

CHUNK = 1 << 20  # numbers that are weighted at once


class CommittedRows:
    """Guards the rows that a pool has committed.

    ``check`` compares them to what they were at the last ``note``, on the device that they are on; it reads each once.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.note()

    def note(self) -> None:
        """From now on the rows that are committed must stay as they are."""
        self._rows, self._tasks = self.pool.num_rows, self.pool.num_tasks
        self._sums = self._read()

    def check(self, title: str) -> None:
        """Raises RuntimeError, naming the tensors, if a row has changed."""
        now = self._read()
        changed = sorted(name for name, value in self._sums.items() if now.get(name) != value)
        if changed:
            raise RuntimeError(
                f"{title}: {len(changed)} tensors of committed rows have changed, which nothing may do: {changed[:4]}; "
                "this task was not saved, and what was saved before is whole: resume from there"
            )

    def _read(self) -> dict[str, int]:
        sums = {name: checksum(part) for name, part in self.pool.committed(self._rows, self._tasks).items()}
        device = self.pool.row_task.device
        return dict(zip(sums, torch.stack([value.to(device) for value in sums.values()]).tolist(), strict=True))


def checksum(tensor: Tensor) -> Tensor:
    """int64 ``[]`` of a tensor's bits and their places, on its device; any single number that changes changes it.

    A polynomial in the chunks' sums of weighted bits, modulo 2^64. Weights are odd, so no single difference is lost.
    """
    flat = tensor.detach().contiguous().flatten()
    # half as wide as the sums, where a flipped sign of every number would cancel out
    bits = flat.view(torch.int16 if flat.numel() * flat.element_size() % 4 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    weights = _weights(tensor.device)
    for start in range(0, bits.numel(), CHUNK):
        chunk = bits[start : start + CHUNK]
        total = total * 6364136223846793005 + (chunk * weights[: len(chunk)]).sum()
    return total


@cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(1 << 62), 1 << 62, (CHUNK,), generator=generator)
    return (2 * drawn + 1).to(device)
