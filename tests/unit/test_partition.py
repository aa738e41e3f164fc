"""How parameters become chunks, which of them train when, and where their optimizer state waits."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.methods.partition import Piece, Span, Spans, bytes_of, cut, cut_within, elements_of
from tunesmith.methods.shelf import BLOCK, Shelf, from_8bit, to_8bit
from tunesmith.methods.turns import Turns

CPU = torch.device("cpu")


@st.composite
def models(draw: st.DrawFn) -> list[Piece]:
    """Vectors, matrices and stacks of matrices, some of which cannot be cut."""
    pieces = []
    for n in range(draw(st.integers(1, 12))):
        shape = tuple(draw(st.lists(st.integers(1, 40), min_size=0, max_size=3)))
        align = draw(st.sampled_from([0, 1, 4, 7, 128])) if len(shape) > 1 else 0
        pieces.append(Piece(f"p{n}", shape, 2, draw(st.sampled_from([0, 4.5, 14])), align))
    return pieces


def assert_whole(chunks: Sequence[Spans], pieces: Sequence[Piece]) -> None:
    """Each row of each parameter once, in the model's order; cut at aligned rows, at a chunk's ends alone."""
    assert [(s.name, row) for chunk in chunks for s in chunk for row in range(s.start, s.stop)] == [
        (piece.name, row) for piece in pieces for row in range(piece.rows)
    ]
    by_name = {piece.name: piece for piece in pieces}
    for chunk in chunks:
        parts = [span for span in chunk if (span.start, span.stop) != (0, by_name[span.name].rows)]
        assert len(parts) <= 2
        assert chunk
        assert all(span in (chunk[0], chunk[-1]) for span in parts)
        assert len({span.name for span in chunk}) == len(chunk)
        for span in parts:
            piece = by_name[span.name]
            assert piece.align, f"{piece} cannot be cut"
            assert span.start % piece.align == 0
            assert span.stop % piece.align == 0 or span.stop == piece.rows
    assert sum(bytes_of(chunk, by_name) for chunk in chunks) == sum(piece.bytes for piece in pieces)
    assert sum(elements_of(chunk, by_name) for chunk in chunks) == sum(prod(piece.shape) for piece in pieces)


@given(models(), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_equal_chunks_hold_every_row_once(pieces: list[Piece], num_chunks: int) -> None:
    try:
        chunks = cut(pieces, num_chunks)
    except UserError:
        assert num_chunks > 1
        return
    assert len(chunks) == num_chunks
    assert_whole(chunks, pieces)


@given(models(), st.floats(1, 3))
@settings(max_examples=300, deadline=None)
def test_chunks_within_a_budget_hold_every_row_once_and_keep_to_it(pieces: list[Piece], factor: float) -> None:
    budget = factor * max(piece.smallest_bytes for piece in pieces)
    chunks = cut_within(pieces, budget, "method.chunk_bytes")
    assert_whole(chunks, pieces)
    by_name = {piece.name: piece for piece in pieces}
    assert max(bytes_of(chunk, by_name) for chunk in chunks) <= budget
    if sum(piece.bytes for piece in pieces) <= budget:
        assert len(chunks) == 1


def test_chunks_within_a_budget_are_as_few_as_can_be() -> None:
    rows = [2, 1, 1, 3]
    pieces = [Piece(f"p{n}", (number, 1), 1, 0.0, 2) for n, number in enumerate(rows)]
    assert len(cut_within(pieces, 2.0, "method.chunk_bytes")) == 4  # 2 | 1 1 | 2 | 1


@given(models(), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_a_budget_below_the_largest_indivisible_part_names_it_and_the_setting(
    pieces: list[Piece], factor: float
) -> None:
    largest = max(piece.smallest_bytes for piece in pieces)
    names = {piece.name for piece in pieces if piece.smallest_bytes == largest}
    with pytest.raises(UserError) as caught:
        cut_within(pieces, factor * largest, "method.memory")
    assert str(caught.value).startswith("method.memory: ")
    assert any(f"too little for {name} [" in str(caught.value) for name in names)


def matrix(name: str, rows: int, align: int = 4) -> Piece:
    return Piece(name, (rows, 10), 4, 12.0, align)


def test_chunks_are_as_equal_as_aligned_cuts_allow() -> None:
    pieces = [matrix("a", 40), matrix("b", 8), Piece("norm", (10,), 4, 12.0, 0), matrix("c", 32)]
    assert cut(pieces, 2) == [(Span("a", 0, 40),), (Span("b", 0, 8), Span("norm", 0, 10), Span("c", 0, 32))]
    assert cut(pieces, 4) == [
        (Span("a", 0, 20),),
        (Span("a", 20, 40),),
        (Span("b", 0, 8), Span("norm", 0, 10), Span("c", 0, 12)),
        (Span("c", 12, 32),),
    ]


def test_bytes_count_and_not_rows() -> None:
    pieces = [Piece("a", (8, 10), 2, 28.0, 1), Piece("b", (8, 10), 2, 8.0, 1)]
    assert cut(pieces, 2) == [(Span("a", 0, 5),), (Span("a", 5, 8), Span("b", 0, 8))]


def test_rows_that_do_not_fill_the_last_aligned_part_stay_with_it() -> None:
    assert cut([matrix("a", 10)], 3) == [(Span("a", 0, 4),), (Span("a", 4, 8),), (Span("a", 8, 10),)]
    assert cut_within([matrix("a", 10)], 640.0, "s") == [(Span("a", 0, 4),), (Span("a", 4, 8),), (Span("a", 8, 10),)]


def test_vectors_and_scalars_are_never_cut() -> None:
    pieces = [Piece("v", (1000,), 4, 12.0, 0), Piece("s", (), 4, 12.0, 0)]
    assert cut(pieces, 1) == [(Span("v", 0, 1000), Span("s", 0, 1))]
    assert cut_within(pieces, 16000.0, "s") == [(Span("v", 0, 1000),), (Span("s", 0, 1),)]
    with pytest.raises(UserError, match=r"s: 0.0 MiB are too little for v \[1000\]: it cannot be cut: take 0.0 MiB"):
        cut_within(pieces, 15999.0, "s")


def test_more_chunks_than_can_be_cut_are_refused_with_the_number_that_can() -> None:
    pieces = [matrix("a", 8), matrix("b", 8)]
    assert len(cut(pieces, 4)) == 4
    with pytest.raises(
        UserError, match=r"method.num_chunks: the 2 parameters give 4 chunks at most when cut into 9; ask"
    ):
        cut(pieces, 9)


def test_a_budget_too_small_says_what_the_smallest_part_takes() -> None:
    with pytest.raises(
        UserError, match=r"memory: 1.0 MiB are too little for a \[512, 8\]: 128 rows of it take 2.0 MiB "
    ):
        cut_within([Piece("a", (512, 8), 0, 2**11, 128)], 2**20, "memory")


ORDERS: list[str | tuple[int, ...]] = ["random", "ascending", "descending"]


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from(ORDERS),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_every_chunk_has_one_turn_in_each_cycle(
    num_chunks: int, num_active: int, order: str, updates: int, seed: int, cycle: int
) -> None:
    num_active = min(num_active, num_chunks)
    turns = Turns(num_chunks, num_active, order, updates, seed)
    length = turns.per_cycle * updates
    active = [turns.at(update) for update in range(cycle * length, (cycle + 1) * length)]
    assert Counter(chunk for chunks in active for chunk in chunks) == dict.fromkeys(range(num_chunks), updates)
    assert all(len(set(active[turn * updates : (turn + 1) * updates])) == 1 for turn in range(turns.per_cycle))
    assert all(len(chunks) == num_active for chunks in active[: length - updates])
    assert turns.seen(length) == set(range(num_chunks))
    assert turns.per_cycle == -(-num_chunks // num_active)


def test_orders_are_what_they_say() -> None:
    def order(name: str | tuple[int, ...], num_active: int, updates: int = 1) -> list[tuple[int, ...]]:
        return [Turns(5, num_active, name, updates, 0).at(update) for update in range(6)]

    assert order("ascending", 1) == [(0,), (1,), (2,), (3,), (4,), (0,)]
    assert order("descending", 1) == [(4,), (3,), (2,), (1,), (0,), (4,)]
    assert order("ascending", 2) == [(0, 1), (2, 3), (4,), (0, 1), (2, 3), (4,)]
    assert order("descending", 2) == [(3, 4), (1, 2), (0,), (3, 4), (1, 2), (0,)]
    assert order("ascending", 5, updates=3) == [(0, 1, 2, 3, 4)] * 6
    assert order("ascending", 1, updates=2) == [(0,), (0,), (1,), (1,), (2,), (2,)]
    assert order((3, 0, 3), 1, updates=2) == [(3,), (3,), (0,), (0,), (3,), (3,)]


def test_random_orders_differ_from_cycle_to_cycle_and_from_seed_to_seed() -> None:
    def cycle(number: int, seed: int) -> tuple[tuple[int, ...], ...]:
        turns = Turns(8, 1, "random", 1, seed)
        return tuple(turns.at(8 * number + turn) for turn in range(8))

    assert len({cycle(number, seed) for number in range(5) for seed in range(5)}) == 25


def test_sampled_chunks_are_drawn_evenly_and_without_repetition_in_a_turn() -> None:
    turns = Turns(6, 2, "sampled", 1, 0)
    drawn = [turns.at(update) for update in range(3000)]
    assert {len(set(chunks)) for chunks in drawn} == {2}
    counts = Counter(chunk for chunks in drawn for chunk in chunks)
    assert set(counts) == set(range(6))
    assert all(abs(count - 1000) < 5 * (3000 * (1 / 3) * (2 / 3)) ** 0.5 for count in counts.values())
    pairs = Counter(drawn)
    assert len(pairs) == 15
    assert all(abs(count - 200) < 5 * 200**0.5 for count in pairs.values())


def test_turns_are_a_function_of_the_update_alone() -> None:
    """Whatever was asked before, and in another process."""
    for order in ("random", "sampled", "ascending", "descending"):
        turns = Turns(7, 2, order, 3, 5)
        forwards = [turns.at(update) for update in range(60)]
        backwards = [Turns(7, 2, order, 3, 5).at(update) for update in reversed(range(60))]
        assert forwards == backwards[::-1]
    code = "from tunesmith.methods.turns import Turns; print([Turns(7, 2, 'random', 3, 5).at(u) for u in range(60)])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str([Turns(7, 2, "random", 3, 5).at(update) for update in range(60)])


@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([*ORDERS, "sampled"]), st.integers(1, 4), st.integers(0, 40)
)
@settings(max_examples=300, deadline=None)
def test_seen_is_what_has_trained_so_far(
    num_chunks: int, num_active: int, order: str, updates_per_chunk: int, updates: int
) -> None:
    turns = Turns(num_chunks, min(num_active, num_chunks), order, updates_per_chunk, 1)
    assert turns.seen(updates) == {chunk for update in range(updates) for chunk in turns.at(update)}


def test_a_fixed_list_has_seen_only_what_it_names() -> None:
    turns = Turns(5, 1, (4, 1), 2, 0)
    assert [turns.seen(updates) for updates in (0, 1, 2, 3, 9)] == [set(), {4}, {4}, {1, 4}, {1, 4}]


def state() -> dict[str, Tensor]:
    return {
        "exp_avg": torch.randn(7, 33),
        "exp_avg_sq": torch.rand(7, 33),
        "master": torch.randn(3, 2, 5),
        "momentum": torch.randn(1000).bfloat16(),
        "double": torch.randn(5, 1, dtype=torch.float64),
        "turned": torch.randn(4, 6).T,
        "whole": torch.arange(5),
        "step": torch.tensor(3.0),
        "flag": torch.tensor(True),
        "nothing": torch.empty(0),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    }


def assert_same_bits(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
        assert torch.equal(found[name], x), name


PLACES = pytest.mark.parametrize("on_disk", [False, True], ids=["host", "disk"])


@PLACES
def test_what_comes_from_the_shelf_has_the_bits_that_went_there(on_disk: bool) -> None:
    shelf = Shelf(CPU, on_disk, eight_bit=False)
    states = {key: state() for key in ("a[0:7]", "a[7:14]", "b")}
    kept = {key: {name: x.clone() for name, x in each.items()} for key, each in states.items()}
    for key, each in states.items():
        shelf.put(key, each)
    for each in states.values():
        for x in each.values():
            x.zero_()
    for key in ("b", "a[0:7]", "a[7:14]"):
        shelf.fetch(key)
        assert_same_bits(shelf.get(key), kept[key])
    assert shelf.get("c") is None


@PLACES
def test_numbers_that_are_not_finite_keep_their_bits(on_disk: bool) -> None:
    bits = torch.tensor([0x7F800000, 0x7FC00001, 1, 0, 0x3F800000], dtype=torch.int32)
    shelf = Shelf(CPU, on_disk, eight_bit=False)
    shelf.put("a", {"exp_avg": bits.view(torch.float32)})
    assert torch.equal(shelf.get("a")["exp_avg"].view(torch.int32), bits)


@PLACES
def test_what_was_fetched_changes_without_changing_the_shelf(on_disk: bool) -> None:
    shelf = Shelf(CPU, on_disk, eight_bit=False)
    expected = state()
    shelf.put("a", expected)
    for x in shelf.get("a").values():
        x.zero_()
    assert_same_bits(shelf.get("a"), expected)


@PLACES
def test_a_state_replaces_the_one_before_and_no_other(on_disk: bool) -> None:
    shelf = Shelf(CPU, on_disk, eight_bit=False)
    first, other, second = state(), state(), state()
    shelf.put("a", first)
    shelf.put("b", other)
    shelf.put("a", second)
    assert_same_bits(shelf.get("a"), second)
    assert_same_bits(shelf.get("b"), other)
    shelf.put("b", {"exp_avg": torch.ones(2)})
    assert_same_bits(shelf.get("b"), {"exp_avg": torch.ones(2)})
    assert_same_bits(shelf.get("a"), second)


@pytest.mark.parametrize("eight_bit", [False, True], ids=["32 bits", "8 bits"])
@pytest.mark.parametrize("from_disk", [False, True], ids=["from host", "from disk"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["to host", "to disk"])
def test_a_shelf_goes_through_a_checkpoint(eight_bit: bool, from_disk: bool, to_disk: bool) -> None:
    shelf, loaded = Shelf(CPU, from_disk, eight_bit), Shelf(CPU, to_disk, eight_bit)
    moments = {"exp_avg": torch.randn(600), "exp_avg_sq": torch.rand(600), "step": torch.tensor(2.0)}
    shelf.put("a", moments)
    shelf.put("b", {name: x * 2 for name, x in moments.items()})
    loaded.put("c", moments)
    loaded.load_state_dict(shelf.state_dict())
    for key in ("a", "b"):
        assert_same_bits(loaded.get(key), shelf.get(key))
    assert loaded.get("c") is None
    before = shelf.get("a")
    loaded.put("a", {"exp_avg": torch.zeros(600), "exp_avg_sq": torch.zeros(600), "step": torch.tensor(3.0)})
    assert_same_bits(shelf.get("a"), before)
    assert_same_bits(loaded.get("b"), shelf.get("b"))
    assert float(loaded.get("a")["step"]) == 3.0


def spread(shape: Iterable[int]) -> Tensor:
    """Numbers over twelve orders of magnitude, with zeros among them."""
    x = torch.randn(*shape) * 10 ** torch.empty(*shape).uniform_(-12, 0)
    return torch.where(torch.rand(*shape) < 0.1, 0.0, x)


@pytest.mark.parametrize("numbers", [1, 255, 256, 257, 1000, 4096])
def test_8_bits_keep_a_first_moment_to_half_a_step(numbers: int) -> None:
    x = spread((numbers,))
    code, scale = to_8bit(x, is_square=False)
    found = from_8bit(code, scale, is_square=False)
    assert code.dtype == torch.int8
    assert (len(code), len(scale)) == (numbers, -(-numbers // BLOCK))
    largest = torch.stack([block.abs().amax() for block in x.split(BLOCK)]).repeat_interleave(BLOCK)[:numbers]
    share = (x.abs() / largest.clamp(min=1e-38)).sqrt()
    # half a step of 1/127 of the root, squared
    bound = largest * ((share + 0.5 / 127) ** 2 - share**2) * 1.001
    assert ((found - x).abs() <= bound).all()
    assert (found * x >= 0).all()
    assert not found[x == 0].any()
    large = share > 0.5
    assert ((found - x).abs()[large] <= 0.016 * x.abs()[large]).all()


@pytest.mark.parametrize("numbers", [1, 255, 256, 257, 1000, 4096])
def test_8_bits_never_make_a_second_moment_smaller_nor_0(numbers: int) -> None:
    x = spread((numbers,)).square()
    code, scale = to_8bit(x, is_square=True)
    found = from_8bit(code, scale, is_square=True)
    assert code.dtype == torch.uint8
    assert (found >= x * (1 - 1e-6)).all()
    assert torch.equal(found == 0, x == 0)
    largest = torch.stack([block.amax() for block in x.split(BLOCK)]).repeat_interleave(BLOCK)[:numbers]
    root = (x / largest.clamp(min=1e-38)) ** 0.25
    assert (found <= largest * (root + 1.001 / 255) ** 4).all()
    large = root > 0.5
    assert (found[large] <= 1.035 * x[large]).all()


def test_8_bits_of_zeros_are_zeros() -> None:
    for is_square in (False, True):
        code, scale = to_8bit(torch.zeros(300), is_square=is_square)
        assert torch.equal(from_8bit(code, scale, is_square=is_square), torch.zeros(300))


@PLACES
def test_the_8_bit_shelf_packs_moments_and_nothing_else(on_disk: bool) -> None:
    shelf = Shelf(CPU, on_disk, eight_bit=True)
    moments = {
        "exp_avg": torch.randn(5, 300),
        "exp_avg_sq": torch.rand(5, 300),
        "momentum_buffer": torch.randn(2, 3, 4),
        "master": torch.randn(5, 300),
        "step": torch.tensor(7.0),
    }
    shelf.put("a", moments)
    kept = shelf.state_dict()["a"]
    assert sum(x.numel() for name, x in kept.items() if x.dtype in (torch.int8, torch.uint8)) == 2 * 1500 + 24
    assert sum(x.nbytes for name, x in kept.items() if "/" in name) < 1.1 * (2 * 1500 + 24)
    found = shelf.get("a")
    assert found.keys() == moments.keys()
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in moments.items()}
    for name in ("master", "step"):
        assert torch.equal(found[name], moments[name])
    for name in ("exp_avg", "momentum_buffer"):
        assert (found[name] - moments[name]).abs().max() < 0.01 * moments[name].abs().max()
    assert (found["exp_avg_sq"] >= moments["exp_avg_sq"] * (1 - 1e-6)).all()
    assert (found["exp_avg_sq"] - moments["exp_avg_sq"]).abs().max() < 0.02


def test_8_bits_twice_are_8_bits_once() -> None:
    """A second moment that is not used does not grow with each turn."""
    for is_square in (False, True):
        x = spread((1000,)).square() if is_square else spread((1000,))
        once = from_8bit(*to_8bit(x, is_square=is_square), is_square=is_square)
        again = from_8bit(*to_8bit(once, is_square=is_square), is_square=is_square)
        torch.testing.assert_close(again, once, rtol=1e-5, atol=0.0)


def test_places_on_the_disk_do_not_overlap() -> None:
    shelf = Shelf(CPU, on_disk=True, eight_bit=False)
    expected = {f"k{n}": {"exp_avg": torch.full((n * 517 + 1,), float(n))} for n in range(12)}
    for key, each in expected.items():
        shelf.put(key, each)
    for key in reversed(expected):
        shelf.put(key, expected[key])
    for key, each in expected.items():
        assert_same_bits(shelf.get(key), each)
    assert shelf.file is not None
    ends = [place + 4 * (n * 517 + 1) for n, place in enumerate(shelf.file.places.values())]
    assert all(end <= start for end, (_, start) in zip(ends, pairwise(shelf.file.places.values()), strict=False))
