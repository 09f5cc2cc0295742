"""Quantised bases: bitsandbytes and torchao on the CPU, where they are installed. They stay as they are, and learn."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import cllava_fast as cf
from cllava_fast.model import get_increments, paths
from cllava_fast.model.files import base_fingerprint, base_quantization
from tests.base_models import FOR_IMAGES, new_model, new_processor
from tests.helpers import QUESTIONS, image, inputs, learn
from tests.test_bases import alone, batch_of, model_of, processor_of

NAME = "LlavaForConditionalGeneration"
CONFIG = cf.IncrementConfig(rows_per_task=4, top_m=2, rank=2, a_std=0.1, surrogate="backbone", targets=("*_proj",))
BATCH = QUESTIONS[:3]


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    return transformers.BitsAndBytesConfig(**options)


def torchao(name: str, **options: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    if name == "IntxWeightOnlyConfig":
        options = {"weight_dtype": torch.int4, "granularity": quantization.granularity.PerGroup(8)}
    return transformers.TorchAoConfig(getattr(quantization, name)(**options))


KINDS: dict[str, Callable[[], Any]] = {
    "bitsandbytes-nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes-int8": lambda: bitsandbytes(load_in_8bit=True),
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-int4": lambda: torchao("IntxWeightOnlyConfig"),
}


@pytest.fixture(scope="module")
def processor() -> Any:
    return new_processor(NAME)


@pytest.fixture(scope="module")
def folder(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    new_model(NAME, processor).save_pretrained(path)
    return path


@pytest.fixture(params=KINDS)
def load(request: pytest.FixtureRequest, folder: Path) -> Callable[..., Any]:
    quantization = KINDS[request.param]()

    def load(dtype: torch.dtype = torch.float32) -> Any:
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder, quantization_config=copy.deepcopy(quantization), device_map="cpu", dtype=dtype
        )
        linear = model.model.language_model.layers[0].self_attn.q_proj
        assert model.is_quantized and not paths.is_plain(linear)
        return model.eval()

    return load


def test_a_quantised_linear_and_its_increments(load: Callable, processor: Any, generator: torch.Generator) -> None:
    model = load()
    batch = inputs(processor, BATCH, generator)
    linears = paths.adapted_linears(model, CONFIG.targets)
    given = {path: torch.randn(2, 3, linear.in_features, generator=generator) for path, linear in linears.items()}
    with torch.no_grad():
        cf.patch(model, CONFIG, processor=processor)
        before = model(**batch).logits
        plain = {path: linear(given[path]) for path, linear in linears.items()}
        increments = learn(model, 2, generator, b_std=0.1)
        assert (model(**batch).logits - before).abs().max() > 1e-2
        pool = increments.pool
        queries = torch.randn(2, pool.key_dim, generator=generator)
        selection = increments.call.active = increments.method.select(pool, queries, 1, training=False)
        for path, linear in linears.items():
            factors = pool.factors(path)
            alpha = torch.zeros(2, pool.num_rows).scatter_add_(1, selection.past.index, selection.past.coefficient)
            alpha[:, : selection.context.shape[1]] += selection.context
            added = torch.einsum("bn,nro,nri,bsi->bso", alpha, factors.B, factors.A, given[path])
            torch.testing.assert_close(linear(given[path]), plain[path] + added, atol=1e-5, rtol=1e-4)
        increments.call.active = None
        after = cf.unpatch(model)(**batch).logits
        # weights that are repacked now are rounded once more
        torch.testing.assert_close(after, before, atol=0.2 if paths.repacked_on_cpu(model) else 0, rtol=0)


def test_it_learns_and_the_base_stays(
    load: Callable, processor: Any, generator: torch.Generator, tmp_path: Path
) -> None:
    model = cf.patch(load(), CONFIG, processor=processor)
    before = base_fingerprint(model)
    picture = image(generator)
    tasks = [
        cf.Task(f"task{k}", train=[cf.Sample(BATCH[k], "red", picture)] * 8, test=[cf.Sample(BATCH[k], "red", picture)])
        for k in range(2)
    ]
    arguments = cf.ContinualArguments(
        output_dir=str(tmp_path / "run"), max_steps=8, align_steps=2, learning_rate=1e-2, warmup_steps=0,
        per_device_train_batch_size=4, max_new_tokens=1, progress=False, logging_steps=2,
    )  # fmt: skip
    result = cf.ContinualTrainer(model, processor, cf.Stream(tasks), arguments).train()
    assert all(losses[-1] < 0.8 * losses[0] for losses in result.losses.values()), result.losses
    assert base_fingerprint(model) == before
    assert "_hf_peft_config_loaded" not in model.__dict__


def test_only_the_block_has_gradients(load: Callable, processor: Any, generator: torch.Generator) -> None:
    model = cf.patch(load(), CONFIG, processor=processor)
    learn(model, 1, generator)
    increments = learn(model, 1, generator, commit_last=False)
    increments.pool.train_keys(False)
    batch = inputs(processor, BATCH, generator, side="right")
    before = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("increments.")}
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[-1] for name in with_gradient} == {"block_A", "block_B", "block_context"}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert before.keys() == {key for key in model.state_dict() if not key.startswith("increments.")}
    for key, value in model.state_dict().items():
        if key in before:
            assert str(value) == str(before[key]), key  # not every class of tensor can be compared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_increments_have_the_dtype_that_the_base_computes_in(
    dtype: torch.dtype, load: Callable, processor: Any, generator: torch.Generator
) -> None:
    model = cf.patch(load(dtype), CONFIG, processor=processor)
    pool = learn(model, 2, generator, commit_last=False).pool
    assert {factors.A.dtype for factors in pool.layers.values()} == {dtype}
    assert {parameter.dtype for parameter in pool.parameters()} == {torch.float32}
    batch = inputs(processor, BATCH, generator)
    with torch.no_grad():
        assert model(**{**batch, "pixel_values": batch["pixel_values"].to(dtype)}).logits.dtype == dtype


def test_files_and_refusals(
    load: Callable, processor: Any, folder: Path, generator: torch.Generator, tmp_path: Path
) -> None:
    model = cf.patch(load(), CONFIG, processor=processor)
    learn(model, 2, generator, b_std=0.1)
    batch = inputs(processor, BATCH, generator)
    cf.save_pretrained(model, tmp_path / "out")
    loaded = cf.load_pretrained(load(), tmp_path / "out", processor=processor)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    with pytest.raises(TypeError, match="only a plain nn.Linear can be merged, no quantised"):
        cf.merge(model, instruction=BATCH[0])
    assert not get_increments(model).pristine
    exact = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match="another base model: its quantisation was '.*', this one's is 'none'; load"):
        cf.load_pretrained(exact, tmp_path / "out", processor=processor)


@pytest.mark.parametrize("name", ["Qwen2VL" + FOR_IMAGES, "InternVL" + FOR_IMAGES])
def test_bases_whose_tower_is_quantised_too(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    """And takes the patches or tiles of all images as one sequence."""
    model_of(name).save_pretrained(tmp_path)
    quantization = KINDS["bitsandbytes-nf4"]()
    base = getattr(transformers, name).from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
    assert not any(paths.is_plain(part) for part in paths.vision_tower(base).modules() if hasattr(part, "in_features"))
    config = dataclasses.replace(CONFIG, surrogate="text+image")
    model = cf.patch(base.eval(), config, processor=processor_of(name))
    before, batch = base_fingerprint(model), batch_of(name, generator, side="right")
    learn(model, 2, generator, b_std=0.1)
    with torch.no_grad():
        found = model(**batch).logits
        for i, mask in enumerate(batch["attention_mask"].bool()):
            torch.testing.assert_close(found[i, mask], model(**alone(batch, i)).logits[0], atol=1e-4, rtol=1e-3)
    pool = learn(model, 1, generator, commit_last=False).pool
    pool.train_keys(False)
    model.train()(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert all(factors.block_A.grad.abs().sum() > 0 for factors in pool.layers.values())
    assert base_fingerprint(model) == before


class Packed(nn.Module):
    """A linear as the libraries of GPTQ, AWQ and HQQ pack it: no ``weight``, or a method of that name."""

    def __init__(self, linear: nn.Linear, named: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.data * 100).round().to(torch.int8))
        if named:
            self.__dict__["weight"] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.T / 100).to(x.dtype)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_without_a_weight(
    dtype: torch.dtype, named: bool, processor: Any, generator: torch.Generator, tmp_path: Path
) -> None:
    model = new_model(NAME, processor).to(dtype)
    for path, linear in paths.adapted_linears(model, CONFIG.targets).items():
        model.set_submodule(path, Packed(linear, named))
    batch = inputs(processor, BATCH, generator)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    cf.patch(model, CONFIG, processor=processor)
    with torch.no_grad():
        before = model(**batch).logits
        pool = learn(model, 2, generator, b_std=0.1).pool
        assert {factors.A.dtype for factors in pool.layers.values()} == {dtype}
        acting = model(**batch).logits
        assert (acting - before).abs().max() > 1e-2
        cf.save_pretrained(model, tmp_path / "out")
        assert torch.equal(cf.load_pretrained(model, tmp_path / "out")(**batch).logits, acting)
    with pytest.raises(TypeError, match="is a Packed; only a plain nn.Linear can be merged, no quantised"):
        cf.merge(model, instruction=BATCH[0])
    increments = learn(model, 1, generator, commit_last=False)
    increments.pool.train_keys(False)
    batch = inputs(processor, BATCH, generator, side="right")
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(factors.block_A.grad.abs().sum() > 0 for factors in pool.layers.values())
    packed = cf.unpatch(model).model.language_model.layers[0].self_attn.q_proj
    assert isinstance(packed, Packed)
    del packed.qweight  # torch.ao's dynamic ones keep it in no tensor
    for call in (
        lambda: cf.patch(model, CONFIG, processor=processor),
        lambda: cf.load_pretrained(model, tmp_path / "out", processor=processor),
        lambda: cf.share(model),
    ):
        with pytest.raises(TypeError, match="a Packed holds no tensor, and no gradient would pass it"):
            call()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bitsandbytes-nf4", "bitsandbytes nf4"),
        ("bitsandbytes-int8", "bitsandbytes llm_int8"),
        ("torchao-int8", "torchao"),
    ],
)
def test_the_quantisation_in_words(kind: str, words: str, folder: Path) -> None:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=KINDS[kind](), device_map="cpu"
    )
    assert base_quantization(model) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_has_run_is_the_same_base(
    dtype: torch.dtype, load: Callable, processor: Any, generator: torch.Generator, tmp_path: Path
) -> None:
    """bitsandbytes casts biases in every forward pass, and autocast has it cast them to something else."""
    model = cf.patch(load(dtype), CONFIG, processor=processor)
    learn(model, 1, generator)
    batch = inputs(processor, BATCH, generator)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(**batch)
        cf.save_pretrained(model, tmp_path / "out")
        cf.load_pretrained(load(dtype), tmp_path / "out", processor=processor)


def test_weights_that_were_repacked_are_refused(folder: Path, processor: Any, generator: torch.Generator) -> None:
    """bitsandbytes does so on CPUs with bfloat16 instructions, in evaluation, and cannot go back."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=KINDS["bitsandbytes-nf4"](), device_map="cpu"
    ).eval()
    linear = model.model.language_model.layers[0].self_attn.q_proj
    if not linear.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no bfloat16 instructions")
    cf.unpatch(cf.patch(model, CONFIG, processor=processor))
    assert linear.support_avx512bf16_for_cpu
    with torch.no_grad():
        model(**inputs(processor, BATCH, generator))
    with pytest.raises(ValueError, match="repacked .* load the model again and patch it before"):
        cf.patch(model, CONFIG, processor=processor)


def test_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS["bitsandbytes-nf4"]()
    from tests.test_bases import run_docs

    model = run_docs("llava-hf/llava-1.5-7b-hf", NAME, tmp_path, monkeypatch)["model"]
    assert model.is_quantized and len(model.increments.pool.layers) == 2
