"""``merge`` and ``unmerge``: one selection goes into the frozen weights, and inference costs what the base costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cllava_fast import ops
from cllava_fast.methods import Selection
from cllava_fast.model import paths
from cllava_fast.model.acting import terms
from cllava_fast.model.images import pooled_image
from cllava_fast.model.increments import Increments
from cllava_fast.model.patching import get_increments
from cllava_fast.model.selecting import Request, select_by_instruction
from cllava_fast.names import brief
from cllava_fast.pool import Factors


@dataclass(frozen=True)
class MergeReport:
    """What rounding cost, by the path of each adapted linear.

    Attributes:
        output_error: ``|merged - exact| / |exact|`` (Frobenius): the relative error of the linear's output, the bias
            aside, for inputs without a preferred direction.
        increment_error: ``|merged - exact| / |exact - W0|``: the same beside the increment alone. At 1 and above, the
            weight's dtype is too coarse for what was learned; serve unmerged then.
    """

    output_error: dict[str, float]
    increment_error: dict[str, float]

    def __str__(self) -> str:
        worst = max(self.output_error.values()), max(self.increment_error.values())
        return f"{len(self.output_error)} linears merged; largest error {worst[0]:.1e} of the output, " + (
            f"{worst[1]:.1e} of the increment"
        )


def merge(
    model: Any, *, instruction: str | None = None, task: str | None = None, query: Tensor | None = None
) -> MergeReport:
    """Adds one selection to the adapted linears' weights, from the pristine ones each time, rounded once.

    Until ``unmerge``, every sample is answered with that selection, at the speed of the bare base. The pristine weights
    are kept beside the merged ones. Give one of the three, or none where the method does not select.

    Args:
        model: a patched model.
        instruction: a text; its rows, as ``generate`` would pick them. Not for a surrogate that looks at images, too.
        task: a learned task's name; the mean over its training samples of what acted on them.
        query: ``[D]`` or ``[1, D]``, an embedding of the surrogate.

    Raises:
        ValueError: the model is not patched or has nothing learned, a task is being learned, the task is unknown, or
            the arguments do not say one selection.
        TypeError: an adapted linear is not a plain ``nn.Linear`` (quantised or wrapped weights cannot take a sum), or
            an instruction is no text or a query no tensor.
    """
    increments = get_increments(model)
    linears = _plain_linears(model, increments)
    selection = choose_one(model, instruction=instruction, task=task, query=query)
    unmerge(model)
    report = MergeReport({}, {})
    try:
        # weights made in inference mode could not be used in training later
        with torch.inference_mode(False), torch.no_grad(), increments.swapping():
            for path, linear in linears.items():
                _merge_one(linear, path, selection, increments, report)
    except BaseException:
        unmerge(model)
        raise
    return report


def _merge_one(linear: nn.Linear, path: str, selection: Selection, increments: Increments, report: MergeReport) -> None:
    weight = linear.weight.data
    finer = weight.to(torch.float64 if weight.dtype.itemsize > 2 else torch.float32)
    A, B, coefficient = acting_rows(selection, increments.pool.factors(path))
    every, scale = torch.arange(len(A), device=A.device), increments.config.scale
    merged, exact = (ops.merge(W, A, B, every, coefficient, scale, check_values=False) for W in (weight, finer))
    off, whole, increment = (torch.linalg.vector_norm(t) for t in (merged - exact, exact, exact - finer))
    report.output_error[path] = (off / whole).item() if whole > 0 else 0.0
    report.increment_error[path] = (off / increment).item() if increment > 0 else 0.0
    increments.pristine[path] = weight  # before it is replaced, so that it can always be put back
    linear.weight.data = merged


def unmerge(model: Any) -> Any:
    """Puts the pristine weights back, the very tensors; does nothing where none was merged. Returns the model."""
    increments = get_increments(model)
    if not increments.pristine:
        return model
    linears = _plain_linears(model, increments)
    with increments.swapping():
        for path in increments.pristine:
            linear = linears[path]
            present = linear.weight.data  # the model may have been moved or cast since
            linear.weight.data = increments.pristine[path].to(present.device, present.dtype)
        increments.pristine = {}
    return model


def _plain_linears(model: Any, increments: Increments) -> dict[str, nn.Linear]:
    linears = {}
    for path, module in increments.linears(model).items():
        if not paths.is_plain(module):
            kind = type(module if type(module) is not nn.Linear else module.weight).__name__
            raise TypeError(
                f"{path} is a {kind}; only a plain nn.Linear can be merged, no quantised or wrapped one: serve unmerged"
            )
        assert isinstance(module, nn.Linear)
        if module.weight.is_meta:
            raise ValueError(f"{path} is offloaded; load its weight on a device before merging")
        linears[path] = module
    return linears


def choose_one(
    model: Any, *, instruction: str | None = None, task: str | None = None, query: Tensor | None = None
) -> Selection:
    """The selection that ``merge`` and ``export_peft`` are asked for, of one sample. Raises as ``merge`` does."""
    increments = get_increments(model)
    method, pool = increments.method, increments.pool
    if method.routes:
        raise ValueError(f"{increments.config.method} looks at every input in every layer: no one selection is its own")
    if method.uses_query and pool.block_rows:
        raise ValueError("a task is being learned; finish it first")
    selection = _select(model, increments, instruction, task, query)
    if selection is None:
        raise ValueError("nothing has been learned yet")
    with torch.no_grad():
        acting_rows(selection, next(iter(pool.layers.values())))  # raises before anything is changed
    return selection


def _select(
    model: Any, increments: Increments, instruction: str | None, task: str | None, query: Tensor | None
) -> Selection | None:
    given = [
        name for name, value in (("instruction", instruction), ("task", task), ("query", query)) if value is not None
    ]
    method, pool = increments.method, increments.pool
    if not method.uses_query:
        if given:
            raise ValueError(f"{given[0]}= was given, but {increments.config.method} does not select; give none")
        return method.select(pool, None, 1, False)
    if len(given) != 1:
        raise ValueError(f"expected one of instruction=, task= and query=, got {given or 'none'}")
    if task is not None:
        if task not in pool.task_names:
            raise ValueError(f"task {task!r} was not learned; expected one of {pool.task_names}")
        return method.task_mean(pool, pool.task_names.index(task))
    if instruction is not None and not isinstance(instruction, str):
        raise TypeError(f"instruction is {brief(instruction)}; expected a text")
    if query is not None and not isinstance(query, Tensor):
        raise TypeError(f"query is {brief(query)}; expected a tensor [D] or [1, D], an embedding of the surrogate")
    surrogate = increments.surrogate
    if instruction is not None and surrogate is not None and surrogate.uses_image:
        raise ValueError(
            'instruction= is a text alone, but surrogate "text+image" looks at an image, too; give task= or query= [D]'
        )
    request = Request(
        batch=1,
        instructions=None if instruction is None else [instruction],
        query=None if query is None else query.reshape(-1, *query.shape[-1:]),
    )
    with torch.no_grad():
        return select_by_instruction(increments, request, partial(pooled_image, model))


def acting_rows(selection: Selection, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """What one sample's selection adds to a linear: ``A [P, R, d_in]``, ``B [P, R, d_out]`` and ``coefficient [P]``.

    A row that is selected and is context too stands there once; rows that do not act are left out. Where rows differ in
    rank, each of their columns is a row of rank 1.
    """
    totals: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for A, B, pairs in terms(selection, factors):
        _, _, total = totals.setdefault(id(A), (A, B, torch.zeros(len(A), device=A.device, dtype=torch.float32)))
        total.index_add_(0, pairs.index[0].to(A.device), pairs.coefficient[0].to(A.device))
    acting = [[rows[total != 0] for rows in (A, B, total)] for A, B, total in totals.values()]
    if len({A.shape[1] for A, _, _ in acting}) > 1:
        acting = [
            [A.flatten(0, 1)[:, None], B.flatten(0, 1)[:, None], total.repeat_interleave(A.shape[1])]
            for A, B, total in acting
        ]
    A, B, coefficient = (torch.cat(tensors) for tensors in zip(*acting, strict=True))
    if not len(coefficient):
        raise ValueError("no row acts on this query: nothing of it was learned")
    return A, B, coefficient
