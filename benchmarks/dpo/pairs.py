"""Preference pairs with the lengths of hh-rlhf's harmless-base: a dialogue of several turns, two answers to its last one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "a",
    "in",
    "that",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "by",
    "I",
    "this",
    "had",
    "not",
    "are",
    "but",
    "from",
    "or",
    "have",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "no",
    "more",
    "if",
    "out",
    "so",
    "up",
    "said",
    "what",
    "its",
    "about",
    "than",
    "into",
    "them",
    "can",
    "only",
    "other",
    "time",
    "new",
    "some",
    "could",
    "these",
    "two",
    "may",
    "first",
    "then",
    "do",
    "any",
    "like",
    "my",
    "now",
    "over",
    "such",
    "our",
    "man",
    "me",
    "even",
    "most",
    "made",
    "after",
    "also",
    "did",
    "many",
    "off",
    "before",
    "must",
    "well",
    "back",
    "through",
    "years",
    "much",
    "where",
    "your",
    "way",
    "down",
    "should",
    "because",
    "long",
    "each",
    "just",
]


def write_pairs(file: Path, number: int) -> None:
    """`number` records {"prompt", "chosen", "rejected"} in messages, the same ones each time.

    Turns: 1 to 4 questions; words in a question log-normal around 13, in an answer around 40 (quartiles 20 and 80), as
    measured on hh-rlhf's harmless-base test split.
    """
    random = np.random.default_rng(0)

    def words(median: float, spread: float) -> str:
        return " ".join(random.choice(WORDS, max(3, int(random.lognormal(np.log(median), spread)))))

    with file.open("w", encoding="utf-8") as stream:
        for _ in range(number):
            turns = [
                {"role": role, "content": words(*size)}
                for _ in range(random.integers(1, 5))
                for role, size in (("user", (13, 0.7)), ("assistant", (35, 0.8)))
            ][:-1]
            answers = {side: [{"role": "assistant", "content": words(40, 1.0)}] for side in ("chosen", "rejected")}
            stream.write(json.dumps({"prompt": turns, **answers}) + "\n")
