"""``export_peft`` writes one selection as a LoRA that stock PEFT loads onto the unpatched base."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import cllava_fast as cf
from cllava_fast import cli
from cllava_fast.cli.base import load_base
from cllava_fast.config import ModelConfig
from cllava_fast.data import chat_template, pad_to_square
from cllava_fast.demo.base import FOLDER
from cllava_fast.methods import config_from_dict
from cllava_fast.model import files
from tests.helpers import QUESTIONS, inputs, learn, logits

peft = pytest.importorskip("peft")


def patched(llava: Any, processor: Any, generator: torch.Generator, **options: Any) -> Any:
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, rank=4, **options), processor=processor)
    learn(llava, 3, generator, b_std=0.1)
    return llava


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted)).item()


def increments_of(folder: Path) -> dict[str, torch.Tensor]:
    """``[d_out, d_in]`` float64 of each linear that a PEFT folder adapts."""
    tensors, config = load_file(folder / files.WEIGHTS), json.loads((folder / files.CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    return {
        path: scale
        * tensors[f"base_model.model.{path}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{path}.lora_A.weight"].double()
        for path in config["target_modules"]
    }


@pytest.mark.parametrize("context", ["product", "factor", "none"])
def test_stock_peft_answers_an_instruction_as_the_patched_model(
    context: str, new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    model = patched(new_llava(), processor, generator, context=context, scale=1.5)
    report = cf.export_peft(model, tmp_path / "lora", instruction=QUESTIONS[0])
    batch = inputs(processor, QUESTIONS[:1] * 2, generator)
    frozen = logits(new_llava(), batch)
    lora = peft.PeftModel.from_pretrained(new_llava(), tmp_path / "lora").eval()
    wanted = logits(model, batch)
    assert relative(logits(lora, batch), wanted) < 1e-5
    assert relative(frozen, wanted) > 1e-2
    assert not any("vision" in name for name, _ in lora.named_parameters() if "lora_" in name)
    assert torch.equal(lora.generate(**batch, max_new_tokens=4), model.generate(**batch, max_new_tokens=4))
    # the export acts on every input alike, while the pool selects anew
    other = inputs(processor, QUESTIONS[3:4], generator)
    told = {"instructions": [QUESTIONS[0]]}
    assert relative(logits(lora, other), logits(model, other, **told)) < 1e-5
    assert max(report.error.values()) == 0.0 and "nothing compressed" in str(report)
    if context == "factor":
        assert report.rank == 4  # factors are summed before they are multiplied


def test_a_row_stands_in_an_export_once(llava: Any, processor: Any, tmp_path: Path, generator: Any) -> None:
    """Selected rows of an early task, which are the context of a later one's too, when both are selected."""
    model = patched(llava, processor, generator, top_m=8)
    pool = model.increments.pool
    pool.keys[:4], pool.keys[16:20] = pool.keys[0].clone(), pool.keys[0].clone()  # tasks 0 and 2 are selected
    pool.keys[4:16], pool.keys[20:] = -pool.keys[0], -pool.keys[0]
    report = cf.export_peft(model, tmp_path / "lora", query=pool.keys[0])
    index, coefficient = cf.ops.select_aggregate(
        pool.keys[:1], pool.keys, 8, pool.row_task, pool.row_mean, pool.context
    )
    acting = set(index[coefficient != 0].tolist())
    assert {0, 1, 2, 3, 16, 17, 18, 19} <= acting and report.rank == 4 * len(acting) < 4 * int((coefficient != 0).sum())
    for path, increment in increments_of(tmp_path / "lora").items():
        A, B = (getattr(pool.factors(path), name).double()[index[0]] for name in "AB")
        exact = torch.einsum("p,pro,pri->oi", coefficient[0].double(), B, A)
        assert relative(increment, exact) < 1e-6


