import random

import numpy as np
import pytest
import torch

from tests.samples import make_part, make_samples
from tunesmith.config import DataConfig, SetConfig
from tunesmith.data.dataset import Dataset, evaluation_batches
from tunesmith.data.pack import pack_rows
from tunesmith.data.samples import Samples, whole
from tunesmith.types import Batch


def numbered(number: int) -> Samples:
    """Sample i is i % 5 + 2 times the token i."""
    return make_samples([[i] * (i % 5 + 2) for i in range(number)])


def make_dataset(number: int, batch_size: int, seed: int = 0, last: int | None = None, pack: bool = False) -> Dataset:
    return Dataset(numbered(number), DataConfig(path="a", max_tokens=8), batch_size, pack, seed, last)


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
    batches = evaluation_batches(numbered(10), 4, 8, pack=False)
    assert [sorted(batch.sample_N.tolist()) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert evaluation_batches(numbered(10).select([np.zeros(10, bool)]), 4, 8, pack=True) == []


def mixture(sizes: list[int], sets: list[SetConfig], **settings: object) -> Dataset:
    """Sets of so many samples; the token of a sample is 100 × its set + its number."""
    parts = [make_part([[100 * n + i, 0] for i in range(size)], name=str(n)) for n, size in enumerate(sizes)]
    config = DataConfig.model_validate({"sets": [part.model_dump() for part in sets], "max_tokens": 8, **settings})
    return Dataset(whole(parts, sets), config, 4, False, 0)


def set_of(data: Dataset, index: int) -> int:
    return int(data.samples.sequences(index)[0][0][0]) // 100


def test_concat_sees_every_sample_of_every_set_as_often_as_it_is_repeated() -> None:
    sets = [SetConfig(path="0"), SetConfig(path="1", repeat=2.5), SetConfig(path="2", repeat=0.5)]
    data = mixture([6, 4, 8], sets)
    assert data.draws == [6, 10, 4]
    assert data.epoch_samples == 20
    seen = stream(data, 40)
    for epoch in (seen[:20], seen[20:]):
        assert sorted(epoch)[:6] == list(range(6))
        assert [sum(set_of(data, index) == n for index in epoch) for n in range(3)] == [6, 10, 4]
        assert sorted({epoch.count(index) for index in range(6, 10)}) == [2, 3]
    assert [seen.count(index) for index in range(18)] == [2] * 6 + [5] * 4 + [1] * 8


def test_interleave_draws_sets_by_weight_and_walks_through_each_evenly() -> None:
    data = mixture([10, 30], [SetConfig(path="0", weight=3), SetConfig(path="1", weight=1)], mix="interleave")
    assert data.draws == [30, 10]
    seen = stream(data, 120)
    for epoch in range(3):
        assert sum(set_of(data, index) == 0 for index in seen[40 * epoch : 40 * epoch + 40]) == 30
    assert [seen.count(index) for index in range(10)] == [9] * 10
    assert [seen.count(index) for index in range(10, 40)] == [1] * 30


@pytest.mark.parametrize(("temperature", "draws"), [(None, [50, 50]), (1, [10, 90]), (2, [25, 75]), (1e9, [50, 50])])
def test_temperature_evens_out_sizes(temperature: float | None, draws: list[int]) -> None:
    """By 10 : 90; by their roots 1 : 3."""
    sets = [SetConfig(path="0"), SetConfig(path="1")]
    assert mixture([10, 90], sets, mix="interleave", temperature=temperature).draws == draws


def test_an_order_that_needs_no_array() -> None:
    """A billion samples cost nothing, and step 10^6 is as near as step 0."""
    part = make_part([[1, 2]])
    samples = Samples((part,), (range(10**9),), (SetConfig(path="a"),))  # type: ignore[arg-type]
    data = Dataset(samples, DataConfig(path="a"), 32, False, 0)
    assert len(set(data.indices(10**6) + data.indices(0))) == 64


def test_a_pair_never_parts() -> None:
    samples = make_samples([[i] * (i % 7 + 2) for i in range(40)], group_size=2)
    for pack in (False, True):
        for step in range(5):
            batch = Dataset(samples, DataConfig(path="a", max_tokens=8), 4, pack, 0)(step)
            assert batch.group_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
            first_tokens = [int(batch.tokens_BT[batch.sequence_BT == n][0]) for n in range(8)]
            assert all(b == a + 1 and a % 2 == 0 for a, b in zip(first_tokens[::2], first_tokens[1::2], strict=True))
            assert batch.sample_N.tolist() == [token // 2 for token in first_tokens]
            for row in batch.sequence_BT.tolist():
                if pack:  # both sides in one row
                    assert sorted(n // 2 for n in set(row) - {-1})[::2] == sorted(n // 2 for n in set(row) - {-1})[1::2]
            for piece in batch.split(1):
                groups = [int(batch.group_N[n]) for n in piece.sequence_BT.unique() if n >= 0]
                assert all(groups.count(group) == 2 for group in groups)


def test_a_small_repeat_of_a_small_set_still_takes_one_sample() -> None:
    assert mixture([3], [SetConfig(path="0", repeat=0.1)]).draws == [1]
    assert mixture([3, 0], [SetConfig(path="0"), SetConfig(path="1")]).draws == [3, 0]
