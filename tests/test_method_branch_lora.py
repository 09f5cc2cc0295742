"""BranchLoRA against its formula in loops, what freezes and what trains, and prompts that decide for what follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import cllava_fast as cf
from cllava_fast.methods import Selection, config_from_dict, make_method
from cllava_fast.methods.branch_lora import MOMENTUM, BranchLora, BranchLoraConfig, choose, task_key
from cllava_fast.model import get_increments
from cllava_fast.model.caches import returned
from cllava_fast.pool import LinearShape, Pool
from tests.helpers import QUESTIONS, cached, inputs, prompt, take
from tests.train_helpers import arguments, stream

CONFIG = BranchLoraConfig(branches=5, rank=3, scale=1.5, a_std=0.2, targets=("mlp.*_proj",), surrogate="sentence")
D = 12


def learn(model: Any, tasks: int, generator: torch.Generator, leave_open: bool = False) -> Any:
    """Tasks with random branches, a random activity, and a random query near their key."""
    increments = get_increments(model)
    pool, method = increments.pool, increments.method
    for task in range(tasks):
        method.open_task(pool, torch.randn(9, pool.key_dim, generator=generator), generator)
        for factors in pool.layers.values():
            factors.block_A.data += 0.1 * torch.randn(factors.block_A.shape, generator=generator)
            factors.block_B.data += 0.2 * torch.randn(factors.block_B.shape, generator=generator)
            factors.block_router.data.normal_(generator=generator)
            factors.keep("activity", torch.rand(CONFIG.branches, generator=generator))
        if not leave_open or task < tasks - 1:
            method.close_task(pool, f"task{pool.num_tasks}", None, 1)
    return increments


def patched(model: Any, processor: Any, tasks: int, generator: torch.Generator, **options: Any) -> Any:
    cf.patch(model, CONFIG, processor=processor)
    return learn(model, tasks, generator, **options)


def prompts(model: Any, processor: Any, generator: torch.Generator, side: str = "left") -> dict[str, Any]:
    """A batch with padding whose samples begin with a token of their own each, and ask for tasks in turn."""
    return asking(model, inputs(processor, QUESTIONS, generator, side=side), generator)


def texts(model: Any, processor: Any, generator: torch.Generator) -> dict[str, Any]:
    """Three prompts without an image, two of which have much padding."""
    questions = (QUESTIONS[0], " and ".join(QUESTIONS[:3]), QUESTIONS[3])
    written = [prompt(processor, question, with_image=False) for question in questions]
    batch = processor(text=written, return_tensors="pt", padding=True, padding_side="left")
    return asking(model, dict(batch), generator)


def asking(model: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    first = batch["attention_mask"].argmax(1)
    samples = torch.arange(len(first))
    batch["input_ids"][samples, first] = 20 + samples
    keys = get_increments(model).pool.keys
    if len(keys):
        batch["query"] = keys[samples % len(keys)] + 0.01 * torch.randn(len(first), keys.shape[1], generator=generator)
    return batch


def gates_of(x: Tensor, router: Tensor, top_k: int) -> dict[int, float]:
    """Branch -> gate: the softmax over the highest logits, of one token ``x [d]``, by loops."""
    logits = [sum(float(x[i]) * float(row[i]) for i in range(len(x))) for row in router]
    best = sorted(range(len(logits)), key=lambda j: -logits[j])[:top_k]
    exponentials = {j: float(torch.tensor(logits[j] - logits[best[0]], dtype=torch.float64).exp()) for j in best}
    return {j: e / sum(exponentials.values()) for j, e in exponentials.items()}


def test_branches_are_chosen_by_the_formula(rng: torch.Generator) -> None:
    first = torch.randn(7, D, generator=rng, dtype=torch.float64)
    router = torch.randn(7, 6, D, generator=rng)
    chosen = choose(first, router, top_k=3)
    assert chosen.index.shape == chosen.coefficient.shape == (7, 3)
    for b in range(7):
        expected = gates_of(first[b], router[b], 3)
        assert chosen.index[b].tolist() == list(expected)
        torch.testing.assert_close(chosen.coefficient[b].tolist(), list(expected.values()), atol=1e-12, rtol=1e-12)


def test_ties_go_to_the_lowest_branch() -> None:
    chosen = choose(torch.ones(2, D), torch.zeros(2, 6, D), top_k=2)
    assert chosen.index.tolist() == [[0, 1]] * 2 and chosen.coefficient.tolist() == [[0.5, 0.5]] * 2


@pytest.mark.parametrize("groups", [1, 2])
def test_a_tasks_key_minimises_the_alignment_loss(groups: int, rng: torch.Generator) -> None:
    queries = torch.randn(30, 2 * D, generator=rng) * torch.rand(30, 1, generator=rng) + 0.3

    def loss(key: Tensor) -> float:
        total = 0.0
        for query in queries:
            for e, k in zip(query.chunk(groups), key[0].chunk(groups), strict=True):
                total += 1 - float(torch.cosine_similarity(e.double(), k.double(), dim=0))
        return total

    key = task_key(queries, groups)
    assert key.shape == (1, 2 * D) and key.dtype == torch.float32
    best = loss(key)
    for _ in range(20):
        assert loss(key + 0.05 * torch.randn(key.shape, generator=rng)) > best
    # samples without an image have no say about it, and neither scale has any
    texts = queries.clone()
    texts[:, D:] = 0
    if groups == 2:
        torch.testing.assert_close(task_key(texts, 2)[:, :D], key[:, :D])
        assert task_key(texts, 2)[:, D:].count_nonzero() == 0


@pytest.mark.parametrize("state", ["first task", "later task", "inference"])
def test_the_layer_and_its_gradients(state: str, llava: Any, processor: Any, rng: torch.Generator) -> None:
    """Sample by sample, token by token, branch by branch, in float64."""
    tasks = {"first task": 1, "later task": 3, "inference": 3}[state]
    increments = patched(llava.double(), processor, tasks, rng, leave_open=state != "inference")
    pool, linear = increments.pool, llava.get_submodule("model.language_model.layers.1.mlp.down_proj")
    factors = pool.factors("model.language_model.layers.1.mlp.down_proj")
    x = torch.randn(4, 6, linear.in_features, generator=rng, dtype=torch.float64, requires_grad=True)
    begins = torch.tensor([0, 2, 1, 5])
    mask = (torch.arange(6) >= begins[:, None]).long()
    training = state != "inference"
    query = torch.randn(4, pool.key_dim, generator=rng)
    selection = increments.method.select(pool, query, 1, training)
    increments.call.active = Selection(block=selection.block, past=selection.past, mask=mask)
    got = increments.inject(x, linear, None, factors)

    if training:
        A, B, routers = factors.block_A.double()[0], factors.block_B.double(), [factors.block_router] * 4
    else:
        A, B = factors.A[0], factors.B
        nearest = [max(range(3), key=lambda t: float(torch.cosine_similarity(q, pool.keys[t], dim=0))) for q in query]
        assert selection.index[:, 0].tolist() == nearest
        routers = [factors.router[t] for t in nearest]
    frozen = getattr(factors, "frozen", torch.zeros(5, dtype=torch.bool)) if training else torch.ones(5).bool()
    if state == "later task":
        assert 2 <= int(frozen.sum()) <= 4
        B = torch.where(frozen[:, None, None], factors.B, B)
    rows = []
    for b in range(4):
        logits = routers[b].double() @ x[b, begins[b]]
        best = sorted(range(5), key=lambda j: -float(logits[j].detach()))[:2]
        gates = logits[best].softmax(0)
        for s in range(6):
            low = A @ x[b, s]
            increment = sum(gate * (B[j].T @ low) for gate, j in zip(gates, best, strict=True))
            rows.append(linear.weight @ x[b, s] + 1.5 * increment)
    expected = torch.stack(rows).view_as(got)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-6)  # gates are float32
    if not training:
        return
    probe = torch.randn(got.shape, generator=rng, dtype=torch.float64)
    parameters = {"x": x, "A": factors.block_A, "B": factors.block_B, "router": factors.block_router}
    for name, found, wanted in zip(
        parameters,
        torch.autograd.grad((got * probe).sum(), list(parameters.values())),
        torch.autograd.grad((expected * probe).sum(), list(parameters.values())),
        strict=True,
    ):
        bound = 1e-5 * float(wanted.abs().max())
        assert float((found - wanted).abs().max()) <= bound, name
        if name == "B":
            assert found[frozen].count_nonzero() == 0


def test_the_most_active_branches_freeze(rng: torch.Generator) -> None:
    """Activity is a running mean of gates over steps; a branch that was frozen before stays so."""
    method = BranchLora(CONFIG)
    pool = Pool(3, D, {"o": LinearShape(D, 5)}, shares_A=True, own_tensors=method.own_tensors, shared_rows=True)
    factors, frozen = pool.factors("o"), set[int]()
    for _ in range(3):
        method.open_task(pool, torch.randn(8, D, generator=rng), rng)
        activity = torch.zeros(5, dtype=torch.float64)
        for _ in range(6):
            x = torch.randn(4, 3, D, generator=rng)
            for part in x.split(3):  # a step's batches, the last one filled up with a sample that is not learned
                selection = method.select(pool, torch.randn(3, D, generator=rng), 1, True)
                filled = torch.cat([part, torch.randn(3 - len(part), 3, D, generator=rng)])
                learned = (torch.arange(3) < len(part)).int()[:, None].expand(3, 3)
                method.route(replace(selection, mask=learned), factors, filled)
            method.end_step(pool)
            activity *= MOMENTUM
            for sample in x:
                for j, gate in gates_of(sample[0], factors.block_router.detach(), 2).items():
                    activity[j] += (1 - MOMENTUM) * gate / 4
        torch.testing.assert_close(factors.activity.double(), activity, atol=1e-7, rtol=1e-5)
        frozen |= set(activity.argsort(descending=True)[:2].tolist())
        method.close_task(pool, f"task{pool.num_tasks}", None, 1)
        assert set(factors.frozen.nonzero().flatten().tolist()) == frozen
    assert factors.router.shape == (3, 5, D) and pool.keys.shape == (3, D) and factors.A.shape == (1, 3, D)
    assert pool.num_rows == 5 and pool.num_tasks == 3 and pool.row_task.tolist() == [0] * 5
    for rows, keys, message in ((4, 1, "rows is 4; all tasks share 5 rows"), (5, 5, r"expected \[1, 12\]")):
        with pytest.raises(ValueError, match=message):
            pool.open_block(rows, keys=torch.ones(keys, D), a_std=1.0, context_init=None, generator=rng)


def test_a_loop_that_does_not_end_steps_is_followed(rng: torch.Generator) -> None:
    """What an optimizer changed tells one step from the next."""
    moved = []
    for says_so in (True, False):
        method, pool = BranchLora(CONFIG), Pool(3, D, {"o": LinearShape(D, 5)}, shares_A=True, shared_rows=True)
        method.open_task(pool, torch.ones(8, D), torch.Generator().manual_seed(0))
        factors = pool.factors("o")
        for step in range(3):
            for x in torch.randn(2, 4, 3, D, generator=torch.Generator().manual_seed(step)):
                method.route(method.select(pool, torch.ones(4, D), 1, True), factors, x)
            with torch.no_grad():
                factors.block_B.add_(1.0)
            if says_so:
                method.end_step(pool)
        if not says_so:
            method.end_step(pool)
        moved.append(factors.activity.clone())
    assert moved[0].sum() > 0 and torch.equal(*moved)


def test_what_trains_and_what_is_frozen(llava: Any, processor: Any, tmp_path: Path) -> None:
    """To the bit, with weight decay, which moves parameters without a gradient; the third task finds all frozen."""
    cf.patch(llava, BranchLoraConfig(branches=4, rank=2, surrogate="sentence"), processor=processor)
    base = {name: t.clone() for name, t in llava.state_dict().items() if not name.startswith("increments")}
    pool, method = get_increments(llava).pool, get_increments(llava).method
    close, states = method.close_task, list[dict[str, Tensor]]()

    def close_and_look(*given: Any) -> None:
        close(*given)
        if pool.num_tasks == 2:
            for factors in pool.layers.values():
                factors.frozen.fill_(True)
        states.append({name: tensor.clone() for name, tensor in pool.state().items()})

    method.close_task = close_and_look  # type: ignore[method-assign]
    losses = cf.ContinualTrainer(
        llava, processor, stream(3), arguments(tmp_path / "run", weight_decay=0.5, logging_steps=1)
    ).train()
    assert all(values[-1] < values[0] for values in losses.losses.values())
    assert all(torch.equal(tensor, llava.state_dict()[name]) for name, tensor in base.items())
    changed = [0, 0]
    for task in range(2):
        before, after = states[task : task + 2]
        assert torch.equal(after["keys"][: task + 1], before["keys"])
        for path in pool.layers:
            old, new = ({name: state[f"layers.{path}.{name}"] for name in ("A", "B", "frozen", "router")}
                        for state in (before, after))  # fmt: skip
            frozen = old["frozen"]
            assert int(frozen.sum()) == (2, 4)[task] and bool(new["frozen"][frozen].all())
            assert torch.equal(new["B"][frozen], old["B"][frozen])
            assert torch.equal(new["router"][: task + 1], old["router"]) and len(new["router"]) == task + 2
            assert not torch.equal(new["A"], old["A"])
            changed[task] += not torch.equal(new["B"], old["B"])
    assert changed[0] > 0 and changed[1] == 0


def test_frozen_branches_of_a_bfloat16_model_stay_to_the_bit(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = patched(llava.bfloat16(), processor, 2, rng)
    before = {path: (f.B.clone(), f.frozen.clone()) for path, f in increments.pool.layers.items()}
    learn(llava, 1, rng)
    for path, factors in increments.pool.layers.items():
        B, frozen = before[path]
        assert factors.B.dtype == torch.bfloat16 and factors.block_B is None
        assert torch.equal(factors.B[frozen], B[frozen]) and not torch.equal(factors.B[~frozen], B[~frozen])


def test_a_task_that_fails_leaves_what_was_learned(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = patched(llava, processor, 1, rng)
    batch = prompts(llava, processor, rng)
    with torch.no_grad():
        before = llava(**batch).logits
        learn(llava, 1, rng, leave_open=True)
        assert torch.equal(llava(**batch).logits, before)
        increments.pool.drop_block()
        assert torch.equal(llava(**batch).logits, before)
    learn(llava, 1, rng)
    assert increments.pool.num_tasks == 2


@pytest.mark.parametrize("generation", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_generate_in_mixed_batches(generation: dict, llava: Any, processor: Any, rng: torch.Generator) -> None:
    """Padding, beams and a cache, whose later tokens come without the first, change no sample's branches."""
    patched(llava, processor, 3, rng)
    batch = prompts(llava, processor, rng)
    no_image = [llava.config.image_token_id]  # which a random model may well say
    options = {
        "suppress_tokens": no_image,
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "num_beams": 1,
    }
    together = llava.generate(**batch, **{**options, **generation})[:, -4:]
    for i in range(len(QUESTIONS)):
        alone = {**take(batch, i), "query": batch["query"][i : i + 1]}
        expected = llava.generate(**alone, **{**options, **generation, "use_cache": False})[:, -4:]
        assert torch.equal(together[i : i + 1], expected)


