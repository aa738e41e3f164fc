"""What the plan says of a run's memory and work, against what the run takes, over a grid of tiny runs."""

from __future__ import annotations

from statistics import median

import pytest

from tests.plan.cells import CELLS, SEEN_BY_ALLOCATOR, Cell, Compared, Workplace, allocated, compare, table

MEDIAN, WORST, UNDER = 0.02, 0.08, 0.03
"""Errors of the foreseen peak over all cells: at most, and how far below what is measured."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def compared() -> list[Compared]:
    """All cells so far."""
    return []


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_work_is_that_of_torchs_counter(cell: Cell, workplace: Workplace, compared: list[Compared]) -> None:
    found = compare(workplace.config(cell), cell)
    compared.append(found)
    assert found.foreseen.flops == found.flops
    assert found.error >= -UNDER, table([found])
    assert found.error <= WORST, table([found])


@pytest.mark.parametrize("cell", SEEN_BY_ALLOCATOR, ids=str)
def test_little_is_taken_beside_tensors(cell: Cell, workplace: Workplace) -> None:
    """What kernels take inside themselves, and alignment, by torch's own count of what its allocator gives out."""
    tensors, given_out = allocated(workplace.config(cell))
    assert 0.97 * tensors <= given_out <= 1.02 * tensors  # of two steps, between which experts may get other tokens


def test_the_grid_is_wide() -> None:
    assert len(CELLS) >= 60
    assert len({cell.family for cell in CELLS}) >= 12
    assert {cell.method for cell in CELLS} == {"lora", "freeze", "full", "chunk", "zeroth"}
    assert {cell.precision for cell in CELLS} == {"fp32", "bf16", "mixed"}


def test_peaks_are_foreseen(compared: list[Compared]) -> None:
    if len(compared) < len(CELLS):
        pytest.skip("asks for all cells")
    errors = [found.error for found in compared]
    assert median(map(abs, errors)) <= MEDIAN, table(compared)
    assert max(map(abs, errors)) <= WORST, table(compared)
    assert min(errors) >= -UNDER, table(compared)
