"""Where two tokenizers begin a token at the same character of the same text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

INSIDE = -1
"""In place of a token's first character: the token begins inside a character, or nobody knows where."""


@dataclass(frozen=True)
class Alignment:
    """From one tokenizer's tokens to another's."""

    ours: Any
    theirs: Any

    def __call__(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """(their tokens of the same text, for each of our tokens which of theirs begins where it does, or -1).

        Theirs begin with what their tokenizer puts before a text, such as a token for its beginning.
        """
        text = self.ours.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        begins_with_token = bool(self.theirs.bos_token) and text.startswith(self.theirs.bos_token)
        their_tokens, offsets = _encode(self.theirs, text, add_special_tokens=not begins_with_token)
        at = {begin: n for n, begin in reversed([*enumerate(_begins(offsets))]) if begin != INSIDE}
        return their_tokens, [at.get(begin, -1) for begin in self._our_begins(tokens, text)]

    def _our_begins(self, tokens: list[int], text: str) -> list[int]:
        again, offsets = _encode(self.ours, text, add_special_tokens=False)
        if again == tokens:
            return _begins(offsets)
        # not what the tokenizer makes of this text, such as a special token spelt out: the beginnings are decoded one by one
        pieces = (
            self.ours.decode(tokens[:n], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for n in range(len(tokens))
        )
        return [len(piece) if text.startswith(piece) else INSIDE for piece in pieces]


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens, and the characters of each."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _begins(offsets: list[tuple[int, int]]) -> list[int]:
    """The character at which each token begins: where the one before it ends, since some tokenizers leave a leading space out
    of their offsets. INSIDE for a token of part of a character that is not its first, and for one of no characters."""
    found, end = [], 0
    for start, stop in offsets:
        found.append(end if end <= start < stop else INSIDE)
        end = max(end, stop)
    return found
