"""Noise that is a function of a key: against NumPy's arithmetic, and against the distributions it claims to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunesmith.methods.noise import Noise, key_of, noise, random_bits

KEY = 0xD0734750FDE362B3
GAUSSIAN = [0.1357421875, 1.03125, -0.298828125, 1.2265625, 1.2734375, -0.115234375]
SIGNS = [1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0]


def split_mix(state: int, number: int) -> np.ndarray:
    """Steele, Lea and Flood's generator in unsigned 64-bit arithmetic."""
    found = []
    for _ in range(number):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        found.append(z ^ (z >> 31))
    return np.array(found, np.uint64)


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, key_of(3, 5)])
def test_the_bits_are_those_of_split_mix(key: int) -> None:
    assert np.array_equal(random_bits(key, 100).numpy().view(np.uint64), split_mix(key, 100))


def test_the_first_output_of_the_published_generator() -> None:
    assert random_bits(0, 1).item() % 2**64 == 0xE220A8397B1DCDAF


def test_noise_never_changes() -> None:
    """These very bits are in the logs of runs."""
    assert key_of(1, 2, 3) == KEY
    assert noise("gaussian", 7, (6,)).tolist() == GAUSSIAN
    assert noise("rademacher", 7, (8,)).tolist() == SIGNS


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_mean_0_variance_1_and_no_correlation(kind: Noise) -> None:
    n = 400_000
    a, b = noise(kind, key_of(1, 0), (n,)).double(), noise(kind, key_of(1, 1), (n,)).double()
    for x in (a, b):
        assert abs(x.mean()) < 5 / n**0.5
        assert abs(x.square().mean() - 1) < 5 * 2**0.5 / n**0.5
    assert abs((a * b).mean()) < 5 / n**0.5
    assert abs((a[1:] * a[:-1]).mean()) < 5 / n**0.5


def test_gaussian_numbers_are_distributed_so() -> None:
    x = noise("gaussian", 11, (200_000,)).double().sort().values
    expected = torch.special.ndtr(x)
    steps = torch.arange(1, len(x) + 1) / len(x)
    # Kolmogorov-Smirnov at 0.1 %, and half of the grain of eight bits, which moves no probability by more
    assert (expected - steps).abs().max() < 1.95 / len(x) ** 0.5 + 2**-9


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_exact_in_16_bits(kind: Noise, dtype: torch.dtype) -> None:
    x = noise(kind, 5, (100_000,))
    assert torch.equal(x.to(dtype).float(), x)


def test_a_longer_draw_begins_with_a_shorter_one() -> None:
    for kind in ("gaussian", "rademacher"):
        assert torch.equal(noise(kind, 9, (10, 13)).flatten()[:77], noise(kind, 9, (77,)))


def test_every_part_of_a_key_matters() -> None:
    keys = {key_of(*parts) for parts in [(0,), (0, 0), (0, 1), (1, 0), (1, 1), (2**40, 0), (0, 2**40), (1,)]}
    assert len(keys) == 8
