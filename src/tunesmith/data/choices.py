"""A question with several answers, to one sequence that ends where the answers part: there one token tells which it is.

K: answers of a question.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.encode import Encoded
from tunesmith.data.render import Marked, Rendered, Sample
from tunesmith.data.samples import encoded_of, sequences_of
from tunesmith.data.sources import Report
from tunesmith.errors import DataError
from tunesmith.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Divide = Callable[[Sample], Sample]


def divider(tokenizer: PreTrainedTokenizerBase) -> Divide:
    """What makes of a question's K texts their common beginning and K endings, so that a long text is encoded once.

    It cuts before a special token, where every tokenizer starts anew; without one there the K texts stay whole.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    longest_first = sorted(added, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first))) if added else None

    def divide(sample: Sample) -> Sample:
        texts = [marked.text for marked in sample]
        first = sample.sequences[0]
        common = len(os.path.commonprefix(texts))  # noqa: RUF071 - characters are meant, not folders
        if pattern is None or first.plain or any(marked.literals for marked in sample):
            return sample
        cut = 0
        for match in pattern.finditer(texts[0], 0, common):
            token = added[match.group()]
            if token.special and not (token.lstrip or token.normalized or token.single_word):
                cut = match.start()
        if not cut:
            return sample
        head = replace(first, text=texts[0][:cut], spans=())
        return replace(sample, sequences=(head, *(Marked(text[cut:]) for text in texts)))

    return divide


def choose(questions: Rendered, encoded: Encoded, report: Report) -> tuple[Rendered, Encoded, list[np.ndarray]]:
    """Of each question one sequence up to the target, its only one; and int32 [K] the answers' tokens there.

    Questions whose answers cannot be told apart by one token are reported and left out.
    """
    sequences = [tokens for tokens, _ in sequences_of(encoded)]
    chosen: Rendered = []
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    words: list[np.ndarray] = []
    start = 0
    for example, sample in questions:
        own = sequences[start : start + len(sample)]
        start += len(sample)
        head = own[0] if len(own) > sample.num_choices else own[0][:0]
        answers = own[-sample.num_choices :]
        try:
            at = _parting(answers, example, bool(len(head)))
        except DataError as error:
            report(error, None)
            continue
        tokens = np.concatenate([head, answers[int(sample.label)][: at + 1]])
        weights = np.zeros(len(tokens), np.float32)
        weights[-1] = 1.0
        chosen.append((example, replace(sample, sequences=sample.sequences[:1])))
        kept.append((tokens, weights))
        words.append(np.array([answer[at] for answer in answers], np.int32))
    return chosen, encoded_of(kept), words


def _parting(answers: Sequence[np.ndarray], example: Example, has_head: bool) -> int:
    """The first position at which the K encodings differ; all of them must."""
    shortest = min(map(len, answers))
    differs = np.any([answer[:shortest] != answers[0][:shortest] for answer in answers], axis=0)
    at = int(differs.argmax()) if differs.any() else shortest
    remedy = "choose words that differ at their beginning, in data.labels or choices"
    alike: dict[int, list[str]] = {}
    for word, answer in zip(example.choices, answers, strict=True):
        alike.setdefault(int(answer[at]) if at < len(answer) else -1, []).append(word)
    if -1 in alike:
        what = f"the class {alike[-1][0]} is the beginning of another one"
        raise DataError(example.place, (), what, remedy)
    for same in alike.values():
        if len(same) > 1:
            what = f"the classes {', '.join(same)} begin with the same token"
            raise DataError(example.place, (), what, remedy)
    if not at and not has_head:
        raise DataError(example.place, (), "nothing stands before its answer", "give the text to classify")
    return at
