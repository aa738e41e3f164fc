import numpy as np
import pytest

from tunesmith.data.order import permute, shares


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4096, 100_003])
def test_every_position_has_an_image_of_its_own(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, 3, 1)), np.arange(size))


def test_an_image_does_not_depend_on_what_else_is_asked() -> None:
    whole = permute(np.arange(1000), 1000, 7)
    assert permute([999, 3, 3], 1000, 7).tolist() == [whole[999], whole[3], whole[3]]
    assert permute([], 1000, 7).tolist() == []


def test_keys_give_other_orders() -> None:
    orders = [permute(np.arange(100), 100, *key).tolist() for key in [(0,), (1,), (0, 0), (0, 1), (1, 0), (-1,)]]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_is_the_same_everywhere() -> None:
    assert permute(np.arange(10), 10, 0, 0).tolist() == [4, 8, 1, 2, 7, 9, 0, 5, 6, 3]


def test_the_order_is_even() -> None:
    """Over many keys each sample comes first equally often, and neighbours do not stay neighbours (chi-squared, 99.9 %)."""
    firsts = np.bincount([int(permute([0], 10, key)[0]) for key in range(5000)], minlength=10)
    assert ((firsts - 500) ** 2 / 500).sum() < 27.9
    order = permute(np.arange(20_000), 20_000, 5)
    steps = np.diff(order)
    assert (np.abs(steps) == 1).mean() < 0.001
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(20_000), order)[0, 1]) < 0.03


def test_shares_add_up() -> None:
    assert shares([5, 5, 5], [1, 1, 1], 10) == [4, 3, 3]
    assert shares([5, 0, 5], [1, 8, 3], 8) == [2, 0, 6]
    assert shares([1], [0.1], 7) == [7]
