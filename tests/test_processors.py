"""Processors: how they are found and loaded, what is remembered of them, and which need torchvision."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.import_utils import BACKENDS_MAPPING

import cllava_fast as cf
from cllava_fast.cli.base import load_base, load_processor
from cllava_fast.config import ModelConfig
from cllava_fast.data import chat_template
from cllava_fast.data.encode import Encoder
from cllava_fast.demo.base import FOLDER
from cllava_fast.model import paths
from cllava_fast.model.processors import follows, image_settings
from tests.base_models import FOR_IMAGES, SIDE
from tests.test_bases import CONFIG, DOCS, model_of, processor_of


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


def test_a_named_conversation_becomes_the_processors_template() -> None:
    _, processor = load_base(ModelConfig(path=str(FOLDER), conversation="vicuna_v1"))
    assert processor.chat_template == chat_template("vicuna_v1")
    assert load_base(ModelConfig(path=str(FOLDER)))[1].chat_template != processor.chat_template


def test_a_base_is_loaded_with_images_that_are_padded() -> None:
    pads = [
        load_base(ModelConfig(path=str(FOLDER), image_aspect_ratio=how))[1].image_processor.do_pad or False
        for how in ("processor", "pad")
    ]
    assert pads == [False, True]


def test_a_base_is_loaded_with_other_settings_of_images() -> None:
    def loaded(**settings: Any) -> Any:
        return load_processor(ModelConfig(path=str(FOLDER), image_settings=settings))

    half = {"height": 32, "width": 32}
    assert image_settings(loaded(size=half, do_center_crop=False)) == {**image_settings(loaded()), "size": half}
    with pytest.raises(ValueError, match="'max_patches': 6}, and the base's image processor has {'do_pad': False, "):
        loaded(max_patches=6)
    with pytest.raises(ValueError, match="image_settings has 'max_pixel'; did you mean max_pixels?"):
        loaded(max_pixel=1)
    with pytest.raises(ValueError, match="image_settings has 'do_pad'; images are padded by image_aspect_ratio: pad"):
        loaded(do_pad=True)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"size": {"height": "a", "width": 3}}, "TypeError: "),
        ({"image_mean": [0.5, 0.5]}, "(ValueError|RuntimeError): "),
        ({"image_std": [0, 0, 0]}, "pixels that are no finite numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of a division by 0
def test_settings_of_images_are_tried_before_the_weights_are_loaded(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.image_settings is .*, and an image prepared so ends in " + problem):
        load_processor(ModelConfig(path=str(FOLDER), image_settings=settings))


@pytest.mark.parametrize("patch", [14, 16])
def test_a_qwens_images_may_be_left_as_large_as_they_are(monkeypatch: pytest.MonkeyPatch, patch: int) -> None:
    def load(path: str, **options: Any) -> Any:
        return SimpleNamespace(image_processor=Qwen2VLImageProcessorPil(patch_size=patch, **options))

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load)
    load_processor(ModelConfig(path="any", image_settings={"do_resize": False}))


def test_settings_of_images_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **options: Any) -> Any:
        return SimpleNamespace(image_processor=Qwen2VLImageProcessorPil(**options))

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load)
    size = {"longest_edge": 8192, "shortest_edge": 64}
    settings: dict[str, Any] = {"max_pixels": 4096, "size": size}
    with pytest.raises(ValueError, match="8192.*, and the base's image processor has .*4096"):
        load_processor(ModelConfig(path="any", image_settings=settings))
    assert size["longest_edge"] == 8192


def test_how_many_pixels_an_image_may_have_is_remembered() -> None:
    name = "Qwen2VL" + FOR_IMAGES
    processor, fewer = processor_of(name), copy.deepcopy(processor_of(name))
    model, image = cf.patch(model_of(name), CONFIG, processor=processor), Image.new("RGB", (300, 300))
    # deprecated names, which act
    fewer.image_processor.min_pixels = fewer.image_processor.max_pixels = 4 * SIDE**2
    sizes = [len(Encoder(one).images([image])["pixel_values"]) for one in (processor, fewer)]
    assert sizes[1] < sizes[0]
    assert [follows(one, {"max_pixels": 4 * SIDE**2}) for one in (processor, fewer)] == [False, True]
    with pytest.raises(ValueError, match="another size of images than the one .*; unpatch"):
        cf.patch(model, processor=fewer)


def test_how_many_tiles_an_image_may_have_is_remembered(tmp_path: Path) -> None:
    name = "InternVL" + FOR_IMAGES
    processor, fewer = processor_of(name), copy.deepcopy(processor_of(name))
    fewer.image_processor.max_patches = 1
    assert [follows(one, {"max_patches": 1}) for one in (processor, fewer)] == [False, True]
    model = cf.patch(model_of(name), CONFIG, processor=processor)
    with pytest.raises(ValueError, match="another max_patches of images than the one .*; unpatch"):
        cf.patch(model, processor=fewer)
    cf.save_pretrained(model, tmp_path)
    with pytest.warns(UserWarning, match="images have max_patches 1, and .* was learned with 4"):
        cf.load_pretrained(model_of(name), tmp_path, processor=fewer)


def test_a_tokenizer_beside_the_weights_is_found(tmp_path: Path) -> None:
    name = "Qwen2ForCausalLM"
    model_of(name).save_pretrained(tmp_path)
    processor_of(name).save_pretrained(tmp_path)
    model = cf.patch(transformers.Qwen2ForCausalLM.from_pretrained(tmp_path), CONFIG)
    assert model.increments.processor.chat_template == processor_of(name).chat_template
    assert model.increments.reader.user.endswith("USER:")
