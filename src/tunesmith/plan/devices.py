"""What devices hold and reach: the one that is here, measured; others from their makers' data sheets."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import psutil
import torch

from tunesmith.cache import cache_folder
from tunesmith.config_section import bytes_of
from tunesmith.errors import UserError
from tunesmith.run_folder import write_text


@dataclass(frozen=True)
class Rates:
    """How fast a device is."""

    fp32: float
    """TFLOP/s of matrix products."""
    bf16: float
    """The same in bf16, summed in fp32."""
    bandwidth: float
    """GB/s that its memory gives."""
    launch_us: float
    """What each operation takes at least, in µs."""
    reach: tuple[float, float]
    """Which share of the rates a training step comes to, from … to."""
    link: float = 20.0
    """GB/s that come from the host's memory; an estimate, of PCIe 4 with 16 lanes."""


@dataclass(frozen=True)
class Device:
    """Where a run would go."""

    name: str
    kind: str
    """cpu or cuda."""
    memory: int
    """Bytes that a run may take there."""
    rates: Rates | None = None
    """None: only its memory is known."""
    watts: float | None = None

    @property
    def context(self) -> int:
        """Bytes that driver and libraries hold, or on the CPU the interpreter and the libraries."""
        return CONTEXT[self.kind]


CONTEXT = {"cuda": 500 * 2**20, "cpu": 450 * 2**20}
"""Estimates: CUDA's context with the kernels that are loaded; Python with torch and transformers."""

OF_SHEETS = (0.35, 0.7)
"""Share of a data sheet's rates. Large products of a training step reach about two thirds; small ones much less."""
LAUNCH_US = 6.0
"""Of an eager operation on a GPU."""

SHEETS: dict[str, tuple[float, float, float, float, float]] = {
    # usable GiB, TFLOP/s in fp32 and in bf16 (dense, summed in fp32), GB/s, W
    "rtx3060": (11.6, 12.7, 25.5, 360, 170),
    "rtx3090": (23.6, 35.6, 71, 936, 350),
    "rtx4060ti": (15.6, 22.1, 44, 288, 165),
    "rtx4070": (11.6, 29.1, 58, 504, 200),
    "rtx4080": (15.6, 48.7, 97.5, 717, 320),
    "rtx4090": (23.5, 82.6, 165, 1008, 450),
    "rtx5090": (31.4, 104.8, 209, 1792, 575),
    "a10": (22.1, 31.2, 125, 600, 150),
    "l4": (22.0, 30.3, 121, 300, 72),
    "a6000": (47.4, 38.7, 155, 768, 300),
    "l40s": (44.4, 91.6, 362, 864, 350),
    "a100-40": (39.4, 19.5, 312, 1555, 400),
    "a100": (79.2, 19.5, 312, 2039, 400),
    "h100": (79.1, 67, 989, 3350, 700),
    "h200": (139.8, 67, 989, 4800, 700),
    "b200": (178.0, 75, 2250, 8000, 1000),
    "mi300x": (191.7, 163, 1307, 5300, 750),
}
"""By name. Memory is what a driver leaves of the nominal one."""


def find_device(name: str | None) -> Device:
    """The device of this name: one of the table, `cpu`, `cuda`, or bytes such as 24GiB. None: the one that is here. Raises
    UserError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name in SHEETS:
        memory, fp32, bf16, bandwidth, watts = SHEETS[name]
        return Device(name, "cuda", int(memory * 2**30), Rates(fp32, bf16, bandwidth, LAUNCH_US, OF_SHEETS), watts)
    if name == "cpu":
        return Device("cpu", "cpu", host_memory(), measured_rates("cpu"))
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device: cuda: there is none here; name one of the table, such as rtx4090, or its memory")
        return Device(torch.cuda.get_device_name(), "cuda", memory_of(torch.device("cuda", 0)), measured_rates("cuda"))
    known = ", ".join(SHEETS)
    unknown = f"--device: {name!r} is not known: give its memory, such as 24GiB, or cpu, cuda, {known}"
    try:
        size = bytes_of(name)
    except ValueError as error:
        raise UserError(unknown) from error
    if size < 2**20:  # of a number without a unit
        raise UserError(unknown)
    return Device(name, "cuda", size)


def memory_of(device: torch.device) -> int:
    """Bytes of a device that is here; on the CPU those that this process may come to hold."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()


def host_memory() -> int:
    """Bytes that this process may come to hold on the CPU: what is free beside what it has, within its container."""
    there = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(file)
        if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
            there = min(there, int(text))
    return there


def within(device: Device, memory: int) -> Device:
    """The device, of which a run may take no more than this."""
    return replace(device, memory=min(memory, device.memory))


def measured_rates(kind: str) -> Rates | None:
    """Rates of the device that is here: measured within a few seconds, and kept. None where it has no room for that."""
    of = (
        torch.cuda.get_device_name()
        if kind == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    file = cache_folder() / "rates.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    key = f"{of}, torch {torch.__version__}"
    if key not in kept:
        try:
            kept[key] = asdict(measure_rates(kind))
        except torch.OutOfMemoryError:
            return None
        with suppress(OSError, UserError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(kept, indent=1))
    return Rates(**{**kept[key], "reach": tuple(kept[key]["reach"])})


def measure_rates(kind: str) -> Rates:
    """Rates of matrix products, of memory and of a small operation on the device that is here."""
    size = 4096 if kind == "cuda" else 1024

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, dtype=dtype, device=kind) for _ in range(2))
        return 2 * size**3 / _seconds(kind, lambda: a @ b) / 1e12

    large = torch.randn(2**24, device=kind)
    small = torch.randn(16, device=kind)
    bandwidth = 2 * large.numel() * 4 / _seconds(kind, lambda: large.neg()) / 1e9
    launch = _seconds(kind, lambda: [small.neg() for _ in range(100)]) / 100
    return Rates(product(torch.float32), product(torch.bfloat16), bandwidth, launch * 1e6, (0.6, 1.0))


def _seconds(kind: str, work: Callable[[], object]) -> float:
    """Median of some runs, after one that warms up."""

    def once() -> float:
        start = perf_counter()
        work()
        if kind == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    once()
    return median(once() for _ in range(5))
