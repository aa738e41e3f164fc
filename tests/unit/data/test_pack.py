from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.samples import make_samples
from tunesmith.data.pack import collate, pack_rows
from tunesmith.data.samples import Samples
from tunesmith.types import Batch

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


def of_lengths(lengths: list[int]) -> Samples:
    """Sample i holds the tokens 100 i + 1, 100 i + 2 …, with weights that differ, the first 0."""
    tokens = [[100 * i + 1 + n for n in range(length)] for i, length in enumerate(lengths)]
    return make_samples(tokens, [[n / (i + 2) for n in range(length)] for i, length in enumerate(lengths)])


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """How many rows best fit needs, the plain way."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in free if left >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else capacity) - length)
    return len(free)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 64))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=40)), capacity


@PROPERTY
@given(packings())
def test_packing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rows = pack_rows(lengths, capacity)
    totals = [sum(lengths[n] for n in row) for row in rows]
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(0 < total <= capacity for total in totals)
    assert totals == sorted(totals, reverse=True)
    assert len(rows) == best_fit_decreasing(lengths, capacity)
    assert pack_rows(lengths, capacity) == rows


def test_rows_are_levelled_where_that_needs_no_more_of_them() -> None:
    assert pack_rows([5, 4, 3, 3, 2, 1], 10) == [[0, 3, 5], [1, 2, 4]]  # 9 and 9, where best fit gives 10 and 8
    assert pack_rows([6, 5, 5, 4], 10) == [[0, 3], [1, 2]]


def test_the_best_fit_stands_where_levelling_would_overflow() -> None:
    """Levelled they would be 8 4, 6 4 and 5 4 4, which is 13."""
    lengths, capacity = [8, 6, 5, 4, 4, 4, 4], 12
    rows = pack_rows(lengths, capacity)
    assert len(rows) == best_fit_decreasing(lengths, capacity) == 3
    assert [sum(lengths[n] for n in row) for row in rows] == [12, 12, 11]


def test_the_fullest_row_that_has_room_is_taken() -> None:
    """5 3 | 4 2 2. The emptiest row first would need three: 5 2 | 4 3 | 2."""
    assert pack_rows([5, 4, 3, 2, 2], 8) == [[0, 2], [1, 3, 4]]


def test_sequences_that_fill_a_row_stand_alone() -> None:
    assert pack_rows([7, 7, 7], 7) == [[0], [1], [2]]
    assert pack_rows([3], 7) == [[0]]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Samples, list[int], Batch]:
    capacity = draw(st.integers(2, 24))
    samples = of_lengths(draw(st.lists(st.integers(1, capacity), min_size=1, max_size=12)))
    chosen = draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=16))
    return samples, chosen, collate(samples, chosen, capacity, draw(st.booleans()))


def sequences(batch: Batch) -> list[tuple[int, list[int], list[float], list[int]]]:
    """(id, tokens, weights, positions) of each run of equal ids, row by row."""
    found = []
    for tokens, weights, positions, ids in zip(
        batch.tokens_BT.tolist(),
        batch.weights_BT.tolist(),
        batch.positions_BT.tolist(),
        batch.sequence_BT.tolist(),
        strict=True,
    ):
        start = 0
        for stop in range(1, len(ids) + 1):
            if stop == len(ids) or ids[stop] != ids[start]:
                if ids[start] >= 0:
                    found.append((ids[start], tokens[start:stop], weights[start:stop], positions[start:stop]))
                start = stop
    return found


@PROPERTY
@given(batches())
def test_a_batch_holds_its_samples_unchanged(case: tuple[Samples, list[int], Batch]) -> None:
    samples, chosen, batch = case
    found = sequences(batch)
    assert [sequence for sequence, *_ in found] == list(range(len(chosen)))
    assert sorted(batch.sample_N.tolist()) == sorted(chosen)
    assert batch.group_N.tolist() == list(range(len(chosen)))
    for (_, tokens, weights, positions), sample in zip(found, batch.sample_N.tolist(), strict=True):
        [(expected, expected_weights)] = samples.sequences(sample)
        assert tokens == expected.tolist()
        assert weights == expected_weights.tolist()
        assert positions == list(range(len(tokens)))
    assert int(batch.num_tokens()) == sum(int(samples.lengths()[i, 0]) for i in chosen)


@PROPERTY
@given(batches())
def test_padding_stands_at_the_end_and_says_so(case: tuple[Samples, list[int], Batch]) -> None:
    _, _, batch = case
    ends = batch.row_ends()
    assert ends == sorted(ends, reverse=True)
    assert ends[0] == batch.tokens_BT.shape[1]
    for row, end in enumerate(ends):
        assert (batch.sequence_BT[row, :end] >= 0).all()
        assert (batch.sequence_BT[row, end:] == -1).all()
        assert not batch.weights_BT[row, end:].any()
        assert not batch.positions_BT[row, end:].any()
        assert not batch.tokens_BT[row, end:].any()


def test_the_types_of_a_batch() -> None:
    batch = collate(of_lengths([3, 2]), [0, 1], 8, pack=True)
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    dtypes = {name: value.dtype for name, value in tensors.items()}
    assert dtypes.pop("weights_BT") == torch.float32
    assert {name: column.dtype for name, column in batch.sequence_columns.items()} == {"label": torch.float32}
    assert set(dtypes.values()) == {torch.int64}


def test_a_packed_and_a_padded_batch() -> None:
    samples = of_lengths([2, 4, 1])
    packed = collate(samples, [0, 1, 2], 5, pack=True)
    assert packed.tokens_BT.tolist() == [[101, 102, 103, 104], [1, 2, 201, 0]]
    assert packed.positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert packed.sequence_BT.tolist() == [[0, 0, 0, 0], [1, 1, 2, -1]]
    assert packed.sample_N.tolist() == [1, 0, 2]
    padded = collate(samples, [0, 1, 2], 5, pack=False)
    assert padded.tokens_BT.tolist() == [[101, 102, 103, 104], [1, 2, 0, 0], [201, 0, 0, 0]]
    assert padded.sequence_BT.tolist() == [[0, 0, 0, 0], [1, 1, -1, -1], [2, -1, -1, -1]]
    assert padded.sample_N.tolist() == [1, 0, 2]


def test_rows_are_cut_to_the_longest_of_them() -> None:
    batch = collate(of_lengths([2, 4, 1, 3]), [0, 1, 2, 3], 4, pack=False)
    part = batch.rows(1, 3)
    assert part.tokens_BT.tolist() == [[301, 302, 303], [1, 2, 0]]
    assert part.positions_BT.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert part.sequence_BT.tolist() == [[1, 1, 1], [2, 2, -1]]
    assert part.weights_BT.tolist() == batch.weights_BT[1:3, :3].tolist()
    assert part.sample_N.tolist() == batch.sample_N.tolist()
    assert batch.rows(3, 4).tokens_BT.tolist() == [[201]]


def row_batch(rows: list[list[tuple[int, int]]]) -> Batch:
    """A batch by hand: for each row the (length, group) of its sequences."""
    flat = [pair for row in rows for pair in row]
    width = max(sum(length for length, _ in row) for row in rows)
    sequence = torch.full((len(rows), width), -1)
    number = 0
    for r, row in enumerate(rows):
        start = 0
        for length, _ in row:
            sequence[r, start : start + length] = number
            start, number = start + length, number + 1
    tokens = torch.arange(sequence.numel()).reshape(sequence.shape)
    group = torch.tensor([group for _, group in flat])
    return Batch(tokens, torch.zeros_like(tokens), sequence, tokens.float(), torch.arange(len(flat)), group)


@st.composite
def grouped_rows(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Rows in which group ids rise by 0 or 1 from one sequence to the next."""
    group, rows = 0, []
    for _ in range(draw(st.integers(1, 10))):
        row = []
        for _ in range(draw(st.integers(1, 3))):
            group += draw(st.integers(0, 1))
            row.append((draw(st.integers(1, 8)), group))
        rows.append(row)
    return rows


