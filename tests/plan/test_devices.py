"""Devices by name, by bytes, and as they are measured."""

from __future__ import annotations

import pytest

from tunesmith.errors import UserError
from tunesmith.plan.devices import SHEETS, find_device, measure_rates


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24g", 24 * 2**30),
        ("1.5 TiB", 1.5 * 2**40),
        ("800MiB", 800 * 2**20),
    ],
)
def test_a_device_by_its_memory(text: str, size: int) -> None:
    assert find_device(text).memory == size


@pytest.mark.parametrize("text", ["24", "24.5", "24B", "GiB", "24 apples", "0GiB", "-1GiB"])
def test_what_is_no_size_is_no_device(text: str) -> None:
    with pytest.raises(UserError, match="is not known: give its memory, such as 24GiB"):
        find_device(text)


def test_bytes_are_a_device_of_unknown_speed() -> None:
    device = find_device("24GiB")
    assert (device.memory, device.rates) == (24 * 2**30, None)


def test_an_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(UserError, match=r"'rtx4900' is not known: give its memory, such as 24GiB.*rtx4090"):
        find_device("rtx4900")


@pytest.mark.parametrize("name", SHEETS)
def test_sheets_are_of_one_kind(name: str) -> None:
    device = find_device(name)
    assert device.rates is not None
    assert device.rates.fp32 < device.rates.bf16  # TFLOP/s
    assert 10 * 2**30 < device.memory < 200 * 2**30
    assert 200 < device.rates.bandwidth < 10_000  # GB/s


def test_rates_of_this_machine_are_plausible() -> None:
    rates = measure_rates("cpu")
    assert 1e-4 < rates.fp32 < 100
    assert 0.1 < rates.bandwidth < 5000
    assert 0.01 < rates.launch_us < 1000


def test_measured_rates_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_device("cpu").rates
    monkeypatch.setattr("tunesmith.plan.devices.measure_rates", lambda kind: pytest.fail("measured again"))
    assert find_device("cpu").rates == first
