"""Reads the instruction back from ``input_ids``: the last user turn, without image tokens and template."""

from __future__ import annotations

import copy
import os
import re
import threading
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from cllava_fast.model.answers import IGNORE
from cllava_fast.model.text import PlainText
from cllava_fast.names import brief
from cllava_fast.texts import RecentTexts

# before a control token in a decoded text, so that no text can pass for one; Unicode has promised not to use it
MARK = "\ufdd0"
# LLaVA-1.5's own, for processors without a chat template
DEFAULT_MARKERS = ("USER:", "ASSISTANT:")
_reading = threading.RLock()  # a call changes its tokenizer's settings


class InstructionReader:
    """Finds instructions by the role markers of the processor's chat template.

    Texts are canonical: what the tokenizer makes of them, with white space folded, so that an instruction read back
    from ids and the same instruction given as text are one and the same query. Control tokens in a text are text.
    Role markers that are plain words, such as ``USER:``, cannot be told from the same words of a user: in ids and in
    texts alike, what stands behind the last one counts.

    Several threads may read at once, while others use the processor: the reader has a copy of its tokenizer.

    Args:
        processor: of a model with images, or the tokenizer of one without.
        left_out: ids of tokens that stand for images and the like.
    """

    def __init__(self, processor: Any, *left_out: int) -> None:
        self._tokenizer = copy.deepcopy(getattr(processor, "tokenizer", processor))
        self._left_out = frozenset(left_out)
        self._canonical: RecentTexts[str] = RecentTexts()
        self._image = getattr(processor, "image_token", None) or "<image>"
        self._plain = PlainText(self._tokenizer, self._image)
        self._marks = set(self._plain.control) - {getattr(self._tokenizer, "unk_token_id", None)}
        spelled = self.tokenize(self._image)
        # as it is read back where a user wrote it; unknown words alone might be any word
        can_spell = set(spelled) != {getattr(self._tokenizer, "unk_token_id", None)}
        self._image_read = self._decode(spelled).replace(MARK, "") if can_spell else self._image
        markers = template_markers(processor) or DEFAULT_MARKERS
        self.user, self.end = (self._decode(self._written(marker)) for marker in markers)
        behind = behind_system(processor, markers[0])
        self._behind_system = behind and self._decode(self._written(behind))

    @property
    def mixes_system(self) -> bool:
        """Whether a system prompt is read as a part of the instruction: in one turn, with nothing but space between."""
        return self._behind_system == ""

    def _written(self, text: str) -> list[int]:
        """Ids of what a template wrote."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize(self, text: str) -> list[int]:
        """Ids of what a user wrote; a slow tokenizer does not tell it from what a template does."""
        with _reading:
            return self._plain.ids(text) if getattr(self._tokenizer, "is_fast", False) else self._written(text)

    def _decode(self, ids: list[int]) -> str:
        """The text of ids, white space folded, control tokens behind a ``MARK``."""
        parts = []
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        for control, run in groupby(ids, lambda i: i in self._marks):
            if control:
                parts += [MARK + self._plain.control[i] for i in run]
            else:
                with _reading:
                    text = self._tokenizer.decode(list(run), **options)
                parts.append(text.replace(MARK, "\ufffd"))
        return " ".join(" ".join(parts).split())

    def canonical(self, text: str) -> str:
        """``text`` as it would be read back from ids, without a mark of the image at its beginning or end.

        Raises ValueError for a blank text, or one that ends with a role marker.
        """
        with _reading:
            known = self._canonical.get(text)
            return self._canonical.keep(text, self._read_text(text)) if known is None else known

    def _read_text(self, text: str) -> str:
        words = self._decode(self.tokenize(_without(text, self._image)))
        turn = self._turn(f"{self.user} {words} {self.end}")
        if not turn:
            raise ValueError(
                f"the instruction {brief(text)} is blank, or nothing stands behind its last {_shown(self.user)}; "
                "expected a text, 'describe the image', say"
            )
        return turn

    def _turn(self, text: str) -> str:
        """The last user turn of a decoded conversation; empty without one."""
        _, found, turn = text.rpartition(self.user)
        if not found:
            return ""
        turn = turn.partition(self.end)[0]
        if self._behind_system:
            turn = turn.rpartition(self._behind_system)[2]
        return _without(turn.replace(MARK, ""), self._image, self._image_read)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """Instructions of ``input_ids [B, S]``; padding is where ``attention_mask [B, S]`` is 0.

        Raises:
            ValueError: a sample without a user turn, or with an empty one.
        """
        return [self._read_one(text, sample) for sample, text in enumerate(self._texts(input_ids, attention_mask))]

    def half_turn(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> str | None:
        """A last user turn of ``input_ids [B, S]`` whose end has not come; None where all are closed."""
        turns = [text.rpartition(self.user)[2] for text in self._texts(input_ids, attention_mask)]
        return next((_shown(turn).strip() for turn in turns if self.end not in turn), None)

    def _texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[str]:
        rows = list(input_ids.cpu())
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            rows = [ids[mask] for ids, mask in zip(rows, attention_mask.bool().cpu(), strict=True)]
        return [self._decode([i for i in ids.tolist() if i not in self._left_out]) for ids in rows]

    def has_turn(self, input_ids: Tensor) -> bool:
        """Whether any sample of ``input_ids [B, S]`` holds the start of a user turn."""
        return any(self.user in self._decode(ids) for ids in input_ids.tolist())

    def _read_one(self, text: str, sample: int) -> str:
        if self.user not in text:
            raise ValueError(
                f"no instruction found in input_ids of sample {sample}: there is no user turn "
                f"({_shown(self.user)!r}) in {_shown(text[:80])!r}; build the prompt with the processor's "
                "chat template, or pass instructions=[...]"
            )
        turn = self._turn(text)
        if not turn:
            raise ValueError(
                f"the last user turn of sample {sample} is empty in input_ids; ask in words, or pass "
                "instructions=[...] with a text for each sample ('describe the image', say)"
            )
        return turn


def _without(text: str, *marks: str) -> str:
    """``text`` without marks at its beginning and end."""
    text, before = text.strip(), ""
    while text != before:
        before = text
        for mark in marks:
            text = text.removeprefix(mark).removesuffix(mark).strip()
    return text


def _shown(text: str) -> str:
    return text.replace(MARK, "")


def message(processor: Any, role: str, text: str, images: int = 0) -> dict[str, Any]:
    """One turn as the chat template of ``processor`` takes it; a tokenizer's knows text alone."""
    if not hasattr(processor, "tokenizer"):
        return {"role": role, "content": text}
    return {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def template_markers(processor: Any) -> tuple[str, str] | None:
    """What stands before a user's words and what ends them in the chat template, or None without a template."""
    if not _has_template(processor):
        return None
    first, answer, second = "qzfirstzq", "qzanswerzq", "qzsecondzq"
    turns = [message(processor, *turn) for turn in (("user", first), ("assistant", answer), ("user", second))]
    text, closed = (_rendered(processor, turns, asking) for asking in (True, False))
    if not all(word in text for word in (first, answer, second)):
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    behind_answer = _rendered(processor, turns[:2], False).partition(answer)[2]
    before_first, asked = text.partition(answer)[0].split(first)
    before_second, asking = text.partition(answer)[2].removeprefix(behind_answer).split(second)
    # a system prompt stands before the first turn only
    user = _common([_parts(tokenizer, before)[::-1] for before in (before_first, before_second)])[::-1]
    marker = "".join(user).strip()
    for special in (tokenizer.eos_token, tokenizer.bos_token):
        if special:
            marker = marker.removeprefix(special).strip()
    behind, asked, asking = closed.split(second)[1].strip(), asked.strip(), asking.strip()
    # where nothing closes a turn, the answer's beginning ends it; what a model is made to think comes behind
    end = _common([_parts(tokenizer, text) for text in (asked, behind or asking)]) or [behind or asking]
    if end[0] in tokenizer.get_added_vocab():
        end = end[:1]  # what follows it may depend on what is asked
    closing = "".join(end).strip()
    return (marker, closing) if marker and closing else None


def _parts(tokenizer: Any, text: str) -> list[str]:
    """Added tokens, whole, and letters."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, added))})", text) if added else [text]
    return [part for i, run in enumerate(parts) for part in ([run] if i % 2 else run)]


def _common(lists: list[list[str]]) -> list[str]:
    """How both begin."""
    return os.path.commonprefix(lists)  # type: ignore[return-value]


def behind_system(processor: Any, user: str) -> str | None:
    """What stands between a system prompt and a user's words where both are in one turn; None where they are not.

    ``user``: what a user's turn begins with.
    """
    system, words = "qzsystemzq", "qzwordszq"
    if not _has_template(processor):
        return None
    try:
        text = _rendered(processor, [message(processor, "system", system), message(processor, "user", words)], True)
    except Exception:  # however a template refuses system prompts
        return None
    between = text.partition(system)[2].partition(words)[0]
    return None if system not in text or user in between else between.strip()


def _has_template(processor: Any) -> bool:
    return getattr(processor, "chat_template", None) is not None and hasattr(processor, "apply_chat_template")


def _rendered(processor: Any, turns: list[dict[str, Any]], asking: bool) -> str:
    text: str = processor.apply_chat_template(turns, add_generation_prompt=asking, tokenize=False)
    return text


def text_ids(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, special: set[int]
) -> list[Tensor]:
    """Ids of each sample's text without special and padded tokens: all that can be had without a tokenizer.

    Positions with a label are answers and left out, except in a sample that has labels everywhere.
    """
    keep = torch.ones_like(input_ids, dtype=torch.bool)
    for token in special:
        keep &= input_ids != token
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        keep &= attention_mask.bool()
    if labels is not None and labels.shape == input_ids.shape:
        asked = keep & (labels == IGNORE)
        keep = torch.where(asked.any(1, keepdim=True), asked, keep)
    return [ids[mask] for ids, mask in zip(input_ids, keep, strict=True)]
