"""Saved increments: bit-equal again, whole or not at all, and nothing wrong is let in."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import cllava_fast as cf
from cllava_fast import atomic
from cllava_fast.model import files
from tests.helpers import QUESTIONS, inputs, learn
from tests.train_helpers import stream


@pytest.fixture
def learned(new_llava: Callable, processor: Any, generator: torch.Generator) -> Any:
    model = cf.patch(new_llava(), cf.IncrementConfig(a_std=0.1, top_m=3), processor=processor)
    learn(model, 2, generator)
    return model


def test_bit_equal_after_a_round_trip(
    learned: Any, new_llava: Callable, processor: Any, tmp_path: Path, generator: Any
) -> None:
    cf.save_pretrained(learned, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(files.FILES)
    model = cf.load_pretrained(new_llava(), tmp_path / "out", processor=processor)
    batch = inputs(processor, QUESTIONS, generator)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, learned(**batch).logits)
    assert model.increments.config == learned.increments.config
    assert model.increments.pool.task_names == ["task0", "task1"]
    # nothing of the base is in the file
    assert all(name.startswith("pool.") for name in load_file(tmp_path / "out" / files.WEIGHTS))


def test_learning_goes_on_after_loading(
    learned: Any, new_llava: Callable, processor: Any, tmp_path: Path, generator: Any
) -> None:
    cf.save_pretrained(learned, tmp_path / "out")
    model = cf.load_pretrained(new_llava(), tmp_path / "out", processor=processor)
    learn(model, 1, generator)
    assert model.increments.pool.num_tasks == 3
    assert torch.equal(model.increments.pool.keys[:16], learned.increments.pool.keys)


def test_learning_goes_on_after_loading_in_inference_mode(
    learned: Any, new_llava: Callable, processor: Any, tmp_path: Path, generator: Any
) -> None:
    cf.save_pretrained(learned, tmp_path / "out")
    model = new_llava()
    with torch.inference_mode():
        cf.load_pretrained(model, tmp_path / "out", processor=processor)
    increments = learn(model, 1, generator, commit_last=False)
    increments.pool.train_keys(False)
    batch = inputs(processor, QUESTIONS[:2], generator, side="right")
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert increments.pool.block_context.grad is not None
    assert not any(tensor.is_inference() for tensor in increments.state_dict().values())


def test_settings_that_somebody_edits_act(learned: Any, new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    config = cf.save_pretrained(learned, tmp_path / "out") / files.CONFIG
    values = json.loads(config.read_text())
    values["config"]["scale"] = 3.5
    config.write_text(json.dumps(values))
    assert cf.load_pretrained(new_llava(), tmp_path / "out", processor=processor).increments.config.scale == 3.5


def test_saving_replaces_its_own_folder_and_no_other(learned: Any, tmp_path: Path, generator: torch.Generator) -> None:
    cf.save_pretrained(learned, tmp_path / "out")
    learn(learned, 1, generator)
    cf.save_pretrained(learned, tmp_path / "out")
    assert json.loads((tmp_path / "out" / files.CONFIG).read_text())["tasks"] == ["task0", "task1", "task2"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="holds something else"):
        cf.save_pretrained(learned, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    (tmp_path / "out" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"something else than saved increments: notes.txt"):
        cf.save_pretrained(learned, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_another_librarys_adapter_is_not_replaced(learned: Any, tmp_path: Path) -> None:
    (tmp_path / files.CONFIG).write_text('{"peft_type": "LORA"}')
    (tmp_path / files.WEIGHTS).write_bytes(b"theirs")
    with pytest.raises(ValueError, match="expected a file written by save_pretrained"):
        cf.save_pretrained(learned, tmp_path)
    assert (tmp_path / files.WEIGHTS).read_bytes() == b"theirs" and len(list(tmp_path.iterdir())) == 2


def test_backbone_queries_with_and_without_a_processor_differ(
    new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    config = cf.IncrementConfig(surrogate="backbone")
    model = cf.patch(new_llava(), config, processor=processor)
    learn(model, 1, generator)
    cf.save_pretrained(model, tmp_path / "out")
    with pytest.raises(ValueError, match="another surrogate"):
        cf.load_pretrained(new_llava(), tmp_path / "out")
    cf.load_pretrained(new_llava(), tmp_path / "out", processor=processor)


@pytest.mark.parametrize("surrogate", ["sentence", "backbone", "text+image"])
def test_a_model_that_was_cast_is_saved_as_it_is_now(
    surrogate: str, llava: Any, new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    """What a surrogate reads of the base is cast with it."""
    model = cf.patch(llava, cf.IncrementConfig(a_std=0.1, surrogate=surrogate), processor=processor)
    learn(model, 2, generator, b_std=0.1)
    twin = copy.deepcopy(model)
    before = cf.save_pretrained(twin, tmp_path / "before")
    cf.save_pretrained(model.to(torch.bfloat16), tmp_path / "out")
    again = cf.load_pretrained(new_llava().to(torch.bfloat16), tmp_path / "out", processor=processor)
    batch = inputs(processor, QUESTIONS, generator)
    exact = batch["pixel_values"]
    with torch.no_grad():
        batch["pixel_values"] = exact.to(torch.bfloat16)
        assert torch.equal(model(**batch).logits, again(**batch).logits)
        # the copy stays as it was
        batch["pixel_values"] = exact
        same = cf.load_pretrained(new_llava(), before, processor=processor)
        assert torch.equal(twin(**batch).logits, same(**batch).logits)
    cf.save_pretrained(twin, before)
    cf.load_pretrained(new_llava(), before, processor=processor)


def test_what_could_not_be_read_again_is_not_saved(learned: Any, tmp_path: Path) -> None:
    pool, before = learned.increments.pool, cf.save_pretrained(learned, tmp_path / "out")
    saved = {path.name: path.read_bytes() for path in before.iterdir()}
    whole = pool.row_mean.clone()
    pool.row_mean[0] = float("nan")
    with pytest.raises(ValueError, match="continual_llava has learned could not be read again: row_mean holds NaN"):
        cf.save_pretrained(learned, before)
    pool.row_mean = whole
    pool.keep("fisher", torch.zeros(2))  # which no method of this pool names
    with pytest.raises(ValueError, match=r"not be read again: .* 1 are unexpected \['fisher'\].*own_tensors names"):
        cf.save_pretrained(learned, before)
    del pool.fisher
    assert {path.name: path.read_bytes() for path in before.iterdir()} == saved
    cf.save_pretrained(learned, before)


def test_half_a_task_is_neither_saved_nor_measured(
    llava: Any, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    learn(cf.patch(llava, cf.IncrementConfig(), processor=processor), 2, generator, commit_last=False)
    with pytest.raises(ValueError, match="a task is being learned; save before it begins"):
        cf.save_pretrained(llava, tmp_path / "out")
    with pytest.raises(ValueError, match="a task is being learned, .*; evaluate once it is committed"):
        cf.evaluate_stream(llava, processor, stream(1), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_failing_write_leaves_the_last_good_state(
    learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cf.save_pretrained(learned, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full_disk(path: Path) -> None:
        if path.name == files.CONFIG:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_to_disk", full_disk)
    with pytest.raises(OSError, match="No space"):
        cf.save_pretrained(learned, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("no weights", FileNotFoundError, "does not exist"),
        ("changed", ValueError, "was changed since it was saved"),
        ("another base", ValueError, "another base model"),
        ("another projector", ValueError, "another base model"),
        ("another vision tower", ValueError, "another base model"),
        ("another surrogate", ValueError, "another surrogate"),
        ("another dtype", ValueError, "its weights were bfloat16, these are float32; load the base with dtype"),
        ("missing", ValueError, "1 tensors are missing"),
        ("unexpected", ValueError, "1 are unexpected"),
        ("base inside", ValueError, r"1 unexpected tensors \['lm_head.weight'\]"),
        ("field", ValueError, "unknown fields"),
        ("no field", ValueError, "'tasks' is missing"),
        ("tasks", ValueError, "expected a list of names"),
        ("tasks twice", ValueError, "expected each name once"),
        ("no json", ValueError, "cannot be read"),
        ("deep json", ValueError, "cannot be read"),
        ("big json", ValueError, "has more than 1048576 bytes"),
        ("newer", ValueError, "format is 2, newer than 1; upgrade"),
        ("format", ValueError, "format is None, not 1"),
        ("peft", ValueError, "peft.PeftModel"),
        ("huge header", ValueError, "its header would have 4611686018427387904 bytes"),
        ("long header", ValueError, "is damaged"),
        ("huge tensor", ValueError, "is damaged"),
        ("cut", ValueError, "is damaged"),
        ("empty", ValueError, "is damaged"),
    ],
)
def test_wrong_files_are_refused_and_the_model_stays(
    damage: str, error: type, message: str, learned: Any, new_llava: Callable, processor: Any, tmp_path: Path
) -> None:
    folder = cf.save_pretrained(learned, tmp_path / "out")
    config, weights = folder / files.CONFIG, folder / files.WEIGHTS
    values = json.loads(config.read_text())
    model = new_llava()
    if damage == "no weights":
        weights.unlink()
    elif damage == "changed":
        data = bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(data)
    elif damage == "another base":
        model.model.language_model.layers[1].mlp.up_proj.weight.data += 0.01
    elif damage == "another projector":
        model.model.multi_modal_projector.linear_1.weight.data += 0.01
    elif damage == "another vision tower":
        model.model.vision_tower.embeddings.patch_embedding.weight.data += 0.01
    elif damage == "another surrogate":
        values["surrogate_fingerprint"] = "0" * 64
    elif damage == "another dtype":
        model.lm_head.weight.data += 0.01
        values["base_dtype"] = "bfloat16"
    elif damage in ("missing", "unexpected", "base inside"):
        tensors = load_file(weights)
        if damage == "missing":
            del tensors["pool.keys"]
        else:
            tensors["pool.more" if damage == "unexpected" else "lm_head.weight"] = torch.zeros(1)
        save_file(tensors, weights)
    elif damage == "field":
        values["config"]["colour"] = "red"
    elif damage == "no field":
        del values["tasks"]
    elif damage == "tasks":
        values["tasks"] = "01"
    elif damage == "tasks twice":
        values["tasks"] = ["task0", "task0"]
    elif damage == "newer":
        values["format"] = 2
    elif damage == "format":
        del values["format"]
    elif damage == "peft":
        values = {"peft_type": "LORA"}
    elif damage == "huge header":
        weights.write_bytes((1 << 62).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif damage == "long header":
        weights.write_bytes((files.MAX_HEADER_BYTES).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif damage == "huge tensor":
        header = b'{"pool.keys":{"dtype":"F32","shape":[1099511627776,384],"data_offsets":[0,1688849860263936]}}'
        weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "empty":
        weights.write_bytes(b"")
    if weights.exists() and damage != "changed" and "weights_sha256" in values:
        # whoever damages a file on purpose also mends its checksum
        values["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    texts = {"no json": "{", "deep json": "[" * 100_000, "big json": " " * (files.MAX_CONFIG_BYTES + 1)}
    config.write_text(texts.get(damage) or json.dumps(values))
    with pytest.raises(error, match=message):
        cf.load_pretrained(model, folder, processor=processor)
    assert not hasattr(model, "increments") and "forward" not in model.__dict__


def test_a_patched_model_keeps_what_it_knows_when_a_file_is_refused(
    learned: Any, new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    folder = cf.save_pretrained(learned, tmp_path / "out")
    model = cf.patch(new_llava(), learned.increments.config, processor=processor)
    before = {name: tensor.clone() for name, tensor in learn(model, 1, generator).pool.state().items()}
    tensors = load_file(folder / files.WEIGHTS)
    tensors["pool.row_mean"][3] = float("nan")
    save_file(tensors, folder / files.WEIGHTS)
    values = json.loads((folder / files.CONFIG).read_text())
    values["weights_sha256"] = hashlib.sha256((folder / files.WEIGHTS).read_bytes()).hexdigest()
    (folder / files.CONFIG).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="row_mean holds NaN"):
        cf.load_pretrained(model, folder)
    after = model.increments.pool.state()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.increments.pool.task_names == ["task0"]


def test_files_from_before_the_base_was_named_load(
    learned: Any, new_llava: Callable, processor: Any, tmp_path: Path
) -> None:
    folder = cf.save_pretrained(learned, tmp_path / "out")
    values = json.loads((folder / files.CONFIG).read_text())
    del values["base_model_name_or_path"], values["base_dtype"]
    (folder / files.CONFIG).write_text(json.dumps(values))
    (folder / files.CARD).unlink()
    model = cf.load_pretrained(new_llava(), folder, processor=processor)
    assert model.increments.pool.task_names == ["task0", "task1"]


def test_the_model_card_says_what_is_there(learned: Any, tmp_path: Path, generator: torch.Generator) -> None:
    learned.increments.pool.task_names[1] = "bars | `pies`\n# and more"
    learned.name_or_path = "llava-hf/llava-1.5-7b-hf"
    folder = cf.save_pretrained(learned, tmp_path / "out")
    card = ModelCard.load(folder / files.CARD)
    assert card.data.base_model == "llava-hf/llava-1.5-7b-hf" and card.data.base_model_relation == "adapter"
    assert card.data.library_name == "cllava-fast" and "continual_llava" in card.data.tags
    digest = hashlib.sha256((folder / files.WEIGHTS).read_bytes()).hexdigest()
    for fact in ("`continual_llava`", "16 of rank 8", "`sentence`", digest, "`llava-hf/llava-1.5-7b-hf`, float32"):
        assert fact in card.text
    assert "| tasks | `task0`, `bars \\| 'pies' # and more` |" in card.text.splitlines()
    # a folder of this machine is in the text, and never in metadata, which a hub would refuse
    learned.name_or_path = str(tmp_path)
    card = ModelCard.load(cf.save_pretrained(learned, tmp_path / "out") / files.CARD)
    assert card.data.base_model is None and f"`{tmp_path}`" in card.text
    assert json.loads((folder / files.CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path)


def test_a_readme_alone_is_somebody_elses(learned: Any, tmp_path: Path) -> None:
    (tmp_path / files.CARD).write_text("my notes")
    with pytest.raises(FileExistsError, match="something else than saved increments: README.md"):
        cf.save_pretrained(learned, tmp_path)
    assert (tmp_path / files.CARD).read_text() == "my notes" and len(list(tmp_path.iterdir())) == 1


def test_a_task_at_7b_is_34_megabytes_without_the_base(
    processor: Any, tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(num_hidden_layers=1),
            text_config=LlamaConfig(),  # as LLaVA-1.5-7B: 32 layers of width 4096
            image_token_id=3,
        )
        model = LlavaForConditionalGeneration(config).bfloat16()
    with pytest.raises(ValueError, match="holds no data"):
        files.base_fingerprint(model)
    monkeypatch.setattr(files, "base_fingerprint", lambda model: "0" * 64)  # there are no weights to read
    model.get_input_embeddings().to_empty(device="cpu")  # the surrogate goes where it is
    cf.patch(model, processor=processor)
    model.increments.pool.to_empty(device="cpu")
    learn(model, 1, generator)
    folder = cf.save_pretrained(model, tmp_path / "out")
    rows = 32 * 8 * 8 * (4096 + 4096)  # layers x rows x rank x (A and B)
    size = (folder / files.WEIGHTS).stat().st_size
    assert 2 * rows < size < 2 * rows + 100_000
    assert sum(file.stat().st_size for file in folder.iterdir()) < 100e6
    with safe_open(folder / files.WEIGHTS, "pt") as file:
        assert {name.split(".")[1] for name in file.keys()} == {"keys", "row_task", "row_mean", "context", "layers"}
        assert file.get_tensor("pool.layers.model/language_model/layers/0/self_attn/o_proj.A").dtype == torch.bfloat16


def test_a_fingerprint_of_the_base_reads_a_few_numbers_of_each_tensor(llava: Any) -> None:
    copied: list[int] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != args[0].data_ptr():
                copied.append(result.numel())
            return result

    with Copies():
        files.base_fingerprint(llava)
    tensors = llava.state_dict()
    assert copied and sum(copied) <= 64 * len(tensors) < sum(t.numel() for t in tensors.values()) / 50


class CastingLinear(torch.nn.Linear):
    """Does with its bias what the linears of bitsandbytes do."""

    __module__ = "bitsandbytes.nn.modules"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.bfloat16()
        assert self.bias is not None
        self.bias.data = self.bias.data.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias).float()


def test_a_base_whose_biases_are_cast_when_it_runs_is_the_same_base(
    new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    def new_base() -> Any:
        model = new_llava()
        for name, module in list(model.model.vision_tower.named_modules()):
            if isinstance(module, torch.nn.Linear):
                cast = CastingLinear(module.in_features, module.out_features)
                cast.load_state_dict(module.state_dict())
                model.model.vision_tower.set_submodule(name, cast)
        return model

    model = cf.patch(new_base(), cf.IncrementConfig(surrogate="text+image"), processor=processor)
    learn(model, 1, generator)
    with torch.no_grad():
        model(**inputs(processor, QUESTIONS, generator))
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.float32, torch.bfloat16}
    cf.save_pretrained(model, tmp_path / "out")
    cf.load_pretrained(new_base(), tmp_path / "out", processor=processor)
    cf.load_pretrained(cf.unpatch(model), tmp_path / "out", processor=processor)
    other = new_base()
    next(p for p in other.model.vision_tower.parameters() if p.dim() == 2).data += 0.01
    with pytest.raises(ValueError, match="another base model"):
        cf.load_pretrained(other, tmp_path / "out", processor=processor)


def test_a_model_with_another_config_is_refused(
    learned: Any, new_llava: Callable, processor: Any, tmp_path: Path
) -> None:
    cf.save_pretrained(learned, tmp_path / "out")
    model = cf.patch(new_llava(), cf.IncrementConfig(rank=2), processor=processor)
    with pytest.raises(ValueError, match="unpatch"):
        cf.load_pretrained(model, tmp_path / "out")
    with pytest.raises(ValueError, match="not patched"):
        cf.save_pretrained(new_llava(), tmp_path / "other")


def test_sequential_lora_round_trips(
    new_llava: Callable, processor: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    model = cf.patch(new_llava(), cf.LoraConfig(a_std=0.1), processor=processor)
    learn(model, 1, generator)
    cf.save_pretrained(model, tmp_path / "out")
    again = cf.load_pretrained(new_llava(), tmp_path / "out", processor=processor)
    batch = inputs(processor, QUESTIONS, generator)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
        assert not torch.equal(model(**batch).logits, new_llava()(**batch).logits)
