"""DIKI in both towers of a CLIP: its attention in loops, whose prompts act, learning, files and refusals."""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Subset, TensorDataset
from transformers import CLIPConfig, CLIPModel

import cllava_fast as cf
from cllava_fast import clip as clip_module
from cllava_fast.atomic import DamagedError
from cllava_fast.clip import PromptedClip
from cllava_fast.methods.diki import DikiConfig
from cllava_fast.model import files
from tests.base_models import new_model, new_processor
from tests.helpers import at_once
from tests.test_method_diki import by_loops

SIDE, END = 16, 9  # pixels; the token that ends a text
NARROW = {"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def new_clip(dtype: torch.dtype = torch.float32) -> CLIPModel:
    """Towers of two widths; the same random weights each time, loud enough that an image changes its feature."""
    torch.manual_seed(0)
    text = {"vocab_size": 10, "hidden_size": 24, "max_position_embeddings": 6, "eos_token_id": END, "bos_token_id": 0}
    vision = {"hidden_size": 32, "image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(
        text_config={**NARROW, **text}, vision_config={**NARROW, **vision}, projection_dim=20, initializer_factor=3.0
    )
    return CLIPModel(config).to(dtype).eval()


def texts(*tokens: int) -> Tensor:
    return torch.tensor([[0, token, END, END] for token in tokens])


def pictures(colors: Tensor, size: int, rng: torch.Generator) -> TensorDataset:
    """Of one colour ``[C, 3]`` each, and noise."""
    classes = torch.arange(size) % len(colors)
    noise = 0.1 * torch.randn(size, 3, SIDE, SIDE, generator=rng)
    return TensorDataset(colors[classes][:, :, None, None] + noise, classes)


@pytest.fixture
def tasks(rng: torch.Generator) -> list[tuple[TensorDataset, TensorDataset, Tensor]]:
    """Two tasks to train, to test, and their texts: two bright colours, two dark ones."""
    found = []
    for sign, ids in ((1.0, texts(2, 3)), (-1.0, texts(4, 5))):
        colors = sign * torch.tensor([[2.0, 1.0, 0.5], [0.5, 1.0, 2.0]])
        found.append((pictures(colors, 64, rng), pictures(colors, 32, rng), ids))
    return found


def random_tasks(prompted: PromptedClip, count: int, rng: torch.Generator, keep_open: bool = False) -> list[Tensor]:
    """Tasks with random prompts; returns images that belong to each."""
    found = []
    dtype = prompted.clip.dtype
    for number in range(count):
        images = 3 * torch.randn(1, 3, SIDE, SIDE, generator=rng) + torch.randn(60, 3, SIDE, SIDE, generator=rng)
        images = images.to(dtype)
        queries = prompted.query(images)
        prompted.method.open_task(prompted.pool, queries, rng)
        for factors in prompted.pool.layers.values():
            factors.block_B.data.normal_(std=3, generator=rng)
        if not keep_open or number < count - 1:
            prompted.method.close_task(prompted.pool, f"task{number}", queries, 1)
            for name, value in clip_module._gaussian(queries).items():
                prompted.pool.keep_for_task(name, value)
        found.append(images)
    return found


def log_likelihood(prompted: PromptedClip, tasks: list[Tensor], asked: Tensor) -> Tensor:
    """``[B, T]``, by torch's own Gaussian, of what each task's images are."""
    found = []
    for images in tasks:
        features = functional.normalize(prompted.query(images).double(), dim=1)
        covariance = features.t().cov() + 1e-7 * torch.eye(20, dtype=torch.float64)
        gaussian = torch.distributions.MultivariateNormal(features.mean(0), covariance)
        found.append(gaussian.log_prob(prompted.query(asked).double()))
    return torch.stack(found, 1)


@pytest.mark.parametrize("training", [False, True])
def test_every_attention_of_both_towers(training: bool, rng: torch.Generator) -> None:
    """In float64, against attention in loops, in the first layers and behind them."""
    clip = new_clip(torch.float64)
    seen: dict[str, dict[str, Tensor]] = {}
    for path, module in clip.named_modules():
        if path.endswith("self_attn"):
            found = seen.setdefault(path, {})
            module.q_proj.register_forward_hook(lambda _, args, q, found=found: found.update(q=q))
            # before the prompts' own hook, and behind it
            module.out_proj.register_forward_pre_hook(lambda _, args, found=found: found.update(x=args[0]))
            module.out_proj.register_forward_hook(lambda _, args, y, found=found: found.update(y=y))
    prompted = PromptedClip(clip, DikiConfig(layers=2, rank=3, scale=1.5))
    images = random_tasks(prompted, 2, rng, keep_open=training)
    assert len(prompted.pool.layers) == 4 and len(seen) == 6
    prompted.train(training)
    prompted(images[1][:1], texts(2, 3, 4))
    task = 0 if training else 1
    strength = 1.0
    if not training:
        likelihood = log_likelihood(prompted, images, images[1][:1])[0] / 20
        assert likelihood.argmax() == task
        prompted(images[1][:1], texts(2, 3, 4))  # what asked for features went through the hooks above, too
        strength = torch.sigmoid(likelihood[task] - 1).item()
        assert 0.1 < strength < 0.99
    for path, found in seen.items():
        joined = found["x"]
        if int(path.split(".")[-2]) < 2:
            factors = prompted.pool.factors(f"{path}.out_proj")
            keys, values = (factors.block_A, factors.block_B) if training else (factors.A, factors.B)
            head_dim = clip.get_submodule(path).head_dim
            branch = [by_loops(q, keys[task].double(), values[task].double(), head_dim) for q in found["q"].detach()]
            joined = joined + 1.5 * strength * torch.stack(branch)
        out = clip.get_submodule(path).out_proj
        expected = functional.linear(joined, out.weight, out.bias)
        # coefficients are float32
        torch.testing.assert_close(found["y"], expected, atol=1e-6 * expected.abs().max().item(), rtol=1e-6)


def test_until_a_task_is_learned_nothing_changes(rng: torch.Generator) -> None:
    images = torch.randn(3, 3, SIDE, SIDE, generator=rng)
    asked = {"input_ids": texts(2, 3), "pixel_values": images}
    expected = new_clip()(**asked).logits_per_image
    prompted = PromptedClip(new_clip())
    torch.testing.assert_close(prompted(images, texts(2, 3)), expected)
    prompted.method.open_task(prompted.pool, prompted.query(images), rng)
    prompted.train()
    torch.testing.assert_close(prompted(images, texts(2, 3)), expected)  # values are born zero
    assert not prompted.clip.training
    assert torch.equal(prompted.clip(**asked).logits_per_image, expected), "what the CLIP computes by itself"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, rng: torch.Generator, tmp_path: Path) -> None:
    """The pool goes with the CLIP; features are compared in float32."""
    errors = []
    for _ in range(3):  # one draw in a hundred is so loud that rounding alone is beyond the bound
        prompted = PromptedClip(new_clip(), DikiConfig(rank=3))
        images = random_tasks(prompted, 2, rng)
        mixed = torch.stack([images[0][0], images[1][0]])
        exact = prompted(mixed, texts(2, 3, 4))
        prompted.clip.to(dtype)
        found = prompted(mixed, texts(2, 3, 4))
        assert found.dtype == torch.float32
        errors.append(float((found - exact).abs().max() / exact.abs().max()))
    assert statistics.median(errors) < 0.1 and all(error < 1 for error in errors)
    saved = prompted.save(tmp_path / "prompts")
    assert torch.equal(PromptedClip.load(new_clip(dtype), saved)(mixed, texts(2, 3, 4)), found)


