from pathlib import Path

import numpy as np
import pytest

from tunesmith.inspect.histogram import Histogram, bars, histogram, write_png


def test_bins_are_half_octaves_with_a_border_at_max_tokens() -> None:
    lengths = np.array([1, 10, 11, 100, 101, 1000, 3000])
    found = histogram(lengths, 100)
    assert found.edges == (
        0, 1, 2, 3, 4, 6, 8, 12, 17, 25, 35, 50, 70, 100, 141, 200, 282, 400, 565, 800, 1131, 1600, 2262, 3200
    )  # fmt: skip
    assert sum(found.counts) == len(lengths)
    assert found.counts[found.edges.index(70)] == 1  # 71 … 100 holds 100
    assert found.counts[found.edges.index(100)] == 1  # 101 … 141 holds 101


def test_few_lengths_have_a_bin_each() -> None:
    assert histogram(np.array([5, 7, 7]), 100) == Histogram((4, 5, 6, 7), (1, 0, 2), 100)
    assert histogram(np.array([3]), 3) == Histogram((2, 3), (1,), 3)


@pytest.mark.parametrize("max_tokens", [2, 7, 128, 1000, 2048, 100_000])
@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 100), (30, 60), (500, 100_000), (77, 78)])
def test_every_length_is_counted(low: int, high: int, max_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(low, high + 1, 500)
    found = histogram(lengths, max_tokens)
    assert sum(found.counts) == 500
    assert found.edges[0] < lengths.min()
    assert lengths.max() <= found.edges[-1]
    assert list(found.edges) == sorted(set(found.edges))
    if low <= max_tokens < high:
        assert max_tokens in found.edges or max_tokens > lengths.max() or max_tokens < lengths.min()


def test_bars() -> None:
    shape = Histogram((1, 2, 4, 1100), (4, 0, 1), 4)
    assert bars(shape).plain.split("\n") == [
        "        2 " + "█" * 48 + " 4  80.0%",
        "    3 – 4 ",
        "          ── data.max_tokens: 4 ".ljust(57, "─"),
        "5 – 1,100 " + "█" * 12 + " 1  20.0%",
    ]


def test_the_picture_is_written_whole(tmp_path: Path) -> None:
    write_png(histogram(np.array([5, 50, 500, 5000]), 100), ["a" * 200, "b"], tmp_path / "lengths.png")
    assert [file.name for file in tmp_path.iterdir()] == ["lengths.png"]
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
