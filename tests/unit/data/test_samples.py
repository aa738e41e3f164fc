import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.config import DataConfig
from tunesmith.data.samples import Counts, Samples, load_samples
from tunesmith.data.template import Rendered
from tunesmith.errors import UserError
from tunesmith.types import Example, Place


class NumberRenderer:
    """Records are numbers written out: prompt "1 2", completion "3 4" → tokens 1 2 3 4, the last two learnt."""

    def render(self, example: Example) -> Rendered:
        pairs = [(int(word), float(piece.learn)) for piece in example.pieces for word in piece.text.split()]
        return Rendered([token for token, _ in pairs], [weight for _, weight in pairs])


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


Records = list[tuple[str, str]]


def write(name: str, records: Records) -> None:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in records]
    Path(name).write_text("\n".join(lines) + "\n")


def load(records: Records, **settings: Any) -> tuple[Samples, Samples]:
    write("data.jsonl", records)
    config = DataConfig(**{"path": "data.jsonl", "eval_fraction": 0.0, "truncation": "right", **settings})
    return load_samples(config, NumberRenderer())  # type: ignore[arg-type]


def unpacked(samples: Samples) -> list[tuple[list[int], list[float], int]]:
    """(tokens, weights, line) of each sample."""
    parts = [slice(samples.offsets[i], samples.offsets[i + 1]) for i in range(len(samples))]
    return [
        (samples.tokens[part].tolist(), samples.weights[part].tolist(), place.line)
        for part, place in zip(parts, samples.places, strict=True)
    ]


SHORT = ("1 2", "3 4")
LONG = ("10 11 12", "13 14 15 16 17 18")
"""Nine tokens, the last six learnt."""
LATE = ("20 21 22 23 24 25", "26")
"""Seven tokens, the last one learnt."""

SHORT_READ = ([1, 2, 3, 4], [0, 0, 1, 1], 1)


@pytest.mark.parametrize(
    ("truncation", "read", "counts"),
    [
        ("drop", [SHORT_READ], Counts(3, truncated=0, dropped=2, first_cut=Place("data.jsonl", 2))),
        (
            "right",
            [SHORT_READ, ([10, 11, 12, 13], [0, 0, 0, 1], 2)],
            Counts(3, truncated=1, dropped=1, first_cut=Place("data.jsonl", 2)),
        ),
        (
            "left",
            [SHORT_READ, ([15, 16, 17, 18], [0, 1, 1, 1], 2), ([23, 24, 25, 26], [0, 0, 0, 1], 3)],
            Counts(3, truncated=2, dropped=0, first_cut=Place("data.jsonl", 2)),
        ),
        (
            # of LONG the last part has one token, and nothing stands before it; of LATE the first has no target
            "split",
            [
                SHORT_READ,
                ([10, 11, 12, 13], [0, 0, 0, 1], 2),
                ([14, 15, 16, 17], [0, 1, 1, 1], 2),
                ([24, 25, 26], [0, 0, 1], 3),
            ],
            Counts(3, truncated=2, dropped=0, first_cut=Place("data.jsonl", 2)),
        ),
    ],
)  # fmt: skip
def test_truncation(truncation: str, read: list, counts: Counts) -> None:
    samples, held_out = load([SHORT, LONG, LATE], truncation=truncation, max_tokens=4)
    assert unpacked(samples) == read
    assert samples.counts == counts
    assert len(held_out) == 0


def test_truncation_error_names_the_record() -> None:
    with pytest.raises(UserError) as caught:
        load([SHORT, LONG], truncation="error", max_tokens=4)
    assert str(caught.value) == (
        "data.jsonl:2: 9 tokens, more than data.max_tokens: 4; raise it, or set data.truncation to right, left, split or drop"
    )


@pytest.mark.parametrize("truncation", ["error", "drop", "right", "left", "split"])
def test_what_fits_is_not_touched(truncation: str) -> None:
    samples, _ = load([SHORT, LONG], truncation=truncation, max_tokens=9)
    assert unpacked(samples) == [SHORT_READ, ([*range(10, 19)], [0, 0, 0, 1, 1, 1, 1, 1, 1], 2)]
    assert samples.counts == Counts(2, truncated=0, dropped=0, first_cut=None)


def test_the_first_cut_is_the_first_record_that_lost_anything() -> None:
    samples, _ = load([LATE, LONG], truncation="right", max_tokens=4)
    assert samples.counts == Counts(2, truncated=1, dropped=1, first_cut=Place("data.jsonl", 1))


def test_all_dropped_is_an_error() -> None:
    with pytest.raises(UserError) as caught:
        load([LATE, LATE], truncation="right", max_tokens=4)
    assert str(caught.value) == (
        "data.jsonl: nothing to learn from: all 2 samples lost their answers at data.max_tokens: 4; raise it, or set "
        "data.truncation: left"
    )


