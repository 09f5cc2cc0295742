"""The pool of increments: what is frozen, what trains, and how it grows by one block a task.

A row is a key ``[D]`` and, for every adapted linear, a factor pair ``A [R, d_in]``, ``B [R, d_out]`` whose increment is
``B^T A`` (rank R). Rows of finished tasks are buffers: they have no gradient and no optimizer state. The block of the
task being learned is a set of parameters; ``commit`` moves it to the buffers for good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cllava_fast import lowrank
from cllava_fast.ops.checks import is_finite

PER_TASK = ("mean_A", "mean_B", "context_error")  # buffers with one entry for each task
PER_ROW = ("A", "B", "row_task", "row_mean")
STANDARD = ("keys", "context", *PER_TASK, *PER_ROW)  # all that is no method's own


@dataclass(frozen=True)
class LinearShape:
    """Width of one adapted linear, and where its rows live."""

    d_in: int
    d_out: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


def _device_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``Module.to``, ``.half()`` and the like, less its change of dtype."""

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return apply


class _Keeper(nn.Module):
    """A module that methods may keep tensors of their own in."""

    def keep(self, name: str, tensor: Tensor) -> None:
        """Adds or replaces a tensor. It trains, in float32, if its name begins with ``block_``, until the block is
        committed or dropped; any other is frozen, and stays as long as ``Pool.own_tensors`` names it."""
        if name.startswith("block_"):
            setattr(self, name, nn.Parameter(tensor.detach().float()))
        elif name in self._buffers:
            setattr(self, name, tensor.detach())
        else:
            self.register_buffer(name, tensor.detach())

    def drop_block(self) -> None:
        for name in list(self._parameters):
            setattr(self, name, None)


