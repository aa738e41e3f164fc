from typing import Any

import numpy as np
import pytest

from tunesmith.config import DataConfig
from tunesmith.inspect.rest import End, Rest
from tunesmith.types import Place

PLACE = Place("a.jsonl", 1)
WHOLE, WEIGHTS = np.arange(10), np.arange(10) / 10


def rest_of(*samples: Any) -> Rest:
    return Rest(DataConfig(path="a.jsonl", max_tokens=4), None, {PLACE: list(samples)})  # type: ignore[arg-type]


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 8), (8, 10), (6, 10), (0, 10)])
def test_both_ends_of_what_was_kept(start: int, stop: int) -> None:
    before, after = rest_of([(WHOLE, WEIGHTS)]).find(PLACE, 0, WHOLE[start:stop])
    assert before == End(WHOLE[:start].tolist(), WEIGHTS[:start].tolist())
    assert after == End(WHOLE[stop:].tolist(), WEIGHTS[stop:].tolist())


def test_a_whole_sample_is_not_taken_for_the_beginning_of_a_longer_one() -> None:
    samples = [[(WHOLE, WEIGHTS)], [(WHOLE[:4], WEIGHTS[:4])]]
    assert rest_of(*samples).find(PLACE, 0, WHOLE[:4]) == (End(), End())


def test_the_side_of_a_pair_is_the_one_looked_at() -> None:
    rest = rest_of([(WHOLE, WEIGHTS), (WHOLE + 100, WEIGHTS)])
    assert rest.find(PLACE, 1, WHOLE[:4] + 100)[1].ids == [104, 105, 106, 107, 108, 109]
    assert rest.find(PLACE, 0, WHOLE[:4] + 100) == rest.find(Place("b", 1), 0, WHOLE[:4]) == (End(), End())
