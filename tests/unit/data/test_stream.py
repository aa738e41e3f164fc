import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.data.test_prepare import number_tokenizer
from tunesmith.cache import cache_folder
from tunesmith.config import RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.data import stream
from tunesmith.data.render import Renderer
from tunesmith.data.samples import Samples
from tunesmith.data.stream import StreamDataset, open_stream
from tunesmith.errors import UserError
from tunesmith.run import train
from tunesmith.run_folder import RunFolder, read_events
from tunesmith.types import Batch

TOKENIZER = number_tokenizer()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def write(name: str, first: int, count: int) -> None:
    """Record n is the text "n n n …", n % 4 + 2 times."""
    lines = [json.dumps({"text": " ".join([str(n)] * (n % 4 + 2))}) for n in range(first, first + count)]
    Path(name).write_text("\n".join(lines) + "\n")


def opened(batch_size: int = 4, seed: int = 0, **data: Any) -> tuple[StreamDataset, Samples, Samples]:
    settings = {"path": "a.jsonl", "stream": True, "shuffle_window": 10, "eval_fraction": 0.0, "max_tokens": 8, **data}
    tree = {
        "model": "demo",
        "output": "x",
        "train": {"steps": 9, "batch_size": batch_size},
        "seed": seed,
        "data": settings,
    }
    if "sets" in data:
        settings.pop("path")
    config = config_from_dict(tree)
    return open_stream(config, Renderer(TOKENIZER, config.data))


def test_labels_and_choices_come_with_the_windows() -> None:
    lines = [json.dumps({"query": str(n), "choices": ["100", "200"], "gold": n % 2}) for n in range(20)]
    Path("a.jsonl").write_text("\n".join(lines) + "\n")
    config = config_from_dict(
        {
            "model": "demo",
            "output": "x",
            "train": {"steps": 5, "batch_size": 4},
            "data": {"path": "a.jsonl", "stream": True, "shuffle_window": 6, "eval_fraction": 0.0, "as_chat": False},
        }
    )
    data, _, _ = open_stream(config, Renderer(TOKENIZER, config.data, "choices"))
    for step in range(5):
        batch = data(step)
        queries = batch.tokens_BT[:, 0]
        assert batch.sequence_columns["label"][batch.sequence_BT[:, 0]].tolist() == (queries % 2).tolist()
        assert batch.tokens_BT[:, 1].tolist() == (100 + queries % 2 * 100).tolist()
        assert batch.token_columns["choices"].tolist() == [[[-1, -1], [100, 200]]] * 4


def numbers(batch: Batch) -> list[int]:
    """The records of a batch, by their number, in row order."""
    return [int(batch.tokens_BT[batch.sequence_BT == n][0]) for n in range(len(batch.sample_N))]


def seen(data: StreamDataset, steps: int) -> list[int]:
    return [number for step in range(steps) for number in sorted(numbers(data(step)))]


def test_windows_follow_each_other_and_are_shuffled_inside() -> None:
    write("a.jsonl", 0, 40)
    data, first, held_out = opened(batch_size=5)
    batches = [numbers(data(step)) for step in range(8)]
    for window in range(4):
        pair = batches[2 * window] + batches[2 * window + 1]
        assert sorted(pair) == list(range(10 * window, 10 * window + 10))
        assert sorted(batches[2 * window]) != list(range(10 * window, 10 * window + 5))
    assert (len(first), len(held_out)) == (10, 0)


def test_a_batch_reaches_over_windows_and_the_end_begins_again() -> None:
    write("a.jsonl", 0, 24)
    data, *_ = opened(batch_size=8)
    batches = [numbers(data(step)) for step in range(10)]
    assert all(len(batch) == 8 for batch in batches)
    seen = [number for batch in batches for number in batch]
    assert sorted(seen[:72]) == sorted([*range(24)] * 3)  # windows of 10, 10 and 4 in each pass
    assert set(seen[72:]) <= set(range(10))


def test_a_window_never_holds_a_record_twice() -> None:
    write("a.jsonl", 0, 6)
    data, first, held_out = opened(batch_size=3, shuffle_window=100, eval_fraction=0.3)
    assert len(first) == 6
    trained = [number for step in range(4) for number in numbers(data(step))]
    assert len(set(trained)) + len(held_out) == 6


def test_a_step_is_a_pure_function_of_the_seed() -> None:
    write("a.jsonl", 0, 40)
    data, *_ = opened()
    expected = [data(step) for step in range(12)]
    for step in (11, 0, 5, 4, 11):
        assert torch.equal(data(step).tokens_BT, expected[step].tokens_BT)
    again, *_ = opened()
    assert torch.equal(again(7).tokens_BT, expected[7].tokens_BT)
    other, *_ = opened(seed=1)
    assert seen(other, 5) != seen(data, 5)


def test_going_on_late_tokenizes_only_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", 0, 400)
    data, *_ = opened()
    expected = numbers(data(60))
    assert json.loads(data.index.read_text())[:24] == [10] * 24
    made: list[int] = []
    make = stream.Windows._make
    monkeypatch.setattr(stream.Windows, "_make", lambda self, window: (made.append(window), make(self, window))[1])
    again, *_ = opened()
    assert numbers(again(60)) == expected
    assert set(made) <= {0, 1, 24, 25}  # the first for its facts, and each window's next, which is made ahead