def test_arrays_have_the_documented_types() -> None:
    samples, held_out = load([SHORT])
    for part in (samples, held_out):
        assert (part.tokens.dtype, part.weights.dtype, part.offsets.dtype) == (np.int32, np.float32, np.int64)
    assert samples.offsets.tolist() == [0, 4]
    assert held_out.offsets.tolist() == [0]


MANY = [(f"{n} {n * n}", f"{3 * n} {n + 7}") for n in range(200)]


def sides(records: Records, fraction: float) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    train, held_out = load(records, eval_fraction=fraction)
    return tuple({tuple(tokens) for tokens, _, _ in unpacked(part)} for part in (train, held_out))  # type: ignore[return-value]


def test_the_held_out_share_is_chosen_by_content_hash() -> None:
    def number(n: int) -> float:
        tokens = np.array([n, n * n, 3 * n, n + 7], dtype="<i4").tobytes()
        return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "big") / 2**64

    expected = {(n, n * n, 3 * n, n + 7) for n in range(200) if number(n) < 0.2}
    train, held_out = sides(MANY, 0.2)
    assert held_out == expected
    assert len(train) == 200 - len(expected)
    assert not train & held_out
    assert 20 < len(expected) < 60


def test_a_sample_keeps_its_side_when_records_are_added_or_reordered() -> None:
    train, held_out = sides(MANY, 0.2)
    shuffled = random.Random(0).sample(MANY, len(MANY))
    assert sides(shuffled, 0.2) == (train, held_out)
    more_train, more_held_out = sides(shuffled[:50] + [("5", str(n)) for n in range(100)] + shuffled[50:], 0.2)
    assert train < more_train
    assert held_out < more_held_out
    smaller_train, smaller_held_out = sides(MANY, 0.1)
    assert smaller_held_out < held_out
    assert train < smaller_train


def test_both_sides_stay_in_file_order_with_their_places() -> None:
    train, held_out = load(MANY, eval_fraction=0.2)
    for part in (train, held_out):
        lines = [line for _, _, line in unpacked(part)]
        assert lines == sorted(lines)
        assert [tokens[0] for tokens, _, _ in unpacked(part)] == [line - 1 for line in lines]


def test_at_most_max_eval_samples_are_held_out_and_the_rest_is_not_trained_on() -> None:
    train, held_out = load(MANY, eval_fraction=0.2)
    same_train, fewer = load(MANY, eval_fraction=0.2, max_eval_samples=5)
    assert unpacked(same_train) == unpacked(train)
    assert unpacked(fewer) == unpacked(held_out)[:5]


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(UserError) as caught:
        load([SHORT, LONG], eval_fraction=1.0)
    assert str(caught.value) == "data.eval_fraction: 1.0 leaves nothing of data.jsonl to train on"


def test_an_eval_file_is_used_whole_and_nothing_else_is_held_out() -> None:
    write("held.jsonl", MANY[:30])
    train, held_out = load(MANY, eval_fraction=0.5, eval_path="held.jsonl")
    assert len(train) == 200
    assert unpacked(held_out) == unpacked(load(MANY[:30])[0])
    assert held_out.places[2] == Place("held.jsonl", 3)
    _, fewer = load(MANY, eval_path="held.jsonl", max_eval_samples=4)
    assert unpacked(fewer) == unpacked(held_out)[:4]


@pytest.fixture
def few() -> Samples:
    return load([SHORT, LONG, LATE])[0]


def _token(samples: Samples) -> Samples:
    tokens = samples.tokens.copy()
    tokens[5] += 1
    return replace(samples, tokens=tokens)


def _weight(samples: Samples) -> Samples:
    weights = samples.weights.copy()
    weights[5] += 0.5
    return replace(samples, weights=weights)


def _border(samples: Samples) -> Samples:
    offsets = samples.offsets.copy()
    offsets[1] += 1
    return replace(samples, offsets=offsets)


@pytest.mark.parametrize("change", [_token, _weight, _border, lambda samples: samples.select([1, 0, 2])])
def test_the_fingerprint_changes_with_every_token_weight_border_and_order(
    change: Callable[[Samples], Samples], few: Samples
) -> None:
    assert change(few).fingerprint() != few.fingerprint()


def test_the_fingerprint_is_that_of_the_content(few: Samples) -> None:
    """Stable between releases: a run of today must be resumable tomorrow."""
    again = Samples(few.tokens.copy(), few.weights.copy(), few.offsets.copy(), places=[Place("other", 1)] * 3)
    assert again.fingerprint() == few.fingerprint() == "870c5ce486a17d4aabfc87f5f496cc7b"


def test_select(few: Samples) -> None:
    chosen = few.select([2, 0])
    assert unpacked(chosen) == [unpacked(few)[2], unpacked(few)[0]]
    assert chosen.lengths().tolist() == [7, 4]
    assert chosen.counts is few.counts
    assert [chosen.content_hash(0), chosen.content_hash(1)] == [few.content_hash(2), few.content_hash(0)]
