"""``from_pretrained`` finds the base that a folder or a repository names; ``push_to_hub`` uploads three files."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import CommitInfo, ModelCard, RepoUrl
from huggingface_hub.errors import HFValidationError
from PIL import Image

import cllava_fast as cf
from cllava_fast.data import chat_template, pad_to_square
from cllava_fast.demo import load_base
from cllava_fast.model import files, hub
from tests.base_models import new_model, new_processor
from tests.helpers import QUESTIONS, inputs, learn

COMMIT = "c" * 40


@pytest.fixture
def base(new_llava: Callable, processor: Any, tmp_path: Path) -> Path:
    """A folder of a base model in bfloat16, with its processor."""
    folder = tmp_path / "base"
    new_llava().bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def learned_on(base: str | Path, generator: torch.Generator, **options: Any) -> Any:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(base, **options)
    cf.patch(model, cf.IncrementConfig(a_std=0.1))
    learn(model, 2, generator)
    return model


def put_in_cache(cache: Path, repo_id: str, folder: Path) -> None:
    """As if ``repo_id`` had been downloaded."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that keeps what is uploaded in a folder; its methods take what the real ones take."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.create_repo.side_effect = lambda repo_id, **options: RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(*, repo_id: str, folder_path: Path, commit_message: str, **options: Any) -> CommitInfo:
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}", commit_message=commit_message,
            commit_description="", oid=COMMIT,
        )  # fmt: skip

    api.upload_folder.side_effect = upload_folder
    monkeypatch.setattr(hub, "HfApi", lambda token=None: api)
    return api


