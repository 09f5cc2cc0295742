"""inject and its gradients beside the frozen linear and what a user would write otherwise.

One token a sample is decoding, which has no backward.
"""

from __future__ import annotations

import torch

from benchmarks import baselines, measure
from benchmarks.measure import Unavailable, Way, Work
from cllava_fast import ops
from cllava_fast.ops.inject import cases, few_calls

OP = "inject"
AUTOTUNED, FRAMED, FEW_CALLS = "compiled, max-autotune", "framed weight", "few calls"
WAYS = (
    "frozen linear", "inject", "smart eager", "compiled", AUTOTUNED, "grouped_mm", "dense by sample", "dense by batch",
    "PEFT LoRA", "PEFT mixed batch", "expert loop", "one product", "gathered", FRAMED, FEW_CALLS,
)  # fmt: skip
# What takes coefficients of tokens, or rows that share one A; and what does not.
OF_ROUTERS = {
    "expert loop": baselines.expert_loop,
    "one product": baselines.one_product,
    "gathered": baselines.gathered,
}
OF_SAMPLES = {
    "smart eager", "compiled", AUTOTUNED, "grouped_mm", "dense by sample", "dense by batch", FRAMED,
}  # fmt: skip
BROKEN_DOWN = ("inject", "smart eager", "frozen linear")


def points(device, quick):
    chosen = cases.QUICK if quick else cases.BENCH if device == "cpu" else cases.BENCH_GPU
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return measure.points(chosen, [dtype], device, directions, lambda case: case.S == 1 or case == cases.ONE_SAMPLE)


def directions(case):
    if case == cases.ONE_SAMPLE:
        return (measure.BOTH,)
    return measure.DIRECTIONS if case.S > 1 else (measure.FORWARD,)


def broken_down(point):
    """Each pass of the shapes that the bounds are of: kernels of both together could not be told apart."""
    return point.case in cases.BENCH_GPU[:2] and point.direction != measure.BOTH


def inputs(case, dtype, device):
    """x, weight, A, B, index, coefficient, and the past's A, B, coefficient."""
    rng = torch.Generator(device).manual_seed(0)
    tensors = [*cases.make(case, dtype, rng)[:6], *(cases.make_past(case, dtype, rng) or ())]
    if case.S > 1:
        # the past's factors are frozen, how strongly it acts is trained
        for position in (0, 2, 3, 5, 8)[: 5 if case.past else 4]:
            tensors[position].requires_grad_()
    return tuple(tensors)


def way(name, point, tensors):
    case = point.case
    x, weight, A, B, index, coefficient, *past = tensors
    if name == "frozen linear":
        return Way(baselines.frozen, exact_frozen, (x, weight), "the floor", rival=False)
    if name == FEW_CALLS:
        if case != cases.ONE_SAMPLE:
            raise Unavailable("for training steps that wait for Python")
        return few_calls_way(x, weight, A, B, index, coefficient, *past)
    if point.case.per_token or point.case.shared:
        return of_router(name, point, tensors)
    if name in OF_ROUTERS:
        raise Unavailable("for routers")
    if name.startswith("PEFT"):
        measure.need_peft()
        if name == "PEFT LoRA":
            return peft_lora(x, weight, *low_rank(0, A, B, index, coefficient, *past))
        if case.S > 1 or case.past:
            raise Unavailable("for inference only: it refuses to train")
        if point.launch == measure.GRAPH:
            raise Unavailable("copies the numbers of its samples to the device: no CUDA graph")
        return peft_mixed_batch(x, weight, A, B, index, coefficient)
    if name == FRAMED:
        if case.S == 1 or case.selection == "distinct":
            raise Unavailable("for training, in which the rows are few")
        frame = baselines.frame_of(weight, (case.N + case.past) * case.R)
        return Way(baselines.framed, exact_framed, (x, frame, *tensors[2:]), "the frozen weight lies in a larger one")
    if name == "dense by batch":
        return Way(baselines.dense_by_batch, exact_by_batch, tensors, measure.BY_BATCH, rival=False)
    if name in ("compiled", AUTOTUNED):
        options = compile_options(name, point)
        return Way(measure.compiled(baselines.smart_eager, **options), exact_by_sample, tensors)
    if name == "grouped_mm" and baselines.grouped_mm() is None:
        raise Unavailable(f"torch {torch.__version__} has none")
    functions = {
        "smart eager": baselines.smart_eager,
        "grouped_mm": baselines.grouped,
        "dense by sample": baselines.dense_by_sample,
    }
    backend = ops.dispatch.AUTO if name in WAYS else name
    return Way(functions.get(name, inject), exact_by_sample, tensors, backend=backend)


