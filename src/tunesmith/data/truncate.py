"""What becomes of samples that are longer than data.max_tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tunesmith.config import DataConfig
from tunesmith.data.encode import Encoded
from tunesmith.data.forms import equal_answers
from tunesmith.data.render import Rendered, Sample
from tunesmith.data.samples import Counts, encoded_of, sequences_of
from tunesmith.data.sources import Report
from tunesmith.errors import DataError
from tunesmith.types import Place


def long_prompts(max_tokens: int) -> str:
    """The note about samples that are dropped for this reason."""
    return f"dropped, since their prompt alone fills data.max_tokens: {max_tokens}"


def shorten(
    rendered: Rendered, encoded: Encoded, config: DataConfig, counts: Counts, report: Report
) -> tuple[Encoded, list[int]]:
    """Samples shortened to max_tokens by the truncation policy, and which of `rendered` each comes from.

    A sample without any target is no sample.
    """
    group = len(rendered[0][1]) if rendered else 1
    files = [marked.files for _, sample in rendered for marked in sample]
    if any(files):
        encoded = replace(encoded, files=tuple(files))
    lengths = np.diff(encoded.offsets)
    targets = np.add.reduceat(np.append(encoded.weights != 0, False), encoded.offsets[:-1]) if len(lengths) else lengths
    usable = (lengths > 0) & (lengths <= config.max_tokens) & (targets > 0)
    fine = [all(group_usable) for group_usable in usable.reshape(-1, group).tolist()]
    if group == 2:  # two answers may be told apart by nothing that is a token
        own = list(sequences_of(encoded))
        fine = [good and not _are_equal(own[2 * n : 2 * n + 2]) for n, good in enumerate(fine)]
    if all(fine):
        return encoded, list(range(len(rendered)))
    sequences = list(sequences_of(encoded))
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    owners: list[int] = []
    for n, (example, sample) in enumerate(rendered):
        own = sequences[n * group : (n + 1) * group]
        try:
            samples = [own] if fine[n] else _shorten(own, sample, config, example.place)
        except DataError as error:
            report(error, None)
            continue
        if not fine[n]:
            if not samples and config.truncation != "drop" and max(map(_prompt_tokens, own)) >= config.max_tokens:
                note = long_prompts(config.max_tokens)
                counts.notes[note] = counts.notes.get(note, 0) + 1
            counts.truncated += bool(samples)
            counts.dropped += not samples
            counts.first_cut = counts.first_cut or str(example.place)
        for part in samples:
            kept += part
            owners.append(n)
    cut = encoded_of(kept)
    if any(files):
        cut = replace(cut, files=tuple(own for n in owners for own in files[n * group : (n + 1) * group]))
    return cut, owners


def _shorten(
    own: list[tuple[np.ndarray, np.ndarray]], sample: Sample, config: DataConfig, place: Place
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """What is left of a sample longer than max_tokens: none, one, or with `split` several. Raises DataError."""
    longest, limit = max(len(tokens) for tokens, _ in own), config.max_tokens
    if _are_equal(own):
        raise equal_answers(place)
    if longest <= limit:
        raise DataError(
            place,
            (),
            "nothing to learn from: its answer makes no token of its own",
            "give an assistant turn or completion that is not empty, or remove the record",
        )
    if config.truncation == "error":
        remedy = "raise it, or set data.truncation to right, left or drop"
        if (prompt := max(map(_prompt_tokens, own))) >= limit:
            what = f"the prompt has {prompt} tokens, data.max_tokens is {limit}: nothing of the answer is left"
            raise DataError(place, (), what, "raise it, or set data.truncation to left or drop")
        raise DataError(place, (), f"{longest} tokens, more than data.max_tokens: {limit}", remedy)
    if config.truncation == "drop" or any(marked.media for marked in sample):  # an image's tokens are never cut
        return []
    if config.truncation == "split" and len(own) == 1 and not sample.num_choices:
        tokens, weights = own[0]
        starts = range(0, len(tokens), limit)
        pieces = [[_slice(tokens, weights, start, start + limit)] for start in starts]
        return [piece for piece in pieces if piece[0][1].any()]
    left = config.truncation == "left" or sample.num_choices  # a question's only target is its last token
    start = longest - limit if left else 0  # the same for both sides of a pair, whose prompts then stay the same
    cut = [_slice(tokens, weights, start, start + limit) for tokens, weights in own]
    if _are_equal(cut):  # they differed beyond the cut
        return []
    return [cut] if all(weights.any() for _, weights in cut) else []


def _are_equal(own: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether both sequences of a pair have the same tokens."""
    return len(own) == 2 and np.array_equal(own[0][0], own[1][0])


def _prompt_tokens(sequence: tuple[np.ndarray, np.ndarray]) -> int:
    """Tokens before the first one that is learnt."""
    targets = np.flatnonzero(sequence[1])
    return int(targets[0]) if len(targets) else 0


def _slice(tokens: np.ndarray, weights: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    weights = weights[start:stop].copy()
    weights[:1] = 0.0
    return tokens[start:stop], weights