def test_cached_decoding_by_hand_keeps_the_prompts_branches(llava: Any, processor: Any, rng: torch.Generator) -> None:
    patched(llava, processor, 3, rng)
    batch = prompts(llava, processor, rng)
    with torch.no_grad():
        prefill = llava(**batch, use_cache=True)
        token = torch.full((len(QUESTIONS), 1), 9)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
        step = llava(input_ids=token, attention_mask=mask, **cached(returned(prefill)))
        full = {**batch, "input_ids": torch.cat([batch["input_ids"], token], 1), "attention_mask": mask}
        whole = llava(**full)
        other = llava(**{**full, "query": batch["query"].roll(1, 0)})
        returned(prefill).crop(-1)
        again = llava(input_ids=token, attention_mask=mask, **cached(returned(prefill)), query=batch["query"])
        returned(prefill).crop(-1)  # with it, what was said is gone, though not how the prompts began
        with pytest.raises(ValueError, match="its instruction is unknown"):
            llava(input_ids=token, attention_mask=mask, **cached(returned(prefill)))
        said = llava(input_ids=token, attention_mask=mask, **cached(returned(prefill)), query=batch["query"])
    for found in (again, said):
        torch.testing.assert_close(found.logits, step.logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], atol=2e-4, rtol=1e-4)
    assert float((other.logits - whole.logits)[:, -1].abs().amax(1).min()) > 1e-3, "tasks must matter here"


