"""The rows that ``cllava-fast ask`` shows beside an answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import cllava_fast
from tests.helpers import QUESTIONS, inputs, learn


@pytest.mark.parametrize("name", ["forms of the tax office and other documents", "x" * 70])
def test_the_rows_of_an_answer_fit_a_terminal_of_60_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cllava_fast.cli.ask import Row, _print

    monkeypatch.setenv("COLUMNS", "60")
    _print([Row(name, 1003, 0.934, 0.512, 0.123, 0.97)], "")
    _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "row", "similarity", "weight", "context", "strength"]
    assert rows[0].split()[-5:] == ["1003", "0.934", "51.2%", "12.3%", "97.0%"]
    assert max(map(len, [head, *rows])) <= 60
    assert "".join("".join(row.partition("1003")[0].split()) for row in rows) == "".join(name.split())


@pytest.mark.parametrize("context", ["product", "none"])
def test_the_rows_of_an_answer_are_those_that_act(
    context: str, llava: Any, processor: Any, rng: torch.Generator
) -> None:
    """Each row's numbers against the ops: cosine, weight, and what aggregate adds to that row alone."""
    from cllava_fast import ops
    from cllava_fast.cli.ask import explain

    cllava_fast.patch(llava, cllava_fast.IncrementConfig(context=context, rank=2, top_m=3), processor=processor)
    assert explain(llava, inputs(processor, QUESTIONS[:1], rng)) == []  # nothing is learned yet
    increments = learn(llava, 3, rng)
    pool = increments.pool
    w = pool.context_matrix() if context == "product" else torch.zeros(3, 3)
    for question in QUESTIONS:
        rows = explain(llava, inputs(processor, (question,), rng))
        query = increments.surrogate.query([increments.reader.canonical(question)])
        cosines = torch.nn.functional.cosine_similarity(query, pool.keys)
        best = cosines.topk(3)
        assert [row.number for row in rows] == best.indices.tolist()
        for row in rows:
            assert row.task == f"task{int(pool.row_task[row.number])}"
            assert row.similarity == pytest.approx(cosines[row.number].item(), abs=1e-5)
            assert row.weight == pytest.approx((cosines[row.number] / best.values.sum()).item(), abs=1e-5)
            alone = torch.tensor([[row.number]]), torch.ones(1, 1)
            _, coefficient = ops.aggregate(*alone, pool.row_task, pool.row_mean, w)
            brought = coefficient[0, 1:].abs().sum().item()
            assert row.context == pytest.approx(brought / (1 + brought), abs=1e-5)
            assert row.strength == 1.0


@pytest.mark.parametrize("name", ["calibrated", "diki", "slm", "branch_lora", "smora", "o_lora"])
def test_every_method_shows_the_rows_that_act(
    name: str, llava: Any, processor: Any, rng: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the coefficients that the layers find in the forward pass; a strange question's are held back."""
    from cllava_fast.cli.ask import _print, _why_no_rows, explain
    from cllava_fast.methods import config_from_dict

    calibrated = cllava_fast.IncrementConfig(calibrate=True)
    config = calibrated if name == "calibrated" else config_from_dict({"method": name})
    if name == "branch_lora":
        config = dataclasses.replace(config, surrogate="sentence")
    increments = learn(cllava_fast.patch(llava, config, processor=processor), 2, rng)
    acting = []
    llava.model.language_model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda *_: acting.append(increments.call.active)
    )
    strengths = []
    for question in (QUESTIONS[0], "transcribe the sign"):
        batch = inputs(processor, (question,), rng)
        rows = explain(llava, batch)
        if not rows:
            assert name in ("smora", "o_lora") and increments.call.active is None
            continue
        with torch.no_grad():
            llava(**batch)
        past, number = acting[-1].past, {row.number: row for row in rows}
        assert sorted(number) == sorted(past.index[0].tolist())
        for n, coefficient in zip(past.index[0].tolist(), past.coefficient[0].tolist(), strict=True):
            assert number[n].weight * number[n].strength == pytest.approx(coefficient, abs=1e-5)
        assert sum(row.weight for row in rows) == pytest.approx(1.0, abs=1e-5)
        strengths.append(rows[0].strength)
    _print(rows, "")
    shown = capsys.readouterr().out
    assert ("strength" in shown) == (name in ("calibrated", "diki"))
    if name in ("calibrated", "diki"):
        assert strengths[0] > 0.5 > 0.01 > strengths[1]
        assert shown.rstrip().endswith(" 0.0%")
    elif strengths:
        assert strengths == [1.0, 1.0]
    else:
        assert ("for every token" in _why_no_rows(increments.method)) == (name == "smora")
