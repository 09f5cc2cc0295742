"""What a method is: a policy that decides which rows act on a sample, and how strongly."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cllava_fast.names import check_types
from cllava_fast.ops import checks
from cllava_fast.pool import Factors, LinearShape, OwnTensors, Pool

Policy = TypeVar("Policy", bound="Method")


@dataclass(frozen=True)
class Pairs:
    """Rows and how strongly they act: ``index [B, P]`` int64, ``coefficient [B, P]`` float32, or ``[B, S, P]`` where a
    method weighs each token (``Method.route``)."""

    index: Tensor
    coefficient: Tensor

    @staticmethod
    def ones(index: Tensor) -> Pairs:
        """Rows that act with coefficient 1."""
        return Pairs(index, torch.ones(index.shape, device=index.device, dtype=torch.float32))

    def map(self, function: Any) -> Pairs:
        return Pairs(function(self.index), function(self.coefficient))


@dataclass(frozen=True)
class Begun:
    """What one linear has seen of its samples' beginnings: each one's first token ``tokens [B, d_in]``, where it was
    among the ``seen`` tokens that have come, padding included."""

    tokens: Tensor
    seen: int


@dataclass(frozen=True)
class Selection:
    """What acts on each sample of a batch.

    Attributes:
        block: pairs over the open block's rows, which train; None if none acts.
        past: pairs over the committed rows, which get no factor gradient; None if none acts.
        context: ``[B, C]`` float32, coefficients of the first C committed rows, which all act on every sample, or
            ``[1, C]``, the same for all samples; None if none acts.
        means: the columns of ``context`` stand for the first C tasks' shortened mean increments instead.
        index, weight: ``[B, M]`` the rows that were selected (committed row numbers at inference) and their weights,
            for reports; None for methods that do not select.
        strength: ``[B]`` in 0..1, how much of all this acts, which the coefficients know and ``weight`` does not; None
            where nothing is held back.
        mix: sum the factors before multiplying them (``context="factor"``).
        rows: ``A [n, R, d_in]`` and ``B [n, R, d_out]`` that ``block`` counts in place of the open block's, where
            ``Method.route`` makes them from what it keeps.
        mask: ``[B, S]``, 0 where a prompt has padding, for ``Method.route``; None where nobody said. In training, 0 in
            all of a sample without a label, too.
        memory: by linear, what ``Method.route`` decided for the prompt and needs again for the tokens that follow,
            which come without it, for methods with ``by_first_token``; None in training, where a layer that is
            recomputed must find what its first pass found.
        begun: by linear, the first tokens that ``memory`` was decided on. They are the cache's: another selection that
            goes on with it decides on them anew.
        images: ``[B, 1 + d]`` float64 on the CPU, number and sum of the pooled images that samples have shown, for
            later turns of their conversations; None where nobody looked.
        column_strength: ``[B, 1, K]`` float32, how strongly each column of the open block and of ``context``
            acts, for layers that take gradients where a GPU waits for Python (``ops/inject/few_calls.py``); None where
            that cannot say it all, or nobody asks.
        seen: linears that ``Method.route`` has counted this forward pass's tokens in: one that is recomputed does not
            count again. None where nothing is counted.
    """

    block: Pairs | None = None
    past: Pairs | None = None
    context: Tensor | None = None
    index: Tensor | None = None
    weight: Tensor | None = None
    strength: Tensor | None = None
    mix: bool = False
    rows: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    memory: dict[Factors, Pairs] | None = None
    begun: dict[Factors, Begun] | None = None
    seen: set[Factors] | None = None
    means: bool = False
    images: Tensor | None = None
    column_strength: Tensor | None = None

    @property
    def batch_size(self) -> int:
        pairs = self.block or self.past
        assert pairs is not None
        return pairs.index.shape[0]

    @cached_property
    def present(self) -> Tensor | None:
        """``[B]`` bool, whether a sample has any token that is no padding; None where nobody said."""
        return None if self.mask is None else (self.mask != 0).any(1)

    @cached_property
    def first(self) -> Tensor | None:
        """``[B]`` int64, where each sample's first token behind its padding stands, behind the mask where all of it is
        padding; None where nobody said."""
        if self.mask is None or self.present is None:
            return None
        return (self.mask != 0).int().argmax(1).where(self.present, self.mask.shape[1])

    @cached_property
    def last(self) -> int:
        """Where the last of the samples begins."""
        return 0 if self.first is None else int(self.first.max())

    @cached_property
    def joined(self) -> Pairs | None:
        """``past`` and ``context`` in one list, where they are all that acts and both count the committed rows."""
        if self.past is None or self.past.coefficient.dim() != 2 or self.block is not None or self.mix or self.means:
            return None
        if self.context is None:
            return self.past.map(Tensor.contiguous)
        context = self.context_pairs()
        index = torch.cat([self.past.index, context.index], 1)
        return Pairs(index, torch.cat([self.past.coefficient, context.coefficient], 1))

    @cached_property
    def arrived(self) -> Tensor:
        """int32 ``[B]``, zeros: where a native kernel counts within a layer how much of a sample is done."""
        assert self.past is not None
        return torch.zeros(self.batch_size, dtype=torch.int32, device=self.past.index.device)

    @cached_property
    def native(self) -> WeakKeyDictionary[Factors, set[Any]]:
        """By linear, what its tokens looked like when a native kernel was found to decode them with ``joined``."""
        return WeakKeyDictionary()

    def context_pairs(self) -> Pairs:
        """``context`` as pairs of each sample."""
        assert self.context is not None
        coefficient = self.context.expand(self.batch_size, -1)
        rows = torch.arange(coefficient.shape[1], device=coefficient.device)
        return Pairs(rows.expand(coefficient.shape), coefficient)

    def expand(self, batch: int) -> Selection:
        """Repeats every sample for its beams or returned sequences: ``[B, ...]`` to ``[batch, ...]``."""
        size = self.batch_size
        if batch == size:
            return self
        if size == 0 or batch % size:
            raise ValueError(f"the batch holds {batch} samples; instructions were selected for {size}: give one each")
        if checks.captured():
            return self._expand(batch // size)
        asked = batch, torch.is_inference_mode_enabled()  # whose tensors could not be used in training later
        if asked not in self._expanded:
            self._expanded[asked] = self._expand(batch // size)
        return self._expanded[asked]

    def _expand(self, times: int) -> Selection:
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    @cached_property
    def _expanded(self) -> dict[tuple[int, bool], Selection]:
        """Every step of an answer asks, and its layers decode on with what one step has found."""
        return {}

    def take(self, samples: Tensor) -> Selection:
        """The samples that ``samples [n]`` int64 names, in its order, any number of times."""
        size = self.batch_size

        def pick(tensor: Tensor) -> Tensor:
            # what is remembered may be of a time before beams were added
            return tensor.repeat_interleave(size // len(tensor), dim=0)[samples.to(tensor.device)]

        moved = self._map(pick)
        if self.memory is None or self.begun is None:
            return moved
        memory = {factors: pairs.map(pick) for factors, pairs in self.memory.items()}
        begun = {factors: Begun(pick(known.tokens), known.seen) for factors, known in self.begun.items()}
        return replace(moved, memory=memory, begun=begun)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Selection:
        """``function`` of all that is one row a sample, except for what is remembered."""
        context = self.context
        if context is not None and context.shape[0] != 1:
            context = function(context)
        return replace(
            self,
            block=self.block and self.block.map(function),
            past=self.past and self.past.map(function),
            context=context,
            index=None if self.index is None else function(self.index),
            weight=None if self.weight is None else function(self.weight),
            strength=None if self.strength is None else function(self.strength),
            mask=None if self.mask is None else function(self.mask),
            images=None if self.images is None else function(self.images),
            column_strength=None if self.column_strength is None else function(self.column_strength),
        )

    def scaled(self, strength: Tensor) -> Selection:
        """Every coefficient of a sample times its ``strength [B]``."""
        # factors that are summed before they are multiplied each take their part of it
        factor = (strength.sqrt() if self.mix else strength)[:, None]

        def scale(pairs: Pairs | None) -> Pairs | None:
            return pairs and Pairs(pairs.index, pairs.coefficient * factor)

        context = None if self.context is None else self.context * factor
        block, past = scale(self.block), scale(self.past)
        return replace(self, block=block, past=past, context=context, strength=strength, column_strength=None)


@dataclass(frozen=True)
class MethodConfig:
    """What every method decides; see the methods' own configs.

    Attributes:
        method: the name that files and commands know it by. title: the name that reports show.
        demo: fields that the demo's tiny model wants otherwise than a large one, beside ``scale`` and ``a_std``.

    A method may have more fields, and these work for any method that has them:
        dropout: the share of their input that increments see as zero in training; the frozen linear sees all of it.
        layers: the decoder layers that are adapted.
        surrogate: what embeds instructions (``cllava_fast.surrogate``). groups: parts of a query whose cosines are
            averaged; None for the surrogate's own.
        calibrate: at inference, increments act as far as the instruction is like what tasks have asked.
        context_rank: columns to which each earlier task's mean increment is shortened.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    demo: ClassVar[Mapping[str, Any]] = {}

    rank: int
    scale: float
    a_std: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        check_types(self)
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; expected a finite number")
        if self.scale == 0:
            raise ValueError("scale is 0, and increments would add nothing; expected another number")
        if self.a_std <= 0:
            raise ValueError(f"a_std is {self.a_std}; expected a positive number, since B is zero at birth")
        if not self.targets:
            raise ValueError("targets is empty; name at least one linear, such as 'self_attn.o_proj'")
        dropout = getattr(self, "dropout", 0.0)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; expected a share in 0..1, less than 1")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, **asdict(self)}