def parts(batch: dict[str, Any], *ends: int) -> Iterator[dict[str, Any]]:
    """The prompt piece by piece, each with the mask of all that has come."""
    begin = 0
    for end in ends:
        yield {"input_ids": batch["input_ids"][:, begin:end], "attention_mask": batch["attention_mask"][:, :end]}
        begin = end


def test_a_prompt_that_comes_in_parts_is_routed_by_its_first_token(
    llava: Any, processor: Any, rng: torch.Generator
) -> None:
    """Parts that are padding alone for some samples, by generate and by hand, and a prefix that lies in a cache."""
    patched(llava, processor, 3, rng)
    batch = texts(llava, processor, rng)
    query = batch.pop("query")
    length = batch["input_ids"].shape[1]
    assert 5 < int(batch["attention_mask"].argmax(1).max()) < length - 4
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options["suppress_tokens"] = [llava.config.image_token_id]  # random weights may say it
    with torch.no_grad():
        expected, logits = llava.generate(**batch, query=query, **options), llava(**batch, query=query).logits[:, -1]
        chunked = llava.generate(**batch, query=query, **options, prefill_chunk_size=4)
        assert torch.equal(chunked, expected)
        for queries in ([query, query], [query, None]):
            cache = DynamicCache(config=llava.config.text_config)
            for part, asked in zip(parts(batch, 3, 4), queries, strict=True):
                llava(**part, **cached(cache), query=asked)
            assert torch.equal(llava.generate(**batch, query=query, **cached(cache), **options), expected)
        cache = DynamicCache(config=llava.config.text_config)
        for part in parts(batch, 2, 5, length):
            found = llava(**part, **cached(cache), query=query).logits[:, -1]
        torch.testing.assert_close(found, logits, atol=2e-4, rtol=1e-4)