def test_a_task_is_the_mean_over_its_samples(
    new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    model = patched(new_llava(), processor, generator)
    cf.export_peft(model, tmp_path / "lora", task="task1")
    found = increments_of(tmp_path / "lora")
    before = {path: model.get_submodule(path).weight.detach().double() for path in found}
    cf.merge(model, task="task1")
    for path, increment in found.items():
        assert relative(before[path] + increment, model.get_submodule(path).weight.detach().double()) < 1e-6
    card = ModelCard.load(tmp_path / "lora" / files.CARD)
    assert card.data.library_name == "peft" and "| selection | the mean over task `task1` |" in card.text


@pytest.mark.parametrize("rank", [1, 10, 60, 200])
def test_compression_is_the_best_of_its_rank_and_says_what_it_costs(
    rank: int, llava: Any, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    model = patched(llava, processor, generator, targets=("self_attn.o_proj", "mlp.down_proj"))
    exact = cf.export_peft(model, tmp_path / "exact", task="task2")
    report = cf.export_peft(model, tmp_path / "small", task="task2", rank=rank)
    assert exact.rank == 96 and report.rank == min(rank, exact.rank)
    wanted, found = increments_of(tmp_path / "exact"), increments_of(tmp_path / "small")
    assert wanted.keys() == found.keys() == report.error.keys() and len(found) == 6
    for path, increment in found.items():
        values = torch.linalg.svdvals(wanted[path])
        least = (torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values)).item()
        assert relative(increment, wanted[path]) == pytest.approx(least, rel=1e-4, abs=1e-6)
        assert report.error[path] == pytest.approx(least, rel=1e-4, abs=1e-6)
    assert ("compressed, largest" in str(report)) == (rank < 96)
    card = (tmp_path / "small" / files.CARD).read_text()
    assert ("| compression | relative error" if rank < 96 else "| compression | none; all rows that act |") in card


def test_a_rank_above_the_width_is_padded(llava: Any, processor: Any, tmp_path: Path, generator: Any) -> None:
    model = patched(llava, processor, generator, rows_per_task=24, top_m=24)
    report = cf.export_peft(model, tmp_path / "lora", task="task2", rank=200)
    tensors = load_file(tmp_path / "lora" / files.WEIGHTS)
    assert report.rank == 200 and {min(tensor.shape) for tensor in tensors.values()} == {128}
    assert {max(tensor.shape) for tensor in tensors.values()} == {200} and max(report.error.values()) == 0.0
    exact = cf.export_peft(model, tmp_path / "exact", task="task2")
    assert exact.rank == 4 * 72
    wanted = increments_of(tmp_path / "exact")
    assert all(relative(found, wanted[path]) < 1e-6 for path, found in increments_of(tmp_path / "lora").items())


def test_a_method_that_does_not_select_is_exported_whole(
    new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    model = cf.patch(new_llava(), cf.LoraConfig(rank=4, a_std=0.1, scale=2.0), processor=processor)
    learn(model, 1, generator, b_std=0.1)
    assert cf.export_peft(model, tmp_path / "lora").rank == 4
    batch = inputs(processor, QUESTIONS[:2], generator)
    lora = peft.PeftModel.from_pretrained(new_llava(), tmp_path / "lora")
    assert relative(logits(lora, batch), logits(model, batch)) < 1e-5


def test_a_bf16_pool_is_exported_in_float32(
    new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    model = patched(new_llava().bfloat16(), processor, generator)
    cf.export_peft(model, tmp_path / "lora", instruction=QUESTIONS[0])
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / files.WEIGHTS).values()} == {torch.float32}
    batch = inputs(processor, QUESTIONS[:1], generator)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    lora = peft.PeftModel.from_pretrained(new_llava().bfloat16(), tmp_path / "lora")
    wanted = logits(model, batch).float()
    assert relative(logits(lora, batch).float(), wanted) < 0.02 < relative(logits(new_llava(), batch | {
        "pixel_values": batch["pixel_values"].float()}), wanted)  # fmt: skip


def test_the_card_says_what_was_not_as_the_bases_processor_has_it(
    new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    new_llava().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")

    def row(learned_with: Any, name: str) -> list[str]:
        base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
        cf.export_peft(patched(base, learned_with, generator), tmp_path / name, task="task1")
        lines = (tmp_path / name / files.CARD).read_text().splitlines()
        return [line for line in lines if line.startswith("| learned with")]

    assert row(processor, "alike") == []
    other = copy.deepcopy(processor)
    pad_to_square(other)
    other.chat_template = chat_template("vicuna_v1")
    (line,) = row(other, "other")
    assert "`vicuna_v1` (cllava_fast.data.chat_template), images with do_pad `True`, unlike the base's own" in line
    other.chat_template += " "
    assert "chat template of its own, images with do_pad" in row(other, "own")[0]


def test_a_method_that_is_told_the_task_is_asked_for_none_but_that(
    tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = load_base(ModelConfig(path=str(FOLDER)))
    learn(cf.patch(model, config_from_dict({"method": "per_task_lora"}), processor=processor), 1, generator)
    saved = cf.save_pretrained(model, tmp_path / "saved")
    assert cli.main(["export", str(saved), "--output", str(tmp_path / "lora")]) == 1
    assert capsys.readouterr().err.rstrip().endswith("selects, and nothing says what; expected --task")


def test_refusals_write_nothing(llava: Any, processor: Any, tmp_path: Path, generator: torch.Generator) -> None:
    folder = tmp_path / "lora"
    with pytest.raises(ValueError, match="not patched"):
        cf.export_peft(llava, folder, task="task0")
    cf.patch(llava, cf.IncrementConfig(context="factor"), processor=processor)
    with pytest.raises(ValueError, match="nothing has been learned"):
        cf.export_peft(llava, folder, instruction="x")
    learn(llava, 1, generator)
    for options, message in (
        ({}, "expected one of instruction=, task= and query=, got none"),
        ({"task": "task7"}, "'task7' was not learned"),
        ({"task": "task0"}, "continual_llava with context='factor' keeps no mean of a task; name an instruction"),
        *(
            ({"instruction": "x", "rank": rank}, f"rank is {rank!r}; expected a whole number of at least 1")
            for rank in (0, 2.5, "x")
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cf.export_peft(llava, folder, **options)
    assert not folder.exists()
    (tmp_path / "mine").write_text("keep")
    for taken in (tmp_path, tmp_path / "mine"):
        with pytest.raises(FileExistsError, match="give an empty or a new folder"):
            cf.export_peft(llava, taken, instruction="x")
    assert (tmp_path / "mine").read_text() == "keep" and len(list(tmp_path.iterdir())) == 1
    # an export is no pool: load_pretrained says what it is
    cf.export_peft(llava, folder, instruction="x")
    with pytest.raises(ValueError, match="PEFT adapter, which peft.PeftModel.from_pretrained loads"):
        cf.load_pretrained(llava, folder)
