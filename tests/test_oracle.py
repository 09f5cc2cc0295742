"""Models that select by instructions, against a slow oracle that is written from docs/method.md and docs/methods.md.

The oracle is a float64 LLaVA that nobody patched: one sample at a time, no padding, a dense offset in every linear, all
gradients by autograd. Of the library it uses the sentence encoder, and the pool's tensors by their names. Coefficients,
and rows that are being learned, are float32 there, which bounds how near the two can come.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cllava_fast as cf
from cllava_fast.methods.slm import SlmConfig
from tests.helpers import QUESTIONS, image, inputs, take

TASKS = 3  # the last of them is being learned, or learned like the others


def cosines(query: Tensor, keys: Tensor, groups: int) -> Tensor:
    """``[N]``, of ``[D]`` and ``[N, D]``."""
    parts = zip(query.chunk(groups), keys.chunk(groups, 1), strict=True)
    return torch.stack([F.cosine_similarity(q[None], k, 1) for q, k in parts]).mean(0)


def shares(similarity: Tensor, top_m: int) -> Tensor:
    """``[N]``: what the M nearest rows weigh, and 0 for all others."""
    chosen = torch.zeros_like(similarity).scatter(0, similarity.topk(top_m).indices, 1)
    positive = similarity.clamp(min=0) * chosen
    return positive / positive.sum() if positive.sum() >= 1e-6 else chosen / top_m


def groups_of(config: Any) -> int:
    return getattr(config, "groups", 2 if config.surrogate == "text+image" else 1)


class Oracle:
    """What a pool says, in float64; rows that are being learned are ``leaves``."""

    def __init__(self, model: Any) -> None:
        pool = model.increments.pool
        self.config, self.learning = model.increments.config, model.training
        trained = {name for name, _ in pool.named_parameters()} - {"block_keys"}
        state = {n: t.double() if t.is_floating_point() else t for n, t in pool.state().items()}
        self.leaves = {name: state[name].requires_grad_() for name in trained}
        self.paths = [n.removeprefix("layers.").removesuffix(".A") for n in state if n.endswith(".A")]
        self.state = state

    def rows(self, name: str) -> Tensor:
        """Those of all tasks, the one that is being learned among them."""
        parent, dot, short = name.rpartition(".")
        block = [self.state[f"{parent}{dot}block_{short}"]] if self.learning else []
        return torch.cat([self.state[name], *block])

    def offsets(self, queries: Tensor, b: int) -> dict[str, Tensor]:
        """``[d_out, d_in]`` of each linear, for sample ``b`` of the batch ``queries [B, D]``."""
        c, keys = self.config, self.rows("keys")
        row_task = torch.arange(len(keys)) // c.rows_per_task
        allowed = row_task == TASKS - 1 if self.learning else row_task < TASKS
        asked = queries if getattr(c, "reduce", "sample") == "batch" else queries[b : b + 1]
        similarity = torch.stack([cosines(q, keys[allowed], groups_of(c)) for q in asked]).mean(0)
        selected = torch.zeros(len(keys)).double()
        selected[allowed] = shares(similarity, c.top_m)

        of_task = torch.zeros(TASKS).double()  # what each task weighs as the context of selected rows
        for n in selected.nonzero().flatten().tolist() if getattr(c, "context", "none") != "none" else ():
            own = int(row_task[n])
            w = self.state["block_context"] if self.learning else self.state["context"][own, :own]
            of_task = of_task + selected[n] * F.pad(w, (0, TASKS - own))
        z = F.pad(self.state["row_mean"], (0, len(keys) - len(self.state["row_mean"])))

        found = {}
        for path in self.paths:
            A, B = (self.rows(f"layers.{path}.{name}") for name in "AB")
            alpha = selected + of_task[row_task] * z
            if getattr(c, "context", "none") == "factor":
                offset = torch.einsum("n,nro->or", alpha, B) @ torch.einsum("n,nri->ri", alpha, A)
            elif getattr(c, "context_rank", None) is None:
                offset = torch.einsum("n,nro,nri->oi", alpha, B, A)
            else:
                offset = torch.einsum("n,nro,nri->oi", selected, B, A)
                for task in range(TASKS - 1):
                    mine = row_task == task
                    u, s, v = torch.linalg.svd(torch.einsum("n,nro,nri->oi", z[mine], B[mine], A[mine]).detach())
                    offset = (
                        offset + of_task[task] * (u[:, : c.context_rank] * s[: c.context_rank]) @ v[: c.context_rank]
                    )
            found[path.replace("/", ".")] = c.scale * offset
        return found

    def logits(self, plain: Any, batch: dict[str, Any], queries: Tensor) -> list[Tensor]:
        """``[S, vocab]`` of each sample, of the model that nobody patched."""
        found = []
        for b in range(len(queries)):
            hooks = [
                plain.get_submodule(path).register_forward_hook(
                    lambda _, args, y, offset=offset: y + args[0] @ offset.T
                )
                for path, offset in self.offsets(queries, b).items()
            ]
            found.append(plain(**take(batch, b), use_cache=False).logits[0])
            for hook in hooks:
                hook.remove()
        return found


FEW: Any = {"rank": 3, "rows_per_task": 4, "top_m": 2}
MANY: Any = {**FEW, "targets": ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}
CONFIGS = {
    "product": cf.IncrementConfig(**FEW, scale=1.3),
    "factor": cf.IncrementConfig(**FEW, context="factor", scale=-0.7),
    "none": cf.IncrementConfig(**MANY, context="none", key_init="orthogonal"),
    "context_rank": cf.IncrementConfig(**MANY, context_rank=2),
    "image": cf.IncrementConfig(**FEW, surrogate="text+image"),
    "slm_batch": SlmConfig(**MANY, groups=4),
    "slm_sample": SlmConfig(**MANY, reduce="sample"),
}


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    wanted = wanted.detach()
    torch.testing.assert_close(found.double(), wanted, atol=tolerance * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model(name: str, new_llava: Callable[[], Any], processor: Any, rng: torch.Generator, tmp_path: Path) -> None:
    """Loss and gradients while a task is learned, what its end commits, and logits then; mixed batches, padded."""
    model = cf.patch(new_llava().double(), CONFIGS[name], processor=processor)
    plain = new_llava().double().requires_grad_(False)
    pool, surrogate, canonical = model.increments.pool, model.increments.surrogate, model.increments.reader.canonical

    def queries_of(questions: list[str], pixels: Tensor) -> Tensor:
        texts = surrogate.encode([canonical(question) for question in questions]).double()
        if name != "image":
            return texts
        seen = F.normalize(plain.model.vision_tower(pixels).last_hidden_state.mean(1), dim=1)
        return torch.cat([texts, F.pad(seen, (0, texts.shape[1] - seen.shape[1]))], 1)

    def ask(side: str) -> tuple[dict[str, Any], Tensor]:
        questions = [QUESTIONS[i] for i in torch.randint(len(QUESTIONS), (3,), generator=rng)]
        batch = inputs(processor, tuple(questions), rng, side)
        batch["pixel_values"] = batch["pixel_values"].double()
        return batch, queries_of(questions, batch["pixel_values"])

    for task in range(TASKS):
        questions = [QUESTIONS[i] for i in torch.randperm(len(QUESTIONS), generator=rng)[:4]]
        samples = [cf.Sample(question, "red", image(rng)) for question in questions]
        pixels = processor.image_processor([sample.image for sample in samples], return_tensors="pt")["pixel_values"]
        learned = queries_of(questions, pixels.double())
        with cf.learning(model, f"task{task}", samples) as parameters:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.normal_(std=0.1, generator=rng)
                # keys of two tasks that learned one question would lie where rounding decides
                keys = pool.block_keys
                keys += 0.5 * torch.randn(keys.shape, generator=rng) / keys.shape[1] ** 0.5
            for side in ("left", "right") if task == TASKS - 1 else ():
                batch, queries = ask(side)
                labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                labels[:, :-4] = -100
                model.zero_grad()
                loss = model(**batch, labels=labels, use_cache=False).loss
                loss.backward()
                oracle = Oracle(model)
                logits = torch.cat([one[:-1] for one in oracle.logits(plain, batch, queries)])
                answers = torch.cat([labels[i, batch["attention_mask"][i].bool()][1:] for i in range(3)])
                wanted = F.cross_entropy(logits, answers, ignore_index=-100)
                close(loss, wanted, 1e-6)
                assert set(oracle.leaves) == {name for name, p in pool.named_parameters() if p.requires_grad}
                wanted = torch.autograd.grad(wanted, list(oracle.leaves.values()))
                for leaf, gradient in zip(oracle.leaves, wanted, strict=True):
                    close(pool.get_parameter(leaf).grad, gradient, 1e-5)
                # the name in transformers 5.23 and after, and before; for the second batch
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()

    c = CONFIGS[name]
    similarity = torch.stack(
        [cosines(query, pool.keys[-c.rows_per_task :].double(), groups_of(c)) for query in learned]
    )
    if name == "slm_batch":
        similarity = similarity.mean(0, keepdim=True)
    close(pool.row_mean[-c.rows_per_task :], torch.stack([shares(one, c.top_m) for one in similarity]).mean(0), 1e-6)

    cf.save_pretrained(model, tmp_path / "saved")
    loaded = cf.load_pretrained(new_llava().double(), tmp_path / "saved", processor=processor)
    for side in ("left", "right"):
        batch, queries = ask(side)
        with torch.no_grad():
            found, again = model(**batch).logits, loaded(**batch).logits
            expected = Oracle(model).logits(plain, batch, queries)
        assert torch.equal(found, again)
        for i in range(3):
            close(found[i, batch["attention_mask"][i].bool()], expected[i], 3e-6)