def test_another_task_on_an_old_cache_routes_by_the_same_token(
    llava: Any, processor: Any, rng: torch.Generator
) -> None:
    """Its routers choose anew, on what linears saw when the cache was filled."""
    increments = patched(llava, processor, 3, rng)
    batch = texts(llava, processor, rng)
    path = "model.language_model.layers.0.mlp.gate_proj"
    factors, route = increments.pool.factors(path), increments.method.route
    seen: list[Tensor] = []
    chosen: list[list[list[int]]] = []

    def spy(selection: Selection, where: Any, x: Tensor) -> Selection:
        found = route(selection, where, x)
        if where is factors:
            seen.append(x)
            chosen.append(found.past.index.tolist())
        return found

    increments.method.route = spy
    with torch.no_grad():
        cache = returned(llava(**batch, use_cache=True))
        cache.batch_select_indices(torch.tensor([2, 0]))
        mask = torch.cat([batch["attention_mask"][[2, 0]], torch.ones(2, 3, dtype=torch.int64)], 1)
        other = increments.pool.keys[[0, 2]]
        llava(input_ids=torch.full((2, 3), 9), attention_mask=mask, **cached(cache), query=other)
    first = seen[0][torch.arange(3), batch["attention_mask"].argmax(1)]  # [B, d_in]
    for (before, task), found in zip(((2, 0), (0, 2)), chosen[1], strict=True):
        assert found == list(gates_of(first[before], factors.router[task], CONFIG.top_k))


