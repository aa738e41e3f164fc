"""What `data check` and `data show` say of data for other objectives than sft."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import RunConfig
from tunesmith.errors import UserError
from tunesmith.inspect.bad_records import Errors
from tunesmith.inspect.check import check, examine
from tunesmith.inspect.pieces import Pieces
from tunesmith.inspect.show import _batch, make_view, open_packed, show
from tunesmith.inspect.terminal import strand_title

FEEDBACK = [{"prompt": "a", "completion": f"b {n}", "label": n % 2 == 0} for n in range(4)]
PAIRS = [{"prompt": "a", "chosen": "b", "rejected": f"c {n}", "margin": n} for n in range(3)]
FILMS = [{"text": f"film {n}", "label": n % 3} for n in range(6)]
STEPS = [{"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}]
WORDS = ["no", "yes", "maybe"]


@pytest.fixture
def config(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunConfig]:
    """The configuration of an objective with these records."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, records: list[dict[str, Any]], **data: Any) -> RunConfig:
        Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        data = {"path": "a.jsonl", "eval_fraction": 0.0, **data}
        return make_config(data=data, objective={"name": name}, train={"steps": 1, "batch_size": len(records)})

    return make


def titles(config: RunConfig) -> list[str]:
    """What stands above each sequence of the first batch, in the order of the records."""
    data = open_packed(config, pack=True)
    view = make_view(data, [_batch(data, 0)], Pieces(data.renderer.tokenizer))
    shown = [(strand.place.line, strand_title(strand)) for row in view.rows for strand in row.strands]
    return [title.split(" · ")[2].partition(", ")[2] for _, title in sorted(shown, key=lambda pair: pair[0])]


def test_titles(config: Callable[..., RunConfig]) -> None:
    assert titles(config("kto", FEEDBACK)) == ["desirable", "undesirable"] * 2
    assert titles(config("dpo", PAIRS)) == [
        "chosen", "rejected", "chosen, margin 1", "rejected, margin 1", "chosen, margin 2", "rejected, margin 2",
    ]  # fmt: skip
    assert titles(config("classify", FILMS[:2], labels=WORDS)) == [
        "class 0 of 'n', 'y', 'm'",
        "class 1 of 'n', 'y', 'm'",
    ]
    assert titles(config("prm", STEPS)) == [""]


@pytest.mark.parametrize(
    ("name", "records", "data", "line"),
    [
        ("kto", FEEDBACK, {}, "a.jsonl: 2 answers marked as desirable, 2 as undesirable"),
        ("dpo", PAIRS, {}, "a.jsonl: 2 of 3 pairs with a margin"),
        ("classify", FILMS, {"labels": WORDS}, "a.jsonl: samples of class 0: 2, 1: 2, 2: 2"),
    ],
)
def test_check_counts_labels(
    name: str,
    records: list[dict[str, Any]],
    data: dict[str, Any],
    line: str,
    config: Callable[..., RunConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    findings = check(config(name, records, **data))
    assert findings.errors.number == 0
    assert line in capsys.readouterr().out.splitlines()


RIGHT_STEPS = [{"prompt": "q", "completions": ["a", "b"], "labels": [True, True]}] * 2


@pytest.mark.parametrize(
    ("name", "records", "data", "said"),
    [
        ("kto", FEEDBACK[::2], {}, "a.jsonl: all 2 answers to train on are marked as desirable: "),
        ("classify", FILMS[1::3], {"labels": WORDS}, "a.jsonl: all 2 records to train on have the class yes: "),
        ("prm", RIGHT_STEPS, {}, "a.jsonl: all steps to train on are marked as right: "),
    ],
)
def test_data_that_says_one_thing_only(
    name: str, records: list[dict[str, Any]], data: dict[str, Any], said: str, config: Callable[..., RunConfig]
) -> None:
    one_sided = config(name, records, **data)
    findings, _ = examine(one_sided, Errors(limit=5))
    assert [str(error).startswith(said) for error in findings.errors.shown] == [True]
    with pytest.raises(UserError, match=said):
        open_packed(one_sided)


def test_the_lengths_are_those_of_the_samples(config: Callable[..., RunConfig]) -> None:
    wanted = config("classify", FILMS, labels=WORDS)
    findings, _ = examine(wanted, Errors(limit=5))
    assert list(findings.tallies[0].lengths) == open_packed(wanted).samples.lengths().ravel().tolist()
    assert findings.tallies[0].learnt == len(FILMS)


def test_what_a_question_lost_is_found(config: Callable[..., RunConfig]) -> None:
    wanted = config("classify", FILMS[:2], labels=WORDS, max_tokens=8)
    data = open_packed(wanted, pack=True)
    [row] = make_view(data, [_batch(data, 0)], Pieces(data.renderer.tokenizer)).rows[:1]
    strand = row.strands[0]
    whole = "".join(token.text for token in strand.before + strand.tokens)
    assert whole.startswith("<|im_start|>user\nfilm ")
    assert whole.endswith("<|im_start|>assistant\n" + strand.tokens[-1].text)
    assert (len(strand.tokens), strand.after) == (8, [])


def test_a_wrong_step_is_shown(config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    wanted = config("prm", STEPS)
    show(wanted, html=Path("a.html"))
    out = capsys.readouterr().out
    assert "⟦b⟧" in out
    assert "⟦-1: c⟧" in out
    assert '<span class="l w" style="--a:0.42"' in Path("a.html").read_text()
    show(wanted, as_json=True)
    assert json.loads(capsys.readouterr().out)["labels"] == {"0": 0.0}
