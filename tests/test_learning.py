"""A task in a training loop of one's own: ``cf.learning``."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import cllava_fast as cf
from cllava_fast.data.encode import Collator
from cllava_fast.data.prepared import PreparedStream
from cllava_fast.methods import METHODS
from cllava_fast.model import get_increments
from tests.helpers import QUESTIONS, prompt
from tests.train_helpers import CONFIG, stream

PAGE = (Path(__file__).parent.parent / "docs" / "method.md").read_text(encoding="utf-8")


def batches(data: PreparedStream, task: str, model: Any, steps: int, size: int = 12) -> list[dict[str, torch.Tensor]]:
    examples = data.examples(task, "train", model)
    collate = Collator(data.encoder, None, training=True)
    return [collate([examples[(step * size + i) % len(examples)] for i in range(size)]) for step in range(steps)]


def instructions(data: PreparedStream, task: str) -> list[str]:
    return [sample.instruction for t in data.stream if t.name == task for sample in t.train]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in get_increments(model).pool.state().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_page_learns_tasks_and_forgets_none(llava: Any, processor: Any, tmp_path: Path) -> None:
    model, data = cf.patch(llava, CONFIG, processor=processor), PreparedStream(stream(2), processor)
    (code,) = re.findall(r"```python\n(from torch\.utils.*?)```", PAGE, re.DOTALL)
    assert "DataLoader(task.train, " in code
    code = code.replace("lr=2e-5", "lr=1e-2").replace("DataLoader(task.train, ", "DataLoader(task.train * 40, ")
    namespace = {"cf": cf, "torch": torch, "model": model, "processor": processor, "stream": data.stream}
    exec(code, {**namespace, "folder": tmp_path / "mine"})
    assert not model.training
    results = cf.evaluate_stream(model, processor, data, max_new_tokens=3, progress=False)
    assert min(results["methods"]["continual_llava"]["accuracy_matrix"][-1]) > 0.6
    assert results["methods"]["continual_llava"]["selection_accuracy"] > 0.9
    before = state_of(model)
    cf.load_pretrained(model, tmp_path / "mine")
    assert same(before, state_of(model)) and get_increments(model).pool.task_names == ["task0", "task1"]


@pytest.mark.parametrize("name", sorted(name for name, (_, policy) in METHODS.items() if not policy.uses_task))
def test_every_method_learns_so_and_a_failure_leaves_what_was_learned(llava: Any, processor: Any, name: str) -> None:
    config, policy = METHODS[name]
    model = cf.patch(llava, config(), processor=processor)
    data, pool = PreparedStream(stream(2), processor), get_increments(model).pool
    queries: Any = instructions(data, "task0")
    if getattr(get_increments(model).surrogate, "uses_image", False):
        with pytest.raises(ValueError, match="looks at images, too; give the"), cf.learning(model, "a", queries):
            pass
        queries = data.stream.tasks[0].train

    def learn(task: str, fails: bool = False) -> None:
        with cf.learning(model, task, queries) as parameters:
            optimizer = torch.optim.AdamW(parameters, lr=1e-2)
            for batch in batches(data, "task0", model, 2):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if fails:
                raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        learn("first", fails=True)
    assert not pool.block_rows and not pool.task_names
    learn("first")
    before, tasks = state_of(model), list(pool.task_names)
    if policy.joint:
        return
    with pytest.raises(RuntimeError, match="on purpose"):
        learn("second", fails=True)
    assert same(before, state_of(model)) and pool.task_names == tasks and not get_increments(model).is_within_a_task
    learn("second")
    assert not same(before, state_of(model))


@pytest.mark.filterwarnings("ignore:task '.' has learned nothing")
@pytest.mark.parametrize("name", ["continual_llava", "o_lora"])
def test_no_task_is_born_as_another(llava: Any, processor: Any, name: str) -> None:
    model = cf.patch(llava, METHODS[name][0](), processor=processor)
    for task in "ab":
        with cf.learning(model, task, np.array(["what color is it?", "which color is it?"])):
            pass
    for factors in get_increments(model).pool.layers.values():
        first, second = factors.A.chunk(2)
        assert torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0).abs() < 0.1


@pytest.mark.parametrize("config", [CONFIG, cf.LoraConfig()])
def test_what_is_being_learned_is_not_taken_away(llava: Any, processor: Any, tmp_path: Path, config: Any) -> None:
    model = cf.patch(llava, config, processor=processor)
    saved = cf.save_pretrained(model, tmp_path / "out")
    for what, call in (("unpatch", cf.unpatch), ("load", lambda model: cf.load_pretrained(model, saved))):
        with pytest.raises(ValueError, match=f"a task is being learned; {what} before it begins, or once it is comm"):
            with cf.learning(model, "a", ["what?"]):
                before = state_of(model)
                try:
                    call(model)
                finally:
                    assert same(before, state_of(model))
    cf.unpatch(cf.load_pretrained(model, saved))


def test_a_task_of_shared_rows_is_a_task_too(llava: Any, processor: Any, tmp_path: Path) -> None:
    model = cf.patch(llava, cf.LoraConfig(), processor=processor)
    with pytest.raises(ValueError, match="a task is being learned; save before"), cf.learning(model, "a"):
        with pytest.raises(RuntimeError, match="being learned already"), cf.learning(model, "b"):
            pass
        cf.save_pretrained(model, tmp_path / "out")
    joint = cf.patch(cf.unpatch(model), cf.JointLoraConfig(), processor=processor)
    with pytest.warns(UserWarning, match="has learned nothing"), cf.learning(joint, "a"):
        pass
    with pytest.raises(ValueError, match="joint_lora learns all tasks at once, and has"), cf.learning(joint, "b"):
        pass


@pytest.mark.filterwarnings("ignore:task 'a' has learned nothing")
def test_keys_are_aligned(llava: Any, processor: Any) -> None:
    model = cf.patch(llava, cf.IncrementConfig(key_init="orthogonal"), processor=processor)
    increments, questions = get_increments(model), ["what color is it?", "which color is it?"]
    queries = increments.surrogate.query(questions)
    increments.method.open_task(increments.pool, queries, torch.Generator().manual_seed(0))
    born = increments.pool.block_keys.detach().clone()
    increments.pool.drop_block()
    with cf.learning(model, "a", questions):
        pass
    before, after = (cf.ops.select(queries, keys, 4)[2].mean() for keys in (born, increments.pool.keys))
    assert after > before


def test_what_is_refused_or_warned_of(llava: Any, processor: Any) -> None:
    model = cf.patch(llava, CONFIG, processor=processor)
    width = get_increments(model).pool.key_dim
    for given, message in (
        (None, "questions is None; continual_llava selects by them"),
        ("what?", "questions is 'what\\?'"),
        ([], r"questions is \[\]"),
        ([1, 2], r"questions is \[1, 2\]; continual_llava selects by them: give the training samples"),
        ([cf.Sample("q", "a"), cf.Sample("q", 5)], r"questions\[1\]: answer is 5; expected a text"),
        (torch.zeros(2, 3), rf"questions is \[2, 3\]; expected queries \[n, {width}\]"),
    ):
        with pytest.raises(ValueError, match=message), cf.learning(model, "a", given):
            pass
    for task, seed, message in (
        (5, 0, "task is 5; expected a text in UTF-8 that is not blank"),
        ("\ud800", 0, r"task is '\\ud800'; expected a text in UTF-8"),
        ("a", 1.5, "seed is 1.5; expected a whole number"),
        ("a", -1, "seed is -1; expected 0 to"),
    ):
        with pytest.raises(ValueError, match=message), cf.learning(model, task, ["what?"], seed=seed):
            pass
    with pytest.warns(UserWarning, match="'a' has learned nothing: every B is 0") as caught:
        with cf.learning(model, "a", ["what?"]):
            with pytest.raises(RuntimeError, match="being learned already"), cf.learning(model, "b", ["what?"]):
                pass
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=r"'a' is learned already; .*\['a'\]"), cf.learning(model, "a", ["what?"]):
        pass
    with pytest.raises(RuntimeError, match="b: 1 tensors of committed rows have changed.*'keys'"):
        with cf.learning(model, "b", ["why?"]) as parameters:
            for parameter in parameters:
                parameter.data += 1
            get_increments(model).pool.keys += 1
    assert get_increments(model).pool.task_names == ["a"]
    told = cf.patch(cf.unpatch(model), METHODS["per_task_lora"][0](), processor=processor)
    with pytest.raises(ValueError, match="per_task_lora is told the task"), cf.learning(told, "a"):
        pass


@pytest.mark.filterwarnings("ignore:task .task0. has learned nothing")
@pytest.mark.parametrize("says", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packed_samples_are_refused_where_the_instruction_selects(llava: Any, processor: Any, says: str) -> None:
    model, data = cf.patch(llava, CONFIG, processor=processor), PreparedStream(stream(1), processor)
    flatten = DataCollatorWithFlattening(
        return_position_ids=says == "position_ids", return_flash_attn_kwargs=says == "cu_seq_lens_q",
        return_seq_idx=says == "seq_idx",
    )  # fmt: skip
    asked = [processor.tokenizer(prompt(processor, question, with_image=False)) for question in QUESTIONS[:2]]
    packed = dict(flatten([{"input_ids": one["input_ids"], "labels": one["input_ids"]} for one in asked]))
    assert packed["input_ids"].shape[0] == 1
    with cf.learning(model, "task0", instructions(data, "task0")) as parameters:
        with pytest.raises(ValueError, match="packed into one row .* give each sample a row, padded"):
            model(**packed)
        one = packed["input_ids"][:, : len(asked[0]["input_ids"])]
        for positions in (torch.arange(one.shape[1])[None], torch.zeros_like(one)):
            model(input_ids=one, position_ids=positions, labels=one).loss.backward()
        masked = torch.ones_like(packed["input_ids"])  # by which transformers takes all for one sample
        model(packed["input_ids"], attention_mask=masked, position_ids=packed.get("position_ids"))
        model(**packed, instructions=[QUESTIONS[0]])
        model(**packed, query=torch.ones(1, get_increments(model).pool.key_dim))
        assert parameters
    cf.unpatch(model)
    cf.patch(model, cf.LoraConfig(), processor=processor)
    with cf.learning(model, "task0", instructions(data, "task0")):
        model(**packed)


def test_samples_and_their_instructions_are_the_same_question(llava: Any, processor: Any) -> None:
    model, train = cf.patch(llava, CONFIG, processor=processor), stream(1).tasks[0].train
    means = []
    for task, questions in (("a", train), ("b", [sample.instruction for sample in train])):
        with pytest.warns(UserWarning, match="has learned nothing"), cf.learning(model, task, questions):
            means.append(get_increments(model).pool.block_keys.mean(0))
    torch.testing.assert_close(*means, atol=0.05, rtol=0)
    looking = cf.patch(cf.unpatch(model), cf.IncrementConfig(surrogate="text+image"), processor=processor)
    with pytest.warns(UserWarning, match="has learned nothing"), cf.learning(looking, "a", train):
        pass
    said, seen = get_increments(looking).pool.keys.chunk(2, dim=1)  # a key's halves: of the text, of the picture
    assert seen.norm() > 0.5 * said.norm(), "nobody looked at the pictures"


def test_a_collator_makes_what_the_trainer_makes(llava: Any, processor: Any) -> None:
    model = cf.patch(llava, CONFIG, processor=processor)
    data, task = PreparedStream(stream(1), processor), "task0"
    (wanted,) = batches(data, task, model, 1)
    loader = DataLoader(data.stream.tasks[0].train, batch_size=12, collate_fn=cf.DataCollator(processor), num_workers=1)
    batch = next(iter(loader))
    assert batch.keys() == wanted.keys() and all(torch.equal(batch[name], wanted[name]) for name in wanted)
    prompts = cf.DataCollator(processor, training=False)(data.stream.tasks[0].train[:2])
    assert "labels" not in prompts and torch.equal(prompts.attention_mask[:, -1], torch.ones(2, dtype=torch.int64))
    with torch.no_grad():
        assert model.generate(**prompts, max_new_tokens=2).shape[1] == prompts.input_ids.shape[1] + 2


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([], ValueError, r"the batch is \[\]; expected a list of at least one cllava_fast.Sample"),
        (cf.Sample("q", "a"), ValueError, r"the batch is Sample\(.*; expected a list"),
        (["q"], TypeError, r"batch\[0\] is a str; expected a cllava_fast.Sample"),
        ([cf.Sample("q", "a"), {"question": "q"}], TypeError, r"batch\[1\] is a dict; expected a cllava_fast.Sample"),
        ([cf.Sample("", "a")], ValueError, r"batch\[0\]: instruction is ''"),
        ([cf.Sample("q", 5)], ValueError, r"batch\[0\]: answer is 5"),
        ([cf.Sample("q", "a", history=["ab"])], TypeError, r"batch\[0\]: history is \['ab'\]; expected pairs"),
        ([cf.Sample("q", "a", np.zeros((4, 4, 3)))], TypeError, r"batch\[0\]: image is a ndarray; expected one path"),
    ],
)  # fmt: skip
def test_a_collator_takes_samples_as_a_stream_does(
    batch: Any, error: type[Exception], message: str, processor: Any
) -> None:
    with pytest.raises(error, match=message):
        cf.DataCollator(processor)(batch)


def test_a_prompt_needs_no_answer(processor: Any) -> None:
    asked, known = (cf.DataCollator(processor, training=False)([cf.Sample("what?", text)]) for text in ("", "red"))
    assert torch.equal(asked.input_ids, known.input_ids)
    with pytest.raises(ValueError, match=r"batch\[0\]: answer is ''; expected a text that is not blank"):
        cf.DataCollator(processor)([cf.Sample("what?", "")])


def test_a_loss_of_earlier_tasks_is_told(llava: Any, processor: Any, recwarn: pytest.WarningsRecorder) -> None:
    model, task = cf.patch(llava, CONFIG, processor=processor), stream(1).tasks[0]
    batch = cf.DataCollator(processor)(task.train[:4])
    with cf.learning(model, "a", task.train) as parameters:
        for parameter in parameters:
            parameter.data += 0.1
        model(**batch)
        prompt = {name: tensor for name, tensor in batch.items() if name != "labels"}
        model.eval()
        model(**prompt)
        assert not recwarn
        with pytest.warns(UserWarning, match="in evaluation mode its rows do not act") as caught:
            frozen = model(**batch).loss
        assert caught[0].filename == __file__ and not frozen.requires_grad
    model(**batch)
    with pytest.warns(UserWarning, match="'b' has learned nothing"), cf.learning(model, "b", task.train):
        model.eval()
        with pytest.warns(UserWarning, match="is that of the tasks before it"):
            model(**batch)
    shared = cf.patch(cf.unpatch(model), cf.LoraConfig(), processor=processor)
    with cf.learning(shared, "a") as parameters:
        for parameter in parameters:
            parameter.data += 0.1
        shared.eval()
        assert shared(**batch).loss.requires_grad, "its rows do act"
    assert not recwarn


@pytest.mark.parametrize("prepared", ["within", "before"])
def test_what_accelerate_wraps_within_is_taken_off(
    llava: Any, processor: Any, tmp_path: Path, accelerator: Any, prepared: str
) -> None:
    model, task = cf.patch(llava, CONFIG, processor=processor), stream(1).tasks[0]
    ours, batch = model.forward, cf.DataCollator(processor, training=False)(task.train[:4])
    if prepared == "before":
        accelerator.prepare(model)
    with cf.learning(model, "a", task.train):
        args = TrainingArguments(
            str(tmp_path), max_steps=20, learning_rate=1e-2, bf16=True, use_cpu=True, save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, args, train_dataset=task.train, data_collator=cf.DataCollator(processor)).train()
    assert ("_original_forward" in model.__dict__) == (prepared == "before")
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert unwrapped is model and model.forward == ours
    frozen = cf.unpatch(copy.deepcopy(model))
    with torch.no_grad():
        logits = model(**batch).logits
        assert not torch.allclose(logits, frozen(**batch).logits), "the increments are gone"
        loaded = cf.load_pretrained(frozen, cf.save_pretrained(model, tmp_path / "out"), processor=processor)
        assert torch.equal(loaded(**batch).logits, logits)


def test_a_wrapped_model_is_named(llava: Any, processor: Any) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    for inside, do in (
        (cf.patch(llava, CONFIG, processor=processor), "its .module"),
        (llava.model, "call cllava_fast"),
    ):
        with pytest.raises(ValueError, match=f"the Wrapper is not patched; .*{do}"), cf.learning(Wrapper(inside), "a"):
            pass