def test_a_cache_of_an_unknown_beginning_is_refused(llava: Any, processor: Any, rng: torch.Generator) -> None:
    patched(llava, processor, 2, rng)
    batch = texts(llava, processor, rng)
    with torch.no_grad():
        cache = copy.deepcopy(returned(llava(**batch, use_cache=True)))
        for call in (llava, llava.generate):
            with pytest.raises(ValueError, match="branch_lora goes by a prompt's first token; pass the whole prompt"):
                call(**batch, **cached(cache))


def test_branches_follow_the_samples_of_a_cache(llava: Any, processor: Any, rng: torch.Generator) -> None:
    patched(llava, processor, 3, rng)
    batch = prompts(llava, processor, rng)
    token, samples = torch.full((len(QUESTIONS), 1), 9), torch.tensor([3, 0, 3])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
    steps = []
    with torch.no_grad():
        for moved in (False, True):
            cache = returned(llava(**batch, use_cache=True))
            rows = torch.arange(len(QUESTIONS))
            if moved:
                cache.batch_select_indices(samples)
                rows = samples
            position = mask[rows].sum(1, keepdim=True) - 1
            inputs = {"input_ids": token[rows], "attention_mask": mask[rows], "position_ids": position}
            steps.append(llava(**inputs, **cached(cache)).logits[:, -1])
    torch.testing.assert_close(steps[1], steps[0][samples], atol=2e-4, rtol=1e-4)


