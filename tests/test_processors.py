"""Processors that need torchvision, which transformers wants for their part for videos."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.import_utils import BACKENDS_MAPPING

import cllava_fast as cf
from cllava_fast.cli.base import load_processor
from cllava_fast.config import ModelConfig
from cllava_fast.model import paths
from tests.base_models import FOR_IMAGES
from tests.test_bases import DOCS, model_of


def test_the_docs_say_which_bases_need_torchvision() -> None:
    needs = {}
    for row in re.findall(r"^\| (`\w+For.*) \|$", DOCS, re.MULTILINE):
        classes, _, torchvision, _ = row.split(" | ")
        needs.update(dict.fromkeys(re.findall(r"`(\w+)`", classes), torchvision == "yes"))
    assert needs.keys() == paths.BASES.keys()
    for name, said in needs.items():
        processor = PROCESSOR_MAPPING_NAMES.get(getattr(transformers, name).config_class.model_type)
        parts = inspect.signature(getattr(transformers, processor)).parameters if processor else ()
        assert said == ("video_processor" in parts), name


def test_torchvision_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("Qwen2VL" + FOR_IMAGES)
    model.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    model = type(model).from_pretrained(tmp_path)
    calls = (lambda: cf.patch(model), lambda: load_processor(ModelConfig(path=str(tmp_path))))

    def refused(says: str) -> list[ImportError]:
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", Mock(side_effect=ImportError(says)))
        found = []
        for call in calls:
            with pytest.raises(ImportError) as error:
                call()
            found.append(error.value)
        return found

    for error in refused(BACKENDS_MAPPING["torchvision"][1].format("Qwen2VLVideoProcessor")):
        assert isinstance(error, ModuleNotFoundError) and error.name == "torchvision"
        assert str(error).startswith(f"the processor of {tmp_path} needs torchvision, which is not installed")
        assert str(error).endswith(f"fits torch {torch.__version__}")
    assert [str(error) for error in refused("sentencepiece is missing")] == ["sentencepiece is missing"] * 2
