"""The demo's stream and base: reproducible, honest about what was learned when, and readable by the tokenizer."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from cllava_fast.data.encode import Collator, Encoder
from cllava_fast.data.stream import Stream, Task
from cllava_fast.demo import base, mixture, pretrain, stream
from cllava_fast.demo.images import COLORS, NUMBER_LABELS, WORD_LABELS, draw_chart, draw_form, draw_glyph, draw_icon
from cllava_fast.demo.tokenizer import build_tokenizer, vocabulary

SPLITS = ("train", "validation", "test")
SMALL = {"train": 96, "validation": 24, "test": 24}


def fingerprint(tasks: Stream) -> str:
    digest = hashlib.sha256()
    for task in tasks:
        for split in SPLITS:
            for sample in getattr(task, split):
                digest.update(f"{sample.id}|{sample.instruction}|{sample.answer}|".encode())
                digest.update(sample.image.tobytes())
    return digest.hexdigest()


def pixels(task: Task, split: str) -> set[bytes]:
    return {sample.image.tobytes() for sample in getattr(task, split)}


@pytest.fixture(scope="module")
def full() -> Stream:
    return stream.build_stream()


@pytest.fixture(scope="module")
def loaded():
    return base.load_base()


def test_stream_has_the_four_tasks_in_order(full):
    assert full.task_names == ["chart", "document", "icon", "digit"]
    for task in full:
        assert [len(getattr(task, split)) for split in SPLITS] == [1200, 200, 200]
        assert task.train[17].id == f"{task.name}/train/17"
        assert all(sample.image.size == (64, 64) for sample in task.train)


def test_stream_is_reproducible_in_another_process():
    code = (
        "from tests.test_demo_data import fingerprint, SMALL\n"
        "from cllava_fast.demo.stream import build_stream\n"
        "print(fingerprint(build_stream(3, ambiguous=0.5, **SMALL)))"
    )
    root = Path(__file__).resolve().parents[1]
    here = fingerprint(stream.build_stream(3, ambiguous=0.5, **SMALL))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == here
    assert fingerprint(stream.build_stream(4, ambiguous=0.5, **SMALL)) != here


def test_splits_share_no_image(full):
    for task in full:
        train, validation, test = (pixels(task, split) for split in SPLITS)
        assert not train & validation and not train & test and not validation & test, task.name


def test_digits_are_split_alike_for_every_seed():
    first, second = (stream.build_stream(seed, train=2000, validation=400, test=500) for seed in (0, 1))
    for split in SPLITS:
        assert pixels(first.tasks[3], split) == pixels(second.tasks[3], split)


def test_icons_of_the_test_split_are_those_of_easy_vqa(full):
    import easy_vqa

    images = {i: Image.open(path).convert("RGB").tobytes() for i, path in easy_vqa.get_test_image_paths().items()}
    official = {(q, a, images[i]) for q, a, i in zip(*easy_vqa.get_test_questions(), strict=True)}
    for sample in full.tasks[2].test:
        assert (sample.instruction, sample.answer, sample.image.tobytes()) in official


def test_samples_of_one_image_share_the_object(full):
    chart = full.tasks[0].train
    assert chart[0].image is chart[1].image
    for task in full:
        images = {id(sample.image): sample.image.tobytes() for sample in task.train}
        assert len(set(images.values())) == len(images), task.name


def test_chart_answers_can_be_read_from_the_pixels(full):
    for sample in full.tasks[0].test:
        heights = bar_heights(sample.image)
        words = sample.instruction
        if "how many" in words or "number of bars" in words:
            assert sample.answer == str(len(heights))
        elif "tallest" in words or "highest" in words:
            assert sample.answer == max(heights, key=heights.get)
        else:
            assert "shortest" in words or "lowest" in words
            assert sample.answer == min(heights, key=heights.get)


def bar_heights(image: Image.Image) -> dict[str, int]:
    array = np.asarray(image).astype(int)
    heights: dict[str, int] = {}
    for column in range(64):
        ink = (abs(array[:, column] - array[0, 0]) > 30).any(-1)  # [64]
        ink[60:] = False
        if ink[59]:
            color = array[59, column]
            near = min(COLORS, key=lambda name: abs(color - COLORS[name]).sum())
            heights[near] = int(ink.sum())
    return heights


def test_form_facts_agree_with_the_questions():
    rng = Random(5)
    for position in range(60):
        form = draw_form(rng)
        question, answer = stream.question_about(form, position, None, rng)
        if position % 3 == 0:
            assert answer == ("yes" if form.ticked else "no")
        else:
            label = next(label for label in (*NUMBER_LABELS, *WORD_LABELS) if label in question.rstrip("?").split())
            assert answer == form.fields[label]
            assert answer.isdigit() == (label in NUMBER_LABELS)
        assert stream.question_about(form, position, "which?", rng) == ("which?", form.fields[form.number_label])


def test_digit_answers_are_those_of_scikit_learn(full):
    from sklearn.datasets import load_digits

    data = load_digits()
    truth = {image.tobytes(): int(target) for image, target in zip(data.images, data.target, strict=True)}
    tiny = {glyph.image.tobytes(): glyph.digit for split in SPLITS for glyph in stream.digits(split)}
    assert len(tiny) == len(truth)
    for sample in full.tasks[3].test:
        digit, words = tiny[sample.image.tobytes()], sample.instruction
        if words in stream.DIGIT:
            assert sample.answer == str(digit)
        elif words in stream.PARITY:
            assert sample.answer == ("even", "odd")[digit % 2]
        elif words in stream.ODD:
            assert sample.answer == ("no", "yes")[digit % 2]
        else:
            assert words in stream.BIGGER and sample.answer == ("yes" if digit > 5 else "no")


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_ambiguous_questions_are_the_same_in_both_tasks(share):
    tasks = {task.name: task for task in stream.build_stream(1, ambiguous=share, **SMALL)}
    for split, size in SMALL.items():
        document, digit = (getattr(tasks[name], split) for name in ("document", "digit"))
        both = [
            (a, b) for a, b in zip(document, digit, strict=True)
            if a.instruction == b.instruction and a.instruction in stream.AMBIGUOUS
        ]  # fmt: skip
        assert len(both) == round(share * size)
        asked = {sample.instruction for sample in document} & {sample.instruction for sample in digit}
        assert asked <= set(stream.AMBIGUOUS)
        assert all(a.answer.isdigit() and b.answer.isdigit() for a, b in both)
        if share and size > 50:
            assert any(a.answer != b.answer for a, b in both)
        for name in ("chart", "icon"):
            assert not {sample.instruction for sample in getattr(tasks[name], split)} & set(stream.AMBIGUOUS)


@pytest.mark.parametrize("wrong", [{"train": 0}, {"test": -1}, {"validation": -1}, {"ambiguous": 1.1}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        stream.build_stream(**wrong)


def test_every_word_is_in_the_vocabulary(full):
    tokenizer = build_tokenizer()
    samples = [s for task in full for split in SPLITS for s in getattr(task, split)]
    texts = {text for s in samples for text in (s.instruction, s.answer)}
    texts |= set(stream.AMBIGUOUS)
    rng = Random(0)
    for _ in range(2000):
        texts |= set(mixture.describe(mixture.draw_picture(rng), rng)) | set(mixture.repeat_line(rng))
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
    assert len(vocabulary()) == len(set(vocabulary())) == len(tokenizer)


def test_answers_are_one_word(full):
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(s.answer)["input_ids"]) == 1 for task in full for s in task.train)


def test_pretraining_knows_no_question_of_the_stream(full):
    asked = {s.instruction for task in full for split in SPLITS for s in getattr(task, split)} | set(stream.AMBIGUOUS)
    rng = Random(0)
    for draw in (draw_chart, draw_form, draw_icon, draw_glyph):
        for _ in range(300):
            prompt, answer = mixture.describe(draw(rng), rng)
            assert prompt not in asked and not prompt.endswith("?")
            assert len(answer.split()) > 1, "the stream's answers are single words"


def test_pretraining_never_sees_the_packages():
    folder = Path(mixture.__file__).parent
    for name in ("images", "mixture", "tokenizer", "base", "pretrain"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        roots = {module.split(".")[0] for module in modules}
        assert not roots & {"easy_vqa", "sklearn"} and "cllava_fast.demo.stream" not in modules


def test_base_loads_offline_and_silently():
    code = (
        "import os, warnings; os.environ['HF_HUB_OFFLINE'] = '1'; warnings.simplefilter('error')\n"
        "from cllava_fast.demo.base import load_base\n"
        "model, processor = load_base()\n"
        "from transformers import AutoProcessor\n"
        "assert type(AutoProcessor.from_pretrained(model.name_or_path)) is type(processor)"
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    assert not run.stdout.strip()
    assert "warn" not in run.stderr.lower(), run.stderr


def test_base_is_small_and_whole(loaded):
    model, processor = loaded
    assert sum(file.stat().st_size for file in base.FOLDER.iterdir()) < 5e6
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    assert processor.tokenizer.get_vocab() == build_tokenizer().get_vocab(), "the base is older than the vocabulary"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert next(model.parameters()).dtype == torch.float32


def test_chat_template(loaded):
    _, processor = loaded
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    turns = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == ("USER: <image>\nwhat is it? ASSISTANT:")
    turns += [{"role": "assistant", "content": "red"}, {"role": "user", "content": "and the box?"}]
    assert processor.apply_chat_template(turns) == ("USER: <image>\nwhat is it? ASSISTANT: red</s> USER: and the box?")
    tokens = processor.tokenizer.tokenize(processor.apply_chat_template(turns))
    assert tokens[:2] == ["USER:", "<image>"] and tokens.count("ASSISTANT:") == 1


def test_processor_expands_the_image_and_the_model_answers(loaded):
    model, processor = loaded
    content = [{"type": "image"}, {"type": "text", "text": "caption"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    batch = processor(text=inputs, images=draw_icon(Random(0)).image, return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16
    output = model.generate(**batch)
    assert output.shape[1] > batch["input_ids"].shape[1]


def test_base_has_learned_what_it_was_taught(loaded):
    model, processor = loaded
    batch = pretrain._Batches(pretrain.PretrainArguments(batch_size=200, seed=99), processor)[0]
    with torch.no_grad():
        assert model(**batch).loss < 0.6


def test_base_does_not_know_the_stream(loaded, full):
    model, processor = loaded
    encoder = Encoder(processor)
    for task in full:
        batch = Collator(encoder, None, training=True)(encoder.encode(task.validation[:100]))
        with torch.no_grad():
            guess = model(**batch).logits[:, :-1].argmax(-1)
        wanted = batch["labels"][:, 1:]
        right = ((guess == wanted) | (wanted == -100)).all(-1).float().mean()
        # a coin would be right on a quarter of the icons, half of which ask for yes or no
        assert right < (0.25 if task.name == "icon" else 0.15), task.name


def test_pretraining_runs_end_to_end(tmp_path):
    output = tmp_path / "base"
    pretrain.main(["--output", str(output), "--steps", "3", "--batch-size", "4"])
    model, processor = base.load_base(output)
    assert Path(model.name_or_path) == output and processor.tokenizer.eos_token == "</s>"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        pretrain.main(["--output", str(stranger), "--steps", "1"])
    assert (stranger / "thesis.txt").read_text() == "mine"


def test_load_base_names_the_folder_it_missed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no base model"):
        base.load_base(tmp_path)
