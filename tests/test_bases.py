"""Every class in ``paths.BASES``: what the patch presumes of it, on tiny random models; targets."""

from __future__ import annotations

import copy
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor

import cllava_fast as cf
from cllava_fast.data.encode import Collator, Encoder, ImageFeatures
from cllava_fast.model import get_increments, paths
from cllava_fast.model.images import images_per_sample, pooled_image
from cllava_fast.model.instructions import message
from cllava_fast.model.selecting import Request, images_of
from tests.base_models import FOR_IMAGES, FOR_TEXT, VIDEO, new_model, new_processor
from tests.helpers import QUESTIONS, learn

EVERY = ("self_attn.*_proj", "mlp.*")
CONFIG = cf.IncrementConfig(a_std=0.1, rank=2, surrogate="backbone", targets=EVERY)
SIZES = ((40, 40), (64, 30), (30, 80))  # of images, in pixels
ASKED = QUESTIONS[:3]
LLAVA = "Llava" + FOR_IMAGES

of_every_base = pytest.mark.parametrize("name", paths.BASES)
of_image_bases = pytest.mark.parametrize("name", [name for name in paths.BASES if not name.endswith(FOR_TEXT)])
of_text_bases = pytest.mark.parametrize("name", [name for name in paths.BASES if name.endswith(FOR_TEXT)])


@cache
def processor_of(name: str) -> Any:
    return new_processor(name)


@cache
def _model(name: str) -> Any:
    return new_model(name, processor_of(name))


def model_of(name: str) -> Any:
    return copy.deepcopy(_model(name))


def pictures(generator: torch.Generator) -> list[Image.Image]:
    pixels = [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in SIZES]
    return [Image.fromarray(p.numpy()) for p in pixels]


def batch_of(name: str, generator: torch.Generator, side: str = "left") -> dict[str, Any]:
    """One question a sample and, where the base takes them, one image of another size each."""
    processor, with_images = processor_of(name), not name.endswith(FOR_TEXT)
    texts = [
        processor.apply_chat_template(
            [message(processor, "user", question, images=int(with_images))], add_generation_prompt=True, tokenize=False
        )
        for question in ASKED
    ]
    images = {"images": pictures(generator)} if with_images else {}
    return dict(processor(text=texts, **images, return_tensors="pt", padding=True, padding_side=side))


def alone(batch: dict[str, Any], i: int) -> dict[str, Any]:
    """Sample i without its padding."""
    mask = batch["attention_mask"][i].bool()
    rows = {key: value[i : i + 1] for key, value in batch.items()}
    if "image_grid_thw" in batch:  # the patches of all images are one sequence
        rows["pixel_values"] = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())[i]
    elif "pixel_values" in batch and batch["pixel_values"].dim() == 4:  # images or their tiles, of as many tokens each
        tokens = (batch["input_ids"] == processor_of(LLAVA).image_token_id).sum(1)
        tiles = tokens * len(batch["pixel_values"]) // tokens.sum()
        rows["pixel_values"] = batch["pixel_values"].split(tiles.tolist())[i]
    of_tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {**rows, **{key: rows[key][:, mask] for key in of_tokens if key in rows}}


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[:, -1]


def patched(name: str, generator: torch.Generator, config: cf.IncrementConfig = CONFIG, tasks: int = 3) -> Any:
    model = cf.patch(model_of(name), config, processor=processor_of(name))
    learn(model, tasks, generator, b_std=0.1)
    return model


def with_dense_offsets(model: Any, i: int) -> Any:
    """The plain model with the increments of question i added to its weights by hand."""
    increments = get_increments(model)
    pool, config = increments.pool, increments.config
    query = increments.surrogate.query([increments.reader.canonical(ASKED[i])])
    selection = increments.method.select(pool, query, 1, training=False)
    alpha = torch.zeros(pool.num_rows).index_add_(0, selection.past.index[0], selection.past.coefficient[0])
    alpha[: selection.context.shape[1]] += selection.context[0]
    plain = cf.unpatch(copy.deepcopy(model))
    for key, factors in pool.layers.items():
        offset = torch.einsum("n,nro,nri->oi", alpha, factors.B, factors.A)
        plain.get_submodule(key.replace("/", ".")).weight.data += config.scale * offset
    return plain


