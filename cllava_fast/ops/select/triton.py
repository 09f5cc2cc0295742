"""select in Triton: one launch for a small pool, a scan and a merge for a large one; one launch backward.

Every (query, key) product is a chain of explicit float32 fmas over fixed columns, so a similarity depends on nothing
but its two vectors: not on the batch, not on where in the pool the key lies. A similarity and its row are then packed
into one integer whose order is "higher similarity, then lower row": a top-M of distinct integers has one answer,
however the pool was cut.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllava_fast.ops.select.reference import SUM_FLOOR
from cllava_fast.ops.triton_backend import Shipped

ONE_LAUNCH_ROWS = 2048
# One program reads the whole pool of a one-launch call, at no more than a 132nd of an H100's L2 bandwidth: about 10 us
# for this many entries in float32, the price of the second launch and its round trip.
ONE_LAUNCH_ENTRIES = 2**18
# The most that a thread here needs; without a word, ptxas spills a few bytes to reach the next higher occupancy.
REGISTERS = 168
MOST_SLICES = 512  # programs per query tile of a scan; bounds what the merge reads

FLOOR = tl.constexpr(SUM_FLOOR)
LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)
ROW_MASK = tl.constexpr(2**31 - 1)
NAN_BITS = tl.constexpr(0x7FC00000)


class Plan(NamedTuple):
    """How a call is cut. Never by B: a sample must not notice the batch around it."""

    SAMPLES: int  # queries per program
    KEYS: int  # keys per step
    STEPS: int  # steps per ranking round
    WIDTH: int  # columns per step
    SLOTS: int  # M, rounded up
    STAGES: int  # steps whose loads are under way
    warps: int
    slices: int  # programs per query tile; more than one need the merge
    rounds: int  # ranking rounds per program


def plan(rows: int, width: int, top_m: int, groups: int) -> Plan:
    slots = triton.next_power_of_2(top_m)
    columns = max(16, triton.next_power_of_2(width // groups))
    if rows <= ONE_LAUNCH_ROWS and rows * width <= ONE_LAUNCH_ENTRIES:
        span = max(16, min(256, triton.next_power_of_2(rows)))
        keys = min(span, 32)
        return Plan(1, keys, span // keys, min(columns, 64), slots, 3, keys // 4, 1, triton.cdiv(rows, span))
    span = max(32, min(256, triton.next_power_of_2(triton.cdiv(rows, MOST_SLICES))))
    rounds = triton.cdiv(triton.cdiv(rows, span), MOST_SLICES)
    return Plan(8, 32, span // 32, 16, slots, 3, 4, triton.cdiv(rows, span * rounds), rounds)


@triton.jit
def _cosines(
    query,  # [B, D]
    keys,  # [N, D], rows key_stride apart
    samples,  # [SAMPLES]
    rows,  # [KEYS]
    B,
    N,
    chunk,  # D / groups
    groups,
    key_stride,
    UNIT: tl.constexpr,  # the query's chunks need no division by their norm
    SAMPLES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Mean over groups of the chunks' cosines, [SAMPLES, KEYS]; one read of the keys for product and norm."""
    query_rows = query + samples.to(tl.int64)[:, None] * (chunk * groups)
    key_rows = keys + rows.to(tl.int64)[:, None] * key_stride
    total = tl.zeros([SAMPLES, KEYS], tl.float32)
    for group in range(groups):
        # partial sums per column, added up once at the end of the chunk
        product = tl.zeros([SAMPLES, KEYS, WIDTH], tl.float32)
        key_square = tl.zeros([KEYS, WIDTH], tl.float32)
        query_square = tl.zeros([SAMPLES, WIDTH], tl.float32)
        for start in tl.range(0, chunk, WIDTH, num_stages=STAGES):
            within = start + tl.arange(0, WIDTH)[None, :]
            at = group * chunk + within
            k = tl.load(key_rows + at, mask=(rows < N)[:, None] & (within < chunk), other=0.0).to(tl.float32)
            q = tl.load(query_rows + at, mask=(samples < B)[:, None] & (within < chunk), other=0.0).to(tl.float32)
            # spread by hand: older versions of tl.fma do not
            spread_q = tl.broadcast_to(q[:, None, :], [SAMPLES, KEYS, WIDTH])
            spread_k = tl.broadcast_to(k[None, :, :], [SAMPLES, KEYS, WIDTH])
            product = tl.fma(spread_q, spread_k, product)
            key_square = tl.fma(k, k, key_square)
            query_square = tl.fma(q, q, query_square)
        cosine = _over_norm(tl.sum(product, 2), tl.sqrt_rn(tl.sum(key_square, 1))[None, :])
        if not UNIT:
            cosine = _over_norm(cosine, tl.sqrt_rn(tl.sum(query_square, 1))[:, None])
        total += cosine
    return tl.div_rn(total, groups * tl.full([SAMPLES, KEYS], 1.0, tl.float32))


@triton.jit
def _over_norm(x, norm):
    """x / norm, and 0 where the norm is 0."""
    x, norm = tl.broadcast(x, norm)
    return tl.where(norm == 0.0, 0.0, tl.div_rn(x, tl.where(norm == 0.0, 1.0, norm)))


@triton.jit
def _pack(similarity, rows):
    """Integers [SAMPLES, K] that order by similarity, then by lowest row; a NaN comes first, as torch sorts it."""
    similarity = tl.where(similarity == 0.0, 0.0, similarity)  # -0 equals 0
    bits = similarity.to(tl.int32, bitcast=True)
    bits = tl.where(similarity != similarity, NAN_BITS, bits)
    order = tl.where(bits < 0, bits ^ ROW_MASK, bits)
    return (order.to(tl.int64) << 32) | (rows ^ ROW_MASK).to(tl.int64)[None, :]


@triton.jit
def _keep_best(best, ranks, M, SAMPLES: tl.constexpr, SLOTS: tl.constexpr):
    """The M highest of `best` [SAMPLES, SLOTS] and `ranks` [SAMPLES, K], descending."""
    slots = tl.arange(0, SLOTS)[None, :]
    last = tl.min(tl.where(slots < M, best, HIGHEST), 1)
    # late in a long pool most rounds change nothing
    if tl.max((tl.max(ranks, 1) > last).to(tl.int32), 0) > 0:
        held = best
        previous = tl.full([SAMPLES], HIGHEST, tl.int64)
        for m in range(M):
            from_ranks = tl.max(tl.where(ranks < previous[:, None], ranks, LOWEST), 1)
            from_held = tl.max(tl.where(held < previous[:, None], held, LOWEST), 1)
            previous = tl.maximum(from_ranks, from_held)
            best = tl.where(slots == m, previous[:, None], best)
    return best


@triton.jit
def _finish(best, samples, B, M, copies, similarity, weight, index, SLOTS: tl.constexpr):
    """Unpacks, weighs and stores; each sample `copies` times (one selection for a whole batch)."""
    slots = tl.arange(0, SLOTS)[None, :]
    exists = (samples < B)[:, None] & (slots < M)
    order = (best >> 32).to(tl.int32)
    value = tl.where(order < 0, order ^ ROW_MASK, order).to(tl.float32, bitcast=True)
    row = (best & ROW_MASK) ^ ROW_MASK
    positive = tl.where(exists & ((value > 0.0) | (value != value)), value, 0.0)
    total = tl.sum(positive, 1)[:, None]
    # all of them, unless the caller skipped the count of allowed rows
    usable = tl.where(exists & (value != float("-inf")), 1.0, 0.0)
    uniform = tl.div_rn(usable, tl.maximum(tl.broadcast_to(tl.sum(usable, 1)[:, None], usable.shape), 1.0))
    small = tl.broadcast_to(total < FLOOR, usable.shape)
    share = tl.div_rn(positive, tl.where(small, 1.0, tl.broadcast_to(total, usable.shape)))
    share = tl.where(small, uniform, share)
    for copy in range(copies):
        at = (samples.to(tl.int64)[:, None] + copy) * M + slots
        tl.store(similarity + at, value, mask=exists)
        tl.store(weight + at, share, mask=exists)
        tl.store(index + at, row, mask=exists)


