import math
from typing import Any

import pytest

from tunesmith.config import ConstantConfig, CosineConfig, LinearConfig, WsdConfig
from tunesmith.schedules import SCHEDULES, build_schedule

CONFIGS = {"constant": ConstantConfig, "linear": LinearConfig, "cosine": CosineConfig, "wsd": WsdConfig}


def rates(name: str, steps: int, peak: float = 1.0, **settings: Any) -> list[float]:
    lr = build_schedule(CONFIGS[name](**{"warmup_fraction": 0.0, **settings}), peak, steps)
    return [lr(step) for step in range(steps)]


def approx(values: list[float]) -> Any:
    return pytest.approx(values, rel=1e-12, abs=1e-15)


def test_all_schedules_are_tested_here() -> None:
    assert list(CONFIGS) == list(SCHEDULES)


def test_constant() -> None:
    assert rates("constant", 5, peak=3e-4) == [3e-4] * 5


def test_linear() -> None:
    assert rates("linear", 5, peak=10.0) == approx([10, 8, 6, 4, 2])
    assert rates("linear", 5, peak=10.0, final_fraction=0.5) == approx([10, 9, 8, 7, 6])


def test_cosine() -> None:
    root = math.sqrt(0.5)
    assert rates("cosine", 4, peak=2.0) == approx([2, 1 + root, 1, 1 - root])
    assert rates("cosine", 4, peak=2.0, final_fraction=0.5) == approx([2, 1.5 + root / 2, 1.5, 1.5 - root / 2])
    assert rates("cosine", 6) == approx([0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


def test_wsd() -> None:
    assert rates("wsd", 10, decay_fraction=0.4) == approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates("wsd", 10, decay_fraction=0.4, final_fraction=0.2) == approx([1] * 7 + [0.8, 0.6, 0.4])
    assert rates("wsd", 5, decay_fraction=0.0, final_fraction=0.5) == [1.0] * 5
    assert rates("wsd", 5, decay_fraction=1.0) == approx([1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_decays_in_its_share_of_all_steps_whatever_the_warmup() -> None:
    assert rates("wsd", 20, warmup_steps=4, decay_fraction=0.25) == approx(
        [0.25, 0.5, 0.75, 1] + [1.0] * 12 + [0.8, 0.6, 0.4, 0.2]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_warmup_rises_to_the_peak_at_its_last_step(name: str) -> None:
    assert rates(name, 100, peak=8.0, warmup_fraction=0.04)[:5] == approx([2, 4, 6, 8, 8])
    assert rates(name, 4, peak=8.0, warmup_fraction=1.0) == approx([2, 4, 6, 8])


def test_after_warmup_the_rest_of_the_steps_is_the_whole_curve() -> None:
    assert rates("linear", 6, warmup_steps=2) == approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert rates("cosine", 6, warmup_steps=2)[2:] == approx(rates("cosine", 4))


def test_warmup_steps_win_over_the_fraction() -> None:
    assert rates("constant", 10, warmup_fraction=0.5, warmup_steps=2)[:3] == [0.5, 1.0, 1.0]
    assert rates("constant", 10, warmup_fraction=0.5, warmup_steps=0) == [1.0] * 10


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_of_one_step_takes_it_at_the_peak(name: str) -> None:
    assert rates(name, 1, peak=0.5) == [0.5]
    assert rates(name, 1, peak=0.5, warmup_fraction=0.03) == [0.5]
    assert rates(name, 1, peak=0.5, warmup_steps=10) == [0.5]


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_the_rate_never_rises_after_warmup_and_is_lowest_at_the_end(name: str, steps: int) -> None:
    after = rates(name, steps, warmup_steps=1, decay_fraction=0.9)[1:] if name == "wsd" else rates(name, steps)
    assert after == sorted(after, reverse=True)
    assert after[-1] > 0
    assert len(after) == 1 or after[-1] < after[0]
