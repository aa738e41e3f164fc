import random

import numpy as np
import pytest
import torch

from tunesmith.data.dataset import Dataset, evaluation_batches
from tunesmith.data.pack import pack_rows
from tunesmith.data.samples import Samples
from tunesmith.types import Batch, Place


def make_samples(number: int) -> Samples:
    """Sample i is i % 5 + 2 times the token i."""
    lengths = [i % 5 + 2 for i in range(number)]
    tokens = np.repeat(np.arange(number), lengths).astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    return Samples(tokens, np.ones(len(tokens), np.float32), offsets, [Place("a", i) for i in range(number)])


def make_dataset(number: int, batch_size: int, seed: int = 0, last: int | None = None, pack: bool = False) -> Dataset:
    return Dataset(make_samples(number), batch_size, max_tokens=8, pack=pack, seed=seed, last=last)


def stream(data: Dataset, length: int) -> list[int]:
    """The first `length` samples, batch after batch."""
    seen: list[int] = []
    while len(seen) < length:
        seen += data.indices(len(seen) // data.batch_size)
    return seen[:length]


def equal(one: Batch, other: Batch) -> bool:
    names = ("tokens_BT", "positions_BT", "sequence_BT", "weights_BT", "sample_N", "group_N")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize(("number", "batch_size"), [(10, 4), (7, 3), (12, 4), (5, 1), (3, 8), (1, 2)])
def test_every_epoch_sees_every_sample_once(number: int, batch_size: int) -> None:
    seen = stream(make_dataset(number, batch_size), 4 * number)
    for epoch in range(4):
        assert sorted(seen[epoch * number : (epoch + 1) * number]) == list(range(number))


def test_epochs_differ_and_so_do_seeds() -> None:
    seen = stream(make_dataset(50, 8), 100)
    assert seen[:50] != seen[50:]
    assert seen[:50] != list(range(50))
    assert stream(make_dataset(50, 8, seed=1), 50) != seen[:50]
    assert stream(make_dataset(50, 8, seed=0), 100) == seen


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    assert stream(make_dataset(50, 8), 100) == stream(make_dataset(50, 7), 100)


def test_a_batch_goes_on_across_the_border_of_an_epoch() -> None:
    data = make_dataset(10, 4)
    first, second = data.indices(2)[:2], data.indices(2)[2:]
    assert sorted(data.indices(0) + data.indices(1) + first) == list(range(10))
    assert sorted(second + data.indices(3) + data.indices(4)) == list(range(10))


def test_a_step_is_a_pure_function() -> None:
    data = make_dataset(23, 4, pack=True)
    expected = [data(step) for step in range(30)]
    steps = random.Random(0).choices(range(30), k=60)
    torch.manual_seed(7)
    assert all(equal(data(step), expected[step]) for step in steps)
    anew = make_dataset(23, 4, pack=True)
    assert equal(anew(29), expected[29])
    before = torch.get_rng_state()
    anew(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("last", "sizes"), [(10, [4, 4, 2]), (12, [4, 4, 4]), (3, [3]), (None, [4, 4, 4])])
def test_last_cuts_the_final_batch(last: int | None, sizes: list[int]) -> None:
    data, endless = make_dataset(7, 4, last=last), make_dataset(7, 4)
    for step, size in enumerate(sizes):
        assert data.indices(step) == endless.indices(step)[:size]
        assert len(data(step).sample_N) == size


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_holds_the_samples_of_its_step(pack: bool) -> None:
    data = make_dataset(10, 4, pack=pack)
    for step in range(5):
        batch = data(step)
        assert sorted(batch.sample_N.tolist()) == sorted(data.indices(step))
        kept = batch.sequence_BT >= 0
        assert torch.equal(batch.tokens_BT[kept], batch.sample_N[batch.sequence_BT[kept]])
        lengths = [i % 5 + 2 for i in data.indices(step)]
        assert len(batch.tokens_BT) == (len(pack_rows(lengths, 8)) if pack else 4)


def test_evaluation_sees_every_sample_once_in_file_order() -> None:
    batches = evaluation_batches(make_samples(10), 4, 8, pack=False)
    assert [sorted(batch.sample_N.tolist()) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert evaluation_batches(make_samples(10).select([]), 4, 8, pack=True) == []