class Method(ABC):
    """A coefficient policy and the life-cycle of its rows. One object serves one patched model.

    The loop calls, for every task: ``open_task``, alignment if ``aligns_keys``, tuning, ``close_task``.
    """

    config: MethodConfig
    aligns_keys: ClassVar[bool] = False
    joint: ClassVar[bool] = False  # trained once on all tasks together
    keeps_block: ClassVar[bool] = False  # no task is counted: the block that one leaves open is what was learned
    uses_query: ClassVar[bool] = True
    uses_task: ClassVar[bool] = False  # the query is the task's number, [B, 1]: an oracle
    by_first_token: ClassVar[bool] = False  # ``route`` decides on a prompt's first token, for all that follow
    shares_A: ClassVar[bool] = False  # a pool's rows have one A, ``[1, R, d_in]``
    shared_rows: ClassVar[bool] = False  # every task trains the same rows, and keys are those of tasks (``Pool``)
    by_batch: bool = False  # one selection for all samples of a batch, so evaluation mixes no tasks
    remembers_queries: ClassVar[bool] = False  # the pool keeps a Gaussian of each task's queries (``calibration``)

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def routes(self) -> bool:
        """Whether layers decide what acts, by what they are handed: no one selection can be merged or exported."""
        return self.reads or type(self).route is not Method.route

    @property
    def reads(self) -> bool:
        """Whether ``read`` changes what ``o_proj`` is handed; no increments are added behind it."""
        return type(self).read is not Method.read

    @abstractmethod
    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        """Makes ready what the task will train. ``queries [n, D]`` are the task's training instructions."""

    @abstractmethod
    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        """Called once the task is trained."""

    @abstractmethod
    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        """What acts on the samples of ``query [B, D]``, or on all alike (one sample's) where query is None; None where
        nothing does (the frozen model answers alone), which is not while a task is trained."""

    def route(self, selection: Selection, factors: Factors, x: Tensor) -> Selection:
        """What acts in one linear, on activations ``x [B, S, d_in]``; by default the same in every one."""
        return selection

    def row_shape(self, linear: LinearShape) -> LinearShape:
        """Widths of a row of one linear: ``A [R, d_in]`` and ``B [R, d_out]``; by default the linear's own."""
        return linear

    def read(self, selection: Selection, factors: Factors, x: Tensor, queries: Tensor) -> Tensor:
        """What an ``o_proj`` reads in place of ``x [B, S, d_in]``, its attention's heads side by side.
        ``queries [B, S, H, head_dim]`` are those of the same attention, before positions are added."""
        return x

    def own_tensors(self, shape: LinearShape | None, tasks: int, rows: int, block_rows: int) -> OwnTensors:
        """Shapes of what the method keeps beside rows (``pool.keep``), for a linear, or for the pool (shape None), so
        that files are checked before they are read."""
        return {}

    def alignment_loss(self, pool: Pool, query: Tensor, groups: int, generator: torch.Generator) -> Tensor:
        """What a step of alignment minimises over the open block's keys, for ``query [B, D]`` of the task, of a method
        with ``aligns_keys``. ``generator`` is on the CPU."""
        raise NotImplementedError

    def penalty(self, pool: Pool) -> Tensor | None:
        """What the loss of a tuning step grows by; None for nothing."""
        return None

    def end_step(self, pool: Pool) -> None:
        """Called once a step of tuning, on every process, behind the backward pass of its last batch. Gradients are not
        clipped yet, and scaled with fp16; in a step that is skipped (``on_bad_numbers``) they are None, NaN or Inf."""
        return None

    def task_mean(self, pool: Pool, task: int) -> Selection:
        """What acted on the training samples of a committed task, on average: one sample's selection."""
        context = " with context='factor'" if getattr(self.config, "context", None) == "factor" else ""
        raise ValueError(f"{self.config.method}{context} keeps no mean of a task; name an instruction instead")