def cell_count(piece: Batch) -> int:
    return piece.tokens_BT.numel()


@PROPERTY
@given(grouped_rows(), st.integers(1, 120))
def test_split_keeps_every_sequence_once_in_order_and_parts_no_group(
    rows: list[list[tuple[int, int]]], budget: int
) -> None:
    batch = row_batch(rows)
    pieces = batch.split(budget)
    assert [(n, t, w) for piece in pieces for n, t, w, _ in sequences(piece)] == [
        (n, t, w) for n, t, w, _ in sequences(batch)
    ]
    groups = [{int(batch.group_N[n]) for n, *_ in sequences(piece)} for piece in pieces]
    assert sum(len(group) for group in groups) == len(set().union(*groups))
    assert all(piece.tokens_BT.shape[1] == max(piece.row_ends()) for piece in pieces)


@PROPERTY
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 100))
def test_no_piece_is_over_budget_unless_it_is_one_row_and_none_could_take_the_next_row(
    lengths: list[int], budget: int
) -> None:
    batch = row_batch([[(length, n)] for n, length in enumerate(lengths)])
    pieces = batch.split(budget)
    assert all(cell_count(piece) <= budget or len(piece.row_ends()) == 1 for piece in pieces)
    for piece, following in pairwise(pieces):
        joined = piece.row_ends() + following.row_ends()[:1]
        assert len(joined) * max(joined) > budget