def of_router(name, point, tensors):
    case = point.case
    if name in OF_SAMPLES or name.startswith("PEFT"):
        raise Unavailable("takes no coefficients of tokens, and no A that rows share")
    if name in ("expert loop", "one product") and case.selection != "every":
        raise Unavailable("computes all rows")
    if name == "gathered" and not case.shared:
        raise Unavailable("for rows that share one A")
    backend = ops.dispatch.AUTO if name in WAYS else name
    return Way(OF_ROUTERS.get(name, inject), exact_of_router, tensors, backend=backend)


def compile_options(name, point):
    case, cuda = point.case, torch.cuda.is_available()
    if case.selection != "uniform":
        raise Unavailable("compiled once a shape: how rows are selected does not change the code")
    if not cuda and case in cases.QUICK:
        raise Unavailable("compiling takes longer than a quick run")
    if case == cases.SHORTENED:
        raise Unavailable("compiled with the seven tasks' rows in full")
    if name != AUTOTUNED:
        return {}
    if not cuda or case.S == 1 or case.past:
        raise Unavailable("autotuned on a GPU only, at the largest shape")
    return {"mode": "max-autotune-no-cudagraphs"}


def inject(x, weight, A, B, index, coefficient, *past):
    return ops.inject(x, weight, A, B, index, coefficient, past=past or None, check_values=False)


def few_calls_way(x, weight, A, B, index, coefficient, past_A, past_B, past_coefficient):
    """With the strengths that all layers have in common."""
    strength = few_calls.column_strength(index, coefficient, *B.shape[:2], past_coefficient, past_B.shape[1], 1.0)
    inputs = x, weight, A, B, past_A, past_B, strength.detach().requires_grad_()
    return Way(in_few_calls, exact_by_column, inputs, "what layers of a patched model take here", rival=False)


def in_few_calls(x, weight, A, B, past_A, past_B, strength):
    return few_calls.inject(x, weight, None, None, A, B, past_A, past_B, strength)


def exact_by_column(x, weight, A, B, past_A, past_B, strength):
    down, up = (torch.cat([own.flatten(0, 1), past.flatten(0, 1)]) for own, past in ((A, past_A), (B, past_B)))
    return torch.stack([x[b] @ (weight + (up.t() * strength[b]) @ down).t() for b in range(len(x))])


def low_rank(sample, A, B, index, coefficient, *past):
    """One sample's increment as two factors: [K, d_in], [d_out, K]."""
    pools = [[tensor.detach() for tensor in pool] for pool in pools_of(A, B, index, coefficient, *past)]
    down = torch.cat([A[index[sample]].flatten(0, 1) for A, _, index, _ in pools])
    up = torch.cat([(c[sample, :, None, None] * B[index[sample]]).flatten(0, 1) for _, B, index, c in pools])
    return down, up.t().contiguous().to(down.dtype)


def peft_lora(x, weight, down, up):
    layer = baselines.peft_lora(weight, down, up)
    trained = layer.lora_A["sample0"].weight, layer.lora_B["sample0"].weight
    if not x.requires_grad:
        layer.requires_grad_(False)
    return Way(
        lambda x, *_: layer(x),
        exact_lora,
        (x, weight, *trained),
        "cannot select by sample",
        rival=False,
    )