def test_what_would_be_inf_in_the_dtype_of_the_clip_is_not_committed(tasks: Any) -> None:
    images, _, ids = tasks[0]
    prompted = PromptedClip(new_clip(torch.float16))
    with pytest.raises(ValueError, match="NaN or Inf in its increments; nothing was committed"):
        prompted.learn("huge", Subset(images, range(2)), ids, **{**LEARN, "epochs": 1, "learning_rate": 1e9})
    assert prompted.pool.num_tasks == prompted.pool.block_rows == 0


def test_each_image_has_its_own_task_whatever_else_is_asked(rng: torch.Generator) -> None:
    prompted = PromptedClip(new_clip(), DikiConfig(rank=3))
    first, second = random_tasks(prompted, 2, rng)
    mixed = torch.stack([first[0], second[0], first[1]])
    together = prompted(mixed, texts(2, 3, 4))
    for image, logits in zip(mixed, together, strict=True):
        torch.testing.assert_close(prompted(image[None], texts(2, 3, 4))[0], logits, atol=1e-4, rtol=1e-4)
    selection = prompted.select(prompted.query(mixed))
    assert selection.index[:, 0].tolist() == [0, 1, 0]
    frozen = new_clip()(input_ids=texts(2, 3, 4), pixel_values=mixed).logits_per_image
    assert ((together - frozen).abs().amax(1) > 0.1).all()


