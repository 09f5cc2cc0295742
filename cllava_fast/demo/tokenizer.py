"""The base model's word-level tokenizer, chat template and processor."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cllava_fast.demo.images import COLORS, NUMBER_LABELS, SHAPES, SIZE, WORD_LABELS

PATCH = 16
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")

ANSWERS = (
    *COLORS, *SHAPES, *(str(digit) for digit in range(10)), *(word for words in WORD_LABELS.values() for word in words),
    "yes", "no", "odd", "even",
)  # fmt: skip
QUESTION_WORDS = (
    "a agreed an and are at bar bars been beside bigger box by chart check color contain did digit do does drawn "
    "entered filled five for form greater hand handwritten has have here highest how image in is it lowest many "
    "not number of on or picture present reaches read say shape shortest show shown stands tallest than the there "
    "this tick ticked under what which with write writer written you"
).split()
PRETRAINING_WORDS = (
    "big caption column columns copy describe drawing empty every find first found from glyph kind left list long "
    "mark name none object objects panel rank repeat right rows sheet short sign small tally tint to transcribe"
).split()
PUNCTUATION = tuple("?.:;=")

CHAT_TEMPLATE = """
{%- for message in messages -%}
    {%- if not loop.first %} {% endif -%}
    {%- if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {%- if not loop.first %} {% endif -%}{{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' %}{{ '</s>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif -%}
"""


def vocabulary() -> list[str]:
    words = dict.fromkeys((*ANSWERS, *QUESTION_WORDS, *PRETRAINING_WORDS, *NUMBER_LABELS, *WORD_LABELS))
    return [*SPECIAL, *words, *PUNCTUATION]


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_processor() -> LlavaProcessor:
    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    # the class token is an image token too, until strategy "default" drops it
    return LlavaProcessor(
        images, build_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
