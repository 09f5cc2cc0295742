"""Saved increments: bit-equal again, whole or not at all, and nothing wrong is let in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cllava_fast as cf
from cllava_fast import atomic
from cllava_fast.model import files
from tests.helpers import QUESTIONS, inputs, learn


@pytest.fixture
def learned(new_llava: Callable, processor: Any, generator: torch.Generator) -> Any:
    model = cf.patch(new_llava(), cf.IncrementConfig(a_std=0.1, top_m=3), processor=processor)
    learn(model, 2, generator)
    return model


def test_bit_equal_after_a_round_trip(
    learned: Any, new_llava: Callable, processor: Any, tmp_path: Path, generator: Any
) -> None:
    cf.save_pretrained(learned, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [files.CONFIG, files.WEIGHTS]
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
        ("missing", ValueError, "1 tensors are missing"),
        ("field", ValueError, "unknown fields"),
        ("no json", ValueError, "cannot be read"),
        ("format", ValueError, "format is not 1"),
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
    elif damage == "missing":
        tensors = load_file(weights)
        del tensors["pool.keys"]
        save_file(tensors, weights)
        values["weights_sha256"] = files.hashlib.sha256(weights.read_bytes()).hexdigest()
    elif damage == "field":
        values["config"]["colour"] = "red"
    elif damage == "format":
        values["format"] = 2
    config.write_text("{" if damage == "no json" else json.dumps(values))
    with pytest.raises(error, match=message):
        cf.load_pretrained(model, folder, processor=processor)
    assert not hasattr(model, "increments") and "forward" not in model.__dict__


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
