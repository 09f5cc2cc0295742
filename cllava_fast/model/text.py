"""Token ids of texts in which control tokens are words like any others."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple


class Token(NamedTuple):
    id: int
    start: int  # characters of the text that it stands for; start == end for what the tokenizer adds by itself
    end: int


def overlapping(spans: list[tuple[int, int]], start: int, end: int) -> int:
    """Which of several ranges, in order and apart from each other, shares a character with this one; -1 for none."""
    last = bisect_left(spans, (end,)) - 1
    return last if last >= 0 and start < spans[last][1] else -1


class PlainText:
    """Tells what a template writes from what somebody said: only in the former is ``</s>`` the end of a sequence.

    Args:
        tokenizer: a fast one.
        image_token: of the processor, which may not have told its tokenizer that it is special.

    Attributes:
        control: control tokens by id.
    """

    def __init__(self, tokenizer: Any, image_token: str | None = None) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        self.control = {i: token.content for i, token in added if token.special or token.content == image_token}
        self._unknown = getattr(tokenizer, "unk_token_id", None)
        self._spelled: dict[int, list[int]] = {}

    def tokens(self, text: str, said: list[tuple[int, int]], begin: bool = False) -> list[Token]:
        """Tokens of a text.

        Args:
            said: ranges of characters, in order, in which control tokens are spelled out.
            begin: whether the tokenizer adds its own.
        """
        encoded = self._tokenizer(text, add_special_tokens=begin, return_offsets_mapping=True)
        result: list[Token] = []
        for i, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # an unknown word is one too, unless somebody wrote <unk>
            written = i in self.control and (i != self._unknown or self.control[i] in text[start:end])
            if written and overlapping(said, start, end) >= 0:
                result += [Token(letter, start, end) for letter in self._spell(i)]
            else:
                result.append(Token(i, start, end))
        return result

    def ids(self, text: str) -> list[int]:
        """Ids of what somebody said, without any that the tokenizer adds."""
        return [token.id for token in self.tokens(text, [(0, len(text))])]

    def _spell(self, control: int) -> list[int]:
        if control not in self._spelled:
            text = self.control[control]
            ids = self._split(text)
            if control in ids:  # the vocabulary knows it as a word too
                ids = [i for letter in text for i in self._split(letter)]
            self._spelled[control] = ids
        return self._spelled[control]

    def _split(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
