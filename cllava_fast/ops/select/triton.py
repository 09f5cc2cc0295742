"""select in Triton: one launch for a small pool, a scan and a merge for a large one; one launch backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cllava_fast.ops.native import dense_rows
from cllava_fast.ops.select.native import as_bytes
from cllava_fast.ops.select.reference import in_range
from cllava_fast.ops.select.triton_kernels import gradient_kernel, mean_unit_kernel, merge_kernel, scan_kernel
from cllava_fast.ops.triton_backend import Shipped

ONE_LAUNCH_ROWS = 2048
# One program reads the whole pool of a one-launch call, at no more than a 132nd of an H100's L2 bandwidth: about 10 us
# for this many entries in float32, the price of the second launch and its round trip.
ONE_LAUNCH_ENTRIES = 2**18
# The most that a thread here needs, with triton 3.6 to 3.9; without a word, ptxas spills a few bytes to reach the next
# higher occupancy.
REGISTERS = 176
MOST_SLICES = 512  # programs per query tile of a scan; bounds what the merge reads


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
    query, keys = _query(query), dense_rows(keys)
    allowed = None if allowed is None else as_bytes(allowed, batch, by_batch)
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
    query, keys, index = _query(query), dense_rows(keys), index.contiguous()
    constants, warps = _gradient_constants(keys.shape[1] // groups, keys.shape[0], top_m)
    gradient_kernel[(triton.cdiv(keys.shape[0], constants["KEYS"]), groups)](
        grad, query, keys, index, out,
        batch, keys.shape[0], top_m, keys.shape[1] // groups, groups, *grad.stride(), keys.stride(0),
        **constants, **_options(warps),
    )  # fmt: skip
    return out


def _query(query: Tensor) -> Tensor:
    return (in_range(query).float() if query.dtype == torch.float64 else query).contiguous()


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
        yield from kernels
