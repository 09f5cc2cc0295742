"""Streams that are refused, and batches as the model wants them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cllava_fast as cf
from cllava_fast.data import Sample, Stream, Task
from cllava_fast.data.encode import Collator, Encoder, ImageFeatures
from cllava_fast.data.lazy import LazySequence
from cllava_fast.data.lengths import Limit, check_lengths, count_tokens, token_limit
from cllava_fast.data.pixels import ImageError
from cllava_fast.data.prepared import PreparedStream
from cllava_fast.data.stream import fingerprint
from cllava_fast.data.workers import made_of
from cllava_fast.model import paths
from tests.helpers import image, prompt
from tests.train_helpers import arguments

SAMPLE = Sample("which bar is the tallest?", "red", Image.new("RGB", (64, 64)))


def task(name: str = "a", **splits: Any) -> Task:
    return Task(name, **{"train": [SAMPLE], "test": [SAMPLE], **splits})


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ([], ValueError, "has no task"),
        ([task("a"), task("b"), task("a")], ValueError, "names task 'a' twice"),
        ([task(train=[])], ValueError, "'a' has no train sample"),
        ([task(test=[])], ValueError, "'a' has no test sample"),
        ([task(train=[SAMPLE, Sample(" ", "x")])], ValueError, r"a/train\[1\]: instruction is ' '"),
        ([task(test=[Sample("what?", "")])], ValueError, r"a/test\[0\]: answer is ''"),
        ([task(test=[Sample("what?", "x", history=(("a", " "),))])], ValueError, r"a/test\[0\]: history is ' '"),
        ([task(test=[Sample("what?", "x", references=("",))])], ValueError, r"a/test\[0\]: references is ''"),
        ([{"name": "a"}], TypeError, r"tasks\[0\] is a dict; expected a cllava_fast.Task .*load_stream"),
        ([task(train=iter([SAMPLE]))], TypeError, "'a': train is a list_iterator; expected a sequence of Samples"),
        ([task(test=[{"question": "what?"}])], TypeError, r"a/test\[0\] is a dict; expected a .*Sample .*read_samples"),
        ([task(test=[Sample("what?", "x", ["a.png"])])], TypeError, r"a/test\[0\]: image is a list; expected one path"),
        ([task(test=[Sample("what?", "x", torch.zeros(3, 4, 4))])], TypeError, r"a/test\[0\]: image is a Tensor"),
        ([task(test=[Sample("what?", "x", history="a")])], TypeError, r"a/test\[0\]: history is 'a'; expected pairs"),
        ([task(test=[Sample("what?", "x", references="x")])], TypeError, r"a/test\[0\]: references is 'x'"),
        ([task(test=[Sample("what?", "x", history=None)])], TypeError, r"a/test\[0\]: history is None; expected pairs"),
        ([task(test=[Sample("what?", "x", history=(("a",),))])], TypeError, "expected pairs of texts"),
        (
            [task(test=[Sample("what?", "x", references=5)])],
            TypeError,
            r"a/test\[0\]: references is 5; expected a tuple",
        ),
        ([task(test=[Sample("what?", "x", system=5)])], ValueError, r"a/test\[0\]: system is 5; expected a text"),
        ([task(5)], ValueError, r"'stream': tasks\[0\].name is 5; expected a text"),
        ([task("a"), task(" ")], ValueError, r"tasks\[1\].name is ' '; expected a text in UTF-8 that is not blank"),
        ([task("a"), task("a ")], ValueError, r"tasks\[1\].name is 'a '; .* without blanks at its ends"),
        ([task("\u2003a")], ValueError, r"tasks\[0\].name is .*a'; .* without blanks at its ends"),
        *(([task(f"a{c}b")], ValueError, r"name is 'a.*b'; .* without control") for c in "\0\t\n\r\x1b\x85"),
        ([task("\ud800")], ValueError, r"tasks\[0\].name is '\\ud800'; expected a text in UTF-8"),
        (
            [task(validation=[Sample("what?", "x", "no/such.png")])],
            FileNotFoundError,
            r"a/validation\[0\]: image 'no/such",
        ),
    ],
)
def test_a_wrong_stream_is_refused(tasks: list[Task], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Stream(tasks)


def test_a_fingerprint_follows_moved_data_and_notices_other_pictures(tmp_path: Path) -> None:
    def found(folder: str, name: str = "1.png", size: int = 8) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (size, size)).save(tmp_path / folder / name)
        return fingerprint([cf.Sample("which color?", "red", tmp_path / folder / name)])

    first = found("a")
    assert found("b") == first
    assert len({first, found("a", "2.png"), found("c", size=99), fingerprint([cf.Sample("which color?", "red")])}) == 4
    flat = [tmp_path / "d" / "1.bmp", tmp_path / "e" / "1.bmp"]  # as large as one another
    for path, color in zip(flat, ("red", "blue"), strict=True):
        path.parent.mkdir()
        Image.new("RGB", (64, 64), color).save(path)
    assert len({fingerprint([cf.Sample("which color?", "red", path)]) for path in flat}) == 2
    sample = cf.Sample("which color?", "red", Image.new("RGB", (8, 8)))
    assert fingerprint([sample]) == fingerprint([sample]) != fingerprint([sample, sample])
    (tmp_path / "b" / "1.png").unlink()
    fingerprint([cf.Sample("which color?", "red", tmp_path / "b" / "1.png")])  # gone: that is for others to say


def test_images_open_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    opened = Sample("q", "a", tmp_path / "grey.png").open_image()
    assert opened.mode == "RGB" and opened.getpixel((0, 0)) == (7, 7, 7)
    assert Sample("q", "a").open_image() is None
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(OSError):
        Sample("q", "a", tmp_path / "bad.png").open_image()


def test_prompt_ids_are_the_processors_own(processor: Any, generator: torch.Generator) -> None:
    picture = image(generator)
    encoder = Encoder(processor)
    for with_image in (True, False):
        sample = Sample("which bar is the tallest?", "red", picture if with_image else None)
        (example,) = encoder.encode([sample])
        images = {"images": picture} if with_image else {}
        expected = processor(text=prompt(processor, sample.instruction, with_image), **images)["input_ids"]
        assert example.prompt_ids == torch.as_tensor(expected).flatten().tolist()
        assert processor.tokenizer.convert_ids_to_tokens(example.answer_ids) == ["red", "</s>"]


class Lazy(LazySequence[Sample]):
    """As samples of a file are."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def at(self, index: int) -> Sample:
        return self.samples[index]