def test_held_out_records_never_come(tmp_path: Path) -> None:
    write("a.jsonl", 0, 100)
    data, _, held_out = opened(eval_fraction=0.3, max_eval_samples=3, shuffle_window=50)
    out = {int(held_out.sequences(n)[0][0][0]) for n in range(len(held_out))}
    assert len(out) == 3
    trained = set(seen(data, 30))
    assert not out & trained
    assert 50 < len(trained) < 90
    write("eval.jsonl", 500, 6)
    _, _, given = opened(eval_path="eval.jsonl")
    assert len(given) == 6


def test_a_stream_of_records_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that never ends: a window at a time, and one ahead."""
    write("a.jsonl", 0, 1)
    read: list[int] = []
    of_file = stream.read_examples

    def endless(source: Any, *rest: Any) -> Iterator[Any]:
        [example] = list(of_file(source, *rest))
        for n in range(10**9):
            read.append(n)
            yield example

    monkeypatch.setattr(stream, "read_examples", endless)
    data, *_ = opened()
    data(2)  # records 8 … 11: window 1
    data.windows._worker.shutdown()
    assert len(read) <= 30


def test_sets_follow_each_other_or_interleave_by_weight() -> None:
    write("a.jsonl", 0, 20)
    write("b.jsonl", 100, 20)
    data, *_ = opened(batch_size=10, sets=["a.jsonl", "b.jsonl"])
    assert [sorted(numbers(data(step)))[0] for step in range(5)] == [0, 10, 100, 110, 0]
    mixed, *_ = opened(
        batch_size=10, mix="interleave", sets=[{"path": "a.jsonl", "weight": 4}, {"path": "b.jsonl", "weight": 1}]
    )
    for step in range(5):
        assert sum(number >= 100 for number in numbers(mixed(step))) == 2


def test_data_without_a_usable_record_is_an_error_and_no_endless_loop() -> None:
    Path("a.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError):
        opened(bad_records="skip")
    write("b.jsonl", 0, 5)
    with pytest.raises(UserError):
        opened(bad_records="skip", mix="interleave", sets=["a.jsonl", "b.jsonl"])


def test_data_that_changes_under_the_stream_is_noticed() -> None:
    write("a.jsonl", 0, 40)
    data, *_ = opened()
    data(9)
    sizes = json.loads(data.index.read_text())
    data.index.write_text(json.dumps([*sizes[:2], 7, *sizes[3:]]))
    again, *_ = opened()
    with pytest.raises(UserError, match="the data has changed while it was streamed"):
        again(6)
    assert data.index.is_relative_to(cache_folder())


def test_places() -> None:
    write("a.jsonl", 0, 40)
    data, *_ = opened()
    samples, indices = data.at(3)
    assert [samples.place(n).line - 1 for n in indices] == [int(samples.sequences(n)[0][0][0]) for n in indices]
    assert sorted(samples.place(n).line - 1 for n in indices) == sorted(numbers(data(3)))


def test_a_run_on_a_stream_goes_on_to_the_same_bits(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """24 conversations in windows of 7; stopped after 4 of 9 steps, in the second pass over the data."""
    settings: dict[str, Any] = {"data": {"stream": True, "shuffle_window": 7}, "schedule": "constant"}
    whole = train(make_config(**settings, train={"steps": 9}, output=str(tmp_path / "whole")))
    part = make_config(**settings, train={"steps": 4}, output=str(tmp_path / "part"))
    train(part)
    longer = make_config(**settings, train={"steps": 9}, output=str(tmp_path / "part"))
    resumed = train(longer, resume=True)
    weights = [load_file(result.folder / "model" / "adapter_model.safetensors") for result in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert whole.eval_losses[9] == resumed.eval_losses[9]
    losses = [event["loss"] for event in read_events(RunFolder(whole.folder).events) if event["event"] == "step"]
    assert losses[-1] < losses[0]


def test_a_window_of_which_nothing_is_left_is_passed_over() -> None:
    """Records 10 … 19 are longer than allowed."""
    lines = [json.dumps({"text": " ".join([str(n)] * (20 if 10 <= n < 20 else 3))}) for n in range(30)]
    Path("a.jsonl").write_text("\n".join(lines) + "\n")
    data, *_ = opened(batch_size=5, truncation="drop")
    seen = [number for step in range(4) for number in numbers(data(step))]
    assert sorted(seen) == [*range(10), *range(20, 30)]


def test_nothing_to_train_on_is_an_error_and_no_endless_search() -> None:
    write("a.jsonl", 0, 40)
    data, *_ = opened(eval_fraction=1.0)
    with pytest.raises(UserError, match="100 windows without a sample to train on"):
        data(0)


def test_records_that_cannot_be_read_are_counted() -> None:
    write("a.jsonl", 0, 10)
    with Path("a.jsonl").open("a") as file:
        file.write("{\n{\n")
    _, first, _ = opened(bad_records="skip", shuffle_window=20)
    assert (first.counts.records, first.counts.skipped) == (10, 2)


def test_data_that_has_grown_is_other_data() -> None:
    write("a.jsonl", 0, 40)
    data, first, _ = opened()
    data(5)
    write("a.jsonl", 0, 41)
    again, other, _ = opened()
    assert other.fingerprint() != first.fingerprint()
    assert again.index != data.index


def test_a_batch_over_many_windows_reads_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", 0, 400)
    made: list[int] = []
    make = stream.Windows._make
    monkeypatch.setattr(stream.Windows, "_make", lambda self, window: (made.append(window), make(self, window))[1])
    data, *_ = opened(batch_size=32, shuffle_window=8)
    for step in range(6):
        data(step)
    assert len(made) == len(set(made))