@PROPERTY
@given(grouped_rows(), st.integers(1, 120))
def test_no_piece_is_over_budget_unless_no_cut_in_it_is_allowed(rows: list[list[tuple[int, int]]], budget: int) -> None:
    batch = row_batch(rows)
    for piece in batch.split(budget):
        of_rows = [{int(batch.group_N[n]) for n in set(row) if n >= 0} for row in piece.sequence_BT.tolist()]
        cuts = [r for r in range(1, len(of_rows)) if not set().union(*of_rows[:r]) & set().union(*of_rows[r:])]
        assert cell_count(piece) <= budget or not cuts


def test_a_group_that_does_not_fit_any_more_begins_a_new_piece() -> None:
    batch = row_batch([[(4, 0)], [(4, 1)], [(4, 1)], [(4, 2)]])
    assert [piece.sequence_BT[:, 0].tolist() for piece in batch.split(8)] == [[0], [1, 2], [3]]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1, [[0], [1], [2, 3]]), (8, [[0], [1], [2, 3]]), (12, [[0], [1], [2, 3]]), (16, [[0, 1], [2, 3]]), (32, [[0, 1, 2, 3]])],
)  # fmt: skip
def test_split_by_hand(budget: int, expected: list[list[int]]) -> None:
    """Rows of 8, 7, 6 and 5 tokens; the last two hold one group."""
    batch = row_batch([[(8, 0)], [(7, 1)], [(6, 2)], [(5, 2)]])
    assert [piece.sequence_BT[:, 0].tolist() for piece in batch.split(budget)] == expected


def test_a_group_deep_in_a_row_holds_rows_together() -> None:
    batch = row_batch([[(2, 0), (2, 1)], [(1, 1), (3, 2)], [(4, 3)]])
    assert [piece.sequence_BT[:, 0].tolist() for piece in batch.split(1)] == [[0, 2], [4]]


def test_moving_a_batch_moves_all_of_it() -> None:
    moved = collate(make_samples([[1, 2]], choices=[[2, 3]]), [0], 8, pack=True).to("meta")
    columns = [*moved.token_columns.values(), *moved.sequence_columns.values()]
    assert len(columns) == 2
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.device.type == "meta" for tensor in tensors + columns)
