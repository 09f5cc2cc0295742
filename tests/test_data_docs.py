"""docs/data.md tells the truth: its code runs, on the files that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor

from cllava_fast.data import read_samples, ready_streams
from cllava_fast.data.load import SECTIONS, STREAM_KEYS, TASK_KEYS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page names."""
    for name in ("images/coco/1.png", "images/charts/1.png", "digits/train/3/0001.png", "digits/test/3/0002.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "charts").mkdir()
    (records,) = (json.loads(block) for block in blocks("json"))
    (tmp_path / "charts" / "train.json").write_text(json.dumps(records))
    (tmp_path / "charts" / "test.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "stream.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_records_are_what_the_page_says(folder: Path) -> None:
    a, b, c = read_samples(folder / "charts" / "train.json", folder / "images")
    assert (a.instruction, a.answer, a.history) == ("What color is it?", "Red.", (("What is it?", "A cat."),))
    assert (b.instruction, b.answer) == ("What is it?", "cat") and c.answer == "Goethe" and len(c.references) == 3


def test_the_code_runs(folder: Path, llava: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "vqa" / "data").mkdir(parents=True)
    data = datasets.Dataset.from_dict({"query": ["Which?"], "label": ["this"]})
    data.to_parquet(folder / "vqa" / "data" / "train-00000-of-00001.parquet")
    names: dict[str, Any] = {"model": llava, "processor": processor}
    for name in ("chat_template", "image_processor"):
        monkeypatch.setattr(processor, name, getattr(processor, name))  # comes back after the page sets it
    for code in blocks("python"):
        exec(code, names)
    assert [task.name for task in names["trainer"].stream] == ["charts", "digits"]
    assert names["stream"].task_names == ["charts"] and "curious user" in processor.chat_template
    assert len(read_samples(folder / "charts" / "train.jsonl", folder / "images")) == 3
    source = yaml.safe_load(blocks("yaml")[1])["train"]
    assert read_samples(source["path"], split=source["split"], columns=source["columns"])[0].answer == "this"


@pytest.mark.parametrize("size", [(96, 40), (41, 96)])
def test_images_are_padded_as_llava_pads_them(folder: Path, processor: Any, monkeypatch: Any, size: Any) -> None:
    """To a square with the mean color, the image in the middle, as ``expand2square`` of LLaVA's ``mm_utils.py``."""
    (code,) = (code for code in blocks("python") if "pad_to_square" in code)
    image = Image.effect_noise(size, 64).convert("RGB")
    monkeypatch.setattr(processor, "image_processor", processor.image_processor)  # comes back
    processor.save_pretrained(folder / "base")
    exec(code, {"processor": processor})
    plain = AutoProcessor.from_pretrained(folder / "base").image_processor
    square = Image.new("RGB", (96, 96), tuple(int(255 * mean) for mean in plain.image_mean))
    square.paste(image, ((96 - size[0]) // 2, (96 - size[1]) // 2))
    expected = plain([square], return_tensors="pt")["pixel_values"]
    processor.save_pretrained(folder / "padding")
    for padding in (processor.image_processor, AutoProcessor.from_pretrained(folder / "padding").image_processor):
        torch.testing.assert_close(padding([image], return_tensors="pt")["pixel_values"], expected)
    assert not torch.allclose(plain([image], return_tensors="pt")["pixel_values"], expected)


def test_every_key_and_every_ready_stream_is_told() -> None:
    for name in (*STREAM_KEYS, *TASK_KEYS, *SECTIONS, *ready_streams()):
        assert f"`{name}`" in PAGE, name
