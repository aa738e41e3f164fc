import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from tests.conftest import CHATS
from tunesmith.cli import app
from tunesmith.config import RunConfig
from tunesmith.config_file import dump_config, load_config
from tunesmith.data.pack import collate
from tunesmith.errors import UserError
from tunesmith.inspect.show import open_packed
from tunesmith.run import build
from tunesmith.types import Batch

MAX_TOKENS = 100


def chat(*turns: tuple[str, str], **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **keys}


LONG_TEXT = " ".join(f"w{n}" for n in range(60))
FRANCE = chat(("user", "Capital of France?"), ("assistant", "Paris."))
TRAIN: list[Any] = [
    FRANCE,
    FRANCE,  # 2: an exact duplicate
    '{"messages": [',  # 3: no JSON
    chat(("user", "Hi"), ("asistant", "Ho")),  # 4: unknown role
    chat(("user", "a"), ("user", "b"), ("assistant", "c")),  # 5: out of order
    chat(("user", "Count!"), ("assistant", "one two three " * 40)),  # 6: too long, truncated
    chat(("user", ""), ("assistant", "Пусто."), ("user", "And?"), ("assistant", "好.")),  # 7: an empty turn
    chat(("user", "Nobody answers.")),  # 8: nothing to learn
    chat(("user", 5), ("assistant", "x")),  # type: ignore[arg-type]  # 9: no text
    chat(("user", "why " * 150), ("assistant", "lost")),  # 10: the answer is cut off, dropped
    {"messages": [{"role": "user", "content": "w"}, {"role": "assistant", "content": "half", "weight": 0.5}]},  # 11
    chat(("user", "List."), ("assistant", LONG_TEXT)),  # 12
]
HELD_OUT = [
    chat(("user", "Capital of France?"), ("assistant", "It is Paris, on the Seine.")),
    chat(("user", "List!"), ("assistant", LONG_TEXT + " end")),
    chat(("user", "Something else entirely?"), ("assistant", "No.")),
]