def peft_mixed_batch(x, weight, A, B, index, coefficient):
    adapters = [low_rank(b, A, B, index, coefficient) for b in range(len(x))]
    layer, names = baselines.peft_mixed_batch(weight, adapters)
    layer.requires_grad_(False)
    function = lambda x, *_: layer(x, adapter_names=names)  # noqa: E731
    return Way(function, exact_by_sample, (x, weight, A, B, index, coefficient), "one adapter a sample")


def exact_frozen(x, weight):
    return x @ weight.t()


def exact_lora(x, weight, down, up):
    return x @ weight.t() + x @ down.t() @ up.t()


def pools_of(A, B, index, coefficient, *past):
    """A, B, index, coefficient of the block, and likewise of the past."""
    every = [(A, B, index, coefficient)]
    if past:
        past_A, past_B, past_coefficient = past
        rows = torch.arange(len(past_A), device=index.device).expand(len(past_coefficient), -1)
        every.append((past_A, past_B, rows, past_coefficient))
    return every


def exact_by_sample(x, weight, *given):
    """By the dense form: slow, and independent of the op that is measured."""
    samples = []
    for b in range(len(x)):
        total = weight
        for A, B, index, coefficient in pools_of(*given):
            rows = coefficient[b].double().repeat_interleave(A.shape[1])[:, None] * B[index[b]].flatten(0, 1)
            total = total + rows.t() @ A[index[b]].flatten(0, 1)
        samples.append(x[b] @ total.t())
    return torch.stack(samples)


def exact_of_router(x, weight, A, B, index, coefficient):
    """Pair by pair."""
    strength = (coefficient if coefficient.dim() == 3 else coefficient.unsqueeze(1)).double()
    y = x @ weight.t()
    for pair in range(index.shape[1]):
        rows = index[:, pair]
        low = x @ (A if len(A) == 1 else A[rows]).transpose(1, 2)  # [B, S, R]
        y = y + strength[:, :, pair, None] * (low @ B[rows])
    return y


def exact_framed(x, frame, A, B, *given):
    return exact_by_sample(x, frame[: B.shape[2], : A.shape[2]], A, B, *given)


def exact_by_batch(x, weight, *given):
    first = [tensor[:1] if i in (2, 3, 6) else tensor for i, tensor in enumerate(given)]
    return exact_by_sample(x.flatten(0, 1).unsqueeze(0), weight, *first).view(*x.shape[:2], -1)


def work(point):
    case, size = point.case, point.dtype.itemsize
    tokens, columns = case.B * case.S, (case.P + case.past) * case.R
    rows = case.past + (case.P if case.selection == "identical" else min(case.N, case.B * case.P))
    of_A = 1 + case.past if case.shared else rows
    factors = (of_A * case.d_in + rows * case.d_out) * case.R * size
    weight = case.d_in * case.d_out
    product = 2 * tokens * weight
    # of rows that share one A, x is projected once, and the sum of a sample's B is all that its tokens need
    once = (1 + case.past) * case.R if case.shared else columns
    thin_in = 2 * tokens * once * case.d_in
    thin_out = 2 * tokens * (columns if case.per_token else once) * case.d_out
    forward = Work(tokens * (case.d_in + case.d_out) * size + weight * size + factors, product + thin_in + thin_out)
    # of x, A, B and the coefficients; the past's rows have none
    pairs_in = 1 if case.shared else case.P
    pairs_out = case.P if case.per_token else pairs_in
    trained = 2 * tokens * case.R * (pairs_in * case.d_in + pairs_out * case.d_out)
    backward = Work(
        tokens * (2 * case.d_in + case.d_out) * size + weight * size + 2 * factors,
        product + 2 * thin_in + thin_out + trained,
    )
    return forward.then(backward, point.direction)


def test_inject(comparison):
    comparison()
