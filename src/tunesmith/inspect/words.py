"""Texts as arrays: code points, their scripts, and MinHash signatures of word 5-grams (Broder 1997), many texts at once.

Shapes: R texts, C code points of all texts, W words, G 5-grams, K = NUM_HASHES.
"""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

NUM_HASHES = 64
"""Signature numbers per text: a similarity is estimated to ± 0.06 (standard error of a share of 64 at 0.7)."""
GRAM = 5
NUM_CODE_POINTS = sys.maxunicode + 1
SEPARATOR, LETTER, ALONE = 0, 1, 2
"""What a code point is to words: between them, part of one, or a word by itself."""
WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Thai, Lao, Burmese, Khmer, kana and Han: written without spaces, so that each character counts as a word."""
MIX_1, MIX_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


def code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Lower-case code points of all texts, uint32 [C], each text followed by a newline; and where texts start, int64 [R]."""
    lower = [text.lower() + "\n" for text in texts]
    codes = np.frombuffer("".join(lower).encode("utf-32-le", "surrogatepass"), np.uint32)
    starts = np.zeros(len(lower), np.int64)
    np.cumsum([len(text) for text in lower[:-1]], out=starts[1:])
    return codes, starts


def scripts(counts: np.ndarray) -> Counter[str]:
    """Letters by script, and digits, from how often each code point occurs: int64 [NUM_CODE_POINTS]."""
    found: Counter[str] = Counter()
    for code in np.flatnonzero(counts).tolist():
        name = _script(chr(code))
        if name:
            found[name] += int(counts[code])
    return found


def _script(character: str) -> str:
    """The first word of a letter's Unicode name, which is its script for nearly all; "" for what is no letter."""
    category = unicodedata.category(character)
    if category == "Nd":
        return "digits"
    if not category.startswith("L"):
        return ""
    words = [word for word in unicodedata.name(character, "OTHER").split() if word not in ("FULLWIDTH", "HALFWIDTH")]
    return "Han" if words[0] in ("CJK", "IDEOGRAPHIC") else words[0].split("-")[0].title()


def signatures(codes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """uint32 [R, K]: the share of equal numbers of two rows estimates how many of their 5-grams the texts share (Jaccard).

    A text of fewer words than five is one gram. One without any word has a row of zeros, which `similar` never matches.
    """
    found = np.zeros((len(starts), NUM_HASHES), np.uint32)
    if not len(starts):
        return found
    words, first_word = _words(codes, starts)
    grams, first_gram = _grams(words, first_word)
    filled = np.flatnonzero(np.diff([*first_gram, len(grams)]))
    if not len(filled):
        return found
    for column, (noise, factor) in enumerate(zip(*_hashes(), strict=True)):
        found[filled, column] = np.minimum.reduceat((grams ^ noise) * factor, first_gram[filled])
    return found


def _words(codes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each word, uint32 [W], and the first word of each text, int64 [R]."""
    kinds = _kinds()[codes]
    before = np.concatenate([[SEPARATOR], kinds[:-1]])
    begins = np.flatnonzero((kinds == ALONE) | ((kinds == LETTER) & (before != LETTER)))
    first_word = np.searchsorted(begins, starts)
    if not len(begins):
        return np.zeros(0, np.uint32), first_word
    # A sum of (random number of the letter × that of its position) tells words apart by their letters and the order of them.
    position = np.arange(len(codes), dtype=np.int32)
    begun = np.zeros(len(codes), np.int32)
    begun[begins] = begins
    position -= np.maximum.accumulate(begun)
    letters = _letters()[codes] * _positions()[np.minimum(position, len(_positions()) - 1)]
    return _mix(np.add.reduceat(letters, begins)), first_word


def _grams(words: np.ndarray, first_word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each run of five words inside a text, uint32 [G], and the first of each text, int64 [R]."""
    ends = np.concatenate([first_word[1:], [len(words)]])
    end_of = np.repeat(ends, ends - first_word)
    at = np.arange(len(words))
    grams = np.zeros(len(words), np.uint32)
    for n in range(GRAM):
        inside = at + n < end_of
        grams[inside] += _mix(words[at[inside] + n] + np.uint32(n))
    whole = at + GRAM <= end_of
    whole[first_word[first_word < ends]] = True  # a short text's only one
    kept = np.concatenate([[0], np.cumsum(whole)])
    return _mix(grams[whole]), kept[first_word]


def _mix(values: np.ndarray) -> np.ndarray:
    """MurmurHash3's finalizer (Appleby 2011), uint32."""
    values = (values ^ (values >> np.uint32(16))) * MIX_1
    values = (values ^ (values >> np.uint32(13))) * MIX_2
    return values ^ (values >> np.uint32(16))


@lru_cache(maxsize=1)
def _kinds() -> np.ndarray:
    """uint8 [NUM_CODE_POINTS]."""
    kinds = np.fromiter((chr(code).isalnum() for code in range(NUM_CODE_POINTS)), np.uint8, NUM_CODE_POINTS)
    for start, stop in WITHOUT_SPACES:
        kinds[start : stop + 1] *= ALONE
    return kinds


@lru_cache(maxsize=1)
def _letters() -> np.ndarray:
    """A random number for each code point, 0 for separators: uint32 [NUM_CODE_POINTS]."""
    return _random(0, NUM_CODE_POINTS) * (_kinds() != SEPARATOR)


@lru_cache(maxsize=1)
def _positions() -> np.ndarray:
    """A random odd number for each position in a word, the last one for all that follow."""
    return _random(1, 64) | np.uint32(1)


@lru_cache(maxsize=1)
def _hashes() -> tuple[np.ndarray, np.ndarray]:
    """What makes the K hash functions of one: x → (x ^ first) × second, the second odd. uint32 [K] each."""
    return _random(2, NUM_HASHES), _random(3, NUM_HASHES) | np.uint32(1)


def _random(seed: int, number: int) -> np.ndarray:
    """Always the same numbers, so that the same data always gives the same counts."""
    return np.random.default_rng(seed).integers(0, 2**32, number, np.uint32)