def test_the_base_is_loaded_by_the_name_and_the_dtype_in_the_file(
    base: Path, tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = learned_on("base", generator, dtype=torch.float32).eval()  # a relative path, another dtype than its file's
    cf.save_pretrained(model, "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = cf.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert again.dtype == torch.float32 and again.config._attn_implementation == "eager" and not again.training
    processor = again.increments.processor
    batch = inputs(processor, QUESTIONS, generator)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.increments.pool.task_names == ["task0", "task1"]
    # with another dtype it is another base
    for name in ("dtype", "torch_dtype"):
        with pytest.raises(ValueError, match="were float32, these are bfloat16; load the base with dtype='float32'"):
            cf.from_pretrained(tmp_path / "out", **{name: torch.bfloat16})


def test_what_was_learned_in_one_dtype_is_served_in_another(
    base: Path, tmp_path: Path, generator: torch.Generator
) -> None:
    """By a folder that is written in it, which a model that serves may load, too."""
    served = []
    for name in ("older", "newer"):
        folder = cf.save_pretrained(learned_on(base, generator, dtype=torch.float32), tmp_path / name)
        served.append(cf.save_pretrained(cf.from_pretrained(folder).bfloat16(), tmp_path / f"{name}-bfloat16"))
    with pytest.raises(ValueError, match=r"these are bfloat16; load the base with dtype='float32' \(docs/serving.md"):
        cf.load_pretrained(cf.from_pretrained(served[0]), tmp_path / "newer")
    model, newer = (cf.from_pretrained(folder) for folder in served)
    assert model.dtype == torch.bfloat16 == next(iter(model.increments.pool.layers.values())).A.dtype
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32  # a cast in memory would round it
    batch = inputs(model.increments.processor, QUESTIONS, generator)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with torch.no_grad():
        expected = newer(**batch).logits
        assert not torch.equal(model(**batch).logits, expected)
        assert torch.equal(cf.load_pretrained(cf.share(model), served[1])(**batch).logits, expected)


def test_prompts_are_served_as_they_were_learned(
    base: Path, tmp_path: Path, generator: torch.Generator, recwarn: pytest.WarningsRecorder
) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    def new_base() -> tuple[Any, Any]:
        return LlavaForConditionalGeneration.from_pretrained(base), AutoProcessor.from_pretrained(base)

    model, speaking = new_base()
    speaking.chat_template = chat_template("vicuna_v1")
    cf.patch(model, cf.IncrementConfig(a_std=0.1), processor=speaking)
    learn(model, 1, generator)
    saved = cf.save_pretrained(model, tmp_path / "out")
    cf.load_pretrained(new_base()[0], saved, processor=speaking)
    recwarn.clear()
    loaded = [cf.from_pretrained(saved), cf.from_pretrained(saved, new_base()[0])]
    loaded.append(cf.load_pretrained(new_base()[0], saved))
    for model in loaded:
        assert model.increments.processor.chat_template == chat_template("vicuna_v1")
    assert not [warning for warning in recwarn if "template" in str(warning.message)]

    model, silent = new_base()
    with pytest.warns(UserWarning, match="chat template is not the one that .*out was learned with"):
        cf.load_pretrained(model, saved, processor=silent)
    assert model.increments.processor.chat_template != chat_template("vicuna_v1")
    with pytest.warns(UserWarning, match="chat template is not the one"):
        cf.load_pretrained(model, saved)

    file = saved / files.CONFIG
    values = json.loads(file.read_text())
    loops = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
    for template in ("", loops, "{{ 'a' * 10**9 }}", silent.chat_template + " "):
        file.write_text(json.dumps({**values, "chat_template": template}))
        for load in (lambda: cf.from_pretrained(saved), lambda: cf.load_pretrained(new_base()[0], saved)):
            with pytest.raises(ValueError, match="adapter_config.json is neither the base's own nor one of this libr"):
                load()
    light = shutil.copytree(base, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="chat_template in .* is neither"):  # before the weights are asked for
        cf.from_pretrained(saved, base_model=str(light))
    with pytest.raises(FileNotFoundError, match="light', and cannot be loaded; .* model.safetensors"):
        cf.from_pretrained(saved, base_model=str(light), chat_template=template)
    for broken in ('{"image', '{"auto_map": {"AutoProcessor": "evil.Evil"}, "processor_class": "Evil"}'):
        (light / "processor_config.json").write_text(broken)
        with pytest.raises(ValueError, match=r"^the processor beside .*light' cannot be loaded; mend its files, or gi"):
            cf.from_pretrained(saved, base_model=str(light), chat_template=template)
    assert cf.from_pretrained(saved, chat_template=template).increments.processor.chat_template == template
    with pytest.warns(UserWarning, match="chat template is not the one that .*out was learned with"):
        cf.from_pretrained(saved, chat_template="another")
    trusted = new_base()[1]
    trusted.chat_template = template
    assert cf.from_pretrained(saved, processor=trusted).increments.processor is trusted
    for given in ({"processor": trusted}, {"model": new_base()[0]}):
        with pytest.raises(ValueError, match="chat_template is given beside model= or processor="):
            cf.from_pretrained(saved, chat_template=template, **given)
    del values["chat_template"]  # as files were before
    file.write_text(json.dumps(values))
    assert cf.from_pretrained(saved).increments.processor.chat_template == silent.chat_template


def test_images_are_served_as_they_were_learned(base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    def new_base() -> tuple[Any, Any]:
        return LlavaForConditionalGeneration.from_pretrained(base), AutoProcessor.from_pretrained(base)

    image = Image.effect_noise((96, 40), 64).convert("RGB")

    def pixels(processor: Any) -> torch.Tensor:
        return processor.image_processor([image], return_tensors="pt")["pixel_values"]

    (model, padding), (other, plain) = new_base(), new_base()
    pad_to_square(padding)
    padded = cf.save_pretrained(cf.patch(model, cf.IncrementConfig(), processor=padding), tmp_path / "padded")
    whole = cf.save_pretrained(cf.patch(other, cf.IncrementConfig(), processor=plain), tmp_path / "whole")
    assert not torch.equal(pixels(padding), pixels(plain))
    recwarn.clear()
    loaded = [cf.from_pretrained(padded), cf.load_pretrained(new_base()[0], padded)]
    cf.load_pretrained(new_base()[0], padded, processor=padding)
    for model in loaded:
        assert torch.equal(pixels(model.increments.processor), pixels(padding))
    assert torch.equal(pixels(cf.from_pretrained(whole).increments.processor), pixels(plain))
    assert not [warning for warning in recwarn if "images" in str(warning.message)]
    with pytest.warns(UserWarning, match="images have do_pad False, and .*padded was learned with True.*pad_to_square"):
        cf.load_pretrained(new_base()[0], padded, processor=plain)
    smaller = copy.deepcopy(padding)
    smaller.image_processor.image_mean = [0.4, 0.5, 0.5]
    with pytest.warns(UserWarning, match=r"images have image_mean \[0.4, 0.5, 0.5\], and .*set processor.image_p"):
        cf.load_pretrained(new_base()[0], padded, processor=smaller)

    # a base that was itself saved with padding, for increments learned without
    padding.save_pretrained(base)
    try:
        assert torch.equal(pixels(cf.from_pretrained(whole).increments.processor), pixels(plain))
    finally:
        plain.save_pretrained(base)
    file = padded / files.CONFIG
    values = json.loads(file.read_text())
    for settings in ("pad", [], {}, {"do_pad": 1}):
        file.write_text(json.dumps({**values, "image_settings": settings}))
        with pytest.raises(ValueError, match="image_settings is .*; expected a mapping with do_pad, true or false"):
            cf.from_pretrained(padded)
    del values["image_settings"]  # as files were before
    file.write_text(json.dumps(values))
    assert torch.equal(pixels(cf.from_pretrained(padded).increments.processor), pixels(plain))


def test_images_may_be_prepared_by_ones_own_code(base: Path, tmp_path: Path) -> None:
    """It says nothing of how, and nothing is compared."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, processor = LlavaForConditionalGeneration.from_pretrained(base), AutoProcessor.from_pretrained(base)
    plain = processor.image_processor
    processor.image_processor = lambda images, **options: plain(images, **options)
    saved = cf.save_pretrained(cf.patch(model, cf.IncrementConfig(), processor=processor), tmp_path / "own")
    assert json.loads((saved / files.CONFIG).read_text())["image_settings"] is None


def test_views_that_are_made_otherwise_than_learned_are_told(tmp_path: Path) -> None:
    """Images that are cut into views take no ``pad_to_square``, with or without ``do_pad``: they load all the same."""
    name = "LlavaNextForConditionalGeneration"
    processor, learned = new_processor(name), new_processor(name)
    base = new_model(name, processor)
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    learned.image_processor.do_pad = False
    learned.image_processor.image_grid_pinpoints = [[32, 64]]
    saved = cf.save_pretrained(cf.patch(base, cf.IncrementConfig(), processor=learned), tmp_path / "mine")
    with pytest.warns(UserWarning) as told:
        cf.from_pretrained(saved, base_model=str(tmp_path / "base"))
    said = [str(warning.message) for warning in told if "images have" in str(warning.message)]
    assert [text.split()[4] for text in said] == ["do_pad", "image_grid_pinpoints"], said
    assert all(text.endswith("set processor.image_processor so") for text in said)


def test_padding_is_refused_where_there_is_none() -> None:
    for name, given in (("LlavaNextForConditionalGeneration", "a LlavaNextImage"), ("LlamaForCausalLM", "none")):
        with pytest.raises(ValueError, match=f"image_processor is {given}.*expected one of CLIPImageProcessor"):
            pad_to_square(new_processor(name))


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "LlamaForCausalLM"])
def test_a_method_that_reads_no_instruction_has_a_processor_too(
    name: str, tmp_path: Path, generator: torch.Generator
) -> None:
    """That of a base in the hub's cache, which no folder of the model leads to."""
    processor = new_processor(name)
    cache, base = tmp_path / "cache", tmp_path / "base"
    model = cf.patch(new_model(name, processor), cf.LoraConfig(), processor=processor)
    learn(model, 1, generator)
    saved = cf.save_pretrained(model, tmp_path / "out", base_model="lab/base")
    cf.unpatch(model).save_pretrained(base)
    put_in_cache(cache, "lab/bare", base)
    processor.save_pretrained(base)
    put_in_cache(cache, "lab/base", base)
    again = cf.from_pretrained(saved, cache_dir=cache).increments
    assert again.processor.chat_template == processor.chat_template and again.reader is not None
    # where there is none, none is needed
    values = json.loads((saved / files.CONFIG).read_text())
    (saved / files.CONFIG).write_text(json.dumps({**values, "base_model_name_or_path": "lab/bare"}))
    assert cf.from_pretrained(saved, cache_dir=cache).increments.processor is None


def test_patch_finds_the_processor_of_a_base_by_its_name_on_the_hub(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the weights, in the cache; a name that leads nowhere has none."""
    put_in_cache(tmp_path, "lab/base", base)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = cf.patch(transformers.LlavaForConditionalGeneration.from_pretrained("lab/base"))
    assert isinstance(model.increments.processor, transformers.LlavaProcessor)
    model.name_or_path = "lab/gone"
    with pytest.raises(ValueError, match="none was given and none is saved beside"):
        cf.patch(cf.unpatch(model))
    (base / "processor_config.json").write_text("{")  # one that is damaged is not left out in silence
    model.name_or_path = str(base)
    with pytest.raises((OSError, ValueError), match="processor_config.json|JSON"):
        cf.patch(model, cf.IncrementConfig(surrogate="backbone"))


def test_a_base_of_text_alone_is_loaded(tmp_path: Path, generator: torch.Generator) -> None:
    name = "LlamaForCausalLM"
    tokenizer = new_processor(name)
    new_model(name, tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = cf.patch(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), cf.IncrementConfig(a_std=0.1))
    learn(model, 1, generator)
    again = cf.from_pretrained(cf.save_pretrained(model, tmp_path / "out"))
    ids = tokenizer("USER: which bar is the tallest? ASSISTANT:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_files_say_how_the_base_was_quantised(base: Path, tmp_path: Path, generator: torch.Generator) -> None:
    exact = cf.save_pretrained(learned_on(base, generator), tmp_path / "exact")
    model = learned_on(base, generator)
    model.lm_head.weight.data += 0.01
    model.config.quantization_config = {"quant_method": "gptq"}
    quantised = cf.save_pretrained(model, tmp_path / "quantised")
    card = (quantised / files.CARD).read_text()
    assert "bfloat16, quantised: gptq" in card and 'folder", quantization_config=quantization)' in card
    assert "quanti" not in (exact / files.CARD).read_text()
    with pytest.raises(ValueError, match=r"on a quantised base \('gptq'\), .* pass .*quantization_config="):
        cf.from_pretrained(quantised)
    with pytest.raises(ValueError, match="quantisation was 'gptq', this one's is 'none'; load the base with that"):
        cf.from_pretrained(quantised, cf.unpatch(learned_on(base, generator)))
    with pytest.raises(ValueError, match="was 'none', this one's is 'gptq'; load the base without quantization_config"):
        cf.load_pretrained(cf.unpatch(model), exact)
    # files from before it was recorded
    values = json.loads((exact / files.CONFIG).read_text())
    del values["base_quantization"]
    (exact / files.CONFIG).write_text(json.dumps(values))
    assert cf.from_pretrained(exact).increments.pool.num_tasks == 2


def test_a_given_base_is_used(
    base: Path, tmp_path: Path, generator: torch.Generator, new_llava: Callable, processor: Any
) -> None:
    cf.save_pretrained(learned_on(base, generator), tmp_path / "out")
    model = new_llava().bfloat16()
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=r"the base model '.*base' .*base_model=PATH\) or --model PATH, .*model=base"
    ):
        cf.from_pretrained(tmp_path / "out")
    moved = cf.from_pretrained(tmp_path / "out", base_model=str(tmp_path / "moved")).increments
    assert moved.pool.num_tasks == 2 and moved.processor is not None
    with pytest.raises(ValueError, match="base_model is 'moved', but model= was given; give one of them"):
        cf.from_pretrained(tmp_path / "out", model, base_model="moved")
    with pytest.raises(ValueError, match=r"\['dtype'\] say how to load the base, but model= was given"):
        cf.from_pretrained(tmp_path / "out", model, dtype="float32")
    learned = cf.from_pretrained(str(tmp_path / "out"), model.train(), processor)
    assert learned is model and model.increments.pool.num_tasks == 2 and not model.training


def test_a_base_without_a_name_has_to_be_given(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    cf.save_pretrained(cf.patch(new_llava(), processor=processor), tmp_path / "out")
    assert json.loads((tmp_path / "out" / files.CONFIG).read_text())["base_model_name_or_path"] is None
    with pytest.raises(ValueError, match="does not say where its base model is"):
        cf.from_pretrained(tmp_path / "out")
    assert 'from_pretrained("path/of/this/folder", model=base)' in (tmp_path / "out" / files.CARD).read_text()


def test_pushed_and_loaded_by_name(
    base: Path, tmp_path: Path, generator: torch.Generator, uploads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client reads both repositories from its cache; nothing is on a network here."""
    cache = tmp_path / "cache"
    put_in_cache(cache, "lab/llava", base)
    model = learned_on(base, generator)
    url = cf.push_to_hub(
        model, "me/mine", base_model="lab/llava", private=True, commit_message="two tasks", branch="dev",
        ignore_patterns="*.md",
    )  # fmt: skip
    assert url == f"https://huggingface.co/me/mine/commit/{COMMIT}"
    uploads.create_repo.assert_called_once_with(repo_id="me/mine", private=True, exist_ok=True)
    sent = uploads.upload_folder.call_args.kwargs
    assert (sent["commit_message"], sent["revision"], sent["ignore_patterns"]) == ("two tasks", "dev", "*.md")
    assert not Path(sent["folder_path"]).exists()  # only for as long as it was needed
    pushed = tmp_path / "hub" / "me" / "mine"
    assert sorted(path.name for path in pushed.iterdir()) == sorted(files.FILES)
    assert 'cf.from_pretrained("me/mine")' in (pushed / files.CARD).read_text()
    assert ModelCard.load(pushed / files.CARD).data.base_model == "lab/llava"

    put_in_cache(cache, "me/mine", pushed)
    again = cf.from_pretrained("me/mine", cache_dir=cache)
    assert all(
        torch.equal(tensor, again.increments.pool.state()[name])
        for name, tensor in model.increments.pool.state().items()
    )
    with pytest.raises(FileNotFoundError, match="'me/other' is no folder here, and as a repository"):
        cf.from_pretrained("me/other", cache_dir=cache)


def test_a_folder_of_this_machine_is_not_pushed(
    base: Path, tmp_path: Path, generator: torch.Generator, uploads: Any
) -> None:
    cf.push_to_hub(learned_on(base, generator), "me/mine")
    pushed = tmp_path / "hub" / "me" / "mine"
    assert json.loads((pushed / files.CONFIG).read_text())["base_model_name_or_path"] is None
    for file in (files.CONFIG, files.CARD):
        assert str(tmp_path) not in (pushed / file).read_text()


def test_only_our_files_are_downloaded_and_only_if_allowed(
    base: Path, tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = cf.save_pretrained(learned_on(base, generator), tmp_path / "out")
    asked: list[dict[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append({"repo_id": repo_id, **options})
        return str(saved)

    monkeypatch.setattr(
        hub, "snapshot_download", create_autospec(huggingface_hub.snapshot_download, side_effect=download)
    )
    cf.from_pretrained("me/mine", revision="v1", token="t")
    cf.from_pretrained("me/mine", local_files_only=True)
    cf.from_pretrained(saved)  # a folder needs no hub
    assert [call["local_files_only"] for call in asked] == [False, True]
    assert asked[0]["allow_patterns"] == list(files.FILES) and asked[0]["token"] == "t"
    assert asked[0]["repo_id"] == "me/mine" and asked[0]["revision"] == "v1"
    # a folder's base comes from this machine alone
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaConfig

    loads: list[dict[str, Any]] = []

    def refuse(name: str, **options: Any) -> None:
        loads.append({"name": name, **options})
        raise OSError("not here")

    def configuration(name: str, **options: Any) -> LlavaConfig:
        loads.append({"name": name, **options, "use_safetensors": True})
        return LlavaConfig()

    monkeypatch.setattr(AutoConfig, "from_pretrained", configuration)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", partial(refuse, use_safetensors=True))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", refuse)
    values = json.loads((saved / files.CONFIG).read_text())
    (saved / files.CONFIG).write_text(json.dumps({**values, "base_model_name_or_path": "lab/llava"}))
    for source, options in ((saved, {}), (saved, {"local_files_only": False}), ("me/mine", {})):
        with pytest.raises(FileNotFoundError, match="model=base, or let it be downloaded by local_files_only=False"):
            cf.from_pretrained(source, **options)
    assert [call["local_files_only"] for call in loads] == [True] * 3 + [False] * 6
    with pytest.raises(
        FileNotFoundError, match="was given as 'lab/other', and cannot be loaded; expected its folder, or"
    ):
        cf.from_pretrained(saved, base_model="lab/other")
    assert all(call["trust_remote_code"] is False and call["use_safetensors"] for call in loads)


def test_refusals(
    base: Path, tmp_path: Path, uploads: Any, new_llava: Callable, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (tmp_path / "missing", "./missing", "a/b/c", str(tmp_path / "missing")):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            cf.from_pretrained(source)
    with pytest.raises(FileNotFoundError, match=f"{files.CONFIG} does not exist"):
        cf.from_pretrained(base)
    for name in ("01-color", "02-shape"):
        (tmp_path / "run" / "increments" / name).mkdir(parents=True)
    for load in (cf.from_pretrained, lambda folder: cf.load_pretrained(new_llava(), folder)):
        with pytest.raises(FileNotFoundError, match="folder of a run, and what it has learned is in .*02-shape$"):
            load(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="expected a folder written by .*a repository of a hub is loaded by cl"):
        cf.load_pretrained(new_llava(), "you/increments")
    with pytest.raises(ValueError, match="trust_remote_code=True was given"):
        cf.from_pretrained(base, trust_remote_code=True)
    with pytest.raises(ValueError, match="not patched"):
        cf.push_to_hub(new_llava(), "me/mine")
    model = cf.patch(new_llava(), processor=processor)
    with pytest.raises(HFValidationError):
        cf.push_to_hub(model, "me/mine/too")
    monkeypatch.chdir(tmp_path)
    for folder in (str(base), "base"):
        with pytest.raises(ValueError, match="expected the base's name on the hub"):
            cf.push_to_hub(model, "me/mine", base_model=folder)
    assert not uploads.mock_calls


def test_the_page_on_serving_runs(
    tmp_path: Path, generator: torch.Generator, uploads: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("peft")
    page = (Path(__file__).resolve().parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model, processor = load_base()
    cf.patch(model, cf.IncrementConfig(a_std=0.1), processor=processor)
    pool = learn(model, 4, generator).pool
    pool.task_names = ["chart", "document", "icon", "digit"]
    monkeypatch.chdir(tmp_path)
    cf.save_pretrained(model, "runs/demo/methods/continual_llava/seed0/increments/04-digit")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(tmp_path / "hub" / name))
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    printed = capsys.readouterr().out
    assert printed.count(" -> ") == 4 and "3 linears merged" in printed
    assert (
        "bars-lora: a LoRA of rank" in printed and "small-lora: a LoRA of rank 16 on 3 linears; compressed" in printed
    )
    assert names["model"].increments.pool.task_names == pool.task_names
