"""What a model reads, character by character, and what it learns, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from cllava_fast.data import Sample, chat_template
from cllava_fast.data.encode import Collator, Encoder
from cllava_fast.model.instructions import InstructionReader
from cllava_fast.model.text import PlainText

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PICTURE = Image.new("RGB", (64, 64))
TURNS = (("What is it?", "A cat."), ("What color?", "It is red."))
# written by hand from the training code of LLaVA-1.5, whose version is "v1"
GOLDEN = [
    (
        Sample("What is it?", "A cat.", PICTURE),
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:",
        " A cat.</s>",
    ),
    (
        Sample("What is it?", "A cat."),
        f"{SYSTEM} USER: What is it? ASSISTANT:",
        " A cat.</s>",
    ),
    (
        Sample("And why?", "Look\nat it!", PICTURE, history=TURNS),
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: What color? ASSISTANT: It is red.</s>"
        "USER: And why? ASSISTANT:",
        " Look\nat it!</s>",
    ),
    (
        Sample("What color?", "It is red.", history=TURNS[:1]),
        f"{SYSTEM} USER: What is it? ASSISTANT: A cat.</s>USER: What color? ASSISTANT:",
        " It is red.</s>",
    ),
    (
        Sample("What is it?", "A cat.", system="Be brief."),
        "Be brief. USER: What is it? ASSISTANT:",
        " A cat.</s>",
    ),
]
# that of the LLaVA-1.5 checkpoints for transformers, shortened: no system prompt, and no end behind an earlier answer
HUB_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def sentencepiece_like() -> Tokenizer:
    """Spaces belong to the word behind them, and one stands before the first word, as in LLaMA's tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def byte_level() -> Tokenizer:
    """As in GPT-2, LLaMA 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module", params=[sentencepiece_like, byte_level], ids=lambda make: make.__name__)
def real(request: pytest.FixtureRequest, processor: Any) -> Any:
    """The tiny processor with a tokenizer that keeps every character."""
    tokenizer = request.param()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    texts = [text for sample, prompt, answer in GOLDEN for text in (prompt, answer, sample.instruction)] * 3
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return LlavaProcessor(
        processor.image_processor, fast, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chat_template("vicuna_v1"),
    )  # fmt: skip


def messages(sample: Sample, answer: bool = False) -> list[dict[str, Any]]:
    turns = [] if not sample.system else [("system", sample.system)]
    for user, reply in sample.history:
        turns += [("user", user), ("assistant", reply)]
    turns += [("user", sample.instruction), *([("assistant", sample.answer)] if answer else [])]
    result = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    if sample.image is not None:
        result[bool(sample.system)]["content"].insert(0, {"type": "image"})
    return result


@pytest.mark.parametrize(("sample", "prompt", "answer"), GOLDEN)
def test_vicuna_v1_is_what_llava_was_trained_on(processor: Any, sample: Sample, prompt: str, answer: str) -> None:
    template = chat_template("vicuna_v1")
    asked = processor.apply_chat_template(
        messages(sample), chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert asked == prompt
    closed = processor.apply_chat_template(messages(sample, answer=True), chat_template=template, tokenize=False)
    assert closed == prompt + answer


def images_of(sample: Sample) -> dict[str, Any]:
    return {} if sample.image is None else {"images": sample.image}


@pytest.mark.parametrize(("sample", "prompt", "answer"), GOLDEN)
def test_ids_are_those_of_the_whole_text_and_labels_those_of_all_answers(
    real: Any, sample: Sample, prompt: str, answer: str
) -> None:
    encoder = Encoder(real)
    (example,) = encoder.encode([sample])
    asked = torch.as_tensor(real(text=prompt, **images_of(sample))["input_ids"]).flatten().tolist()
    whole = torch.as_tensor(real(text=prompt + answer, **images_of(sample))["input_ids"]).flatten().tolist()
    assert example.prompt_ids == asked, "what generation sees"
    assert example.prompt_ids + example.answer_ids == whole, "what LLaVA learned"

    batch = Collator(encoder, None, training=True)([example])
    labels, ids = batch["labels"][0].tolist(), batch["input_ids"][0].tolist()
    learned: list[list[int]] = [[]]
    for label, token in zip(labels, ids, strict=True):
        if label == -100:
            learned += [[]] if learned[-1] else []
        else:
            assert label == token
            learned[-1].append(token)
    said = [real.tokenizer.decode(run, clean_up_tokenization_spaces=False).strip() for run in learned if run]
    assert said == [f"{reply}</s>" for _, reply in sample.history] + [f"{sample.answer}</s>"]


def test_an_answer_on_a_line_of_its_own_gets_no_space_before_it(real: Any, monkeypatch: Any) -> None:
    turn = "{{ m['role'] + ':\n' + m['content'][0]['text'] + '\n' }}"
    start = "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    monkeypatch.setattr(real, "chat_template", f"{{% for m in messages %}}{turn}{{% endfor %}}{start}")
    (example,) = Encoder(real).encode([Sample("What is it?", "A cat.")])
    prompt = "user:\nWhat is it?\nassistant:\n"
    assert example.prompt_ids == real.tokenizer(prompt)["input_ids"]
    assert example.prompt_ids + example.answer_ids == real.tokenizer(f"{prompt}A cat.</s>")["input_ids"]


def test_labels_token_by_token(processor: Any) -> None:
    """The tiny tokenizer: a word, a token."""
    sample = Sample("is it odd?", "no", PICTURE, history=(("which digit is it?", "6"), ("is it big?", "yes")))
    encoder = Encoder(processor)
    (example,) = encoder.encode([sample])
    batch = Collator(encoder, None, training=True)([example])
    tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    learned = [token if label != -100 else "." for token, label in zip(tokens, batch["labels"][0], strict=True)]
    assert tokens[1:17] == ["<image>"] * 16
    del tokens[1:17], learned[1:17]
    text = "USER: which digit is it ? ASSISTANT: 6 </s> USER: is it big ? ASSISTANT: yes </s> USER: is it odd ? ASSISTANT: no </s>"  # noqa: E501
    mask = ". . . . . . . 6 </s> . . . . . . yes </s> . . . . . . no </s>"
    assert tokens == text.split() and learned == mask.split()
    assert "labels" not in Collator(encoder, None, training=False)([example])


def test_the_hubs_template_has_no_end_behind_earlier_answers(real: Any, monkeypatch: Any) -> None:
    """So earlier answers are learned without one, as they stand in the prompt; the last one ends."""
    monkeypatch.setattr(real, "chat_template", HUB_TEMPLATE)
    sample = Sample("What color?", "It is red.", PICTURE, history=TURNS[:1])
    (example,) = Encoder(real).encode([sample])
    prompt = "USER: <image>\nWhat is it? ASSISTANT: A cat. USER: What color? ASSISTANT:"
    asked = torch.as_tensor(real(text=prompt, images=PICTURE)["input_ids"]).flatten().tolist()
    assert example.prompt_ids == asked
    ((start, end),) = example.earlier_answers
    assert real.tokenizer.decode(example.prompt_ids[start:end]).strip() == "A cat."
    assert real.tokenizer.decode(example.answer_ids).strip() == "It is red.</s>"
    # the same processor, told to speak as LLaVA was trained
    monkeypatch.setattr(real, "chat_template", chat_template("vicuna_v1"))
    (trained,) = Encoder(real).encode([sample])
    assert real.tokenizer.decode(trained.prompt_ids).startswith(
        f"<s>{SYSTEM}" if "Ġ" in real.tokenizer.vocab else "<s>"
    )
    assert trained.prompt_ids != example.prompt_ids


CONTROL = "what is <image> or </s> or <s><pad>"


def test_control_tokens_in_a_text_stay_text(real: Any) -> None:
    encoder = Encoder(real)
    plain = Sample("what is it?", "yes", PICTURE)
    for sample in (
        Sample(CONTROL, "yes", PICTURE),
        Sample("what is it?", CONTROL, PICTURE),
        Sample("what is it?", "yes", PICTURE, history=((CONTROL, CONTROL),)),
        Sample("what is it?", "yes", PICTURE, system=CONTROL),
    ):
        (example,), (other,) = encoder.encode([sample]), encoder.encode([plain])
        tokenizer = real.tokenizer
        image, eos = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id
        assert example.prompt_ids.count(image) == other.prompt_ids.count(image) == 16
        assert example.prompt_ids.count(eos) == len(sample.history)
        assert example.answer_ids.count(eos) == 1 and example.answer_ids[-1] == eos
        assert (example.prompt_ids + example.answer_ids).count(tokenizer.pad_token_id) == 0
        assert example.prompt_ids.count(tokenizer.bos_token_id) == 1
        text = "".join(tokenizer.decode(example.prompt_ids + example.answer_ids).split())
        assert "".join(CONTROL.split()) in text


def test_a_sequence_begins_once(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bos = real.tokenizer.bos_token_id
    assert bos not in PlainText(real.tokenizer).ids("what is it?")
    for template in (real.chat_template, "{{ bos_token }}" + real.chat_template):
        monkeypatch.setattr(real, "chat_template", template)
        (example,) = Encoder(real).encode([Sample("what is it?", "yes", PICTURE)])
        assert [i for i, token in enumerate(example.prompt_ids) if token == bos] == [0]


def test_control_tokens_of_the_tiny_tokenizer_stay_text(processor: Any) -> None:
    (example,) = Encoder(processor).encode([Sample("is <image> USER: red ASSISTANT: </s> odd?", "yes", PICTURE)])
    tokens = processor.tokenizer.convert_ids_to_tokens(example.prompt_ids)
    assert tokens[0] == "USER:" and tokens.count("USER:") == tokens.count("ASSISTANT:") == 1
    assert tokens.count("<image>") == 16 and "</s>" not in tokens and "odd" in tokens


def test_the_last_user_turn_is_read_back(processor: Any, monkeypatch: Any) -> None:
    samples = [
        Sample("is it odd?", "no", PICTURE, history=(("which digit is it?", "6"),)),
        Sample("which color is the bar?", "red"),
    ]
    for template in (processor.chat_template, chat_template("vicuna_v1")):
        monkeypatch.setattr(processor, "chat_template", template)
        reader = InstructionReader(processor, processor.tokenizer.convert_tokens_to_ids("<image>"))
        for example in Encoder(processor).encode(samples):
            (read,) = reader.read(torch.tensor([example.prompt_ids]))
            assert read == reader.canonical(example.sample.instruction) == reader.canonical(example.instruction)


def test_white_space_around_a_text_is_not_learned(real: Any) -> None:
    a, b = Encoder(real).encode([Sample("  What is it?\n", " A cat. "), Sample("What is it?", "A cat.")])
    assert a.prompt_ids == b.prompt_ids and a.answer_ids == b.answer_ids


class TestRefusals:
    def test_an_unknown_conversation(self) -> None:
        with pytest.raises(ValueError, match="conversation is 'vicuna'; expected one of vicuna_v1"):
            chat_template("vicuna")

    def test_a_processor_without_a_template(self, real: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr(real, "chat_template", None)
        with pytest.raises(
            ValueError, match=r'no chat template; set processor.chat_template .*chat_template\("vicuna_v1"\)'
        ):
            Encoder(real)
        monkeypatch.setattr(real, "chat_template", chat_template("vicuna_v1"))
        assert Encoder(real).encode([Sample("What?", "It.")])

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ messages[-1]['content'][0]['text'] }}", "does not write every turn as it is"),
            ("{% if messages %}\n{{ messages }\n{% endif %}", "user.*: no Jinja in line 2, unexpected '}'; leave out"),
            ("{% for m in messages %}{{ m['content'][-1]['text'] | upper }}{% endfor %}", "does not write every turn"),
            ("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}", "0 image tokens"),
        ],
    )
    def test_a_template_that_hides_what_is_said(self, real: Any, monkeypatch: Any, template: str, message: str) -> None:
        monkeypatch.setattr(real, "chat_template", template)
        with pytest.raises(ValueError, match=message):
            Encoder(real).encode([Sample("What?", "It.", PICTURE, history=TURNS)])
