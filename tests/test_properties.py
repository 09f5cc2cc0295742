"""Properties of the readers on inputs that hypothesis makes: a valid result or a refusal by name, and nothing else."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from cllava_fast.data import Sample
from cllava_fast.data.encode import Encoder
from cllava_fast.data.pixels import FORMATS
from cllava_fast.data.records import COLUMNS
from cllava_fast.model.instructions import InstructionReader
from tests.fuzz.__main__ import CORPUS, mutated
from tests.fuzz.readers import READERS, check, check_encoded, seeds
from tests.test_conversation_golden import byte_level, sentencepiece_like  # noqa: F401
from tests.test_conversation_golden import real as real  # a fixture

FEW = settings(
    max_examples=int(os.environ.get("CLLAVA_EXAMPLES", "60")), deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
CONTROL = st.sampled_from(
    ["<image>", "</s>", "<s>", "<pad>", "<unk>", "<|im_start|>", "USER:", "ASSISTANT:", "\ufdd0", "\u202e"]
)
TEXT = st.one_of(
    st.text(max_size=20),
    st.lists(st.one_of(CONTROL, st.text(max_size=4), st.sampled_from([" ", "\n", "what", "is it?"])), max_size=8).map(
        "".join
    ),
)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)


def named(*names: str) -> Any:
    """Mappings with names that a reader knows, and values of any kind."""
    return st.dictionaries(st.one_of(st.sampled_from(names), TEXT), VALUE, max_size=5)


TURN = st.fixed_dictionaries(
    {}, optional={"from": st.one_of(st.sampled_from(["human", "gpt", "system"]), VALUE), "value": TEXT}
)
RECORD = st.one_of(
    VALUE,
    named(*COLUMNS),
    st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=4)}, optional={"image": VALUE, "id": VALUE}),
    st.fixed_dictionaries({"question": TEXT, "answer": TEXT}, optional={"history": VALUE, "system": VALUE}),
)


@FEW
@given(st.lists(RECORD, max_size=3), st.booleans())
def test_records(records: list[Any], lines: bool) -> None:
    if lines:
        check("records", b"\xff" + "\n".join(json.dumps(record) for record in records).encode())
    else:
        check("records", b"\0" + json.dumps(records).encode())


TASK = st.one_of(VALUE, named("name", "train", "test", "validation", "images", "metric", "prompt"))
RUN = st.fixed_dictionaries(
    {"tasks": st.one_of(VALUE, st.lists(TASK, max_size=2))},
    optional={
        "name": VALUE, "images": VALUE, "base": VALUE, "stream": VALUE,
        "model": st.one_of(VALUE, named("path", "dtype", "device_map", "quantization")),
        "method": st.one_of(VALUE, named("name", "rank", "top_m", "targets", "scale", "context")),
        "training": st.one_of(VALUE, named("seed", "learning_rate", "report_to", "output_dir", "bf16")),
    },
)  # fmt: skip


@FEW
@given(RUN)
def test_streams_and_configs(values: Any) -> None:
    try:
        data = yaml.safe_dump(values).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        data = json.dumps(values).encode()
    check("stream", data)
    check("config", data)


@FEW
@given(st.text(st.sampled_from("abn:-[]{}&*!|>'\"?,# \n\t<01.~\\"), max_size=60))
def test_texts_of_yamls_letters(text: str) -> None:
    check("stream", text.encode())
    check("config", f"model: m\ntasks:\n{text}".encode())


SAVED = st.fixed_dictionaries(
    {},
    optional={
        "format": st.one_of(st.just(1), VALUE), "tasks": st.one_of(st.lists(TEXT, max_size=3), VALUE),
        "config": st.one_of(VALUE, named("method", "rank", "targets", "top_m"), st.just({"method": "continual_llava"})),
        **{name: VALUE for name in ("base_model_name_or_path", "base_dtype", "base_fingerprint", "weights_sha256")},
        "surrogate_fingerprint": VALUE, "peft_type": VALUE,
    },
)  # fmt: skip


@FEW
@given(SAVED, st.randoms(use_true_random=False))
def test_adapters(values: Any, generator: random.Random) -> None:
    weights = seeds()["adapter"][0].partition(b"\0")[2]
    check("adapter", json.dumps(values).encode() + b"\0" + mutated(weights, generator))


@FEW
@given(st.sampled_from(sorted(READERS)), st.randoms(use_true_random=False))
def test_valid_inputs_with_a_few_bytes_changed(name: str, generator: random.Random) -> None:
    check(name, mutated(generator.choice(seeds()[name]), generator))


@FEW
@given(st.sampled_from(FORMATS), st.sampled_from(["RGB", "L", "P", "CMYK", "RGBA", "I;16", "LA", "1"]),
       st.integers(1, 12), st.integers(1, 12), st.integers(0, 9), st.randoms(use_true_random=False))  # fmt: skip
def test_images(format: str, mode: str, width: int, height: int, orientation: int, generator: random.Random) -> None:
    import io

    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    try:
        Image.new(mode, (width, height), 1).save(out, format, **({} if format in ("BMP", "PPM") else {"exif": exif}))
    except (OSError, ValueError):  # no mode of this format
        assume(False)
    check("image", out.getvalue())
    check("image", mutated(out.getvalue(), generator))


@FEW
@given(TEXT, TEXT)
def test_what_is_asked_is_read_back_from_ids(question: str, answer: str) -> None:
    check("conversation", f"{question}\0{answer}".encode("utf-8", "replace"))


def test_what_is_asked_is_read_back_from_ids_of_real_tokenizers(real: Any) -> None:  # noqa: F811
    encoder, reader = Encoder(real), InstructionReader(real, real.tokenizer.convert_tokens_to_ids("<image>"))
    picture = Image.new("RGB", (64, 64))

    @FEW
    @given(TEXT, TEXT, st.booleans())
    def property(question: str, answer: str, image: bool) -> None:
        question = question.encode("utf-8", "replace").decode().strip()
        answer = answer.encode("utf-8", "replace").decode().strip()
        assume(question and answer and not question.startswith("<image>") and not question.endswith("<image>"))
        sample = Sample(question, answer, picture if image else None, history=((question, answer),))
        check_encoded(real, encoder, reader, sample)

    property()


RESULT = st.fixed_dictionaries(
    {
        "stream": st.one_of(st.just(["t"]), VALUE), "seeds": st.one_of(st.just([0]), VALUE),
        "environment": named("torch"),
    },
    optional={"methods": st.one_of(VALUE, st.dictionaries(TEXT, named("accuracy_matrix", "examples"), max_size=2)),
              "metrics": VALUE, "config": VALUE, "note": VALUE},
)  # fmt: skip


@FEW
@given(RESULT, named("average_accuracy", "losses", "examples", "per_seed", "seconds"))
def test_results(values: Any, changes: Any) -> None:
    check("results", json.dumps(values).encode())
    known = json.loads(seeds()["results"][0])
    known["methods"]["frozen"] |= changes
    check("results", json.dumps(known).encode())


@FEW
@given(named("kind", "architecture", "device", "environment", "complete", "tiles", "avoid"))
def test_tables(changes: Any) -> None:
    check("table", json.dumps(json.loads(seeds()["table"][0]) | changes).encode())


@pytest.mark.parametrize("name", sorted(READERS))
def test_the_corpus_of_the_fuzzer(name: str) -> None:
    files = sorted((CORPUS / name).iterdir())
    assert files and sum(file.stat().st_size for file in files) < 8192
    for file in files:
        check(name, file.read_bytes())
    for data in seeds()[name]:
        check(name, data)


def test_the_fuzzer_finds_what_breaks_the_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fuzz import __main__ as fuzz
    from tests.fuzz import readers

    def broken(data: bytes, folder: Path) -> None:
        raise KeyError("x")

    monkeypatch.setitem(readers.READERS, "table", broken)
    monkeypatch.setattr(fuzz, "ROOT", tmp_path)
    monkeypatch.setattr(fuzz, "_guided", fuzz._random)
    assert fuzz.main(["table", "--seconds", "1", "--out", str(tmp_path / "r.json")]) == 1
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["reader"] == "table" and row["executions"] == len(row["findings"]) > 0
    assert any((tmp_path / "runs" / "fuzz" / "table").iterdir())
