"""MoELoRA: experts weighed for every token by a router of each linear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import cllava_fast as cf
from cllava_fast.methods import config_from_dict
from cllava_fast.methods.moe_lora import MoeLora, MoeLoraConfig
from cllava_fast.model import get_increments, paths
from cllava_fast.pool import Factors, LinearShape, Pool
from tests import routing_helpers as check

CONFIG = MoeLoraConfig(experts=3, rank=2, a_std=0.1, scale=4.0)


def gates_of(factors: Factors, x: Tensor) -> Tensor:
    """softmax(W_g x), token by token."""
    router, gates = factors.block_router.to(x.dtype), []
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            strength = torch.stack([(row * x[b, s]).sum() for row in router]).exp()
            gates.append(strength / strength.sum())
    return torch.stack(gates).view(*x.shape[:2], len(router))


def test_every_layer_computes_the_formula(llava: Any, processor: Any, rng: torch.Generator) -> None:
    check.check_every_layer(llava, CONFIG, processor, rng, gates_of)


def test_gradients(llava: Any, processor: Any, rng: torch.Generator) -> None:
    check.check_gradients(CONFIG, llava, processor, rng, gates_of)


def test_experts_alone_see_dropout_and_only_in_training(llava: Any, processor: Any, rng: torch.Generator) -> None:
    config = MoeLoraConfig(experts=3, rank=2, a_std=0.1, dropout=0.4)
    increments = check.born(llava.double(), config, processor, rng)
    path, linear = next(iter(paths.adapted_linears(llava, config.targets).items()))
    factors = increments.pool.factors(path)
    x = torch.randn(2, 5, linear.in_features, generator=rng, dtype=torch.float64)
    increments.call.active = increments.method.select(increments.pool, None, 1, False).expand(2)
    torch.manual_seed(7)
    seen = functional.dropout(x, 0.4)
    plain = functional.linear(x, linear.weight, linear.bias)
    assert 0 < (seen == 0).double().mean() < 1
    for training, base, given in ((True, None, linear), (True, plain, None), (False, None, linear)):
        increments.train(training)
        torch.manual_seed(7)
        y = increments.inject(x, given, base, factors)
        expected = check.by_loops(x, linear, factors, gates_of(factors, x), config.scale, seen if training else x)
        torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-7)


def test_all_language_linears_are_adapted_and_nothing_else(llava: Any, processor: Any) -> None:
    cf.patch(llava, MoeLoraConfig(), processor=processor)
    layers = get_increments(llava).pool.layers
    names = {path.rpartition("/")[2] for path in layers}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(layers) == 7 * 3 and all("language_model" in path for path in layers)


def test_the_router_is_born_as_a_linear_and_goes_on_training(generator: torch.Generator) -> None:
    method, pool = MoeLora(CONFIG), Pool(rank=2, key_dim=0, shapes={"o": LinearShape(400, 5)})
    assert method.select(pool, None, 1, training=False) is None
    method.open_task(pool, None, generator)
    router = pool.factors("o").block_router
    assert router.shape == (3, 400) and 0.045 < router.abs().max() <= 400**-0.5
    assert abs(router.std() * 3**0.5 * 400**0.5 - 1) < 0.1
    method.close_task(pool, "a", None, 1)
    method.open_task(pool, None, generator)
    assert pool.factors("o").block_router is router and pool.num_tasks == 0
    assert method.select(pool, None, 1, training=False).expand(4).block.index.tolist() == [[0, 1, 2]] * 4


def test_files(new_llava: Callable, processor: Any, rng: torch.Generator, tmp_path: Path) -> None:
    check.check_files(new_llava, CONFIG, processor, rng, tmp_path / "saved")


def test_decoding(llava: Any, processor: Any, rng: torch.Generator) -> None:
    check.check_decoding(llava, CONFIG, processor, rng)


def test_checkpointed_layers_drop_and_route_the_same(llava: Any, processor: Any, rng: torch.Generator) -> None:
    check.check_checkpointing(llava, MoeLoraConfig(experts=3, rank=2, a_std=0.1, dropout=0.3), processor, rng)


def test_a_run(new_llava: Callable, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check.check_run(new_llava, CONFIG, processor, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 0}, "experts is 0; expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0; expected a share"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_a_config_refuses_what_it_cannot_do(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeLoraConfig(**fields)


def test_config_round_trip() -> None:
    assert config_from_dict(CONFIG.to_dict()) == CONFIG
