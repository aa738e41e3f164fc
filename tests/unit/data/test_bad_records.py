"""Every way that a record can be wrong that we know of, with the whole message: place, path, what is wrong, remedy."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import SetConfig
from tunesmith.data.examples import read_examples
from tunesmith.data.formats import FORMATS
from tunesmith.data.sources import find_sources
from tunesmith.errors import DataError, UserError

ALL_FORMS = "; or ".join(form.keys for form in FORMATS.values())


@dataclass(frozen=True)
class Bad:
    what: str
    settings: dict[str, Any]
    line: str
    """The record as it stands in the file."""
    message: str
    """Without the file's name."""


def read_table() -> list[Bad]:
    """Blocks of lines: what is bad; the settings, if any; the record; the message, in which ALL_FORMS is all forms' keys."""
    blocks = [block.splitlines() for block in Path(__file__).with_name("bad_records.txt").read_text().split("\n\n")]
    return [
        Bad(what, json.loads(settings[0]) if settings else {}, line, message.replace("ALL_FORMS", ALL_FORMS))
        for what, *settings, line, message in blocks
    ]


BAD = read_table()
IDS = [bad.what.replace(" ", "-") for bad in BAD]


def errors(file: Path, text: str, **settings: Any) -> list[UserError]:
    file.write_text(text)
    (source,) = find_sources(SetConfig(path=str(file), **settings))
    found: list[UserError] = []
    assert list(read_examples(source, report=lambda error, raw: found.append(error))) == []
    return found


def test_the_cases_differ() -> None:
    assert len(set(IDS)) == len(IDS) >= 40


def test_all_forms_are_shown() -> None:
    assert ALL_FORMS == (
        "chosen, rejected (and prompt, instruction or conversations); or prompt, completion, label (true or false; or "
        "messages with label); or prompt, completions, labels (true or false for each); or messages: [{role, content}, …]; "
        "or conversations: [{from, value}, …]; or instruction, "
        "output (and input, system, history); or prompt, completion; or text (or sentence1, sentence2), label; or query, "
        "choices, gold; or question, answer (and solution), or prompt alone; or text"
    )


@pytest.mark.parametrize("bad", BAD, ids=IDS)
def test_the_whole_message(bad: Bad, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    (error,) = errors(file, bad.line + "\n", **bad.settings)
    assert str(error) == f"{file}:{bad.message}"


@pytest.mark.parametrize("bad", BAD, ids=IDS)
def test_the_column_is_where_the_value_of_the_path_begins(bad: Bad, tmp_path: Path) -> None:
    (error,) = errors(tmp_path / "data.jsonl", bad.line + "\n", **bad.settings)
    value, path = json.loads(bad.line), error.path if isinstance(error, DataError) else ()
    for key in path:
        value = value[key]
    column = int(bad.message.split(":")[1].split()[0])
    found = json.JSONDecoder().raw_decode(bad.line[column - 1 :])[0]
    assert found == value or "surrogate" in bad.message  # that one is the reader's, which knows no path


@pytest.mark.parametrize("bad", BAD, ids=IDS)
def test_a_message_names_a_remedy_and_stays_short(bad: Bad) -> None:
    *_, remedy = bad.message.split(": ")
    assert remedy
    assert len(bad.message.replace(ALL_FORMS, "")) < 250


def test_a_later_record_of_another_form(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "T"}\n\n{"prompt": "Q", "completion": "A"}\n')
    (source,) = find_sources(SetConfig(path=str(file)))
    with pytest.raises(DataError) as caught:
        list(read_examples(source))
    assert str(caught.value) == (
        f"{file}:3:1: not of the form of the records before it, with the keys prompt, completion: expected text; "
        "put records of another form into a file of their own"
    )


def test_a_record_of_a_json_array(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    (error,) = errors(file, '[\n  {\n    "instruction": "I",\n    "output": 5\n  }\n]\n')
    assert str(error) == f"{file}:4:15 output: expected text, found int: write it as a string"


def test_a_row_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "data.tsv"
    (error,) = errors(file, "sentence\tlabel\nFine.\tgod\n", labels=("bad", "good"))
    assert str(error) == f"{file}:2:7 label: unknown label 'god': did you mean good?"


def test_a_table_without_names_of_its_columns(tmp_path: Path) -> None:
    file = tmp_path / "data.tsv"
    (error,) = errors(file, "What a fine day this is, is it not, my dear?\t1\nNo.\t0\n")
    assert isinstance(error, DataError)
    assert error.what == "a record of no known form, with the keys What a fine day this is, is it not, my d…, 1"
    assert error.remedy.endswith("; the first line of the file seems to be data: name its columns in data.header")


def test_the_column_that_columns_names_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    (error,) = errors(file, '{"question": "Q", "reply": 5}\n', columns={"instruction": "question", "output": "reply"})
    assert str(error) == f"{file}:1:28 reply: expected text, found int: write it as a string"