def layers_of(pool: Pool) -> list[Any]:
    """The ``Factors`` of every linear; what methods keep in them (``Factors.keep``), no type knows."""
    return list(pool.layers.values())


def pool_version(pool: Pool) -> int:
    """Another number after every step of an optimizer, which changes parameters in place."""
    return sum(parameter._version for parameter in pool.parameters())


def check_selection(method: Method, pool: Pool, selection: Any, samples: int) -> None:
    """Refuses what ``Method.select`` cannot have meant for that many queries; layers take what they are handed."""
    what = f"{type(method).__name__}.select"
    if selection is None:
        return
    if not isinstance(selection, Selection):
        raise TypeError(f"{what} returned a {type(selection).__name__}; expected a Selection, or None")
    for name, pairs, rows in (("block", selection.block, pool.block_rows), ("past", selection.past, pool.num_rows)):
        if pairs is None:
            continue
        index, coefficient = pairs.index, pairs.coefficient
        if len(index) != samples or len(coefficient) != samples:
            raise ValueError(
                f"{what}: {name} has an index {list(index.shape)} and a coefficient {list(coefficient.shape)}; "
                f"expected {samples} samples, as many as queries, or 1 without"
            )
        if index.dtype != torch.int64 or coefficient.dtype != torch.float32:
            raise TypeError(
                f"{what}: {name} has an index of {index.dtype} and a coefficient of {coefficient.dtype}; expected "
                "torch.int64 and torch.float32"
            )
        if not method.routes:  # which may make other rows than the pool's
            if index.dim() != 2 or index.shape != coefficient.shape:
                raise ValueError(
                    f"{what}: {name} has an index {list(index.shape)} and a coefficient {list(coefficient.shape)}; "
                    f"expected one shape for both, [{samples}, P]"
                )
            checks.within(f"{what}: {name}.index", index, rows, "rows")