class Factors(_Keeper):
    """The rows of one adapted linear.

    Attributes:
        A, B: ``[N, R, d_in]`` and ``[N, R, d_out]``, the committed rows, in the dtype of the linear's weight.
        mean_A, mean_B: ``[T, k, d_in]`` and ``[T, k, d_out]``, each committed task's mean increment shortened to rank
            k, in the same dtype; only where ``context_rank`` (k) is not 0.
        block_A, block_B: ``[n, R, d_in]`` and ``[n, R, d_out]`` float32 parameters of the open block, or None.
        shares_A: all rows have one A: ``A`` and ``block_A`` are ``[1, R, d_in]``.
    """

    A: Tensor
    B: Tensor
    mean_A: Tensor
    mean_B: Tensor
    block_A: nn.Parameter | None
    block_B: nn.Parameter | None

    def __init__(self, rank: int, shape: LinearShape, shares_A: bool = False, context_rank: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.rank, self.context_rank = rank, context_rank
        self.shares_A = shares_A
        self.register_buffer("A", torch.empty(0, rank, shape.d_in, dtype=shape.dtype, device=shape.device))
        self.register_buffer("B", torch.empty(0, rank, shape.d_out, dtype=shape.dtype, device=shape.device))
        if context_rank:
            self.register_buffer("mean_A", self.A.new_empty(0, context_rank, shape.d_in))
            self.register_buffer("mean_B", self.B.new_empty(0, context_rank, shape.d_out))
        # registered in this order, in which an optimizer's saved state counts them
        self.register_parameter("block_A", None)
        self.register_parameter("block_B", None)

    def open_block(self, rows: int, a_std: float, generator: torch.Generator) -> None:
        # drawn on the CPU, so that a seed gives the same rows on every device
        a_rows = 1 if self.shares_A else rows
        a = torch.randn(a_rows, self.rank, self.shape.d_in, generator=generator, dtype=torch.float32) * a_std
        self.block_A = nn.Parameter(a.to(self.A.device))
        # B is zero at birth: a new row changes nothing
        self.block_B = nn.Parameter(
            torch.zeros(rows, self.rank, self.shape.d_out, device=self.B.device, dtype=torch.float32)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factors:
        # committed rows follow the model's dtype; what trains, and what methods keep, does not
        move, rows = _device_only(fn), [t for name, t in self.named_buffers() if name in ("A", "B", "mean_A", "mean_B")]
        return super()._apply(lambda t: fn(t) if any(t is row for row in rows) else move(t), recurse)

    def reopen(self) -> None:
        """Opens a block that is a copy of the committed rows."""
        self.block_A, self.block_B = nn.Parameter(self.A.float().clone()), nn.Parameter(self.B.float().clone())

    def as_committed(self) -> tuple[Tensor, Tensor]:
        """The block's rows in the dtype of committed ones, where large numbers may be Inf."""
        assert self.block_A is not None and self.block_B is not None
        return self.block_A.detach().to(self.A.dtype), self.block_B.detach().to(self.B.dtype)

    def commit(self, replace: bool = False) -> None:
        """The block's rows follow the committed ones, or replace them."""
        A, B = self.as_committed()
        self.A = A if replace or self.shares_A else torch.cat([self.A, A])
        self.B = B if replace else torch.cat([self.B, B])
        self.drop_block()

    def short_mean(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean increment of the block's rows as they will be committed, weighted by ``weight [n]`` and shortened:
        its factors, and its relative error."""
        A, B = (factor.double() for factor in self.as_committed())
        A = A.flatten(0, 1)  # [n * R, d_in]
        B = (B * weight.to(B)[:, None, None]).flatten(0, 1)
        short = [factor.to(self.A.dtype) for factor in lowrank.truncate(A, B, self.context_rank)[:2]]
        return short[0], short[1], lowrank.relative_error(short[0], short[1], A, B)


OwnTensors = dict[str, tuple[list[int], torch.dtype]]


class Pool(_Keeper):
    """All rows of all tasks, the keys that find them, and what tasks learned about each other.

    Args:
        rank: R, columns of one row's factors.
        key_dim: D, width of keys and queries; 0 for methods that select without keys.
        shapes: the adapted linears by their path in the model.
        shares_A: the rows of each linear have one A.
        own_tensors: shapes and dtypes of what a method keeps beside rows (``Method.own_tensors``).
        shared_rows: every task trains the same rows: a block is a copy of the committed rows, and its commit replaces
            them. Keys are those of tasks, one each.
        context_rank: rank that the mean increment of each committed task is shortened to, below ``rank`` times the
            rows of a block; 0 keeps none.

    Attributes:
        keys: ``[N, D]`` float32, keys of committed rows; ``[T, D]``, of committed tasks, with ``shared_rows``.
        row_task: ``[N]`` int64, the task that each row belongs to (0-based, ascending); 0 with ``shared_rows``.
        row_mean: ``[N]`` float32, ``z``: mean selection weight of the row over its own task's training samples.
        context: ``[T, T]`` float32, ``w``: row = the task that looks back, column = the earlier task.
        context_error: ``[T]`` float32, relative error (Frobenius) of each task's shortened mean, the largest of all
            linears; only where ``context_rank`` is not 0.
        block_keys, block_context: the open block's keys ``[n, D]`` and its ``w[t, :]`` ``[t]``, parameters, or None.
        task_names: names of the committed tasks.
    """

    keys: Tensor
    row_task: Tensor
    row_mean: Tensor
    context: Tensor
    context_error: Tensor
    block_keys: nn.Parameter | None
    block_context: nn.Parameter | None

    def __init__(
        self,
        rank: int,
        key_dim: int,
        shapes: Mapping[str, LinearShape],
        shares_A: bool = False,
        own_tensors: Callable[[LinearShape | None, int, int, int], OwnTensors] = lambda *sizes: {},
        shared_rows: bool = False,
        context_rank: int = 0,
    ) -> None:
        super().__init__()
        if not shapes:
            raise ValueError("the pool needs at least one adapted linear; none matched the targets")
        self.rank = rank
        self.key_dim = key_dim
        self.shares_A = shares_A
        self.own_tensors = own_tensors
        self.shared_rows = shared_rows
        self.context_rank = context_rank
        self.task_names: list[str] = []
        # state-dict keys may not hold dots
        layers = {
            path.replace(".", "/"): Factors(rank, shape, shares_A, context_rank) for path, shape in shapes.items()
        }
        self.layers: Mapping[str, Factors] = nn.ModuleDict(layers)  # type: ignore[assignment]
        device = next(iter(shapes.values())).device
        self.register_buffer("keys", torch.empty(0, key_dim, device=device, dtype=torch.float32))
        self.register_buffer("row_task", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("row_mean", torch.empty(0, device=device, dtype=torch.float32))
        self.register_buffer("context", torch.empty(0, 0, device=device, dtype=torch.float32))
        if context_rank:
            self.register_buffer("context_error", torch.empty(0, device=device, dtype=torch.float32))
        self.register_parameter("block_keys", None)
        self.register_parameter("block_context", None)
        self._block_rows = 0
        self.loads = 0  # how often numbers came to mean other rows, as by `load_state`; a commit leaves them theirs
        self.last_block_start = 0  # rows from here on belong to the newest committed task and are nobody's context

    def factors(self, path: str) -> Factors:
        return self.layers[path.replace(".", "/")]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pool:
        # keys, means and context stay float32 when the model is cast
        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(_device_only(fn), recurse=False)

    @property
    def num_rows(self) -> int:
        """Committed rows, N."""
        return self.row_task.shape[0]

    @property
    def num_tasks(self) -> int:
        """Committed tasks, T, also those that ``count_task`` named; 0 where a method commits none (sequential LoRA)."""
        return self.context.shape[0]

    @property
    def block_rows(self) -> int:
        """Rows of the open block; 0 when no task is being learned."""
        return self._block_rows

    def open_block(
        self,
        rows: int,
        *,
        a_std: float,
        generator: torch.Generator,
        keys: Tensor | None = None,
        context_init: float | None = None,
    ) -> None:
        """Adds the trainable block of a new task.

        Args:
            rows: number of new rows.
            a_std: standard deviation of ``A`` at birth (``B`` is zero). Rows that are there already stay as they are.
            generator: a CPU generator; the only source of randomness.
            keys: ``[rows, D]`` at birth (``[1, D]`` with ``shared_rows``), or None for a pool without keys.
            context_init: value of every ``w[t, l]`` at birth, or None to learn no context.
        """
        if self.block_rows:
            raise RuntimeError("a block is open already; commit or drop it before the next task begins")
        if rows < 1:
            raise ValueError(f"rows is {rows}; a block needs at least one row")
        again = self.shared_rows and self.num_rows > 0
        if again and rows != self.num_rows:
            raise ValueError(f"rows is {rows}; all tasks share {self.num_rows} rows")
        device, wanted = self.row_task.device, [1 if self.shared_rows else rows, self.key_dim]
        if keys is not None:
            if list(keys.shape) != wanted:
                raise ValueError(f"keys is {list(keys.shape)}; expected {wanted}")
            if not is_finite(keys):
                raise ValueError("keys holds NaN or Inf; check the surrogate's embeddings")
            self.block_keys = nn.Parameter(keys.detach().to(device, torch.float32).clone())
        elif self.key_dim:
            raise ValueError(f"keys is None; this pool needs keys {wanted}")
        if context_init is not None and self.num_tasks:
            self.block_context = nn.Parameter(self.context.new_full((self.num_tasks,), context_init))
        for factors in self.layers.values():
            if again:
                factors.reopen()
            else:
                factors.open_block(rows, a_std, generator)
        self._block_rows = rows

    def commit(self, name: str, row_mean: Tensor) -> None:
        """Freezes the open block for good as the newest task.

        Args:
            name: the task's name, not used before.
            row_mean: ``[rows]``, ``z`` of the block.
        """
        rows = self.block_rows
        if not rows:
            raise RuntimeError("no block is open; open_block() before commit()")
        self._check_name(name)
        if tuple(row_mean.shape) != (rows,):
            raise ValueError(f"row_mean is {list(row_mean.shape)}; expected [{rows}], one value for each row")
        if not is_finite(row_mean):
            raise ValueError(f"task {name!r} has a row_mean of NaN or Inf; nothing was committed")
        self._check_finite(name)
        # what may not fit into memory comes before anything is changed
        means = [factors.short_mean(row_mean) for factors in self.layers.values()] if self.context_rank else []
        task = self.num_tasks
        if self.shared_rows:
            self.row_task, self.row_mean = self.row_task.new_zeros(rows), row_mean.detach().to(self.row_mean)
        else:
            self.last_block_start = self.num_rows
            self.row_task = torch.cat([self.row_task, self.row_task.new_full((rows,), task)])
            self.row_mean = torch.cat([self.row_mean, row_mean.detach().to(self.row_mean)])
        self.context = self.context_matrix().detach()
        none = self.keys.new_empty(1 if self.shared_rows else rows, 0)
        keys = none if self.block_keys is None else self.block_keys.detach()
        self.keys = torch.cat([self.keys, keys])
        for factors in self.layers.values():
            factors.commit(self.shared_rows)
        for factors, (A, B, _) in zip(self.layers.values(), means, strict=False):
            factors.mean_A, factors.mean_B = torch.cat([factors.mean_A, A[None]]), torch.cat([factors.mean_B, B[None]])
        if means:
            error = torch.stack([error.to(self.context_error) for *_, error in means]).max()
            self.context_error = torch.cat([self.context_error, error[None]])
        self.task_names.append(name)
        self.drop_block()

    def count_task(self, name: str) -> None:
        """Names the newest task where it leaves no rows of its own: the open block stays open for the next one."""
        self._check_name(name)
        self._check_finite(name)
        self.context = nn.functional.pad(self.context, (0, 1, 0, 1))
        self.task_names.append(name)

    def _check_name(self, name: str) -> None:
        if name in self.task_names:
            raise ValueError(f"task {name!r} is in the pool already; the pool holds {self.task_names}")

    def keep_for_task(self, name: str, value: Tensor) -> None:
        """Appends ``value [1, ...]``, the newest task's, to what is kept of all tasks under ``name``."""
        before = getattr(self, name, None)
        value = value.to(self.row_task.device)
        self.keep(name, value if before is None else torch.cat([before, value]))

    def _check_finite(self, name: str) -> None:
        rounded = [block for factors in self.layers.values() for block in factors.as_committed()]
        if not all(is_finite(p) for p in (*self.parameters(), *rounded)):
            raise ValueError(f"task {name!r} left NaN or Inf in its increments; nothing was committed")

    def drop_block(self) -> None:
        """Forgets the open block, trained or not."""
        super().drop_block()
        for factors in self.layers.values():
            factors.drop_block()
        self._block_rows = 0
        if not self.num_rows:  # tasks that shared the block alone are forgotten with it
            self.task_names, self.context = [], self.context.new_empty(0, 0)
        # what a method kept for the block goes with it
        for module, shape in ((self, None), *((factors, factors.shape) for factors in self.layers.values())):
            own = self.own_tensors(shape, self.num_tasks, self.num_rows, 0)
            for name in [name for name in module._buffers if name not in (*STANDARD, *own)]:
                delattr(module, name)

    def context_matrix(self) -> Tensor:
        """``[T, T]``, or ``[T + 1, T + 1]`` with the open block's row, through which gradients reach ``w[t, :]``."""
        if not self.block_rows:
            return self.context
        grown = nn.functional.pad(self.context, (0, 1, 0, 1))  # [T+1, T+1]
        if self.block_context is None:
            return grown
        row = nn.functional.pad(self.block_context, (0, 1))  # [T+1]
        return torch.cat([grown[:-1], row[None]])

    def train_keys(self, on: bool) -> None:
        """Chooses what of the open block learns: its keys (alignment), or its factors and ``w[t, :]`` (tuning)."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_((name == "block_keys") == on)

    def trainable_parameters(self) -> int:
        """Parameters of the open block, keys included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def committed(self, rows: int, tasks: int) -> dict[str, Tensor]:
        """What belongs to the first ``rows`` rows and ``tasks`` tasks and never changes, by the buffers' names."""
        found = {"context": self.context[:tasks, :tasks], "keys": self.keys[: tasks if self.shared_rows else rows]}
        for name, buffer in self.named_buffers():
            leaf = name.rpartition(".")[2]
            if leaf in PER_TASK:
                found[name] = buffer[:tasks]
            elif leaf in PER_ROW and not self.shared_rows:  # rows that tasks share go on learning
                found[name] = buffer[:rows]
        return found

    def kept(self) -> dict[str, Tensor]:
        """What methods keep beside rows and do not train, by name."""
        return {name: buffer for name, buffer in self.named_buffers() if name.rpartition(".")[2] not in STANDARD}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Puts back copies of tensors by name, such as ``kept`` returned, each on its linear's device."""
        for name, tensor in kept.items():
            parent, _, leaf = name.rpartition(".")
            module: Any = self.get_submodule(parent)
            module.keep(leaf, tensor.to(self.row_task.device if module is self else module.A.device, copy=True))

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name, contiguous, on the CPU: what a safetensors file holds."""
        tensors = (*self.named_buffers(), *self.named_parameters())
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}

    @torch.inference_mode(False)  # rows made in inference mode could not be used in training later
    def load_state(self, state: Mapping[str, Tensor], task_names: list[str]) -> None:
        """Replaces all rows by ``state``. Checks everything before it writes.

        Raises:
            ValueError: missing or unexpected names, a tensor of a wrong shape or dtype, NaN or Inf.
        """
        self.check_state(state, len(task_names))
        self.loads += 1
        self.drop_block()
        for name in {name for name, _ in self.named_buffers()} - set(state):  # what a method kept of other rows
            parent, _, leaf = name.rpartition(".")
            delattr(self.get_submodule(parent), leaf)
        # a file has an order of its own, and that of parameters decides how their gradients' norms are summed
        self.restore(dict(sorted(state.items())))
        self._block_rows = _block_rows(state)
        order = self.row_task.tolist()
        self.task_names = list(task_names)
        self.last_block_start = order.index(len(task_names) - 1) if order and not self.shared_rows else 0

    def check_state(self, state: Mapping[str, Tensor], tasks: int) -> None:
        """Raises ValueError for a state of ``tasks`` tasks that ``load_state`` would refuse."""
        rows = len(state["row_task"]) if "row_task" in state else 0
        block_rows = _block_rows(state)
        expected: OwnTensors = {
            "keys": ([tasks if self.shared_rows else rows, self.key_dim], torch.float32),
            "row_task": ([rows], torch.int64),
            "row_mean": ([rows], torch.float32),
            "context": ([tasks, tasks], torch.float32),
            **self.own_tensors(None, tasks, rows, block_rows),
        }
        if self.context_rank:
            expected["context_error"] = ([tasks], torch.float32)
        for path, factors in self.layers.items():
            a_rows, block_a_rows = (min(1, n) if self.shares_A else n for n in (rows, block_rows))
            own = self.own_tensors(factors.shape, tasks, rows, block_rows)
            own["A"] = ([a_rows, *factors.A.shape[1:]], factors.A.dtype)
            own["B"] = ([rows, *factors.B.shape[1:]], factors.B.dtype)
            if self.context_rank:
                own["mean_A"] = ([tasks, *factors.mean_A.shape[1:]], factors.A.dtype)
                own["mean_B"] = ([tasks, *factors.mean_B.shape[1:]], factors.B.dtype)
            if block_rows:
                own["block_A"] = ([block_a_rows, *factors.A.shape[1:]], torch.float32)
                own["block_B"] = ([block_rows, *factors.B.shape[1:]], torch.float32)
            expected.update({f"layers.{path}.{name}": wanted for name, wanted in own.items()})
        if block_rows:
            if self.key_dim:
                expected["block_keys"] = ([1 if self.shared_rows else block_rows, self.key_dim], torch.float32)
            if "block_context" in state:
                expected["block_context"] = ([tasks], torch.float32)
        missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        if missing or unexpected:
            raise ValueError(
                f"the state does not fit this pool: {len(missing)} tensors are missing {missing[:3]}, "
                f"{len(unexpected)} are unexpected {unexpected[:3]}; was it saved with other targets or another method?"
            )
        for name, (shape, dtype) in expected.items():
            got = state[name]
            if list(got.shape) != shape or got.dtype != dtype:
                raise ValueError(f"{name} is {list(got.shape)} {got.dtype}; expected {shape} {dtype}")
            if got.is_floating_point() and not is_finite(got):
                raise ValueError(f"{name} holds NaN or Inf")
        order = state["row_task"].tolist()
        without_rows = not rows and block_rows  # count_task
        owners = list(range(min(tasks, 1) if self.shared_rows else tasks))
        if order != sorted(order) or (sorted(set(order)) != owners and not without_rows):
            raise ValueError(f"row_task does not number {tasks} tasks in order; the file is damaged")


def _block_rows(state: Mapping[str, Tensor]) -> int:
    return max((len(tensor) for name, tensor in state.items() if name.endswith(".block_B")), default=0)
