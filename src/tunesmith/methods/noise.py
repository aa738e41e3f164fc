"""Random numbers that are a function of a key and a place: the same bits on every device and in every version of torch.

A number is a hash of where it stands (SplitMix64 over a counter), made by integer arithmetic alone. Gaussian numbers are looked
up among the 65,536 quantiles of the normal distribution, rounded to eight significant bits: so they are exact in fp32, bf16
and fp16 alike, and a direction that is probed in bf16 is the one that is applied in fp32.
"""

from __future__ import annotations

from functools import cache
from math import prod
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

Noise = Literal["gaussian", "rademacher"]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_QUANTILES = 2**16


def key_of(*parts: int) -> int:
    """A 64-bit key from integers, each of which changes all of it."""
    key = 0
    for part in parts:
        key = _mix_int((key ^ (part & (2**64 - 1))) + _GOLDEN)
    return key


def noise(kind: Noise, key: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Independent numbers of mean 0 and variance 1 (Gaussian ones to 1e-4), fp32, of any shape; exact in bf16 too."""
    number = prod(shape)
    if kind == "rademacher":
        hashes = random_bits(key, -(-number // 64), device)
        bits = (hashes[:, None] >> torch.arange(64, device=device)) & 1
        return (bits.flatten()[:number] * 2 - 1).float().view(shape)
    sixteenths = random_bits(key, -(-number // 4), device).view(torch.int16)[:number]
    return quantiles(str(device))[sixteenths.long() + _QUANTILES // 2].view(shape)


def random_bits(key: int, number: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [number]: SplitMix64's (Steele, Lea, Flood 2014) outputs 0 … number-1 from the state `key`."""
    x = torch.arange(1, number + 1, dtype=torch.int64, device=device).mul_(_signed(_GOLDEN)).add_(_signed(key))
    x = (x ^ _shifted(x, 30)).mul_(_signed(_FIRST))
    x = (x ^ _shifted(x, 27)).mul_(_signed(_SECOND))
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift of int64 copies the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _mix_int(x: int) -> int:
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * _FIRST) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * _SECOND) & (2**64 - 1)
    return x ^ (x >> 31)


@cache
def quantiles(device: str) -> Tensor:
    """The middle of each 65,536th part of the normal distribution, scaled to variance 1 and rounded to bf16; fp32."""
    normal = NormalDist()
    upper = torch.tensor([normal.inv_cdf((n + 0.5) / _QUANTILES) for n in range(_QUANTILES // 2, _QUANTILES)]).double()
    upper = (upper / upper.square().mean().sqrt()).bfloat16().float()
    return torch.cat([-upper.flip(0), upper]).to(device)
