import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.cache import cache_folder
from tunesmith.config import DataConfig
from tunesmith.data import prepare
from tunesmith.data.encode import Encoder, FastDisagrees
from tunesmith.data.prepare import load_samples
from tunesmith.data.render import Renderer
from tunesmith.data.samples import Counts, Samples
from tunesmith.errors import UserError
from tunesmith.types import Form, Place


def number_tokenizer() -> PreTrainedTokenizerFast:
    """Every number that is written out is a token of that id: prompt "1 2 ", completion "3 4" → tokens 1 2 3 4."""
    backend = Tokenizer(models.WordLevel({str(n): n for n in range(50_000)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


tokenizer = number_tokenizer()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


Records = list[tuple[str, str]]


def write(name: str, records: Records) -> None:
    lines = [json.dumps({"prompt": prompt + " ", "completion": completion}) for prompt, completion in records]
    Path(name).write_text("\n".join(lines) + "\n")


def load(records: Records, **settings: Any) -> tuple[Samples, Samples]:
    write("data.jsonl", records)
    return load_path("data.jsonl", **settings)


def load_path(path: str, form: Form = "answers", **settings: Any) -> tuple[Samples, Samples]:
    config = DataConfig(**{"path": path, "eval_fraction": 0.0, "truncation": "right", **settings})
    return load_samples(config, Renderer(tokenizer, config, form))


def unpacked(samples: Samples) -> list[tuple[list[int], list[float], int]]:
    """(tokens, weights, line) of each sample."""
    found = []
    for index in range(len(samples)):
        [(tokens, weights)] = samples.sequences(index)
        found.append((tokens.tolist(), weights.tolist(), samples.place(index).line))
    return found


SHORT = ("1 2", "3 4")
LONG = ("10 11 12", "13 14 15 16 17 18")
"""Nine tokens, the last six learnt."""
LATE = ("20 21 22 23 24 25", "26")
"""Seven tokens, the last one learnt."""

LONG_PROMPT = "dropped, since their prompt alone fills data.max_tokens: 4"
SHORT_READ = ([1, 2, 3, 4], [0, 0, 1, 1], 1)


@pytest.mark.parametrize(
    ("truncation", "read", "counts"),
    [
        ("drop", [SHORT_READ], Counts(3, truncated=0, dropped=2, first_cut="data.jsonl:2")),
        (
            "right",
            [SHORT_READ, ([10, 11, 12, 13], [0, 0, 0, 1], 2)],
            Counts(3, truncated=1, dropped=1, first_cut="data.jsonl:2", notes={LONG_PROMPT: 1}),
        ),
        (
            "left",
            [SHORT_READ, ([15, 16, 17, 18], [0, 1, 1, 1], 2), ([23, 24, 25, 26], [0, 0, 0, 1], 3)],
            Counts(3, truncated=2, dropped=0, first_cut="data.jsonl:2"),
        ),
        (
            # of LONG the last part has one token, and nothing stands before it; of LATE the first has no target
            "split",
            [
                SHORT_READ,
                ([10, 11, 12, 13], [0, 0, 0, 1], 2),
                ([14, 15, 16, 17], [0, 1, 1, 1], 2),
                ([24, 25, 26], [0, 0, 1], 3),
            ],
            Counts(3, truncated=2, dropped=0, first_cut="data.jsonl:2"),
        ),
    ],
)  # fmt: skip
def test_truncation(truncation: str, read: list, counts: Counts) -> None:
    samples, held_out = load([SHORT, LONG, LATE], truncation=truncation, max_tokens=4)
    assert unpacked(samples) == read
    assert samples.counts == counts
    assert len(held_out) == 0


def test_truncation_error_names_the_record() -> None:
    with pytest.raises(UserError) as caught:
        load([SHORT, LONG], truncation="error", max_tokens=4)
    assert str(caught.value) == (
        "data.jsonl:2:1: 9 tokens, more than data.max_tokens: 4: raise it, or set data.truncation to right, left or drop"
    )
    with pytest.raises(UserError) as caught:
        load([SHORT, LATE], truncation="error", max_tokens=4)
    assert str(caught.value) == (
        "data.jsonl:2:1: the prompt has 6 tokens, data.max_tokens is 4: nothing of the answer is left: raise it, or set "
        "data.truncation to left or drop"
    )


@pytest.mark.parametrize("truncation", ["error", "drop", "right", "left", "split"])
def test_what_fits_is_not_touched(truncation: str) -> None:
    samples, _ = load([SHORT, LONG], truncation=truncation, max_tokens=9)
    assert unpacked(samples) == [SHORT_READ, ([*range(10, 19)], [0, 0, 0, 1, 1, 1, 1, 1, 1], 2)]
    assert samples.counts == Counts(2, truncated=0, dropped=0, first_cut=None)


def test_the_first_cut_is_the_first_record_that_lost_anything() -> None:
    samples, _ = load([LATE, LONG], truncation="right", max_tokens=4)
    assert samples.counts == Counts(2, truncated=1, dropped=1, first_cut="data.jsonl:1", notes={LONG_PROMPT: 1})


def test_all_dropped_is_an_error() -> None:
    with pytest.raises(UserError) as caught:
        load([LATE, LATE], truncation="right", max_tokens=4)
    assert str(caught.value) == (
        "data.jsonl: nothing to learn from in 2 records: 2 dropped, since their prompt alone fills data.max_tokens: 4; raise "
        "data.max_tokens, or set data.truncation: left"
    )
    with pytest.raises(UserError) as caught:
        load([LONG, LATE], truncation="drop", max_tokens=4)
    assert str(caught.value) == (
        "data.jsonl: nothing to learn from in 2 records: 2 are longer than data.max_tokens: 4; raise data.max_tokens, or set "
        "data.truncation: left"
    )


def test_arrays_have_the_documented_types() -> None:
    [part] = load([SHORT, LONG])[0].parts
    types = {
        name: getattr(part, name).dtype.str for name in ("tokens", "weights", "offsets", "content", "file", "line")
    }
    assert types == {
        "tokens": "<i4",
        "weights": "<f4",
        "offsets": "<i8",
        "content": "<u8",
        "file": "<i4",
        "line": "<i8",
    }
    assert part.offsets.tolist() == [0, 4, 13]
    assert (part.files, part.max_token, part.group_size) == (("data.jsonl",), 18, 1)
    assert not part.tokens.flags.writeable


MANY = [(f"{n} {n * n}", f"{3 * n} {n + 7}") for n in range(200)]


def sides(records: Records, fraction: float) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    train, held_out = load(records, eval_fraction=fraction)
    return tuple({tuple(tokens) for tokens, _, _ in unpacked(part)} for part in (train, held_out))  # type: ignore[return-value]


def test_the_held_out_share_is_chosen_by_content_hash() -> None:
    train, held_out = load(MANY, eval_fraction=0.2)
    limit = 0.2 * 2**64
    assert (train.parts[0].content[train.chosen[0]] >= limit).all()
    assert (held_out.parts[0].content[held_out.chosen[0]] < limit).all()
    assert len(train) + len(held_out) == 200
    assert 20 < len(held_out) < 60


def test_the_side_does_not_depend_on_the_tokens() -> None:
    """Another template, tokenizer or objective must not carry held-out records into training."""
    lines = [{line for _, _, line in unpacked(part)} for part in load(MANY, eval_fraction=0.2)]
    assert lines == [{line for _, _, line in unpacked(part)} for part in load(MANY, form="text", eval_fraction=0.2)]


def test_a_sample_keeps_its_side_when_records_are_added_or_reordered() -> None:
    train, held_out = sides(MANY, 0.2)
    shuffled = random.Random(0).sample(MANY, len(MANY))
    assert sides(shuffled, 0.2) == (train, held_out)
    more_train, more_held_out = sides(shuffled[:50] + [("5", str(n)) for n in range(100)] + shuffled[50:], 0.2)
    assert train < more_train
    assert held_out < more_held_out
    smaller_train, smaller_held_out = sides(MANY, 0.1)
    assert smaller_held_out < held_out
    assert train < smaller_train


def test_both_sides_stay_in_file_order_with_their_places() -> None:
    train, held_out = load(MANY, eval_fraction=0.2)
    for part in (train, held_out):
        lines = [line for _, _, line in unpacked(part)]
        assert lines == sorted(lines)
        assert [tokens[0] for tokens, _, _ in unpacked(part)] == [line - 1 for line in lines]


def test_at_most_max_eval_samples_are_held_out_and_the_rest_is_not_trained_on() -> None:
    train, held_out = load(MANY, eval_fraction=0.2)
    same_train, fewer = load(MANY, eval_fraction=0.2, max_eval_samples=5)
    assert unpacked(same_train) == unpacked(train)
    lowest = sorted(held_out.parts[0].content[held_out.chosen[0]])[:5]
    assert sorted(fewer.parts[0].content[fewer.chosen[0]]) == lowest


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(UserError) as caught:
        load([SHORT, LONG], eval_fraction=1.0)
    assert str(caught.value) == "data.eval_fraction: 1.0 leaves nothing of the data to train on"


def test_an_eval_file_is_used_whole_and_nothing_else_is_held_out() -> None:
    write("held.jsonl", MANY[:30])
    train, held_out = load(MANY, eval_fraction=0.5, eval_path="held.jsonl")
    assert len(train) == 200
    assert unpacked(held_out) == unpacked(load(MANY[:30])[0])
    assert held_out.place(2) == Place("held.jsonl", 3)
    _, fewer = load(MANY, eval_path="held.jsonl", max_eval_samples=4)
    assert len(fewer) == 4


FEW = [SHORT, LONG, LATE]


def test_the_fingerprint_changes_with_every_token_weight_border_and_order() -> None:
    changed = [
        [SHORT, ("10 11 12", "13 14 15 16 17 19"), LATE],
        [SHORT, ("10 11", "12 13 14 15 16 17 18"), LATE],
        [SHORT, LONG, ("20 21 22 23 24", "26")],
        [LONG, SHORT, LATE],
        FEW[:2],
    ]
    prints = [load(records)[0].fingerprint() for records in [FEW, *changed]]
    assert len(set(prints)) == len(prints)
    assert load(FEW)[0].fingerprint() == prints[0]


def test_the_fingerprint_is_that_of_the_content() -> None:
    """Stable between releases: a run of today must be resumable tomorrow."""
    samples, _ = load(FEW)
    write("other.jsonl", FEW)
    assert load_path("other.jsonl")[0].fingerprint() == samples.fingerprint() == "a859e767f3687966c681ae2b88b313c6"


def test_select() -> None:
    samples, _ = load(FEW)
    chosen = samples.select([np.array([True, False, True])])
    assert unpacked(chosen) == [unpacked(samples)[0], unpacked(samples)[2]]
    assert chosen.lengths().tolist() == [[4], [7]]
    assert chosen.counts == samples.counts


def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the data sets that are tokenized from now on, not taken from the cache."""
    names: list[str] = []
    write_part = prepare._write
    monkeypatch.setattr(
        prepare,
        "_write",
        lambda folder, source, *rest: (names.append(source.name), write_part(folder, source, *rest))[1],
    )
    return names


def age(*files: str) -> None:
    for file in files:
        os.utime(file, (1_000_000_000, 1_000_000_000))


def test_a_second_start_takes_the_samples_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    names = made(monkeypatch)
    first, _ = load(FEW)
    again, _ = load(FEW)
    assert names == ["data.jsonl"]
    assert (unpacked(again), again.counts, again.fingerprint()) == (unpacked(first), first.counts, first.fingerprint())


CHANGES: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": 5},
    "truncation": {"truncation": "left"},
    "objective": {"form": "text"},
    "as_chat": {"as_chat": False},
    "columns": {"columns": {"prompt": "prompt"}},
    "template variables": {"template_variables": {"a": 1}},
    "special tokens": {"parse_special_tokens": True},
    "learn": {"learn": "all"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_tokens_is_part_of_the_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = made(monkeypatch)
    load(FEW)
    load(FEW, **CHANGES[name])
    assert len(names) == 2


def test_what_does_not_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    names = made(monkeypatch)
    load(FEW)
    for settings in ({"eval_fraction": 0.3}, {"repeat": 2.0}, {"weight": 3.0}, {"mix": "interleave"}, {"pack": True}):
        load(FEW, **settings)
    assert len(names) == 1


def test_changed_data_a_changed_template_and_a_changed_tokenizer_are_new_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    names = made(monkeypatch)
    load(FEW)
    load([*FEW, SHORT])
    assert len(names) == 2
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages }}")
    load(FEW)
    assert len(names) == 3
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    other.add_tokens(["x"])
    monkeypatch.setattr(f"{__name__}.tokenizer", other)
    load(FEW)
    assert len(names) == 4


def test_the_bytes_decide_not_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    names = made(monkeypatch)
    load(FEW)
    age("data.jsonl")
    load_path("data.jsonl")
    load_path("data.jsonl")
    assert len(names) == 1
    assert len(list((cache_folder() / "files").iterdir())) == 1  # the hash is remembered, once the file is old enough
    write("data.jsonl", [*FEW, SHORT])
    age("data.jsonl")
    assert len(load_path("data.jsonl")[0]) == 4


def test_a_preparation_that_dies_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError):
        load([SHORT, LONG], truncation="error", max_tokens=4)
    assert list((cache_folder() / "data").iterdir()) == []


def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [*MANY, LONG, LATE, SHORT]
    whole = unpacked(load(records, truncation="split", max_tokens=3)[0])
    for size in (1, 7):
        monkeypatch.setattr(prepare, "CHUNK", size)
        monkeypatch.setenv("TUNESMITH_CACHE", str(Path.cwd() / f"cache{size}"))
        assert unpacked(load(records, truncation="split", max_tokens=3)[0]) == whole


def test_where_the_fast_tokenizer_disagrees_all_is_done_by_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 1)
    tried: list[bool] = []

    class Disagrees(Encoder):
        def __init__(self, tokenizer: Any, fast: bool = True) -> None:
            super().__init__(tokenizer, fast)
            self.calls = 0
            tried.append(fast)

        def encode(self, batch: Any) -> Any:
            self.calls += 1
            if tried[-1] and self.calls == 3:
                raise FastDisagrees
            return super().encode(batch)

    monkeypatch.setattr(prepare, "Encoder", Disagrees)
    samples, _ = load(FEW)
    assert tried == [True, False]
    assert unpacked(samples) == [
        SHORT_READ,
        ([*range(10, 19)], [0.0] * 3 + [1.0] * 6, 2),
        ([*range(20, 27)], [0.0] * 6 + [1.0], 3),
    ]
    assert samples.counts.records == 3


def test_bad_records_are_skipped_counted_and_named() -> None:
    write("data.jsonl", FEW)
    with Path("data.jsonl").open("a") as file:
        file.write('{"prompt": "1", "completion": 2}\n{bad\n')
    with pytest.raises(UserError):
        load_path("data.jsonl")
    samples, _ = load_path("data.jsonl", bad_records="skip")
    assert len(samples) == 3
    assert samples.counts.skipped == 2
    assert samples.counts.first_skipped == (
        "data.jsonl:4:31 completion: expected text, found int: write it as a string"
    )


def test_several_sets_are_numbered_through() -> None:
    write("data.jsonl", [SHORT])
    write("more.jsonl", [LONG, LATE])
    config = DataConfig.model_validate(
        {"sets": ["more.jsonl", "data.jsonl"], "eval_fraction": 0.0, "truncation": "right"}
    )
    samples, _ = load_samples(config, Renderer(tokenizer, config))
    assert [samples.place(n) for n in range(3)] == [
        Place("more.jsonl", 1),
        Place("more.jsonl", 2),
        Place("data.jsonl", 1),
    ]
    assert [tokens[0] for tokens, _, _ in unpacked(samples)] == [10, 20, 1]
    assert samples.counts.records == 3


def preference(name: str) -> None:
    records = [
        {"prompt": "1 2 ", "chosen": "3 4", "rejected": "5"},
        {"prompt": "6 7 8 9 ", "chosen": "10", "rejected": "11"},
        {"prompt": "12 ", "chosen": "13 14 15 16", "rejected": "17"},
    ]
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("truncation", "read", "dropped"),
    [
        ("drop", [[1, 2, 3, 4], [1, 2, 5]], 2),
        ("right", [[1, 2, 3, 4], [1, 2, 5], [12, 13, 14, 15], [12, 17]], 1),
        ("left", [[1, 2, 3, 4], [1, 2, 5], [7, 8, 9, 10], [7, 8, 9, 11]], 1),
    ],
)
def test_pairs_are_cut_and_dropped_together(truncation: str, read: list[list[int]], dropped: int) -> None:
    preference("pairs.jsonl")
    config = DataConfig(path="pairs.jsonl", eval_fraction=0.0, truncation=truncation, max_tokens=4)  # type: ignore[arg-type]
    samples, _ = load_samples(config, Renderer(tokenizer, config, "pairs"))
    assert [tokens.tolist() for n in range(len(samples)) for tokens, _ in samples.sequences(n)] == read
    assert samples.counts.dropped == dropped
    assert samples.group_size == 2


def test_of_a_pair_sft_learns_the_chosen_answer_and_says_so() -> None:
    preference("pairs.jsonl")
    samples, _ = load_path("pairs.jsonl")
    assert [tokens for tokens, _, _ in unpacked(samples)] == [[1, 2, 3, 4], [6, 7, 8, 9, 10], [12, 13, 14, 15, 16]]
    assert samples.counts.notes == {"preference pairs of which the chosen answer is learnt": 3}


def test_undesirable_answers_are_left_out_and_counted() -> None:
    records = [
        {"prompt": "1 ", "completion": "2 3", "label": True},
        {"prompt": "1 ", "completion": "4", "label": False},
    ]
    Path("kto.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    samples, _ = load_path("kto.jsonl")
    assert [tokens for tokens, _, _ in unpacked(samples)] == [[1, 2, 3]]
    assert samples.counts.notes == {"answers marked as undesirable, left out": 1}
    config = DataConfig(path="kto.jsonl")
    with pytest.raises(UserError, match="no preference pair: looked for chosen and rejected"):
        load_samples(config, Renderer(tokenizer, config, "pairs"))


def test_counts_add_up() -> None:
    one = Counts(3, 1, 1, 0, "a:1", None, 2, {"x": 1})
    other = Counts(2, 0, 1, 4, "b:1", "bad", 1, {"x": 2, "y": 1})
    assert one + other == Counts(5, 1, 2, 4, "a:1", "bad", 3, {"x": 3, "y": 1})


def test_a_folder_of_the_cache_that_is_not_whole_is_made_anew() -> None:
    load(FEW)
    [folder] = (cache_folder() / "data").iterdir()
    (folder / "part.json").unlink()
    assert len(load(FEW)[0]) == 3


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="the cache of tokenized data cannot be written"):
        load(FEW)
