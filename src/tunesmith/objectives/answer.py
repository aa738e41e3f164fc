"""What the model answers by itself, against what the data answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.objectives.base import Metrics, Objective, mean
from tunesmith.types import Batch, Generation, Scores, Wanted


class Answer(Objective):
    """1 - metric(the model's greedy answer, the data's answer), a mean over sequences; the metric is f1 or exact_match.

    The objective without gradient of Malladi et al. 2023 (arXiv 2305.17333, section 3.3). Each sequence is one question: what
    stands before its first learnt stretch, and its answer is that stretch, without special tokens. Loss weights do not count.
    """

    needs = frozenset({"tokenizer"})
    reads = frozenset({"generated"})
    no_gradient = "objective: answer"
    unit = "wrong per answer (0 to 1)"
    shows = ("f1", "exact_match")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.wanted = Wanted(generate=Generation(config.max_new_tokens))

    def prepare(self, batch: Batch, helpers: Mapping[str, Any]) -> Iterable[Batch]:
        self.tokenizer = helpers["tokenizer"]
        self.wanted = Wanted(generate=Generation(self.config.max_new_tokens, self.tokenizer.end_tokens))
        yield batch

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(sum(len(answer) > 0 for _, answer in batch.questions()))

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        assert scores.generated_NG is not None
        given, right = [], []
        for tokens_G, (_, answer) in zip(scores.generated_NG, batch.questions(), strict=True):
            if len(answer):
                given.append(tokens_G[tokens_G >= 0].tolist())
                right.append(answer.tolist())
        pairs = list(zip(self.tokenizer.texts(given), self.tokenizer.texts(right), strict=True))
        found = {name: torch.tensor([metric(*pair) for pair in pairs]).double() for name, metric in METRICS.items()}
        return (1 - found[self.config.metric]).sum(), {name: mean(values) for name, values in found.items()}


def normalized(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, without punctuation and articles (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(given: str, right: str) -> float:
    """Harmonic mean of precision and recall of the words, each as often as it stands there. Of no words on either side, 1 if
    both have none (SQuAD 2.0)."""
    words, right_words = normalized(given), normalized(right)
    if not words or not right_words:
        return float(words == right_words)
    return 2 * (Counter(words) & Counter(right_words)).total() / (len(words) + len(right_words))


def exact_match(given: str, right: str) -> float:
    """1 if the words are the same in the same order, else 0."""
    return float(normalized(given) == normalized(right))


METRICS: dict[str, Callable[[str, str], float]] = {"f1": f1, "exact_match": exact_match}