class TestLengths:
    def prepared(self, processor: Any, picture: Any, lazy: bool) -> PreparedStream:
        samples = [
            Sample("is it?", "no", picture, id="short"),
            Sample("which bar is the tallest?", "red", picture, id="long one"),
        ]

        return PreparedStream(Stream([Task("a", Lazy(samples) if lazy else samples, samples)]), processor)

    @pytest.mark.parametrize("lazy", [False, True])
    def test_too_long_is_refused_before_anything_is_learned(
        self, lazy: bool, llava: Any, processor: Any, generator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        picture = image(generator)
        (longest,) = Encoder(processor).encode([Sample("which bar is the tallest?", "red", picture)])
        size, answer = len(longest.prompt_ids), len(longest.answer_ids)
        config = llava.config.get_text_config()
        for positions, split in ((size + answer, "train"), (size, "test")):
            monkeypatch.setattr(config, "max_position_embeddings", positions)
            data = self.prepared(processor, picture, lazy)
            assert len(data.examples("a", split, llava)) == 2, "it fits"
            monkeypatch.setattr(config, "max_position_embeddings", positions - 1)
            expected = (
                rf"task 'a', {split}: 'long one' has {positions} tokens, .*; expected {positions - 1} at most, the "
                "model's max_position_embeddings: shorten"
            )
            for again in (data, self.prepared(processor, picture, lazy)):
                with pytest.raises(ValueError, match=expected):
                    again.examples("a", split, llava)
        run = cf.ContinualTrainer(
            llava, processor, self.prepared(processor, picture, lazy), arguments(tmp_path / "run")
        )
        with pytest.raises(ValueError, match="task 'a', train: 'long one' has"):
            run.train()
        assert not (tmp_path / "run" / "increments").exists()
        with pytest.raises(ValueError, match="task 'a', test: 'long one' has"):
            cf.evaluate_stream(cf.unpatch(llava), processor, self.prepared(processor, picture, lazy), progress=False)

    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize("most", [1, 2])
    def test_answers_that_cannot_be_met(
        self, most: int, lazy: bool, llava: Any, processor: Any, tmp_path: Any, recwarn: pytest.WarningsRecorder
    ) -> None:
        test = [Sample("is it?", "no"), Sample("which bar?", "red bar")]
        stream = Stream([Task("a", [Sample("is it?", "no, it is not")], Lazy(test) if lazy else test)])
        expected = "task 'a', test: 1 of 2 answers have more than max_new_tokens=1 tokens, the longest 2; "
        config = arguments(tmp_path / "run", max_new_tokens=most, max_steps=1, align_steps=1)
        cf.ContinualTrainer(llava, processor, stream, config).train()
        cf.evaluate_stream(llava, processor, stream, max_new_tokens=most, progress=False)
        said = [str(warning.message) for warning in recwarn if "max_new_tokens" in str(warning.message)]
        assert len(said) == (2 if most == 1 else 0) and all(text.startswith(expected) for text in said)

    def test_answers_that_the_tokenizer_cannot_write(
        self, llava: Any, processor: Any, recwarn: pytest.WarningsRecorder
    ) -> None:
        test = [Sample("is it?", "no"), Sample("what is it?", "a xylophone"), Sample("which bar?", "red bar")]
        stream = Stream([Task("a", test, test), Task("b", test[:1], test[:1])])
        cf.evaluate_stream(llava, processor, stream, max_new_tokens=3, progress=False)
        (said,) = [str(warning.message) for warning in recwarn if "does not know" in str(warning.message)]
        assert said.startswith("task 'a', test: 1 of 3 answers hold what the base's tokenizer does not know, such as")
        assert "'a xylophone'" in said

    def test_answers_that_cannot_be_learned(
        self, llava: Any, processor: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        train = [Sample("is it?", "a xylophone of many words")]
        cf.patch(llava, cf.IncrementConfig(surrogate="backbone"), processor=processor)
        config = arguments(tmp_path / "run", max_new_tokens=2, max_steps=1, align_steps=1)
        cf.ContinualTrainer(llava, processor, Stream([Task("a", train, [Sample("is it?", "no")])]), config).train()
        (said,) = [text for warning in recwarn if "task 'a', " in (text := str(warning.message))]
        assert said.startswith("task 'a', train: 1 of 1 answers hold what the base's tokenizer does not know")

    def test_the_model_says_and_else_the_tokenizer(
        self, llava: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer, config = processor.tokenizer, llava.config.get_text_config()
        monkeypatch.setattr(tokenizer, "model_max_length", 100)
        assert token_limit(tokenizer, llava.config) == (256, "the model's max_position_embeddings")
        with monkeypatch.context() as changed:
            changed.setattr(config, "max_position_embeddings", 10**20)
            assert token_limit(tokenizer, llava.config) == (100, "the tokenizer's model_max_length")
            changed.setattr(tokenizer, "model_max_length", 10**30)
            assert token_limit(tokenizer, llava.config) is None
        for rope, positions in (
            ({"rope_type": "default"}, 256), ({"rope_type": "linear", "factor": 4.0}, 1024),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
            ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 256),
            ({"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {}}, 512),
        ):  # fmt: skip
            monkeypatch.setattr(config, "rope_parameters", rope)
            assert token_limit(tokenizer, llava.config).tokens == positions

    def test_many_are_counted(self, processor: Any) -> None:
        samples = [Sample("is it?", "no") for _ in range(8)]
        lengths = count_tokens(Encoder(processor).encode(samples), processor.tokenizer)
        with pytest.raises(
            ValueError, match=r"a: number 0 has \d+ tokens, number 1 .* and 3 others are too long, image"
        ):
            check_lengths(lengths, samples, Limit(3, "mine"), "a", answers=False)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_template_that_refuses_a_sample_is_told_with_the_sample(
    llava: Any, processor: Any, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    """As Gemma's, which knows no system turn."""
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    monkeypatch.setattr(processor, "chat_template", refuses + processor.chat_template)
    samples = [Sample("is it?", "no"), Sample("is it?", "no", system="be brief", id="s7")]

    class Lazy(LazySequence[Sample]):
        def __len__(self) -> int:
            return len(samples)

        def at(self, index: int) -> Sample:
            return samples[index]

    data = PreparedStream(Stream([Task("a", Lazy() if lazy else samples, samples[:1])]), processor)
    told = r"task 'a', train: sample 's7': the chat template does not write 2 turns \(system, user\): no system role; "
    with pytest.raises(ValueError, match=told + "leave out what it does not know, or set processor.chat_template"):
        list(data.examples("a", "train", llava))
    assert len(data.examples("a", "test", llava)) == 1


def test_labels_cover_the_answer_alone(processor: Any) -> None:
    encoder = Encoder(processor)
    samples = [Sample("is the box ticked?", "yes"), Sample("is it?", "five red")]
    batch = Collator(encoder, None, training=True)(encoder.encode(samples))
    for i, answer in enumerate((["yes", "</s>"], ["five", "red", "</s>"])):
        labels = batch["labels"][i]
        assert processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist()) == answer
        length = int(batch["attention_mask"][i].sum())
        assert batch["attention_mask"][i, :length].all(), "training pads on the right"
        tail = slice(length - len(answer), length)
        assert torch.equal(labels[tail], batch["input_ids"][i, tail])
    prompts = Collator(encoder, None, training=False)(encoder.encode(samples))
    assert "labels" not in prompts and prompts["attention_mask"][:, -1].all(), "generation pads on the left"


def test_images_go_through_the_vision_tower_once(llava: Any, processor: Any, generator: torch.Generator) -> None:
    encoder, features = Encoder(processor), ImageFeatures()
    pictures = [image(generator) for _ in range(3)]
    samples = [Sample("is it?", "no", pictures[i % 3]) for i in range(7)] + [Sample("is it?", "no")]
    calls = []
    handle = llava.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    features.add(samples, encoder, llava, batch_size=2)
    features.add(samples, encoder, llava, batch_size=2)
    handle.remove()
    assert len(calls) == 2
    batch = Collator(encoder, features, training=True)(encoder.encode(samples))
    direct = llava.get_image_features(encoder.images(pictures)["pixel_values"]).pooler_output
    assert batch["image_features"].shape[0] == 7
    torch.testing.assert_close(batch["image_features"][4], direct[1], atol=1e-5, rtol=1e-5)
    pooled = features.pooled(samples, 128)
    assert torch.equal(pooled[0], pooled[3]) and torch.count_nonzero(pooled[7]) == 0


def test_other_processes_open_images_for_the_vision_tower(llava: Any, processor: Any, generator: Any) -> None:
    pictures = [image(generator) for _ in range(5)]
    samples = [Sample("is it?", "no", pictures[i % 5]) for i in range(7)]
    found = []
    for workers in (0, 2):
        features, done = ImageFeatures(), list[int]()
        features.add(samples, Encoder(processor), llava, batch_size=2, workers=workers, advance=done.append)
        found.append((features.projected(pictures), features.pooled(samples, 128)))
        assert done == [2, 2, 3], "samples, of which the last two show what is known"
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_other_processes_cannot_open_is_told_in_its_own_words(llava: Any, processor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    found = []
    for workers in (0, 1):
        with pytest.raises(ImageError) as error:
            ImageFeatures().add([Sample("q", "a", tmp_path / "a.png")], Encoder(processor), llava, workers=workers)
        found.append(str(error.value))
    assert found[0] == found[1]
    assert "in read_rgb" in "".join(error.value.__notes__), "where it came from is told, too"


class Unpickled(Exception):
    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def test_an_error_that_cannot_be_sent_is_told_as_torch_does() -> None:
    def make(batch: int) -> int:
        raise Unpickled(str(batch), "broken")

    for workers, kind in ((0, Unpickled), (1, RuntimeError)):
        with pytest.raises(kind, match="7: broken"):
            list(made_of([7], make, workers))


def test_features_go_to_other_processes_without_images_that_have_other_ids_there(
    llava: Any, processor: Any, generator: Any, tmp_path: Path
) -> None:
    features, picture = ImageFeatures(), image(generator)
    picture.save(tmp_path / "a.png")
    samples = [Sample("is it?", "no", picture), Sample("is it?", "no", tmp_path / "a.png")]
    features.add(samples, Encoder(processor), llava)
    sent = pickle.loads(pickle.dumps(features))
    assert sent.projected([picture]) is None and features.projected([picture]) is not None
    assert torch.equal(sent.projected([tmp_path / "a.png"]), features.projected([picture]))
    assert torch.equal(sent.pooled(samples[1:], 128), features.pooled(samples[:1], 128))


def test_many_features_go_to_another_process() -> None:
    features = ImageFeatures()
    features._projected = {str(i): torch.full((2, 3), float(i)) for i in range(300)}
    context = torch.multiprocessing.get_context("forkserver")  # Python's default on Linux from 3.14 on
    found = context.Queue()
    process = context.Process(target=project, args=(features, found), daemon=True)
    process.start()
    assert found.get(timeout=60) == [[7.0] * 6, [299.0] * 6]
    process.join()


def project(features: ImageFeatures, found: Any) -> None:
    projected = features.projected(["7", "299"])
    assert projected is not None
    found.put(projected.flatten(1).tolist())


def test_without_a_use_for_features_nothing_is_computed(
    llava: Any, processor: Any, generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        paths.BASES, "LlavaForConditionalGeneration", paths.base_of(llava)._replace(takes_features=False)
    )
    monkeypatch.setattr(llava.model.vision_tower, "forward", None)
    samples = [Sample("is it?", "no", image(generator))]
    ImageFeatures().add(samples, Encoder(processor), llava, pooled=False)


def test_beyond_the_memory_limit_pixels_are_opened_for_each_batch(llava: Any, processor: Any, generator: Any) -> None:
    encoder, features = Encoder(processor), ImageFeatures(limit=1)
    samples = [Sample("is it?", "no", image(generator)) for _ in range(2)]
    features.add(samples, encoder, llava)
    batch = Collator(encoder, features, training=False)(encoder.encode(samples))
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and "image_features" not in batch