@of_every_base
def test_bit_equal_until_a_task_is_learned_and_after_unpatch(name: str, generator: torch.Generator) -> None:
    model, batch = model_of(name), batch_of(name, generator)
    before, generated = logits(model, batch), model.generate(**batch, max_new_tokens=3)
    attributes = {path: set(module.__dict__) for path, module in model.named_modules()}
    cf.patch(model, CONFIG, processor=processor_of(name))
    assert torch.equal(logits(model, batch), before)
    assert torch.equal(model.generate(**batch, max_new_tokens=3), generated)
    learn(model, 1, generator, b_std=0.1)
    assert (logits(model, batch) - before).abs().max() > 1e-2
    cf.unpatch(model)
    assert torch.equal(logits(model, batch), before)
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == attributes


@of_every_base
def test_what_is_beside_the_language_model(name: str) -> None:
    """Every parameter once: FSDP shards the language model and its head, and leaves the others whole."""
    model = model_of(name)
    parts = [paths.language_model(model), paths.output_head(model), *paths.beside_language_model(model)]
    found = [id(parameter) for part in parts for parameter in part.parameters()]
    assert sorted(found) == sorted(map(id, model.parameters()))


@of_every_base
def test_increments_are_dense_offsets(name: str, generator: torch.Generator) -> None:
    model, batch = patched(name, generator), batch_of(name, generator)
    got = logits(model, batch)
    expected = [logits(with_dense_offsets(model, i), alone(batch, i))[0] for i in range(len(ASKED))]
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-4, rtol=1e-3)


@of_every_base
def test_another_head_reads_what_the_own_one_does(name: str, generator: torch.Generator) -> None:
    """``model.model`` called by itself, as for embeddings."""
    model, batch = patched(name, generator), batch_of(name, generator)
    expected, ids = logits(model, batch), batch.pop("input_ids")
    for hidden in (model.model(ids, **batch), model.model(input_ids=ids, **batch)):
        assert torch.equal(paths.output_head(model)(hidden.last_hidden_state)[:, -1], expected)


@of_every_base
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_cache_and_beams(name: str, beams: int, generator: torch.Generator) -> None:
    model, batch = patched(name, generator), batch_of(name, generator)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams}
    together = model.generate(**batch, **options)[:, -4:]
    for i in range(len(ASKED)):
        dense = with_dense_offsets(model, i)
        assert torch.equal(dense.generate(**alone(batch, i), **options)[0, -4:], together[i])


def test_a_generate_within_generate_leaves_the_outer_ones_rows(generator: torch.Generator) -> None:
    """Speculative decoding by the model's own first layers."""
    name = "LlamaForCausalLM"
    model, batch = patched(name, generator), alone(batch_of(name, generator), 0)
    options = {"instructions": [ASKED[1]], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    wanted, found = (model.generate(**batch, **options, **early) for early in ({}, {"assistant_early_exit": 1}))
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(wanted.logits), atol=2e-4, rtol=1e-3)
    assert get_increments(model).call.pending is None


def test_guidance_within_generate_has_its_rows(generator: torch.Generator) -> None:
    """Its steps begin at the prompt's last token, which asks nothing."""
    name = "LlamaForCausalLM"
    model, batch = patched(name, generator), batch_of(name, generator)
    options = {"guidance_scale": 3.0, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    for i in range(len(ASKED)):
        found, wanted = (m.generate(**alone(batch, i), **options) for m in (model, with_dense_offsets(model, i)))
        torch.testing.assert_close(torch.cat(found.scores), torch.cat(wanted.scores), atol=1e-3, rtol=1e-3)


@of_every_base
def test_activation_checkpointing_leaves_gradients_as_they_are(name: str, generator: torch.Generator) -> None:
    model = patched(name, generator, tasks=1)
    increments = learn(model, 1, generator, commit_last=False)
    increments.pool.train_keys(False)
    batch = batch_of(name, generator, side="right")
    model.train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(plain) == 2 * 14 + 1  # A and B of seven linears in two layers, and w
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for key, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[key], atol=1e-6, rtol=1e-4)


