"""From turns to token ids: the chat template writes, and only what it writes can be a control token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError

from cllava_fast.model.instructions import message
from cllava_fast.model.text import PlainText, Token, overlapping

FOLDER = Path(__file__).resolve().parent / "conversations"
# what errors advise
SET_TEMPLATE = (
    "set processor.chat_template to the format that the model was trained with; for a LLaVA-1.5 that is "
    'cllava_fast.data.chat_template("vicuna_v1"), or model.conversation=vicuna_v1 of a run'
)


def conversations() -> list[str]:
    """Names that ``chat_template`` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def chat_template(name: str) -> str:
    """A conversation format as a Jinja chat template, for ``processor.chat_template = chat_template("vicuna_v1")``.

    Set on the processor, training, evaluation and serving all speak it. ``vicuna_v1`` is the text that LLaVA-1.5 was
    trained on; see ``docs/data.md`` for how a processor's own template may differ.
    """
    if name not in conversations():
        raise ValueError(f"conversation is {name!r}; expected one of {', '.join(conversations())}")
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def name_of(template: Any) -> str | None:
    """The name by which ``chat_template`` knows it; None for another one."""
    return next((name for name in conversations() if chat_template(name) == template), None)


@dataclass(frozen=True)
class Turns:
    """What is said: ``users`` has as many texts as ``answers``, whose last one is being asked for."""

    users: tuple[str, ...]
    answers: tuple[str, ...]
    system: str = ""
    image: bool = False

    def texts(self) -> list[str]:
        """In the order in which a template writes them."""
        pairs = [text for pair in zip(self.users, self.answers, strict=True) for text in pair]
        return [self.system, *pairs] if self.system else pairs


class Encoded(NamedTuple):
    prompt: list[Token]
    answer: list[int]  # without an end-of-sequence token
    earlier: list[tuple[int, int]]  # ranges of the prompt's tokens: earlier answers, with the end the template gives


class Conversation:
    """Encodes turns by the processor's chat template.

    What a user or a data set wrote stays text: ``<image>``, ``</s>`` and other control tokens in it are spelled out.

    Args:
        processor: with ``apply_chat_template``, a chat template and a fast tokenizer.

    Raises:
        ValueError: a processor without a chat template, a tokenizer that cannot tell where in the text a token stands.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)  # of a model without images, it is one
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(f"the processor has no chat template; {SET_TEMPLATE}")
        if not self.tokenizer.is_fast:
            raise ValueError(f"{type(self.tokenizer).__name__} is a slow tokenizer; load the processor's fast one")
        self._plain = PlainText(self.tokenizer, getattr(processor, "image_token", None))
        self._parts: dict[tuple[int, bool, bool, bool], list[str]] = {}

    def encode(self, turns: Turns) -> Encoded:
        """Raises ValueError for a template that hides or repeats what is said."""
        asked, closed = self._literals(turns, answered=False), self._literals(turns, answered=True)
        texts = [text.strip() for text in turns.texts()]
        prompt, spans = _join(asked, texts[:-1])
        # what the template puts between the generation prompt and the answer, one space in most
        gap = closed[-2][len(asked[-1]) :] if closed[-2].startswith(asked[-1]) else ""
        start = len(prompt) + len(gap)
        whole, spans = f"{prompt}{gap}{texts[-1]}", [*spans, (start, start + len(texts[-1]))]
        bos = self.tokenizer.bos_token
        # a template that writes its own beginning-of-sequence token must not get a second one
        begin = not (bos and asked[0].startswith(bos))
        before, after = self._plain.tokens(prompt, spans, begin), self._plain.tokens(whole, spans, begin)
        size = len(before)
        if [token.id for token in after[:size]] == [token.id for token in before]:
            answer = [token.id for token in after[size:]]
        else:  # a token would reach across the border; generation starts behind the prompt's last one
            answer = [token.id for token in self._plain.tokens(whole[len(prompt) :], [(0, len(whole))])]
        first = 1 if turns.system else 0
        return Encoded(before, answer, self._ranges(before, spans[first + 1 : -1 : 2]))

    def _ranges(self, tokens: list[Token], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Tokens of each text, with the end behind it; nothing for a text of which the tokenizer makes no token."""
        inside: dict[int, list[int]] = {}
        for i, token in enumerate(tokens):
            inside.setdefault(overlapping(spans, token.start, token.end), []).append(i)
        ranges = []
        for number in range(len(spans)):
            if number in inside:
                start, end = inside[number][0], inside[number][-1] + 1
                ends = end < len(tokens) and tokens[end].id == self.tokenizer.eos_token_id
                ranges.append((start, end + ends))
        return ranges

    def _literals(self, turns: Turns, answered: bool) -> list[str]:
        """What the template writes before, between and behind the texts; depends on their number alone."""
        key = (len(turns.users), turns.image, bool(turns.system), answered)
        if key not in self._parts:
            self._parts[key] = self._render(turns, answered)
        return self._parts[key]

    def _render(self, turns: Turns, answered: bool) -> list[str]:
        messages: list[dict[str, Any]] = []
        marks: list[str] = []

        def say(role: str, image: bool = False) -> None:
            marks.append(f"qz{len(marks)}zq")
            messages.append(message(self.processor, role, marks[-1], images=int(image)))

        if turns.system:
            say("system")
        for number in range(len(turns.users)):
            say("user", image=turns.image and number == 0)
            say("assistant")
        if not answered:
            messages.pop()
            marks.pop()
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=not answered, tokenize=False)
        except Exception as error:  # whatever a template raises
            roles = ", ".join(str(message["role"]) for message in messages[:4])
            line = f"no Jinja in line {error.lineno}, " if isinstance(error, TemplateSyntaxError) else ""
            raise ValueError(
                f"the chat template does not write {len(messages)} turns ({roles}{', ...' * (len(messages) > 4)}): "
                f"{line}{str(error) or type(error).__name__}; leave out what it does not know, or {SET_TEMPLATE}"
            ) from error
        literals = []
        for mark in marks:
            literal, found, text = text.partition(mark)
            if not found:
                raise ValueError(
                    f"the chat template does not write every turn as it is, once and in order; {SET_TEMPLATE}"
                )
            literals.append(literal)
        return [*literals, text]


def _join(literals: list[str], texts: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """``literals`` around ``texts``, and where in the whole the texts stand."""
    whole, spans = literals[0], []
    for text, literal in zip(texts, literals[1:], strict=True):
        spans.append((len(whole), len(whole) + len(text)))
        whole += text + literal
    return whole, spans