def write(file: Path, records: list[Any]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    file.write_text("".join(line + "\n" for line in lines))
    return file


@pytest.fixture
def run_yaml(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Writes run.yaml into the current folder."""
    monkeypatch.chdir(tmp_path)

    def make(**sections: Any) -> str:
        Path("run.yaml").write_text(dump_config(make_config(**sections)))
        return "run.yaml"

    return make


@pytest.fixture
def faulty(run_yaml: Callable[..., str], tmp_path: Path) -> str:
    """A configuration whose data has one of each fault."""
    write(tmp_path / "train.jsonl", TRAIN)
    write(tmp_path / "held.jsonl", HELD_OUT)
    return run_yaml(data={"path": "train.jsonl", "eval_path": "held.jsonl", "max_tokens": MAX_TOKENS})


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["data", *arguments], catch_exceptions=False)


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        invoke(*arguments)
    return str(caught.value)


ERRORS = [
    "train.jsonl:3:15: not JSON: Expecting value: one object per line is expected",
    "train.jsonl:4:59 messages[1].role: unknown role 'asistant': did you mean assistant?",
    "train.jsonl:5:58 messages[1].role: roles out of order: user after user: join the two into one turn",
    "train.jsonl:8:1: nothing to learn from: no answer in it: give an assistant turn or completion that is not empty, or "
    "remove the record",
    "train.jsonl:9:43 messages[0].content: expected text, found int: write it as a string",
]


def table(text: str) -> dict[str, list[str]]:
    """The rows of the table: "group name" → a cell for each column."""
    rows, group = {}, ""
    for line in text.splitlines():
        if match := re.match(r"(\w+)?  +([A-Za-z0-9 ]+?)  +([\d,.%–< ]+)$", line):
            group = match[1] or group
            rows[f"{group} {match[2]}"] = re.split(r"\s{2,}", match[3].strip())
    return rows


def lengths(tokenizer: Any, records: list[Any]) -> list[int]:
    """Tokens of the conversations, by the tokenizer alone."""
    texts = [tokenizer.apply_chat_template(record["messages"], tokenize=False) for record in records]
    return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def test_check_names_every_error_and_counts_everything(faulty: str, tokenizer: Any) -> None:
    result = invoke("check", faulty)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[:6] == [*ERRORS, ""]
    good = lengths(tokenizer, [TRAIN[n] for n in (0, 1, 5, 6, 9, 10, 11)])
    held = lengths(tokenizer, HELD_OUT)
    before, short = sum(good), [n for n in good if n <= MAX_TOKENS]
    assert len(short) == 4
    assert max(held) > MAX_TOKENS
    kept = [sum(short) + 2 * MAX_TOKENS, sum(min(n, MAX_TOKENS) for n in held)]
    rows = table(result.stdout)
    assert {name: cells for name, cells in rows.items() if name.split()[0] not in ("length", "scripts")} == {
        "records read": ["12", "3", "15"],
        "records bad": ["5", "0", "5"],
        "records with role errors": ["2", "0", "2"],
        "records exact duplicates": ["1", "0", "1"],
        "samples to learn from": ["6", "3", "9"],
        "samples truncated": ["2", "1", "3"],
        "samples dropped": ["1", "0", "1"],
        "tokens before truncation": [f"{n:,}" for n in (before, sum(held), before + sum(held))],
        "tokens to train on": [f"{n:,}" for n in (*kept, sum(kept))],
        "tokens supervised": rows["tokens supervised"],
        "turns median": ["2", "2", "2"],
        "turns maximum": ["4", "2", "4"],
        "turns empty": ["1", "0", "1"],
    }
    ordered = sorted(good)
    assert rows["length minimum"][0] == f"{ordered[0]}"
    assert rows["length median"][0] == f"{ordered[3]}"
    assert rows["length 90th percentile"][0] == rows["length maximum"][0] == f"{ordered[-1]:,}"
    held_text = "".join(message["content"] for record in HELD_OUT for message in record["messages"])
    letters, digits = sum(map(str.isalpha, held_text)), sum(map(str.isdigit, held_text))
    assert rows["scripts Latin"][1] == f"{letters / (letters + digits):.1%}"
    assert rows["scripts other"][1] == "–"


def test_the_supervised_share_is_that_of_the_samples(run_yaml: Callable[..., str]) -> None:
    config = load_config(run_yaml(data={"eval_fraction": 0.0}))
    samples = open_packed(config).samples
    weights = np.concatenate([weights for n in range(len(samples)) for _, weights in samples.sequences(n)])
    result = invoke("check", "run.yaml")
    assert result.exit_code == 0
    assert table(result.stdout)["tokens supervised"] == [f"{(weights != 0).mean():.1%}"]
    assert table(result.stdout)["tokens to train on"] == [f"{len(weights):,}"]


def test_check_finds_what_both_sides_share(faulty: str) -> None:
    text = invoke("check", faulty).stdout
    assert "Held out: 3 records of data.eval_path\n" in text
    assert "  1 whose prompt is also trained on\n    held.jsonl:1 ~ train.jsonl:1\n" in text
    near = re.search(
        r"  1 that are nearly the same as one that is trained on\n    held.jsonl:2 ~ train.jsonl:12 \((\d+)%", text
    )
    assert near is not None
    assert int(near[1]) >= 85


def test_check_of_good_data_says_so_and_exits_with_0(run_yaml: Callable[..., str]) -> None:
    result = invoke("check", run_yaml(data={"eval_fraction": 0.0}))
    assert result.exit_code == 0
    assert table(result.stdout)["records read"] == [str(len(CHATS))]
    assert "all within data.max_tokens: 128\n" in result.stdout
    assert "Held out" not in result.stdout
    assert result.stdout.splitlines()[-1] == (
        "next: nothing to mend; see what the model will get with tunesmith data show, or start with tunesmith train"
    )


def test_the_last_line_says_what_to_do(faulty: str, tokenizer: Any) -> None:
    def last(*arguments: str) -> str:
        return invoke("check", faulty, *arguments).stdout.splitlines()[-1]

    assert last() == "next: mend the 5 bad records, or leave them out with data.bad_records=skip"
    assert (
        last("data.bad_records=skip") == "next: train, without the 5 bad records (data.bad_records: skip), or mend them"
    )
    write(Path("train.jsonl"), [TRAIN[0], TRAIN[5]])
    longest = max(lengths(tokenizer, [TRAIN[5], *HELD_OUT]))
    assert last() == (
        f"next: data.max_tokens={longest} would cut nothing; 99 % of the samples have {longest} tokens or fewer"
    )
    assert last(f"data.max_tokens={longest}").startswith("next: the held-out loss will flatter")


def test_limit(faulty: str) -> None:
    lines = invoke("check", faulty, "--limit", "2").stdout.splitlines()
    assert lines[:4] == [*ERRORS[:2], "… and 3 more (--limit shows more)", ""]


def test_truncation_error_is_an_error_of_the_record(faulty: str) -> None:
    write(Path("train.jsonl"), [TRAIN[0], TRAIN[5]])
    result = invoke("check", faulty, "data.truncation=error", "data.eval_path=null", "data.eval_fraction=0")
    assert result.exit_code == 1
    assert result.stdout.startswith("train.jsonl:2:1: ")
    assert "more than data.max_tokens: 100: raise it" in result.stdout.splitlines()[0]
    assert table(result.stdout)["records bad"] == ["1"]


def test_quarantine_holds_each_bad_record(faulty: str) -> None:
    result = invoke("check", faulty, "--quarantine", "bad.jsonl")
    assert result.exit_code == 1
    expected = []
    for error in ERRORS:
        place, _, reason = error.partition(": ")
        where, _, path = place.partition(" ")
        line = int(where.split(":")[1])
        record = TRAIN[line - 1]
        reason = f"{path}: {reason}" if path else reason
        expected.append({"error": reason, "file": "train.jsonl", "line": line, "record": record})
    assert [json.loads(line) for line in Path("bad.jsonl").read_text().splitlines()] == expected
    assert "bad records: bad.jsonl\n" in result.stdout
    assert result.stdout.splitlines()[-1] == (
        "next: mend the 5 bad records (copied to bad.jsonl), or leave them out with data.bad_records=skip"
    )
    before = Path("bad.jsonl").read_bytes()
    assert refusal("check", faulty, "--quarantine", "bad.jsonl") == (
        "bad.jsonl: exists already; choose another file for the bad records"
    )
    assert Path("bad.jsonl").read_bytes() == before


def test_no_quarantine_for_good_data(run_yaml: Callable[..., str]) -> None:
    assert invoke("check", run_yaml(), "--quarantine", "bad.jsonl").exit_code == 0
    assert not Path("bad.jsonl").exists()


def test_a_broken_file_does_not_hide_the_others(faulty: str) -> None:
    Path("broken.json").write_text('[{"text": "fine"}, {"text": ]')
    write(Path("empty.jsonl"), ["", ""])
    write(Path("good.jsonl"), [FRANCE])
    sets = "data.sets=[broken.json, empty.jsonl, good.jsonl]"
    Path("run.yaml").write_text(Path("run.yaml").read_text().replace("  path: train.jsonl\n", "", 1))
    result = invoke("check", faulty, sets, "data.eval_path=null", "--quarantine", "bad.jsonl")
    assert result.exit_code == 1
    first, second = result.stdout.splitlines()[:2]
    assert first.startswith("broken.json:1:29: not JSON: ")
    assert second.startswith("empty.jsonl: no records")
    assert table(result.stdout)["samples to learn from"] == ["1", "0", "1", "2"]


def test_png(faulty: str) -> None:
    invoke("check", faulty, "--png", "lengths.png")
    assert Path("lengths.png").read_bytes().startswith(b"\x89PNG")
    assert refusal("check", faulty, "--png", "nowhere/lengths.png").startswith(
        "nowhere/lengths.png: could not be written"
    )


def test_nothing_is_cached_and_no_weights_are_read(
    faulty: str, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model_folder("llama").iterdir():
        (bare / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    assert invoke("check", faulty, f"model.path={bare}").exit_code == 1
    assert not (tmp_path / "cache" / "data").exists()
    assert invoke("show", faulty, f"model.path={bare}", "data.bad_records=skip").exit_code == 0


def rows_of(batch: Batch, tokenizer: Any) -> list[dict[str, Any]]:
    """Tokens, weights and sequences of each row, straight from the batch."""
    return [
        {"tokens": tokens.tolist(), "weights": weights.tolist(), "sequence": sequence.tolist()}
        for tokens, weights, sequence in zip(batch.tokens_BT, batch.weights_BT, batch.sequence_BT, strict=True)
    ]


def without_text(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("tokens", "weights", "sequence")}


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_as_json_is_the_batch_of_the_run(run_yaml: Callable[..., str], tokenizer: Any, pack: bool) -> None:
    run = build(load_config(run_yaml(data={"pack": pack})))
    assert run.pack is pack
    for step in range(run.steps):
        result = invoke("show", "run.yaml", "--batch", str(step), "--json")
        rows = json.loads(result.stdout)
        assert [without_text(row) for row in rows] == rows_of(run.data(step), tokenizer)
        for row in rows:
            for n in set(row["sequence"]) - {-1}:
                own = [column for column, sequence in enumerate(row["sequence"]) if sequence == n]
                text = tokenizer.decode([row["tokens"][column] for column in own], clean_up_tokenization_spaces=False)
                assert "".join(row["text"][column] for column in own) == text
            assert all(text == "" for text, n in zip(row["text"], row["sequence"], strict=True) if n == -1)


def test_packing_can_be_asked_for(run_yaml: Callable[..., str], tokenizer: Any) -> None:
    config = load_config(run_yaml())
    for flag, pack in (("--packed", True), ("--no-packed", False)):
        rows = json.loads(invoke("show", "run.yaml", "--batch", "1", "--json", flag).stdout)
        assert [without_text(row) for row in rows] == rows_of(open_packed(config, pack).batches(1), tokenizer)
        assert len(rows) == (4 if not pack else len(open_packed(config, True).batches(1).tokens_BT))


def test_a_sample_as_json(run_yaml: Callable[..., str], tokenizer: Any) -> None:
    data = open_packed(load_config(run_yaml()))
    for n in range(len(data.samples)):
        row = json.loads(invoke("show", "run.yaml", "--sample", str(n), "--json").stdout)
        assert without_text(row) == rows_of(collate(data.samples, [n], 128, False), tokenizer)[0]
        question, answer = CHATS[data.samples.place(n).line - 1]
        chatml = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        assert "".join(row["text"]) == chatml
        learnt = "".join(text for text, weight in zip(row["text"], row["weights"], strict=True) if weight)
        assert learnt == f"{answer}<|im_end|>"
    assert invoke("show", "run.yaml", "--json").stdout == invoke("show", "run.yaml", "--sample", "0", "--json").stdout


def test_the_samples_of_a_record(run_yaml: Callable[..., str], chat_file: Path) -> None:
    data = open_packed(load_config(run_yaml()))
    for samples, what in ((data.samples, "training"), (data.held_out, "held-out")):
        place = samples.place(1)
        for name in (str(chat_file), chat_file.name):
            text = invoke("show", "run.yaml", "--place", f"{name}:{place.line}").stdout
            assert text.startswith(f"sample 1 of {len(samples)} {what} samples\n")
            assert CHATS[place.line - 1][0] in text
    assert refusal("show", "run.yaml", "--place", "chats.jsonl:999") == (
        "--place chats.jsonl:999: no sample comes from there; tunesmith data check tells what is left out, and why"
    )
    assert refusal("show", "run.yaml", "--place", "chats.jsonl") == (
        "--place chats.jsonl: expected FILE:LINE, such as train.jsonl:17"
    )


def test_what_is_not_there_is_refused(run_yaml: Callable[..., str]) -> None:
    number = len(open_packed(load_config(run_yaml())).samples)
    assert refusal("show", "run.yaml", "--sample", "999") == (
        f"--sample 999: there are {number} training samples; give 0 to {number - 1}"
    )
    assert refusal("show", "run.yaml", "--batch", "4") == "--batch 4: the run has 4 batches; give 0 to 3"
    assert refusal("show", "run.yaml", "--batch", "1", "--sample", "1") == "give one of --sample, --place and --batch"


def test_a_sample_in_the_terminal(faulty: str) -> None:
    text = invoke("show", faulty, "data.bad_records=skip", "--place", "train.jsonl:11").stdout
    assert text.splitlines() == [
        "sample 4 of 6 training samples",
        "train.jsonl",
        "⟦learnt⟧  ⟦0.5: learnt with loss weight 0.5⟧  all else is not learnt  ⁶⁴position",
        "",
        "── sequence 0 · 16 tokens, 5 learnt · sample 4 · train.jsonl:11",
        "<|im_start|>user⏎",
        "w<|im_end|>⏎",
        "<|im_start|>assistant⏎",
        "⟦0.5: half<|im_end|>⟧⏎",
    ]


@pytest.mark.parametrize("truncation", ["right", "left", "split"])
def test_what_was_cut_off_is_shown(faulty: str, tokenizer: Any, truncation: str) -> None:
    write(Path("train.jsonl"), [TRAIN[5]])
    whole = lengths(tokenizer, [TRAIN[5]])[0]
    arguments = [f"data.truncation={truncation}", "--html", "page.html"]
    invoke("show", faulty, *arguments)
    kept = invoke("show", faulty, *arguments[:1], "--json").stdout
    page = Path("page.html").read_text()
    assert f"{whole - MAX_TOKENS:,} tokens {'are in other samples' if truncation == 'split' else 'lost'}" in page
    shown = Spans()
    shown.feed(page)
    lost = "".join(text for classes, text in shown.spans if classes == "x").replace("⏎", "")
    mine = "".join(json.loads(kept)["text"])
    text = tokenizer.apply_chat_template(TRAIN[5]["messages"], tokenize=False)
    assert (lost + mine if truncation == "left" else mine + lost) == text


class Spans(HTMLParser):
    """Checks that tags are closed in order, and collects the tokens and what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.spans: list[tuple[str, str]] = []
        self.loads: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.loads += [tag] if tag in ("script", "link", "img", "iframe") or {"src", "href"} & set(found) else []
        if tag != "meta":
            self.open.append((tag, found.get("class") or ""))
        if tag == "span" and "title" in found:
            self.titles.append(str(found["title"]))
            self.spans.append((found.get("class") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "span" and self.spans and self.titles and self.spans[-1][1] == "":
            self.spans[-1] = (self.spans[-1][0], data)


def test_the_page_needs_nothing_else_and_escapes_the_data(faulty: str, tokenizer: Any) -> None:
    evil = "<script src='http://x'>alert(\"1\")</script> & </div> é\x1b[31m"
    write(Path("train.jsonl"), [chat(("user", evil), ("assistant", evil))])
    result = invoke("show", faulty, "--html", "page.html", "data.max_tokens=300")
    assert "\x1b[31m" not in result.stdout
    page = Path("page.html").read_text()
    parsed = Spans()
    parsed.feed(page)
    assert parsed.loads == []
    assert parsed.open == []
    assert "<script" not in page
    assert "url(" not in page
    assert "@import" not in page
    ids = json.loads(invoke("show", faulty, "--json", "data.max_tokens=300").stdout)
    assert parsed.titles == [
        f"token {token} · position {n} · weight {weight:g}"
        for n, (token, weight) in enumerate(zip(ids["tokens"], ids["weights"], strict=True))
    ]
    joined = "".join(text for _, text in parsed.spans)
    assert joined == "".join(ids["text"]).replace("\n", "⏎\n").replace("\x1b", "␛")
    assert evil.replace("\x1b", "␛") in joined
    learnt = [text for classes, text in parsed.spans if classes.startswith("l")]
    assert "".join(learnt) == evil.replace("\x1b", "␛") + "<|im_end|>"
    special = [text for classes, text in parsed.spans if "s" in classes.split()]
    assert special == ["<|im_start|>", "<|im_end|>"] * 2
    assert "prefers-color-scheme: dark" in page


def test_json_and_html_together_print_json_alone(run_yaml: Callable[..., str]) -> None:
    alone = invoke("show", run_yaml(), "--json").stdout
    assert invoke("show", "run.yaml", "--json", "--html", "page.html").stdout == alone
    assert Path("page.html").is_file()


def test_a_batch_shows_rows_borders_and_padding(run_yaml: Callable[..., str]) -> None:
    batch = open_packed(load_config(run_yaml()), True).batches(0)
    text = invoke("show", "run.yaml", "--batch", "0", "--packed", "--positions").stdout
    assert text.startswith("batch 0 of 4 · 4 samples\n")
    for row, sequence in enumerate(batch.sequence_BT):
        inside, padding = sorted(set(sequence[sequence >= 0].tolist())), int((sequence < 0).sum())
        number = f"{len(inside)} sequence{'s' * (len(inside) > 1)}"
        assert f"row {row} · {number} · {len(sequence) - padding} tokens, {padding} padding" in text
        for n in inside:
            learnt = int((batch.weights_BT[row][sequence == n] != 0).sum())
            assert f"── sequence {n} · {int((sequence == n).sum())} tokens, {learnt} learnt · sample " in text
    assert len(re.findall("(?<![⁰¹²³⁴⁵⁶⁷⁸⁹])⁰<", text)) == len(torch.unique(batch.sample_N))


def test_preference_pairs_stand_in_one_row(run_yaml: Callable[..., str], tmp_path: Path) -> None:
    pairs = [{"prompt": "Which?", "chosen": f"This {n}.", "rejected": "That."} for n in range(8)]
    write(tmp_path / "pairs.jsonl", pairs)
    result = invoke("show", run_yaml(data={"path": "pairs.jsonl", "eval_fraction": 0.0}), "--sample", "2")
    assert "This 2." in result.stdout
