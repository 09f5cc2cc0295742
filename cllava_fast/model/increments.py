"""What ``patch`` adds to a model: the pool, the method, the surrogate, and what acts in its layers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllava_fast.methods import Method, MethodConfig, Selection, calibration, make_method
from cllava_fast.methods.base import check_selection
from cllava_fast.model import acting, paths
from cllava_fast.model.instructions import InstructionReader
from cllava_fast.ops.inject import check_frozen, inject_add_unchecked, inject_unchecked
from cllava_fast.pool import Factors, LinearShape, OwnTensors, Pool
from cllava_fast.surrogate import BackboneSurrogate, Surrogate, TextImageSurrogate, sentence_surrogate

IMAGE_TOKENS = ("image", "video", "vision_start", "vision_end")  # as configurations name them


class Call(threading.local):
    """What belongs to the call that is under way, in each thread its own: a model may answer in several at once.

    A layer that activation checkpointing computes again, in whichever thread, is handed its selection once more.

    Attributes:
        given: whether the forward pass that is under way was started with a selection, which every attention must be
            handed; None while there is none.
        active: what acts on the batch that is in the layers right now.
        pending: what acts in the steps of the ``generate`` that is under way.
        custom: its loop is the caller's (``custom_generate``), and whatever it asks the model is taken for a step.
        queries: ``[B, S, H, head_dim]`` of the attention that is computed right now, where the method reads them.
    """

    def __init__(self) -> None:  # for every thread; torch.compile would guard no default of the class
        self.given: bool | None = None
        self.active: Selection | None = None
        self.pending: Selection | None = None
        self.custom = False
        self.queries: Tensor | None = None

    def __reduce__(self) -> tuple[type[Call], tuple[()]]:
        return Call, ()  # a copy is in no call


class Increments(nn.Module):
    """Registered as ``model.increments`` by ``patch``.

    Attributes:
        config: the method's configuration.
        method: the coefficient policy.
        dropout: share of its input that increments do not see in training, where the config has such a field.
        pool: the rows; the only state.
        call: what acts in the call that is under way.
        swaps: twice how often what acts was replaced, odd while it is, see ``swapping``.
        pristine: the frozen weight of each linear that ``merge`` replaced, by path; empty while nothing is merged.
        base_fingerprint: of the frozen model, kept where a process may lose parts of it (FSDP); otherwise None.
    """

    def __init__(self, model: nn.Module, config: MethodConfig, processor: Any | None) -> None:
        super().__init__()
        self.config = config
        self.method: Method = make_method(config)
        self.processor = processor
        # of images and what stands around them; a model without any has no such id, and -1 is no token's
        self.image_token_id, *beside = (_token_id(model, f"{name}_token_id") for name in IMAGE_TOKENS)
        if processor is not None and hasattr(processor, "image_processor"):
            beside += processor.image_token_ids
        # otherwise an image has as many tokens as its size and its neighbours ask for
        self.equal_images = getattr(model.config, "image_grid_pinpoints", None) is None
        self.special_ids = _special_ids(model) | {self.image_token_id, *beside}
        self.reader = None if processor is None else InstructionReader(processor, self.image_token_id, *beside)
        self.surrogate = self._make_surrogate(model)
        if self.surrogate is not None and self.surrogate.dim % self.groups:
            raise ValueError(f"groups is {self.groups}; expected a divisor of the query's width, {self.surrogate.dim}")
        key_dim = self.surrogate.dim if self.surrogate else 0
        self.pool = Pool(
            rank=config.rank,
            key_dim=key_dim,
            shapes={
                path: self.method.row_shape(linear_shape(linear, model)) for path, linear in self.linears(model).items()
            },
            shares_A=self.method.shares_A,
            # a method of this object would hold it, and what is dropped would wait for the garbage collector
            own_tensors=functools.partial(_own_tensors, self.method, key_dim if self.remembers_queries else None),
            shared_rows=self.method.shared_rows,
            context_rank=getattr(config, "context_rank", None) or 0,
        )
        self.dropout: float = getattr(config, "dropout", 0.0)
        self.call = Call()
        self.pristine: dict[str, Tensor] = {}
        self.swaps = 0
        self.base_fingerprint: str | None = None
        self._is_open = False  # a task
        # the pool's state and names when it was opened, where it changes what earlier ones learned
        self._before: tuple[dict[str, Tensor], list[str]] | None = None

    def linears(self, model: nn.Module) -> dict[str, nn.Module]:
        """The adapted linears of ``model`` by path."""
        return paths.adapted_linears(model, self.config.targets, getattr(self.config, "layers", None))

    @property
    def calibrates(self) -> bool:
        """Whether coefficients are scaled at inference by what tasks remember of their queries."""
        return self.surrogate is not None and getattr(self.config, "calibrate", False)

    @property
    def remembers_queries(self) -> bool:
        """Whether each task keeps a Gaussian of its queries."""
        return self.calibrates or (self.surrogate is not None and self.method.remembers_queries)

    @contextmanager
    def swapping(self) -> Iterator[None]:
        """Around whatever replaces what acts on calls: those that are under way say so, and give no answer."""
        self.swaps += 1
        try:
            yield
        finally:
            self.swaps += 1

    def open_task(self, queries: Tensor | None, generator: torch.Generator) -> None:
        """Makes ready what a task will train; ``queries [n, D]`` are its training instructions."""
        pool, self._before = self.pool, None
        if pool.block_rows or pool.shared_rows:
            state = {name: tensor.clone() for name, tensor in pool.state().items()}
            self._before = state, list(pool.task_names)
        self._is_open = True
        self.method.open_task(pool, queries, generator)

    def drop_task(self) -> None:
        """Forgets what the task that is being learned has learned; what earlier ones learned is as before it. Does
        nothing once it is committed."""
        if not self.is_within_a_task:
            return
        self._is_open = False
        self.pool.drop_block()
        if self._before is not None:
            self.pool.load_state(*self._before)
            self._before = None

    def check_not_learning(self, what: str) -> None:
        """Raises ValueError between ``open_task`` and the task's end: whoever opened it goes on with its rows. Half a
        task that nobody goes on with may be taken off."""
        if self._is_open:
            raise ValueError(f"a task is being learned; {what} before it begins, or once it is committed")

    def close_task(self, name: str, queries: Tensor | None) -> None:
        """Freezes what the open block learned as task ``name``; ``queries [n, D]`` are its training instructions."""
        remembered = None if queries is None or not self.remembers_queries else calibration.gaussian(queries)
        self.method.close_task(self.pool, name, queries, self.groups)
        if remembered is not None:  # nothing that may fail lies between
            calibration.keep(self.pool, remembered)
        self._is_open = False
        if self.is_within_a_task:
            raise RuntimeError(
                f"{self.config.method} left task {name!r} open: close_task has to commit the block or to count the "
                "task (Pool.count_task), unless the method says that it counts none (keeps_block)"
            )
        if self.pool.task_names[-1:] != [name] and not self.method.keeps_block:
            raise RuntimeError(
                f"{self.config.method} closed task {name!r}, and the pool has {self.pool.task_names}; close_task has "
                "to commit or count it under the name that it is handed"
            )
        self._before = None

    def _make_surrogate(self, model: nn.Module) -> Surrogate | None:
        name = getattr(self.config, "surrogate", None)
        if not self.method.uses_query or name is None:
            return None
        if self.reader is None and name != "backbone":
            raise ValueError(
                f"surrogate {name!r} reads instructions and needs a processor; none was given and none is saved beside "
                'the model\'s weights: patch(model, config, processor=...), or use surrogate="backbone"'
            )
        embedding, tower = paths.input_embedding(model), paths.vision_tower(model)
        if name == "backbone":
            return BackboneSurrogate(embedding, self.reader.tokenize if self.reader else None)
        device = str(paths.execution_device(embedding))
        if name != "text+image":
            return sentence_surrogate(name, device)
        if tower is None:
            raise ValueError(
                f'surrogate "text+image" looks at images, and a {type(model).__name__} has no vision tower; '
                'use "sentence" or "backbone"'
            )
        # hidden_size of a Qwen2-VL's tower is the width of what its projector puts out
        width = getattr(tower.config, "embed_dim", tower.config.hidden_size)
        return TextImageSurrogate(sentence_surrogate("sentence", device), width, tower)

    @property
    def may_act(self) -> bool:
        """Whether there are rows of which a call may select, as ``selecting.select`` goes."""
        learning = self.pool.block_rows > 0 and (self.training or not self.method.uses_query)
        return not self.pristine and (self.pool.num_tasks > 0 or learning)

    @property
    def is_within_a_task(self) -> bool:
        """Whether a part of a task is learned. Rows that all tasks share stay open behind a task, too."""
        pool = self.pool
        stays_open = not pool.num_rows and (pool.num_tasks > 0 or self.method.keeps_block)
        return self._is_open or (pool.block_rows > 0 and not stays_open)

    @property
    def groups(self) -> int:
        """Parts of queries and keys whose cosines are averaged: the method's own choice, or the surrogate's."""
        chosen: int | None = getattr(self.config, "groups", None)
        return chosen or (self.surrogate.groups if self.surrogate else 1)

    def select_by_query(self, query: Tensor) -> Selection | None:
        """What the method picks for queries ``[B, D]``, as strongly as calibration lets it act."""
        query = query.to(self.pool.keys.device)
        learning = self.training and self.pool.block_rows > 0
        selection = self.method.select(self.pool, query, self.groups, learning)
        check_selection(self.method, self.pool, selection, len(query))
        if selection is not None and self.calibrates and not learning:
            selection = selection.scaled(calibration.familiarity(self.pool, query))
        return selection

    def task_query(self, tasks: Sequence[str]) -> Tensor:
        """The query ``[n, 1]`` of a method that is told the task: its number; of a task not learned yet, the next."""
        names = self.pool.task_names
        numbers = [names.index(task) if task in names else len(names) for task in tasks]
        return torch.tensor(numbers, dtype=torch.float32).view(-1, 1)

    # -- in the layers -------------------------------------------------------------------------------------------

    def inject(self, x: Tensor, linear: nn.Linear | None, base: Tensor | None, factors: Factors) -> Tensor:
        """The adapted linear's output: frozen linear plus what is active.

        Args:
            x: ``[B, S, d_in]``.
            linear: the frozen layer where it is a plain linear, whose product the op may fuse with the increments.
            base: its output ``[B, S, d_out]`` where it is any other kind of layer.
            factors: the layer's rows.
        """
        selection = self._selection_for(x)
        y = base
        if base is not None:
            x = x.to(base.device)  # an offloaded layer was handed its input elsewhere
        selection = self.method.route(selection, factors, x)
        if linear is not None:
            lasts = not self.method.routes
            decoded = acting.decode_natively(x, linear, selection, factors, self.config.scale, lasts)
            if decoded is not None:
                return decoded
        if self.dropout and self.training and self.pool.block_rows:
            if y is None:
                assert linear is not None
                check_frozen(linear.weight, linear.bias)
                y = functional.linear(x, linear.weight, linear.bias)
            x = functional.dropout(x, self.dropout)
        trained = acting.train_in_few_calls(x, linear, y, selection, factors)
        if trained is not None:
            return trained
        for A, B, pairs, past in acting.pools(selection, factors, x.device):
            index, coefficient = pairs.index.to(x.device), pairs.coefficient.to(x.device)
            if y is None:
                assert linear is not None
                check_frozen(linear.weight, linear.bias)
                y = inject_unchecked(x, linear.weight, A, B, index, coefficient, linear.bias, self.config.scale, past)
            else:
                y = inject_add_unchecked(y, x, A, B, index, coefficient, self.config.scale, past)
        assert y is not None
        return y

    def read(self, x: Tensor, factors: Factors) -> Tensor:
        """What an ``o_proj`` is handed in place of ``x [B, S, d_in]``, by a method with ``reads``."""
        selection, queries = self._selection_for(x), self.call.queries
        self.call.queries = None  # those of this attention are not the next one's
        assert queries is not None
        if queries.shape[:2] != x.shape[:2] or queries.shape[2:].numel() != x.shape[2]:
            raise TypeError(
                f"the attention's queries are {list(queries.shape)} beside x {list(x.shape)}; {self.config.method} "
                "expects [B, S, heads, width], as Llama's attention computes them"
            )
        x, queries = x.to(factors.A.device), queries.to(factors.A.device)
        return self.method.read(selection, factors, x, queries)

    def _selection_for(self, x: Tensor) -> Selection:
        active = self.call.active
        assert active is not None
        if x.dim() != 3 or x.shape[0] != active.batch_size:
            raise ValueError(f"an adapted linear got x {list(x.shape)}; expected [{active.batch_size}, S, d_in]")
        return active


def _own_tensors(
    method: Method, remembered: int | None, shape: LinearShape | None, tasks: int, rows: int, block_rows: int
) -> OwnTensors:
    """``remembered``: width of the queries of which each task keeps a Gaussian, where it keeps one."""
    own = method.own_tensors(shape, tasks, rows, block_rows)
    if shape is None and tasks and remembered is not None:
        own = {**own, **calibration.own_tensors(remembered, tasks)}
    return own


def linear_shape(linear: nn.Module, model: Any) -> LinearShape:
    weight, dtype = getattr(linear, "weight", None), model.dtype
    # quantised weights are integers, or not there, and what they compute has the dtype of what they are handed
    if isinstance(weight, Tensor) and weight.dtype.is_floating_point and weight.element_size() > 1:
        dtype = weight.dtype
    return LinearShape(linear.in_features, linear.out_features, dtype, paths.execution_device(linear))  # type: ignore[arg-type]


def _token_id(model: nn.Module, name: str) -> int:
    found: int | None = getattr(model.config, name, None)
    return -1 if found is None else found


def _special_ids(model: nn.Module) -> set[int]:
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    ids: set[int] = set()
    for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids
