"""The kernels of select.

Every (query, key) product is a chain of explicit float32 fmas over fixed columns, so a similarity depends on nothing
but its two vectors: not on the batch, not on where in the pool the key lies. A similarity and its row are then packed
into one integer whose order is "higher similarity, then lower row": a top-M of distinct integers has one answer,
however the pool was cut.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from cllava_fast.ops.select.reference import SUM_FLOOR

FLOOR = tl.constexpr(SUM_FLOOR)
LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)
ROW_MASK = tl.constexpr(2**31 - 1)
NAN_BITS = tl.constexpr(0x7FC00000)


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