# What depends on B, or on where a view of the batch begins, may not choose the code: a sample alone and the same sample
# in a batch run the same instructions.
@triton.jit(
    do_not_specialize=["B", "N", "M", "copies", "rounds"],
    do_not_specialize_on_alignment=["query", "allowed", "candidates", "similarity", "weight", "index"],
)
def scan_kernel(
    query,  # [B, D]
    keys,  # [N, D]
    allowed,  # [B, N] of 0 and 1, or None
    candidates,  # [B, slices, M], if SPLIT
    similarity,  # [B * copies, M], and the next two likewise, if not
    weight,
    index,
    B,
    N,
    M,
    chunk,
    groups,
    copies,
    rounds,
    key_stride,
    allowed_stride_b,
    allowed_stride_n,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    SAMPLES: tl.constexpr,
    KEYS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # neighbouring programs read the same keys
    samples = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    piece = tl.program_id(1)
    SPAN: tl.constexpr = STEPS * KEYS
    best = tl.full([SAMPLES, SLOTS], LOWEST, tl.int64)
    for turn in range(rounds):
        first = (piece * rounds + turn) * SPAN
        wide = tl.zeros([SAMPLES, STEPS, KEYS], tl.float32)
        for step in range(STEPS):
            near = first + step * KEYS + tl.arange(0, KEYS)
            cosines = _cosines(
                query, keys, samples, near, B, N, chunk, groups, key_stride, UNIT, SAMPLES, KEYS, WIDTH, STAGES
            )  # fmt: skip
            wide = tl.where((tl.arange(0, STEPS) == step)[None, :, None], cosines[:, None, :], wide)
        rows = first + tl.arange(0, SPAN)
        found = tl.reshape(wide, [SAMPLES, SPAN])
        if allowed is not None:
            at = samples.to(tl.int64)[:, None] * allowed_stride_b + rows.to(tl.int64)[None, :] * allowed_stride_n
            may = tl.load(allowed + at, mask=(samples < B)[:, None] & (rows < N)[None, :], other=0)
            found = tl.where(may != 0, found, float("-inf"))
        ranks = tl.where((rows < N)[None, :], _pack(found, rows), LOWEST)
        best = _keep_best(best, ranks, M, SAMPLES, SLOTS)
    if SPLIT:
        slots = tl.arange(0, SLOTS)[None, :]
        at = (samples.to(tl.int64)[:, None] * tl.num_programs(1) + piece) * M + slots
        tl.store(candidates + at, best, mask=(samples < B)[:, None] & (slots < M))
    else:
        _finish(best, samples, B, M, copies, similarity, weight, index, SLOTS)


@triton.jit(
    do_not_specialize=["B", "M", "count", "copies"],
    do_not_specialize_on_alignment=["candidates", "similarity", "weight", "index"],
)
def merge_kernel(
    candidates,  # [B, count]
    similarity,  # [B * copies, M], and the next two likewise
    weight,
    index,
    B,
    M,
    count,
    copies,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    samples = tl.program_id(0) + tl.arange(0, 1)
    best = tl.full([1, SLOTS], LOWEST, tl.int64)
    for start in range(0, count, TILE):
        places = (start + tl.arange(0, TILE))[None, :]
        at = samples.to(tl.int64)[:, None] * count + places
        ranks = tl.load(candidates + at, mask=places < count, other=LOWEST)
        best = _keep_best(best, ranks, M, 1, SLOTS)
    _finish(best, samples, B, M, copies, similarity, weight, index, SLOTS)


@triton.jit(do_not_specialize=["B"])
def mean_unit_kernel(
    query,  # [B, D]
    mean,  # [1, D]
    B,
    chunk,
    groups,
    SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,  # chunk, rounded up
):
    """Mean over the batch of the normalised chunks: its product with a key's is the mean of the cosines."""
    columns = tl.arange(0, COLUMNS)[None, :]
    at = tl.program_id(0) * chunk + columns
    total = tl.zeros([1, COLUMNS], tl.float32)
    for start in range(0, B, SAMPLES):
        samples = (start + tl.arange(0, SAMPLES))[:, None]
        inside = (samples < B) & (columns < chunk)
        q = tl.load(query + samples.to(tl.int64) * (chunk * groups) + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(_over_norm(q, tl.sqrt_rn(tl.sum(q * q, 1))[:, None]), 0)[None, :]
    tl.store(mean + at, tl.div_rn(total, B * tl.full([1, COLUMNS], 1.0, tl.float32)), mask=columns < chunk)


@triton.jit(do_not_specialize=["B", "N", "M"])
def gradient_kernel(
    grad,  # [B, M]
    query,  # [B, D]
    keys,  # [N, D]
    index,  # [B, M]
    out,  # [N, D]
    B,
    N,
    M,
    chunk,
    groups,
    grad_stride_b,
    grad_stride_m,
    key_stride,
    BLOCK: tl.constexpr,  # samples looked through at once
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,  # chunk, rounded up
    SLOTS: tl.constexpr,
):
    """One group of KEYS rows: the samples that chose one of them, in order of the batch."""
    first = tl.program_id(0) * KEYS
    rows = first + tl.arange(0, KEYS)
    columns = tl.arange(0, COLUMNS)
    at = tl.program_id(1) * chunk + columns
    slots = tl.arange(0, SLOTS)
    pull = tl.zeros([KEYS, COLUMNS], tl.float32)
    chosen = 0
    for start in range(0, B, BLOCK):
        samples = start + tl.arange(0, BLOCK)
        several = (samples < B)[:, None] & (slots < M)[None, :]
        block = tl.load(index + samples.to(tl.int64)[:, None] * M + slots[None, :], mask=several, other=-1)
        hits = tl.sum(tl.sum(((block >= first) & (block < first + KEYS)).to(tl.int32), 1), 0)
        chosen += hits
        if hits > 0:
            for b in range(start, tl.minimum(start + BLOCK, B)):
                sample = tl.full([], 0, tl.int64) + b
                choice = tl.load(index + sample * M + slots, mask=slots < M, other=-1)
                if tl.sum(((choice >= first) & (choice < first + KEYS)).to(tl.int32), 0) > 0:
                    g = tl.load(grad + sample * grad_stride_b + slots * grad_stride_m, mask=slots < M, other=0.0)
                    here = choice[None, :] == rows[:, None]
                    g = tl.sum(
                        tl.where(here, g.to(tl.float32)[None, :], 0.0), 1
                    )  # [KEYS]: the rows of one sample differ
                    q = tl.load(query + sample * (chunk * groups) + at, mask=columns < chunk, other=0.0).to(tl.float32)
                    unit = _over_norm(q, tl.sqrt_rn(tl.sum(q * q, 0)))
                    pull += g[:, None] * unit[None, :]
    where = rows.to(tl.int64)[:, None]
    inside = (rows < N)[:, None] & (columns < chunk)[None, :]
    target = out + where * (chunk * groups) + at[None, :]
    if chosen > 0:
        k = tl.load(keys + where * key_stride + at[None, :], mask=inside, other=0.0).to(tl.float32)
        norm = tl.sqrt_rn(tl.sum(k * k, 1))[:, None]
        unit = _over_norm(k, norm)
        across = _over_norm(pull - unit * tl.sum(unit * pull, 1)[:, None], norm * groups)
        tl.store(target, across.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(target, tl.zeros([KEYS, COLUMNS], out.dtype.element_ty), mask=inside)


def select(
    query: Tensor, keys: Tensor, top_m: int, allowed: Tensor | None, groups: int, by_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = query.shape
    similarity = query.new_empty((batch, top_m), dtype=torch.float32)
    weight = torch.empty_like(similarity)
    index = query.new_empty((batch, top_m), dtype=torch.int64)
    outputs = similarity, weight, index
    if batch == 0:
        return outputs
    query, keys = _query(query), _rows(keys)
    if allowed is not None:
        if allowed.dim() == 1:
            allowed = allowed.expand(batch, -1)
        elif by_batch:
            allowed = allowed.all(0, keepdim=True)
        allowed = allowed.view(torch.uint8)
    strides = (0, 0) if allowed is None else allowed.stride()
    copies = 1
    if by_batch:
        query, batch, copies = _mean_unit(query, groups), 1, batch
    cut = plan(keys.shape[0], width, top_m, groups)
    split = cut.slices > 1
    candidates = index.new_empty((batch, cut.slices, top_m)) if split else None
    scan_kernel[(triton.cdiv(batch, cut.SAMPLES), cut.slices)](
        query, keys, allowed, candidates, *outputs,
        batch, keys.shape[0], top_m, width // groups, groups, copies, cut.rounds, keys.stride(0), *strides,
        **_scan_constants(cut, by_batch), **_options(cut.warps),
    )  # fmt: skip
    if split:
        count = cut.slices * top_m
        merge_kernel[(batch,)](
            candidates, *outputs, batch, top_m, count, copies, **_merge_constants(cut, top_m), **_options()
        )
    return outputs


def select_backward(grad: Tensor, query: Tensor, keys: Tensor, index: Tensor, groups: int, by_batch: bool) -> Tensor:
    if query.shape[0] == 0 or keys.numel() == 0:
        return torch.zeros_like(keys, memory_format=torch.contiguous_format)
    out = torch.empty_like(keys, memory_format=torch.contiguous_format)
    batch, top_m = index.shape
    if by_batch:
        grad = (grad.float().sum(0) / batch).expand(batch, top_m)
    query, keys, index = _query(query), _rows(keys), index.contiguous()
    constants, warps = _gradient_constants(keys.shape[1] // groups, keys.shape[0], top_m)
    gradient_kernel[(triton.cdiv(keys.shape[0], constants["KEYS"]), groups)](
        grad, query, keys, index, out,
        batch, keys.shape[0], top_m, keys.shape[1] // groups, groups, *grad.stride(), keys.stride(0),
        **constants, **_options(warps),
    )  # fmt: skip
    return out


def _query(query: Tensor) -> Tensor:
    return (query.float() if query.dtype == torch.float64 else query).contiguous()


def _rows(keys: Tensor) -> Tensor:
    """Rows may lie apart (a slice of wider ones), their entries not."""
    return keys if keys.stride(1) == 1 else keys.contiguous()


def _mean_unit(query: Tensor, groups: int) -> Tensor:  # [B, D] -> [1, D]
    mean = query.new_empty((1, query.shape[1]), dtype=torch.float32)
    chunk = query.shape[1] // groups
    constants, warps = _mean_constants(chunk)
    mean_unit_kernel[(groups,)](query, mean, query.shape[0], chunk, groups, **constants, **_options(warps))
    return mean


def _scan_constants(cut: Plan, unit: bool) -> dict[str, Any]:
    return {"UNIT": unit, "SPLIT": cut.slices > 1} | {name: cut._asdict()[name] for name in Plan._fields[:6]}


def _merge_constants(cut: Plan, top_m: int) -> dict[str, Any]:
    return {"TILE": max(32, min(2048, triton.next_power_of_2(cut.slices * top_m))), "SLOTS": cut.SLOTS}


def _mean_constants(chunk: int) -> tuple[dict[str, Any], int]:
    columns = max(16, triton.next_power_of_2(chunk))
    return {"SAMPLES": max(1, min(16, 2048 // columns)), "COLUMNS": columns}, _warps(columns)


def _gradient_constants(chunk: int, rows: int, top_m: int) -> tuple[dict[str, Any], int]:
    columns = max(16, triton.next_power_of_2(chunk))
    constants = {
        "BLOCK": 16,
        "KEYS": max(1, min(32, 2048 // columns, triton.next_power_of_2(rows))),
        "COLUMNS": columns,
        "SLOTS": triton.next_power_of_2(top_m),
    }
    return constants, _warps(columns)


def _warps(columns: int) -> int:
    """A whole chunk lies in registers."""
    return max(4, columns // 512)


def _options(warps: int = 4) -> dict[str, Any]:
    # fusing a product and a sum of the compiler's choice could round equal rows differently; what is fused says tl.fma
    registers = min(REGISTERS, 2**16 // (32 * warps))
    return {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": False, "maxnreg": registers}


def shipped() -> list[Shipped]:
    return [kernel._replace(options=_options(kernel.num_warps)) for kernel in _shipped()]


def _shipped() -> Iterator[Shipped]:
    # (N, D, M, groups): a task's block, a pool in one launch, larger ones in two
    shapes = (
        (8, 384, 4, 1),
        (64, 384, 4, 1),
        (512, 384, 4, 4),
        (2048, 40, 8, 1),
        (2048, 384, 4, 1),
        (100_000, 768, 4, 1),
        (100_000, 4096, 64, 4),
        (64, 8192, 4, 1),
    )
    outputs = {"similarity": "*fp32", "weight": "*fp32", "index": "*i64"}
    sizes = {name: "i32" for name in ("B", "N", "M", "chunk", "groups", "copies", "rounds", "key_stride")}
    strides = {"allowed_stride_b": "i32", "allowed_stride_n": "i32"}
    seen = set()
    for rows, width, top_m, groups in shapes:
        cut = plan(rows, width, top_m, groups)
        kernels = []
        for dtype in ("*fp16", "*bf16", "*fp32"):
            for unit, mask in ((False, None), (False, "*u8"), (True, "*u8")):
                constants = _scan_constants(cut, unit)
                signature = {"query": "*fp32" if unit else dtype, "keys": dtype, **outputs, **sizes, **strides}
                for name, given in (("allowed", mask), ("candidates", "*i64" if cut.slices > 1 else None)):
                    if given is None:
                        constants[name] = None
                    else:
                        signature[name] = given
                kernels.append(Shipped(scan_kernel, signature, constants, cut.warps))
            signature = {"query": dtype, "mean": "*fp32", "B": "i32", "chunk": "i32", "groups": "i32"}
            constants, warps = _mean_constants(width // groups)
            kernels.append(Shipped(mean_unit_kernel, signature, constants, warps))
            signature = {"grad": "*fp32", "query": dtype, "keys": dtype, "index": "*i64", "out": dtype}
            signature |= {name: "i32" for name in ("B", "N", "M", "chunk", "groups")}
            signature |= {name: "i32" for name in ("grad_stride_b", "grad_stride_m", "key_stride")}
            constants, warps = _gradient_constants(width // groups, rows, top_m)
            kernels.append(Shipped(gradient_kernel, signature, constants, warps))
        if cut.slices > 1:
            signature = {"candidates": "*i64", **outputs, "B": "i32", "M": "i32", "count": "i32", "copies": "i32"}
            kernels.append(Shipped(merge_kernel, signature, _merge_constants(cut, top_m)))
        for kernel in kernels:
            key = (kernel.kernel.__name__, str(kernel.signature), str(kernel.constants), kernel.num_warps)
            if key not in seen:
                seen.add(key)
                yield kernel
