"""Marked text to tokens and loss weights, many at once.

Byte-level BPE tokenizers, which most models have, go through fastokens, several times faster than `tokenizers`. It knows
no offsets; but there a token's bytes are the text's bytes, so that their lengths tell where each token stands. Where the
lengths do not add up to the text (a normalizer changed it), and for all other tokenizers, `tokenizers` does the work.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import normalizers

from tunesmith.data.render import Marked
from tunesmith.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.media import MediaFile

CHECKED_TEXTS = 256
"""So many texts of the first batch, and one of every later batch, are encoded in both ways and compared."""


class FastDisagrees(Exception):
    """fastokens gave other tokens than `tokenizers`."""


@dataclass(frozen=True)
class Encoded:
    """Sequences end to end. Sequence i is `tokens[offsets[i]:offsets[i+1]]`."""

    tokens: np.ndarray
    """int32 [total tokens]."""
    weights: np.ndarray
    """float32 [total tokens]: loss weight of predicting each token; 0 on each sequence's first."""
    offsets: np.ndarray
    """int64 [sequences + 1]."""
    files: tuple[tuple[MediaFile, ...], ...] = ()
    """The media of each sequence; empty where none has any."""


class Encoder:
    """The tokenizer, for batches of marked text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, fast: bool = True) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: needs a fast tokenizer (tokenizer.json) to place the loss")
        self.tokenizer = tokenizer
        self.backend: Any = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self._fast_wanted, self._first = fast, True

    def encode(self, batch: Sequence[Marked]) -> Encoded:
        """Tokens and weights of each text, in order. Raises FastDisagrees."""
        if self._fast is not None:
            encoded, wrong = self._by_lengths(batch)
            self._compare(batch, encoded)
        else:
            encoded, wrong = None, list(range(len(batch)))
        slowly = dict(zip(wrong, self._by_offsets([batch[n] for n in wrong]), strict=True))
        for n, marked in enumerate(batch):
            if marked.literals:
                slowly[n] = self._with_literals(marked)
            elif marked.plain:
                ids, weights = slowly[n] if n in slowly else _part(encoded, n)
                slowly[n] = self._with_ends(marked, ids, weights)
        return _first_weightless(_merge(encoded, slowly, len(batch)))

    @property
    def is_fast(self) -> bool:
        return self._fast is not None

    @cached_property
    def _fast(self) -> Any:
        """fastokens' tokenizer, where it is installed and the vocabulary is byte-level; else None."""
        if not self._fast_wanted or not find_spec("fastokens") or "ByteLevel" not in str(self.backend.decoder):
            return None
        import fastokens

        try:
            return fastokens.Tokenizer.from_json_str(self.backend.to_str())
        except ValueError:  # it knows fewer kinds of tokenizer
            return None

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        """int64 [vocabulary]: bytes of text that each token stands for."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for text, token in vocabulary.items():
            lengths[token] = len(text)  # in the byte-level alphabet a character is a byte
        for token, added in self.backend.get_added_tokens_decoder().items():
            lengths[token] = len(added.content.encode())
        return lengths

    @cached_property
    def _changes_ascii(self) -> bool:
        """Whether the tokenizer has a normalizer of another kind than Unicode's, which leave ASCII alone."""
        return not isinstance(self.backend.normalizer, normalizers.NFC | normalizers.NFKC | None)

    def _is_normalized_away(self, text: str) -> bool:
        """Whether the normalizer changes a text, so that its bytes are not those of its tokens."""
        if self.backend.normalizer is None or (text.isascii() and not self._changes_ascii):
            return False
        return bool(self.backend.normalizer.normalize_str(text) != text)

    def _by_lengths(self, batch: Sequence[Marked]) -> tuple[Encoded, list[int]]:
        """By fastokens; and which texts are not of as many bytes as their tokens."""
        texts = [marked.text for marked in batch]
        flat, starts = self._fast.encode_batch_flat(texts)
        tokens = np.frombuffer(flat, np.uint32).astype(np.int32)
        offsets = np.frombuffer(starts, np.uint64).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(self._token_bytes[tokens])])
        text_bytes = np.fromiter((len(text.encode()) for text in texts), np.int64, len(texts))
        changed = np.fromiter(map(self._is_normalized_away, texts), bool, len(texts))
        wrong = np.flatnonzero((np.diff(ends[offsets]) != text_bytes) | changed).tolist()
        lengths = np.diff(offsets)
        weights = np.repeat(np.array([marked.base for marked in batch], np.float32), lengths)
        for n, marked in enumerate(batch):
            for start, stop, weight in marked.spans:
                text, begin = marked.text, int(ends[offsets[n]])
                if not text.isascii():
                    start, stop = len(text[:start].encode()), len(text[:stop].encode())
                own = slice(offsets[n], offsets[n + 1] + 1)
                first = int(np.searchsorted(ends[own], begin + start, "left"))
                after = int(np.searchsorted(ends[own], begin + stop, "right")) - 1
                weights[offsets[n] + first : offsets[n] + after] = weight
            for character, weight in marked.marks:
                last_byte = int(ends[offsets[n]]) + len(marked.text[: character + 1].encode()) - 1
                own = slice(offsets[n], offsets[n + 1])
                weights[own][int(np.searchsorted(ends[own], last_byte, "right")) - 1] = weight
        return Encoded(tokens, weights, offsets), wrong

    def _compare(self, batch: Sequence[Marked], encoded: Encoded) -> None:
        """Raises FastDisagrees where `tokenizers` gives other tokens."""
        checked = range(min(len(batch), CHECKED_TEXTS if self._first else 1))
        self._first = False
        expected = self.backend.encode_batch([batch[n].text for n in checked], add_special_tokens=False)
        if any(_part(encoded, n)[0].tolist() != expected[n].ids for n in checked):
            raise FastDisagrees

    def _by_offsets(self, batch: Sequence[Marked]) -> list[tuple[np.ndarray, np.ndarray]]:
        if not batch:
            return []
        encodings = self.backend.encode_batch([marked.text for marked in batch], add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int32), _weights(marked, np.array(encoding.offsets).reshape(-1, 2)))
            for encoding, marked in zip(encodings, batch, strict=True)
        ]

    @cached_property
    def _begin_and_end(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer puts before and behind plain text."""
        bare, whole = (self.backend.encode("a", add_special_tokens=wanted).ids for wanted in (False, True))
        at = next(n for n in range(len(whole) + 1) if whole[n : n + len(bare)] == bare)
        end, eos = whole[at + len(bare) :], self.tokenizer.eos_token_id
        return whole[:at], end if eos is None or end[-1:] == [eos] else [*end, eos]

    def _with_ends(self, marked: Marked, ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Plain text between the tokenizer's beginning and its end."""
        begin, end = self._begin_and_end
        if begin and ids[: len(begin)].tolist() == begin:
            begin = []
        if end and ids[-1:].tolist() == end[-1:]:
            weights[-1], end = marked.end or weights[-1], []
        begin_weights, end_weights = np.full(len(begin), marked.base), np.full(len(end), marked.base)
        end_weights[-1:] = marked.end
        return (
            np.concatenate([begin, ids, end]).astype(np.int32),
            np.concatenate([begin_weights, weights, end_weights]).astype(np.float32),
        )

    @cached_property
    def _special_as_text(self) -> tuple[Any, Any]:
        """Tokenizers for which special tokens are ordinary text: for the beginning of a text, and for its middle."""
        from tokenizers import Tokenizer

        source = self.backend.to_str()
        middle = re.sub(r'("prepend_scheme":\s*)"first"', r'\1"never"', source)
        pair = Tokenizer.from_str(source), Tokenizer.from_str(middle)
        for tokenizer in pair:
            tokenizer.encode_special_tokens = True
        return pair

    @cached_property
    def _special(self) -> dict[str, Any]:
        return {added.content: added for added in self.backend.get_added_tokens_decoder().values() if added.special}

    def _with_literals(self, marked: Marked) -> tuple[np.ndarray, np.ndarray]:
        """Special tokens are cut out of the text, but for those that are the data's own words; the rest is encoded as text."""
        longest_first = sorted(self._special, key=len, reverse=True)
        found = re.finditer("|".join(map(re.escape, longest_first)), marked.text)
        tokens = [match for match in found if not any(a <= match.start() < b for a, b in marked.literals)]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position, strip_next = 0, False
        for match in [*tokens, None]:
            stretch = marked.text[position : match.start() if match else len(marked.text)]
            begin = position + (len(stretch) - len(stretch.lstrip()) if strip_next else 0)
            stretch = stretch.lstrip() if strip_next else stretch
            if match and self._special[match.group()].lstrip:
                stretch = stretch.rstrip()
            encoding = self._special_as_text[position > 0].encode(stretch, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(begin + start, begin + stop) for start, stop in encoding.offsets]
            if match:
                ids.append(self.backend.token_to_id(match.group()))
                offsets.append(match.span())
                position, strip_next = match.end(), self._special[match.group()].rstrip
        weights = _weights(marked, np.array(offsets).reshape(-1, 2))
        array = np.array(ids, np.int32)
        return self._with_ends(marked, array, weights) if marked.plain else (array, weights)


def _weights(marked: Marked, offsets: np.ndarray) -> np.ndarray:
    """float32 [tokens] from the characters [tokens, 2] of each token: a token is in a span if it begins and ends there.

    A mark is for the token that holds its character, of several the last.
    """
    weights = np.full(len(offsets), marked.base, np.float32)
    for start, stop, weight in marked.spans:
        inside = (offsets[:, 0] >= start) & (offsets[:, 1] > start) & (offsets[:, 1] <= stop)
        weights[inside] = weight
    for character, weight in marked.marks:
        holding = np.flatnonzero((offsets[:, 0] <= character) & (offsets[:, 1] > character))
        weights[holding[-1:]] = weight
    return weights


def _part(encoded: Encoded | None, n: int) -> tuple[np.ndarray, np.ndarray]:
    assert encoded is not None, "what is not replaced has been encoded"
    own = slice(encoded.offsets[n], encoded.offsets[n + 1])
    return encoded.tokens[own], encoded.weights[own]


def _merge(encoded: Encoded | None, replaced: dict[int, tuple[np.ndarray, np.ndarray]], count: int) -> Encoded:
    """`encoded` with some sequences replaced."""
    if encoded is not None and not replaced:
        return encoded
    parts = [replaced[n] if n in replaced else _part(encoded, n) for n in range(count)]
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum([len(tokens) for tokens, _ in parts], out=offsets[1:])
    return Encoded(
        np.concatenate([tokens for tokens, _ in parts] or [np.zeros(0, np.int32)]),
        np.concatenate([weights for _, weights in parts] or [np.zeros(0, np.float32)]),
        offsets,
    )


def _first_weightless(encoded: Encoded) -> Encoded:
    """Nothing stands before a first token to predict it from."""
    starts = encoded.offsets[:-1][np.diff(encoded.offsets) > 0]
    weights = encoded.weights.copy()
    weights[starts] = 0.0
    return replace(encoded, weights=weights)
