import random

import numpy as np
import pytest

from tunesmith.inspect.overlap import SIMILAR, Pair, near_duplicates, same_prompts
from tunesmith.inspect.words import NUM_CODE_POINTS, NUM_HASHES, code_points, scripts, signatures

WORDS = [f"word{n}" for n in range(2000)]


def signed(*texts: str) -> np.ndarray:
    return signatures(*code_points(texts))


def jaccard(one: str, other: str) -> float:
    """Of sets of runs of five words: what signatures estimate."""
    sides = []
    for text in (one, other):
        words = text.split()
        sides.append({tuple(words[n : n + 5]) for n in range(len(words) - 4)})
    return len(sides[0] & sides[1]) / len(sides[0] | sides[1])


def test_code_points_are_lower_case_and_end_each_text() -> None:
    codes, starts = code_points(["Ab", "", "é\U0001f600"])
    assert "".join(map(chr, codes)) == "ab\n\né\U0001f600\n"
    assert starts.tolist() == [0, 3, 4]


def test_scripts_count_letters_and_digits_only() -> None:
    codes, _ = code_points(["Hello, 42!", "мир", "你好 ٣", "ｗｉｄｅ", "שלום", "かな カナ"])
    counts = np.bincount(codes, minlength=NUM_CODE_POINTS)
    assert dict(scripts(counts)) == {
        "Latin": 9, "digits": 3, "Cyrillic": 3, "Han": 2, "Hebrew": 4, "Hiragana": 2, "Katakana": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The quick brown fox jumps.", "the QUICK, brown fox… jumps"),
        ("one", "One!"),
        ("two words", "two  words"),
        ("今天去公园", "今天，去公园。"),
    ],
)
def test_case_and_punctuation_do_not_matter(one: str, other: str) -> None:
    first, second = signed(one, other)
    assert (first == second).all()


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    texts = ["alpha beta", "", "one two three four five six seven", "!", "x"]
    together = signed(*texts)
    for text, row in zip(texts, together, strict=True):
        assert (signed(text)[0] == row).all()
    assert not together[1].any()
    assert not together[3].any()
    assert signatures(*code_points([])).shape == (0, NUM_HASHES)


def test_word_order_and_letter_order_matter() -> None:
    rows = signed("a b c d e", "e d c b a", "abc", "cba", "ab c", "a bc")
    for n, row in enumerate(rows):
        assert all((row != other).all() for m, other in enumerate(rows) if m != n)


def test_similarity_is_estimated_without_bias() -> None:
    rng = random.Random(0)
    errors = []
    for changed in (1, 3, 6, 12, 30):
        for _ in range(20):
            words = rng.choices(WORDS, k=150)
            other = list(words)
            for n in rng.sample(range(150), changed):
                other[n] = "changed"
            one, two = " ".join(words), " ".join(other)
            first, second = signed(one, two)
            errors.append((first == second).mean() - jaccard(one, two))
    assert abs(np.mean(errors)) < 3 * 0.06 / np.sqrt(len(errors))
    assert np.std(errors) < 0.07


def test_near_duplicates_are_found_and_others_are_not() -> None:
    rng = random.Random(1)
    train = [" ".join(rng.choices(WORDS, k=100)) for _ in range(300)]
    one_word = train[17].replace(train[17].split()[50], "changed", 1)
    half = " ".join([*train[40].split()[:50], *rng.choices(WORDS, k=50)])
    held_out = [" ".join(rng.choices(WORDS, k=100)), one_word, half, train[5].upper(), ""]
    found = near_duplicates(signed(*held_out), signed(*train, ""))
    assert [(pair.held_out, pair.train) for pair in found] == [(1, 17), (3, 5)]
    assert found[0].similarity == pytest.approx(jaccard(one_word, train[17]), abs=0.15)
    assert found[1].similarity == 1.0
    assert jaccard(half, train[40]) < SIMILAR


def test_each_held_out_record_is_counted_once_with_its_likest_partner() -> None:
    text = " ".join(WORDS[:60])
    close = text.replace("word59", "changed")
    found = near_duplicates(signed(text, text), signed(close, "unlike", text, text))
    assert [(pair.held_out, pair.similarity) for pair in found] == [(0, 1.0), (1, 1.0)]
    assert {pair.train for pair in found} <= {2, 3}


def test_no_records_on_a_side() -> None:
    nothing = np.zeros((0, NUM_HASHES), np.uint32)
    some = signed("a b c d e f")
    assert near_duplicates(nothing, some) == near_duplicates(some, nothing) == []
    none = np.zeros(0, np.uint64)
    assert same_prompts(none, np.ones(1, np.uint64)) == same_prompts(np.ones(1, np.uint64), none) == []


def test_same_prompts() -> None:
    held_out, train = np.array([7, 0, 9, 7], np.uint64), np.array([0, 5, 7, 7], np.uint64)
    assert same_prompts(held_out, train) == [Pair(0, 2, 1.0), Pair(3, 2, 1.0)]