@of_every_base
def test_a_round_trip_through_files(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    model, batch = patched(name, generator), batch_of(name, generator)
    cf.save_pretrained(model, tmp_path / "out")
    loaded = cf.load_pretrained(model_of(name), tmp_path / "out", processor=processor_of(name))
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    other = model_of(name)
    paths.input_embedding(other).weight.data += 1
    with pytest.raises(ValueError, match="another base model"):
        cf.load_pretrained(other, tmp_path / "out", processor=processor_of(name))
    cf.export_peft(model, tmp_path / "lora", task="task0")
    does = "text-generation" if name.endswith(FOR_TEXT) else "image-text-to-text"
    for folder in ("out", "lora"):
        assert ModelCard.load(tmp_path / folder / "README.md").data.pipeline_tag == does


@pytest.mark.parametrize(
    "name",
    [*(kind + FOR_IMAGES for kind in ("LlavaNext", "LlavaOnevision", "Qwen2_5_VL", "InternVL")), "Qwen2" + FOR_TEXT],
)
def test_a_stream_is_learned(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    images = pictures(generator) if not name.endswith(FOR_TEXT) else [None] * 3
    tasks = [
        cf.Task(f"task{k}", *([cf.Sample(ASKED[k], "red", images[i % 3]) for i in range(n)] for n in (4, 2)))
        for k in range(2)
    ]
    config = cf.IncrementConfig(rows_per_task=2, top_m=1, rank=2, a_std=0.1, scale=8.0, surrogate="backbone")
    model = cf.patch(model_of(name), config, processor=processor_of(name))
    arguments = cf.ContinualArguments(
        output_dir=str(tmp_path / "run"), max_steps=16, align_steps=2, learning_rate=1e-2, warmup_steps=0,
        per_device_train_batch_size=2, max_new_tokens=1, progress=False, logging_steps=4,
    )  # fmt: skip
    result = cf.ContinualTrainer(model, processor_of(name), cf.Stream(tasks), arguments).train()
    assert all(losses[-1] < 0.7 * losses[0] for losses in result.losses.values()), result.losses
    assert result.accuracy_matrix[1][0] == result.accuracy_matrix[0][0], "the first task must not be forgotten"


@of_image_bases
def test_each_token_of_an_answer_weighs_the_same_in_a_step(
    name: str, generator: torch.Generator, tmp_path: Path
) -> None:
    """In one batch or accumulated over several, some of which have longer answers."""
    answers, images = ("red", "which bar is the", "red color", "red", "what color"), pictures(generator)
    samples = [cf.Sample(ASKED[0], answer, images[i % 3]) for i, answer in enumerate(answers)]
    losses = []
    for size in (4, 1):
        config = cf.IncrementConfig(rows_per_task=2, top_m=1, rank=2, a_std=0.1, surrogate="backbone")
        model = cf.patch(model_of(name), config, processor=processor_of(name))
        arguments = cf.ContinualArguments(
            output_dir=str(tmp_path / str(size)), max_steps=3, align_steps=1, learning_rate=1e-2, warmup_steps=0,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_new_tokens=1, progress=False,
            logging_steps=1,
        )  # fmt: skip
        stream = cf.Stream([cf.Task("task", train=samples, test=samples[:1])])
        losses += cf.ContinualTrainer(model, processor_of(name), stream, arguments).train().losses.values()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(set(losses[0])) == 3


@of_image_bases
def test_queries_of_text_and_image(name: str, generator: torch.Generator) -> None:
    """The trainer's pooled images and those of a call to the model are the same."""
    processor = processor_of(name)
    config = cf.IncrementConfig(a_std=0.1, surrogate="text+image")
    model = patched(name, generator, config)
    samples = [
        cf.Sample(question, "red", picture) for question, picture in zip(ASKED, pictures(generator), strict=True)
    ]
    encoder, features = Encoder(processor), ImageFeatures()
    features.add(samples, encoder, model)
    increments = get_increments(model)
    query = increments.surrogate.query(
        [increments.reader.canonical(question) for question in ASKED],
        features.pooled(samples, increments.surrogate.image_dim),
    )
    assert len({tuple(row.tolist()) for row in query}) == 3
    examples = encoder.encode(samples)
    by_model = Collator(encoder, None, training=False)(examples)
    by_trainer = Collator(encoder, features, training=False)(examples)
    assert ("image_features" in by_trainer) == paths.BASES[name].takes_features
    torch.testing.assert_close(
        logits(model, by_model), logits(model, {**by_trainer, "query": query}), atol=1e-5, rtol=1e-4
    )
    for i in range(3):
        single = Collator(encoder, None, training=False)(examples[i : i + 1])
        torch.testing.assert_close(logits(model, single)[0], logits(model, by_model)[i], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name, base in paths.BASES.items() if base.packs_images])
def test_images_of_many_patches_are_opened_one_by_one(
    name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may have thousands of patches, and a batch no room beside the model."""
    order: list[str] = []
    images, compute = Encoder.images, ImageFeatures._compute
    monkeypatch.setattr(Encoder, "images", lambda self, given: order.append("opened") or images(self, given))
    monkeypatch.setattr(
        ImageFeatures, "_compute", lambda self, *given: order.append(f"{len(given[0])} seen") or compute(self, *given)
    )
    model = patched(name, generator, cf.IncrementConfig(surrogate="text+image"))
    samples = [cf.Sample("what is it?", "red", picture) for picture in pictures(generator)]
    ImageFeatures().add(samples, Encoder(processor_of(name)), model)
    assert order == ["opened", "1 seen"] * len(samples)


@of_image_bases
def test_in_bfloat16_queries_are_as_precise(name: str, generator: torch.Generator) -> None:
    """The trainer's mean over an image's tiles is no rounder than that of a call to the model."""
    processor, config = processor_of(name), cf.IncrementConfig(surrogate="text+image")
    model = cf.patch(model_of(name).bfloat16(), config, processor=processor)
    samples = [cf.Sample(ASKED[0], "red", picture) for picture in pictures(generator)]
    encoder, features = Encoder(processor), ImageFeatures()
    features.add(samples, encoder, model)
    learned = features.pooled(samples, model.increments.surrogate.image_dim)
    for sample, by_trainer in zip(samples, learned, strict=True):
        batch = Collator(encoder, None, training=False)(encoder.encode([sample]))
        request = Request(1, **{key: batch[key] for key in batch.keys() & set(Request._fields)})
        with torch.no_grad():
            count, *total = images_of(model.increments, request, partial(pooled_image, model))[0]
        torch.testing.assert_close(torch.stack(total) / count, by_trainer.double(), atol=1e-6, rtol=1e-5)


@of_image_bases
def test_batches_are_what_the_processor_makes(name: str, generator: torch.Generator) -> None:
    """To the last input that the model is told by, and read back as they were asked."""
    processor, model = processor_of(name), patched(name, generator)
    samples = [cf.Sample(*sample) for sample in zip(ASKED, ["red"] * 3, pictures(generator), strict=True)]
    prompts = [
        processor.apply_chat_template(
            [message(processor, "user", question, images=1)], add_generation_prompt=True, tokenize=False
        )
        for question in ASKED
    ]
    images = [sample.open_image() for sample in samples]
    wanted = processor(text=prompts, images=images, return_tensors="pt", padding=True, padding_side="left")
    batch = cf.DataCollator(processor, training=False)(samples)
    assert set(batch) == set(wanted) and all(torch.equal(batch[key], wanted[key]) for key in wanted)
    reader = get_increments(model).reader
    assert reader.read(**{key: batch[key] for key in ("input_ids", "attention_mask")}) == [
        reader.canonical(question) for question in ASKED
    ]


@of_image_bases
def test_image_features_are_taken_or_refused(name: str, generator: torch.Generator) -> None:
    model, batch = patched(name, generator), batch_of(name, generator)
    rest = {key: value for key, value in batch.items() if key != "pixel_values"}
    if paths.BASES[name].takes_features:
        features = torch.stack(model.get_image_features(batch["pixel_values"]).pooler_output)
        assert torch.equal(logits(model, {**rest, "image_features": features}), logits(model, batch))
    else:
        with pytest.raises(ValueError, match=f"{name} takes no image_features"):
            model(**rest, image_features=torch.zeros(3, 4, 64))


@of_text_bases
def test_a_model_without_images_refuses_them(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    processor = processor_of(name)
    with pytest.raises(ValueError, match=f'"text.image" looks at images, and a {name} has no vision tower'):
        cf.patch(model_of(name), cf.IncrementConfig(surrogate="text+image"), processor=processor)
    model, batch = patched(name, generator), batch_of(name, generator)
    for call in (model, model.generate):
        for given in ("pixel_values", "image_features"):
            with pytest.raises(ValueError, match=f"{given} was given, but a {name} takes no images"):
                call(**batch, **{given: torch.zeros(3, 3, 32)})
    task = cf.Task("a", *[[cf.Sample("what?", "red", pictures(generator)[0])]] * 2)
    arguments = cf.ContinualArguments(output_dir=str(tmp_path / "run"), progress=False)
    trainer = cf.ContinualTrainer(cf.unpatch(model), processor, cf.Stream([task]), arguments)
    with pytest.raises(ValueError, match=f"a sample has the image .*, but a {name} takes no images"):
        trainer.train()


@pytest.mark.parametrize("name", ["LlavaNextVideo" + FOR_IMAGES, "LlavaOnevision" + FOR_IMAGES])
def test_tokens_of_videos_are_no_instruction(name: str) -> None:
    reader = get_increments(cf.patch(model_of(name), CONFIG, processor=processor_of(name))).reader
    ids = processor_of(name).tokenizer(f"USER: {VIDEO} {VIDEO} what is here? ASSISTANT:", return_tensors="pt").input_ids
    assert reader.read(ids) == ["what is here ?"]


def test_images_of_one_sample_are_counted() -> None:
    """One, two apart, two side by side: each sample is selected for by the mean of its own images."""

    def count(*samples: str, images: int) -> list[int]:
        tokens = torch.tensor([[mark == "x" for mark in sample] for sample in samples])
        return images_per_sample(tokens, images, equal=True).tolist()

    one, apart, beside, uneven = "-xxxx------", "-xxxx-xxxx-", "-xxxxxxxx--", "-xxxxxxx---"
    assert count(one, apart, images=3) == [1, 2]
    assert count(one, beside, images=3) == [1, 2]
    assert count(one, uneven, images=2) == [1, 1]
    with pytest.raises(ValueError, match="3 images came with 11 image tokens"):
        count(one, uneven, images=3)


def test_images_of_other_sizes_are_not_shared_out(generator: torch.Generator) -> None:
    """Side by side, two small images may have as many tokens as one half of a large one."""
    name = "LlavaNext" + FOR_IMAGES
    processor, model = processor_of(name), patched(name, generator, cf.IncrementConfig(surrogate="text+image"))
    small, large = (Image.new("RGB", size) for size in ((64, 8), (32, 64)))

    def batch(*images: list[Image.Image]) -> dict[str, Any]:
        texts = [
            processor.apply_chat_template(
                [message(processor, "user", QUESTIONS[0], images=len(own))], add_generation_prompt=True, tokenize=False
            )
            for own in images
        ]
        return dict(processor(text=texts, images=sum(images, []), return_tensors="pt", padding=True))

    mixed = batch([small, small], [large])
    tokens = (mixed["input_ids"] == model.config.image_token_id).sum(1)
    assert (tokens * 3 % tokens.sum()).tolist() == [0, 0], "or nothing could be mistaken here"
    with pytest.raises(ValueError, match="3 images came with .* which are whose is not clear; pass query="):
        model(**mixed)
    model(**mixed, query=torch.zeros(2, model.increments.pool.key_dim))
    model(**batch([small, large]))  # one sample's are all its own


@of_every_base
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_implementation_stays(name: str, attention: str, generator: torch.Generator) -> None:
    model, batch = model_of(name), batch_of(name, generator)
    model.set_attn_implementation(attention)
    kinds = [type(module) for module in model.modules()]
    cf.patch(model, CONFIG, processor=processor_of(name))
    assert model.config._attn_implementation == attention
    assert [type(module) for module in model.modules() if module not in set(model.increments.modules())] == kinds
    learn(model, 2, generator, b_std=0.1)
    got = logits(model, batch)
    model.set_attn_implementation({"sdpa": "eager", "eager": "sdpa"}[attention])
    torch.testing.assert_close(logits(model, batch), got, atol=1e-4, rtol=1e-3)


def test_flash_attention_is_called_as_before(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a GPU; what it would be handed is recorded in its place, and holds nothing of the patch."""
    name, handed = "LlamaForCausalLM", []
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        handed.append(sorted(kwargs))
        return interface["sdpa"](module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(interface._global_mapping, "flash_attention_2", flash)
    model, batch = model_of(name), batch_of(name, generator)
    model.config._attn_implementation_internal = "flash_attention_2"
    logits(model, batch)
    cf.patch(model, CONFIG, processor=processor_of(name))
    learn(model, 2, generator, b_std=0.1)
    assert model.config._attn_implementation == "flash_attention_2"
    logits(model, batch)
    assert len(handed) == 4 and handed[:2] == handed[2:]


DOCS = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text(encoding="utf-8")


def run_docs(example: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the example of that base's name, on a tiny model in a folder of that name."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if example in code]
    model_of(name).save_pretrained(folder / example)
    processor_of(name).save_pretrained(folder / example)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_docs_list_every_base() -> None:
    assert {name for name in re.findall(r"`(\w+)`", DOCS) if name.endswith((FOR_IMAGES, FOR_TEXT))} == set(paths.BASES)


def test_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = run_docs("llava-hf/llava-v1.6-mistral-7b-hf", "LlavaNext" + FOR_IMAGES, tmp_path, monkeypatch)["model"]
    assert len(model.increments.pool.layers) == 14
    run_docs("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2" + FOR_TEXT, tmp_path, monkeypatch)
    assert 0.0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1.0