METHODS: dict[str, tuple[type[Any], type[Any]]] = {}  # config and policy by the config's ``method``


def register(config: type[Any]) -> Callable[[type[Policy]], type[Policy]]:
    """Makes a policy known under the name that its config bears: ``@register(LoraConfig) class ...(Method)``.

    Raises:
        TypeError: the config says no ``method`` or ``title`` of its own, or is no frozen dataclass itself.
        ValueError: another method has its name.
    """
    own = vars(config)
    if not {"method", "title", "__dataclass_params__"} <= set(own) or not own["__dataclass_params__"].frozen:
        raise TypeError(
            f"{config.__name__} is not what a method needs: expected a @dataclass(frozen=True) with a method and a "
            "title of its own, both ClassVar[str]"
        )
    if config.method in METHODS:
        taken = METHODS[config.method][0]
        again = config.__module__ == taken.__module__ and config.__module__ == "__main__"  # a notebook's cell, say
        if not again and (config.__module__, config.__qualname__) != (taken.__module__, taken.__qualname__):
            raise ValueError(
                f"{config.__name__} has method {config.method!r}, which is that of {taken.__module__}.{taken.__name__}"
                "; give it another name"
            )

    def enter(policy: type[Policy]) -> type[Policy]:
        METHODS[config.method] = config, policy
        return policy

    return enter
