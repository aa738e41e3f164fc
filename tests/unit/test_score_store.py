"""Stored numbers about targets come back in their places, however a batch lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.batches import ragged_batch
from tunesmith.errors import UserError
from tunesmith.score_store import ScoreStore, StoreWriter, content_keys
from tunesmith.types import Batch


def numbers(batch: Batch) -> torch.Tensor:
    """A number for each target that its token and position tell: 1000 position + token."""
    number_BT = 1000.0 * batch.positions_BT + batch.tokens_BT
    return torch.where(batch.weights_BT != 0, number_BT, 0.0)


def write(folder: Path, batch: Batch) -> ScoreStore:
    writer = StoreWriter(folder, {"of": "a test"})
    values = numbers(batch)[batch.weights_BT != 0]
    writer.add(batch, {"number": values, "two": torch.stack([values, -values], 1).double()})
    return writer.close()


def test_what_was_stored_from_rows_comes_back_packed(tmp_path: Path) -> None:
    write(tmp_path, ragged_batch(pack=False))
    store = ScoreStore.open(tmp_path)
    assert store.facts == {"of": "a test"}
    for pack in (False, True):
        batch = ragged_batch(pack=pack)
        found = store.columns(batch)
        assert torch.equal(found["number"], numbers(batch).float())
        assert found["two"].shape == (*batch.tokens_BT.shape, 2)
        assert torch.equal(found["two"][..., 1], -numbers(batch).double())
        store.check_holds([batch])


def test_a_sequence_that_is_not_there_is_named(tmp_path: Path) -> None:
    store = write(tmp_path, ragged_batch(pack=False))
    batch = ragged_batch(pack=False)
    batch.tokens_BT[0, 3] += 1
    for ask in (store.columns, lambda batch: store.check_holds([batch])):
        with pytest.raises(UserError, match=r"holds nothing about a sample with \d+ targets"):
            ask(batch)


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", ragged_batch(pack=False))
    (tmp_path / "a" / "number.bin").unlink()
    for folder in (tmp_path / "a", tmp_path / "none"):
        with pytest.raises(UserError, match="no stored scores, or not whole"):
            ScoreStore.open(folder)


def test_equal_words_about_different_pictures_are_told_apart() -> None:
    batch = ragged_batch(pack=False)
    number = len(batch.sample_N)
    same = replace(batch, tokens_BT=torch.full_like(batch.tokens_BT, 7))
    seen = replace(same, media_N=tuple({"pixels": torch.full((2, 2), float(n))} for n in range(number)))
    assert len(set(content_keys(seen))) == number
    assert content_keys(replace(seen, media_N=seen.media_N[::-1])) != content_keys(seen)
