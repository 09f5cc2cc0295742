"""Answers of fixed length, greedily, for requests whose samples need different rows, beside the unpatched model.

Eight tasks have been learned; each sample brings four rows and the context of the tasks before theirs. A token is right
where no other has a higher logit in the same model with a dense weight for each sample, up to rounding.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from benchmarks import exact, measure, models
from benchmarks.measure import Job, Point, Tokens

OP, OWN = "generate", "patched"
WAYS = ("unpatched model", "patched", "PEFT mixed batch")
BACKENDS = ("reference",)
BROKEN_DOWN = ("patched", "unpatched model")
# A token drawn at random lies about as far below the best as the largest logit is from 0; the unpatched model's worst
# token in bfloat16, a twentieth of that.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 0.12}
TASKS = 8


class Case(NamedTuple):
    size: models.Size
    B: int
    new: int

    def __str__(self):
        return f"{self.size.name}-B{self.B}-S{self.size.image_tokens + self.size.text}-new{self.new}-tasks{TASKS}"


def points(device, quick):
    size = models.size_for(device, quick)
    case = Case(size, 4, 4) if quick else Case(size, 4, 16) if device == "cpu" else Case(size, 16, 64)
    dtype, launch = (torch.float32, measure.HOST) if device == "cpu" else (torch.bfloat16, measure.IDLE)
    return [Point(case, dtype, measure.FORWARD, launch)]


def broken_down(point):
    return point.launch == measure.HOST  # on a GPU, too many kernels for the profiler


class Setup:
    """A patched model that has learned its tasks, requests, and what each sample's rows do to each linear."""

    def __init__(self, case, dtype, device):
        self.case, self.dtype = case, dtype
        self.base = models.base(case.size, dtype, device)
        self.patched = models.patched(self.base, TASKS, learning=False)
        pool = self.patched.increments.pool
        self.batch = models.batch(case.size, case.B, pool.keys, dtype)
        del self.batch["labels"]
        self.plain = models.plain(self.batch)
        self.rows = exact.rows(pool, exact.FINER[dtype])
        every = torch.ones_like(pool.row_task, dtype=torch.bool)
        self.strengths = exact.strengths(self.batch["query"], self.rows, every, models.TOP_M)  # [B, N]

    def token_error(self, offset):
        """The finer model is made for each use: a 7B one leaves no room for anything else."""
        judged = []  # most ways give the same answers

        def error(found):
            for answers, worst in judged:
                if torch.equal(found, answers):
                    return worst
            worst = exact.token_error(exact.model(self.base, self.dtype, offset), self.plain, found)
            judged.append((found, worst))
            return worst

        return error

    @functools.cached_property
    def mixed_error(self):
        return self.token_error(self.rows.offset(self.strengths))

    @functools.cached_property
    def bare(self):
        return models.takes_features(models.share(self.base))


def inputs(case, dtype, device):
    return Setup(case, dtype, device)


def way(name, point, setup):
    new = point.case.new
    if name == "unpatched model":
        return Job(generation(setup.bare, setup.plain, new), setup.token_error(None), "the floor", limits=LIMITS)
    if name == "PEFT mixed batch":
        model, adapters = peft_mixed_batch(setup)
        run = generation(model, setup.plain | {"adapter_names": adapters}, new)
        return Job(run, setup.mixed_error, "one adapter a sample", rival=True, limits=LIMITS)
    backend = measure.ops.dispatch.AUTO if name == OWN else name
    return Job(generation(setup.patched, setup.batch, new), setup.mixed_error, backend=backend, limits=LIMITS)


def generation(model, inputs, new):
    def run():
        # without an end-of-sequence token it is as many as asked for
        return model.generate(**inputs, max_new_tokens=new, do_sample=False, num_beams=1)  # [B, S + new]

    return run


def peft_mixed_batch(setup):
    measure.need_peft()
    from peft import LoraConfig, get_peft_model

    model, names = None, [f"sample{b}" for b in range(setup.case.B)]
    skeleton = models.takes_features(models.share(setup.base))
    for name, strength in zip(names, setup.strengths, strict=True):
        acting = strength.nonzero()[:, 0]
        rank = len(acting) * models.RANK
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=models.TARGETS, task_type="CAUSAL_LM")
        options = {"adapter_name": name, "autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
        if model is None:
            model = get_peft_model(skeleton, config, **options)
        else:
            model.add_adapter(peft_config=config, **options)
        for path, layer in models.adapted(skeleton).items():
            A, B = (factor[acting] for factor in setup.rows.factors[path])
            up = (strength[acting, None, None] * B).flatten(0, 1).t()  # [d_out, K]
            for weights, factor in ((layer.lora_A, A.flatten(0, 1)), (layer.lora_B, up)):
                weights[name].weight = torch.nn.Parameter(factor.to(setup.dtype).contiguous(), requires_grad=False)
    return model.eval(), names


def work(point):
    return Tokens(point.case.B * point.case.new)


def test_generate(comparison):
    comparison()