def test_activation_checkpointing_changes_no_gradient(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = patched(llava, processor, 2, rng, leave_open=True)
    increments.pool.train_keys(False)
    llava.train()
    batch = prompts(llava, processor, rng, side="right")

    def gradients() -> dict[str, Tensor]:
        llava.zero_grad()
        llava(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in llava.named_parameters() if p.grad is not None}

    plain = gradients()
    assert {name.rpartition(".")[2] for name in plain} == {"block_A", "block_B", "block_router"}
    enable = getattr(llava, "activation_checkpointing_enable", None) or llava.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)


def test_files_copies_and_unpatch(
    llava: Any, new_llava: Callable, processor: Any, tmp_path: Path, rng: torch.Generator
) -> None:
    patched(llava, processor, 2, rng)
    batch = prompts(llava, processor, rng)
    cf.save_pretrained(llava, tmp_path / "out")
    loaded, copied = cf.load_pretrained(new_llava(), tmp_path / "out", processor=processor), copy.deepcopy(llava)
    state = get_increments(llava).pool.state()
    again = get_increments(loaded).pool.state()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)
    with torch.no_grad():
        logits = llava(**batch).logits
        assert torch.equal(loaded(**batch).logits, logits) and torch.equal(copied(**batch).logits, logits)
        learn(copied, 1, rng)
        assert torch.equal(llava(**batch).logits, logits)
        del batch["query"]
        assert torch.equal(cf.unpatch(llava)(**batch).logits, new_llava()(**batch).logits)
    learn(loaded, 1, rng)
    with pytest.raises(ValueError, match="no one selection"):
        cf.merge(loaded, task="task0")
    # files of no task take all away that was kept
    cf.save_pretrained(cf.patch(new_llava(), CONFIG, processor=processor), tmp_path / "empty")
    cf.load_pretrained(loaded, tmp_path / "empty")
    cf.save_pretrained(loaded, tmp_path / "again")
    cf.load_pretrained(new_llava(), tmp_path / "again", processor=processor)


def test_an_interrupted_run_goes_on_to_the_same_end(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    config = BranchLoraConfig(branches=4, rank=2, a_std=0.1, targets=("self_attn.o_proj",), surrogate="text+image")

    def run(folder: str, stop: bool = False, **values: Any) -> Any:
        model = cf.patch(new_llava(), config, processor=processor)
        trainer = cf.ContinualTrainer(model, processor, stream(2), arguments(tmp_path / folder, **values))
        learn = trainer._learn
        if stop:
            trainer._learn = lambda number, *rest: learn(number, *rest) if number == 0 else 1 / 0
            with pytest.raises(ZeroDivisionError):
                trainer.train()
        else:
            assert trainer.train().selection_accuracy == 1.0  # of the task selector
        return get_increments(model).pool.state()

    whole = run("whole")
    run("cut", stop=True)
    resumed = run("cut", resume=True)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"branches": 0}, "branches is 0; expected at least 1"),
        ({"top_k": 0}, "top_k is 0; expected 1 to 8"),
        ({"top_k": 9}, "top_k is 9; expected 1 to 8"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_a_config_refuses_what_it_cannot_do(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BranchLoraConfig(**fields)


def test_defaults_are_the_papers() -> None:
    config = BranchLoraConfig()
    assert (config.branches, config.top_k, config.branches * config.rank, config.scale) == (8, 2, 128, 256 / 128)
    assert config_from_dict(config.to_dict()) == config and isinstance(make_method(config), BranchLora)