def test_calls_in_two_threads_each_have_their_own_task(rng: torch.Generator) -> None:
    prompted = PromptedClip(new_clip(), DikiConfig(layers=2))
    images = random_tasks(prompted, 2, rng)

    def logits(task: int) -> Tensor:
        with torch.no_grad():
            return prompted(images[task][:2], texts(2, 3, 4))

    attentions = [layer.self_attn for tower in (prompted.clip.vision_model, prompted.clip.text_model)
                  for layer in tower.encoder.layers]  # fmt: skip
    alone = [logits(task) for task in range(2)]
    together = at_once(attentions, *(partial(logits, task) for task in range(2)))
    assert all(torch.equal(*results) for results in zip(together, alone, strict=True))


def test_what_is_like_no_task_gets_the_frozen_clip(rng: torch.Generator) -> None:
    prompted = PromptedClip(new_clip(), DikiConfig(rank=3))
    known = random_tasks(prompted, 1, rng)[0]
    strange = torch.full_like(known[:2], 5.0)
    strength = prompted.select(prompted.query(strange)).past.coefficient
    assert (strength < 1e-4).all()
    frozen = new_clip()(input_ids=texts(2, 3), pixel_values=strange).logits_per_image
    torch.testing.assert_close(prompted(strange, texts(2, 3)), frozen, atol=1e-3, rtol=1e-3)


def test_what_the_gaussians_know_of_wide_features(rng: torch.Generator) -> None:
    """As wide as a CLIP's own: of images that are like no task, less is left than of a task's own."""
    prompted, width = PromptedClip(new_clip()), 512
    directions = torch.randn(width, width, generator=rng) / torch.arange(1, width + 1)[:, None].sqrt()
    own, other = (torch.randn(1, width, generator=rng) for _ in range(2))

    def features(mean: Tensor, count: int) -> Tensor:
        spread = torch.randn(count, width, generator=rng) @ directions
        return functional.normalize(mean + 0.7 * functional.normalize(spread) * mean.norm())

    prompted.pool.key_dim, prompted.pool.keys = width, torch.empty(0, width)
    prompted.method.open_task(prompted.pool, features(own, 1500), rng)
    prompted.method.close_task(prompted.pool, "own", None, 1)
    for name, value in clip_module._gaussian(features(own, 1500)).items():
        prompted.pool.keep_for_task(name, value)
    mine, others = (prompted.select(features(mean, 50)).past.coefficient.mean() for mean in (own, other))
    assert mine > 0.7 and others < 0.2


LEARN: dict[str, Any] = {"epochs": 20, "batch_size": 16, "learning_rate": 5.0, "progress": False}


def test_tasks_are_learned_and_not_forgotten(tasks: Any, tmp_path: Path) -> None:
    prompted = PromptedClip(new_clip())
    first, second = tasks
    before = prompted.accuracy(first[1], first[2])
    losses = prompted.learn("bright", first[0], first[2], **LEARN)
    assert len(losses) == 20 * 4 and losses[-1] < 0.5 * losses[0]
    learned = prompted.accuracy(first[1], first[2])
    logits = prompted(first[1].tensors[0], first[2])
    assert before < 0.8 and learned > 0.95
    prompted.learn("dark", second[0], second[2], **LEARN)
    assert prompted.accuracy(second[1], second[2]) > 0.95
    # the first task's images find the same prompts, with the same strength
    assert torch.equal(prompted(first[1].tensors[0], first[2]), logits)
    assert prompted.pool.task_names == ["bright", "dark"]

    saved = prompted.save(tmp_path / "prompts")
    loaded = PromptedClip.load(new_clip(), saved)
    both = torch.cat([first[1].tensors[0][:4], second[1].tensors[0][:4]])
    assert torch.equal(loaded(both, first[2]), prompted(both, first[2]))
    assert "PromptedClip.load" in (saved / files.CARD).read_text()
    assert json.loads((saved / files.CONFIG).read_text())["tasks"] == ["bright", "dark"]
    again = loaded.remove()
    assert torch.equal(
        again(input_ids=first[2], pixel_values=both).logits_per_image,
        new_clip()(input_ids=first[2], pixel_values=both).logits_per_image,
    )


