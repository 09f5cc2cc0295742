"""The readers of strangers' input, each as a function of bytes that fails only where its promise is broken.

The promise: a valid result, or an error of ``REFUSALS`` whose message names the file; nothing is written.
"""

from __future__ import annotations

import functools
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cllava_fast.config import load_config
from cllava_fast.data import Sample, load_stream, read_samples
from cllava_fast.data.encode import Encoder
from cllava_fast.data.pixels import MAX_ASPECT, read_rgb, read_size
from cllava_fast.demo.tokenizer import build_processor
from cllava_fast.evaluate.report import load_results
from cllava_fast.model import files
from cllava_fast.model.instructions import InstructionReader
from cllava_fast.ops import tuned
from cllava_fast.pool import LinearShape, Pool

REFUSALS = (ValueError, OSError)


def refused_or(read: Callable[[], Any], name: str) -> Any:
    """What ``read`` returns, or None where it refuses as it should."""
    try:
        return read()
    except REFUSALS as error:
        assert name in str(error), f"{type(error).__name__} does not name {name}: {str(error)[:300]}"
        assert len(str(error)) < 10_000, "a message, not the file itself"
        return None


def records(data: bytes, folder: Path) -> None:
    """A file of records; the first byte says which kind."""
    path = folder / ("a.json" if data[:1] < b"\x80" else "a.jsonl")
    path.write_bytes(data[1:])
    samples = refused_or(lambda: read_samples(path, folder), str(path))
    for sample in samples or ():
        assert sample.instruction.strip() and sample.answer.strip() and sample.image is None
        sample.instruction.encode()


def stream(data: bytes, folder: Path) -> None:
    path = folder / "s.yaml"
    path.write_bytes(data)
    refused_or(lambda: load_stream(path), str(path))


def config(data: bytes, folder: Path) -> None:
    path = folder / "r.yaml"
    path.write_bytes(data)
    read = refused_or(lambda: load_config(path), str(path))
    if read is not None:
        read.to_yaml()


def adapter(data: bytes, folder: Path) -> None:
    """``adapter_config.json``, a zero byte, and a safetensors file."""
    text, _, weights = data.partition(b"\0")
    (folder / files.CONFIG).write_bytes(text)
    (folder / files.WEIGHTS).write_bytes(weights)
    saved = refused_or(lambda: files.read_config(folder), str(folder))
    state = refused_or(lambda: _state(folder), str(folder))
    if state is not None:
        pool = Pool(2, 4, {"a": LinearShape(3, 5)})
        refused_or(lambda: pool.load_state(state, saved.tasks if saved else ["t"]), "")


def _state(folder: Path) -> Any:
    files._check_header(folder / files.WEIGHTS)
    tensors = files.load((folder / files.WEIGHTS).read_bytes())
    return {name.removeprefix("pool."): tensor for name, tensor in tensors.items()}


def image(data: bytes, folder: Path) -> None:
    path = folder / "a.png"
    path.write_bytes(data)
    size = refused_or(lambda: read_size(path, str(path)), str(path))
    rgb = refused_or(lambda: read_rgb(path, str(path)), str(path))
    if rgb is not None:
        assert rgb.mode == "RGB" and rgb.size == size and max(size) <= MAX_ASPECT * min(size)


@functools.cache
def _processor() -> tuple[Any, Encoder, InstructionReader]:
    processor = build_processor()
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    return processor, Encoder(processor), InstructionReader(processor, image_id)


def conversation(data: bytes, folder: Path) -> None:
    """A question and an answer, a zero byte between them: what is encoded is read back."""
    question, _, answer = data.decode("utf-8", "ignore").partition("\0")
    read = refused_or(
        lambda: read_samples([{"question": question, "answer": answer}, {"question": "is it?", "answer": "yes"}]),
        "samples: record 0",
    )
    if read is None:
        return
    processor, encoder, reader = _processor()
    first = read[0]
    picture = Image.new("RGB", (64, 64))
    history = ((first.instruction, first.answer),)
    check_encoded(processor, encoder, reader, Sample(first.instruction, first.answer, picture, history=history))


def check_encoded(processor: Any, encoder: Encoder, reader: InstructionReader, sample: Sample) -> None:
    """Image and end tokens are those of the template alone, and the instruction is read back as it was given."""
    tokenizer = processor.tokenizer
    (example,) = encoder.encode([sample])
    (plain,) = encoder.encode([Sample("what?", "it", sample.image, history=(("what?", "it"),) * len(sample.history))])
    for control in (tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id, tokenizer.bos_token_id):
        for ids, expected in ((example.prompt_ids, plain.prompt_ids), (example.answer_ids, plain.answer_ids)):
            assert ids.count(control) == expected.count(control), f"token {control} came in by way of a text"
    given = refused_or(lambda: reader.canonical(sample.instruction), "")
    read = refused_or(lambda: reader.read(torch.tensor([example.prompt_ids])), "sample 0")
    assert read == (None if given is None else [given])


