"""Which linears a target names, in every layer."""

from __future__ import annotations

import pytest
import torch

import cllava_fast as cf
from cllava_fast.model import paths
from tests.test_bases import ASKED, EVERY, batch_of, logits, model_of, patched

NAME = "LlamaForCausalLM"
IMAGES = "LlavaForConditionalGeneration"


def found(*targets: str, name: str = NAME) -> list[str]:
    """What is adapted in the first layer, behind its number."""
    linears = paths.adapted_linears(model_of(name), targets)
    prefix = f"{paths.BASES[name].layers}."
    assert all(path.startswith(prefix) for path in linears)
    layers = [[p.removeprefix(f"{prefix}{n}.") for p in linears if p.startswith(f"{prefix}{n}.")] for n in range(2)]
    assert layers[0] == layers[1]
    return sorted(layers[0])


def test_patterns() -> None:
    attention = [f"self_attn.{x}_proj" for x in "koqv"]
    mlp = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert found("self_attn.o_proj") == ["self_attn.o_proj"]
    assert found("self_attn.*_proj") == attention
    assert found("mlp.*") == mlp
    assert found("*") == mlp + attention
    assert found("self_attn.[qv]_proj", "q_proj") == ["self_attn.q_proj", "self_attn.v_proj"]
    assert found("q_proj", "down_proj") == ["mlp.down_proj", "self_attn.q_proj"]
    # the vision tower has a q_proj too
    assert found("q_proj", name=IMAGES) == ["self_attn.q_proj"]


@pytest.mark.parametrize("target", ["w_proj", "vision_tower.*", "self_attn.x*", "layers.0.self_attn.o_proj", ""])
def test_a_target_that_is_not_there(target: str) -> None:
    with pytest.raises(ValueError, match=r"is not in model\.layers\.0; expected one of .*'self_attn\.q_proj'"):
        found(target)


def test_a_target_that_is_no_linear() -> None:
    with pytest.raises(ValueError, match="'mlp' is a LlamaMLP; expected a linear"):
        found("mlp")


def test_a_merge_of_linears_of_every_shape(generator: torch.Generator) -> None:
    model, batch = patched(NAME, generator), batch_of(NAME, generator)
    shapes = {tuple(linear.weight.shape) for linear in paths.adapted_linears(model, EVERY).values()}
    assert shapes == {(64, 64), (32, 64), (128, 64), (64, 128)}
    report = cf.merge(model, instruction=ASKED[1])
    assert len(report.output_error) == 14
    expected = logits(cf.unmerge(model), batch)[1]
    cf.merge(model, instruction=ASKED[1])
    torch.testing.assert_close(logits(model, batch)[1], expected, atol=1e-4, rtol=1e-3)