def test_the_same_seed_gives_the_same_prompts(tasks: Any) -> None:
    images, _, ids = tasks[0]
    options = {**LEARN, "epochs": 1}
    runs = [PromptedClip(new_clip()).learn("bright", images, ids, seed=seed, **options) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_what_cannot_be_learned_is_refused(tasks: Any, rng: torch.Generator) -> None:
    images, _, ids = tasks[0]
    with pytest.raises(TypeError, match="expected a transformers.CLIPModel"):
        PromptedClip(new_model("LlamaForCausalLM", new_processor("LlamaForCausalLM")))  # type: ignore[arg-type]
    clip = new_clip()
    prompted = PromptedClip(clip)
    with pytest.raises(ValueError, match="has prompts already"):
        PromptedClip(clip)
    prompted.remove()
    with pytest.raises(RuntimeError, match="taken out of the CLIP"):
        prompted(images.tensors[0][:1], ids)
    prompted = PromptedClip(clip)
    options = {**LEARN, "epochs": 1}
    nothing = TensorDataset(torch.empty(0, 3, SIDE, SIDE), torch.empty(0))
    for work in (prompted.accuracy, lambda *given: prompted.learn("bright", *given, **options)):
        with pytest.raises(ValueError, match="there is no image"):
            work(nothing, ids)
        with pytest.raises(ValueError, match="has classes 0 to 1; expected 0 to 0"):
            work(images, ids[:1])
    with pytest.raises(ValueError, match="epochs is 0"):
        prompted.learn("bright", images, ids, **{**LEARN, "epochs": 0})
    broken = TensorDataset(torch.full((4, 3, SIDE, SIDE), float("nan")), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="task 'bright' has images whose features are NaN"):
        prompted.learn("bright", broken, ids, **options)
    with pytest.raises(FloatingPointError, match="loss is"):
        prompted.learn("bright", images, ids, **{**options, "learning_rate": 1e30, "epochs": 9})
    assert prompted.pool.num_tasks == prompted.pool.block_rows == 0 and not prompted.training
    prompted.learn("bright", images, ids, **options)
    with pytest.raises(ValueError, match="learned already"):
        prompted.learn("bright", images, ids, **options)
    recomputing = new_clip()
    older = "gradient_checkpointing_enable"
    getattr(recomputing, "activation_checkpointing_enable", getattr(recomputing, older, None))()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        PromptedClip(recomputing)


def test_files_of_others_are_refused(tasks: Any, rng: torch.Generator, tmp_path: Path) -> None:
    prompted = PromptedClip(new_clip(), DikiConfig(rank=3))
    random_tasks(prompted, 1, rng)
    saved = prompted.save(tmp_path / "prompts")
    other = new_clip()
    other.logit_scale.data.add_(1)
    with pytest.raises(ValueError, match="another base model"):
        PromptedClip.load(other, saved)
    with pytest.raises(TypeError, match="CLIPModel; expected transformers.Llava"):
        cf.load_pretrained(new_clip(), saved)
    clip, config = new_clip(), saved / files.CONFIG
    written = config.read_text()
    config.write_text(written.replace('"layers": 8', '"layers": 1'))
    with pytest.raises(ValueError, match="unexpected"):
        PromptedClip.load(clip, saved)
    config.write_text(written)
    assert torch.equal(PromptedClip.load(clip, saved).pool.keys, prompted.pool.keys), "no hook was left behind"
    weights = saved / files.WEIGHTS
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(DamagedError, match="checksum"):
        PromptedClip.load(new_clip(), saved)


def test_the_page_on_methods_runs(tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    code = page.partition("### DIKI in a CLIP")[2].partition("```python\n")[2].partition("```")[0]
    images = tasks[0][0]
    monkeypatch.chdir(tmp_path)

    def tokenizer(texts: list[str], **options: Any) -> Any:
        ids = torch.tensor([[0, 2 + number, END] for number in range(len(texts))])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    names = {"clip": new_clip(), "tasks": [("bright", images, ["one", "other"])], "tokenizer": tokenizer}
    exec(code, {**names, "pixel_values": images.tensors[0][:2]})
    assert PromptedClip.load(new_clip(), "prompts").pool.task_names == ["bright"]