def results(data: bytes, folder: Path) -> None:
    from cllava_fast.evaluate.page import html_page
    from cllava_fast.evaluate.report import _csv, _markdown, explanations, selection_table, table

    path = folder / "results.json"
    path.write_bytes(data)
    read = refused_or(lambda: load_results(path), str(path))
    if read is not None:
        page = html_page(read, table(read), explanations(read), {}, selection_table(read))
        assert "<script" not in page
        (page + _csv(read) + _markdown(read, {})).encode()


def table(data: bytes, folder: Path) -> None:
    path = folder / "sm_90.json"
    path.write_bytes(data)
    refused_or(lambda: tuned.read(path), path.name)


READERS: dict[str, Callable[[bytes, Path], None]] = {
    read.__name__: read for read in (records, stream, config, adapter, image, conversation, results, table)
}


def check(name: str, data: bytes) -> None:
    """One input for one reader, in a folder of its own."""
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ids that come twice, and Pillow's of odd files
        READERS[name](data, Path(work))
        strangers = {path.name for path in Path(work).iterdir()} - {
            "a.json", "a.jsonl", "s.yaml", "r.yaml", "a.png", "results.json", "sm_90.json", files.CONFIG, files.WEIGHTS,
        }  # fmt: skip
        assert not strangers, f"a reader has written {strangers}"


def seeds() -> dict[str, list[bytes]]:
    """Small valid inputs of each reader."""
    import json

    from safetensors.torch import save

    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    llava = [{"id": "1", "conversations": [{"from": "human", "value": "Hi?"}, turns[1]]}]
    coin = [{"question_id": 2, "text": "Who?", "answer": "A"}, {"question": "Q?", "answers": ["A", "B", "B"]}]
    pool = Pool(2, 4, {"a": LinearShape(3, 5)})
    pool.open_block(2, keys=torch.ones(2, 4), a_std=1.0, context_init=None, generator=torch.Generator().manual_seed(0))
    pool.commit("t", torch.ones(2))
    weights = save({f"pool.{name}": tensor for name, tensor in pool.state().items()})
    saved = {
        "format": 1, "config": {"method": "continual_llava", "rank": 2, "rows_per_task": 2, "top_m": 1},
        "tasks": ["t"], "base_model_name_or_path": "a/b", "base_dtype": "float32", "base_fingerprint": "0",
        "surrogate_fingerprint": None, "weights_sha256": "0",
    }  # fmt: skip
    numbers = dict.fromkeys(("average_accuracy", "average_forgetting", "backward_transfer", "mean_average_accuracy"), 1)
    method = {**numbers, "accuracy_matrix": [[1.0]], "selection_accuracy": None, "trainable_parameters": 1}
    example = {"question": "<b>?", "answers": ["A"], "prediction": "\x1b[1m", "score": 1.0, "image": None}
    method |= {"seconds": 1, "losses": {"t": [0.5]}, "examples": {"t": [example]}}
    report = {"stream": ["t"], "metrics": {"t": "exact_match"}, "seeds": [0], "methods": {"frozen": method}}
    report |= {"environment": {"torch": "2"}, "config": {"split": "test"}}
    tasks = "tasks: [{name: t, train: a.json, test: {path: a.json, columns: {question: q}}, prompt: '{question}'}]\n"
    empty = {"kind": tuned.KIND, "architecture": "sm_90", "device": "d", "environment": {}, "complete": True}
    empty |= {"tiles": [], "avoid": []}

    def dump(value: Any) -> bytes:
        return json.dumps(value).encode()

    return {
        "records": [
            b"\0" + dump(llava), b"\0" + dump(coin), b"\xff" + b"\n".join(map(dump, coin)),
            b"\0" + dump([{"image": "x.png", "conversations": turns}]),
        ],
        "stream": [tasks.encode(), ("a: &a [1]\nb: *a\n" + tasks).encode()],
        "config": [f"model: m\nmethod: {{rank: 4, targets: [a]}}\ntraining: {{seed: 1, bf16: true}}\n{tasks}".encode()],
        "adapter": [dump(saved) + b"\0" + weights],
        "image": [_encoded(format) for format in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "TIFF")],
        "conversation": [b"what is <image>?\0USER: </s>", b"is it?\0ASSISTANT: yes"],
        "results": [dump(report)],
        "table": [dump(empty)],
    }  # fmt: skip


def _encoded(format: str) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((6, 5)).convert("P").save(out, format) if format in ("PNG", "GIF") else (
        Image.new("RGB", (6, 5), "red").save(out, format)
    )
    return out.getvalue()
