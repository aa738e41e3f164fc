import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.formats import FORMATS, find_format
from tunesmith.data.samples import read_examples
from tunesmith.errors import UserError
from tunesmith.types import Example, Message, Piece, Place

PLACE = Place("chats.jsonl", 7)
CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "Two and two?"),
    Message("assistant", "Four."),
    Message("user", "And one more?\nIn words."),
    Message("assistant", "Five."),
)

SAMPLES: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Two and two?"},
            {"role": "assistant", "content": "Four."},
            {"role": "user", "content": "And one more?\nIn words."},
            {"role": "assistant", "content": "Five."},
        ]
    },
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Two and two?"},
            {"from": "gpt", "value": "Four."},
            {"from": "human", "value": "And one more?\nIn words."},
            {"from": "gpt", "value": "Five."},
        ],
    },
    "alpaca": {
        "system": "Be brief.",
        "history": [["Two and two?", "Four."]],
        "instruction": "And one more?",
        "input": "In words.",
        "output": "Five.",
    },
    "prompt_completion": {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Two and two?"},
            {"role": "assistant", "content": "Four."},
            {"role": "user", "content": "And one more?\nIn words."},
        ],
        "completion": [{"role": "assistant", "content": "Five."}],
    },
    "text": {"text": "Two and two are four."},
}
"""One record for each format. A new format without one fails below."""

EXPECTED = {name: Example(PLACE, messages=CONVERSATION) for name in SAMPLES} | {
    "text": Example(PLACE, pieces=(Piece("Two and two are four.", learn=True),))
}

ALL_FORMS = (
    "messages: [{role, content}, …]; or conversations: [{from, value}, …]; or instruction, output (and input, system, "
    "history); or prompt, completion; or text"
)
KNOWN_ROLES = "system, developer, user, human, assistant, gpt, model, chatgpt, bot"
TURNS = "turns go [system] user assistant user assistant …"


def test_every_format_has_a_sample() -> None:
    assert list(SAMPLES) == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_sample_reads_as_the_canonical_conversation(name: str) -> None:
    assert FORMATS[name].read(SAMPLES[name], PLACE) == EXPECTED[name]


@pytest.mark.parametrize("name", FORMATS)
def test_auto_finds_the_format_and_no_other_takes_the_sample(name: str) -> None:
    assert find_format("auto", SAMPLES[name], PLACE) is FORMATS[name]
    assert [other for other, form in FORMATS.items() if form.matches(SAMPLES[name])] == [name]


def read(record: dict[str, Any], name: str = "auto") -> Example:
    return find_format(name, record, PLACE).read(record, PLACE)


def test_a_named_format_wins_over_what_auto_would_find() -> None:
    record = {**SAMPLES["messages"], "text": "Plain."}
    assert read(record) == EXPECTED["messages"]
    assert read(record, "text") == Example(PLACE, pieces=(Piece("Plain.", learn=True),))


def test_prompt_and_completion_as_strings_are_plain_text() -> None:
    assert read({"prompt": "2+2=", "completion": "4"}) == Example(
        PLACE, pieces=(Piece("2+2=", learn=False), Piece("4", learn=True))
    )


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"instruction": "Add.", "output": "4"}, [("user", "Add."), ("assistant", "4")]),
        ({"instruction": "", "input": "2+2", "output": "4"}, [("user", "2+2"), ("assistant", "4")]),
        (
            {"instruction": "Add.", "input": None, "output": "4", "system": None, "history": None},
            [("user", "Add."), ("assistant", "4")],
        ),
        (
            {"conversations": [{"from": role, "value": role.upper()} for role in ("system", "user", "bot", "human", "gpt")]},
            [("system", "SYSTEM"), ("user", "USER"), ("assistant", "BOT"), ("user", "HUMAN"), ("assistant", "GPT")],
        ),
        (
            {"messages": [{"role": role, "content": None} for role in ("developer", "user", "model")]},
            [("system", ""), ("user", ""), ("assistant", "")],
        ),
        ({"messages": [{"role": "user", "content": "Q"}]}, [("user", "Q")]),
    ],
)  # fmt: skip
def test_dialects(record: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    assert read(record) == Example(PLACE, messages=tuple(Message(*message) for message in messages))


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"foo": 1, "bar": 2}, f"a record of no known form: it has the keys foo, bar; expected {ALL_FORMS}"),
        ({}, f"a record of no known form: it has the keys (none); expected {ALL_FORMS}"),
        ({"prompt": "Q"}, f"a record of no known form: it has the keys prompt; expected {ALL_FORMS}"),
        (turns(), "a conversation without turns; give at least one user and one assistant message"),
        (turns(("system", "S")), "a conversation without turns; give at least one user and one assistant message"),
        (turns(("assistant", "A")), f"message 1: roles out of order: expected user, found assistant; {TURNS}"),
        (
            turns(("system", "S"), ("user", "Q"), ("user", "Q")),
            f"message 3: roles out of order: expected assistant, found user; {TURNS}",
        ),
        (
            turns(("user", "Q"), ("assistant", "A"), ("system", "S")),
            f"message 3: roles out of order: expected user, found system; {TURNS}",
        ),
        (turns(("user", "Q"), ("tool", "A")), f"message 2: unknown role 'tool'; known: {KNOWN_ROLES}"),
        (turns((5, "Q")), f"message 1: unknown role 5; known: {KNOWN_ROLES}"),
        (
            turns(("user", "Q"), ("assistant", [{"type": "text", "text": "A"}])),
            "message 2: content: expected text, found list; write it as a string",
        ),
        ({"messages": ["Q", "A"]}, "message 1: expected role and content, found 'Q'"),
        ({"messages": [{"role": "user"}]}, "message 1: expected role and content, found {'role': 'user'}"),
        ({"conversations": [{"from": "human"}]}, "message 1: expected from and value, found {'from': 'human'}"),
        (
            {"conversations": [{"from": "human", "value": 5}]},
            "message 1: value: expected text, found int; write it as a string",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "x"}]},
            f"message 1: unknown role 'function_call'; known: {KNOWN_ROLES}",
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}], "system": "S"},
            f"message 2: roles out of order: expected user, found system; {TURNS}",
        ),
        ({"instruction": "I", "output": 5}, "output: expected text, found int; write it as a string"),
        ({"instruction": 5, "output": "O"}, "instruction: expected text, found int; write it as a string"),
        ({"instruction": "I", "input": ["x"], "output": "O"}, "input: expected text, found list; write it as a string"),
        (
            {"instruction": "I", "output": "O", "history": [["Q", "A"], ["Q"]]},
            "history 2: expected [question, answer], found ['Q']",
        ),
        (
            {"instruction": "I", "output": "O", "history": [["Q", 5]]},
            "history 1: expected text, found int; write it as a string",
        ),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "completion": "A"},
            "prompt: expected text, found list; write it as a string",
        ),
        ({"prompt": "Q", "completion": 5}, "completion: expected text, found int; write it as a string"),
        ({"text": 5}, "text: expected text, found int; write it as a string"),
    ],
)
def test_a_bad_record_is_named_with_its_place_and_what_to_mend(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(record)
    assert str(caught.value) == f"chats.jsonl:7: {message}"


@pytest.mark.parametrize("history", [5, {"Q": "A"}, "Q A"])
def test_a_history_that_is_no_list_is_refused(history: Any) -> None:
    with pytest.raises(UserError, match=r"^chats\.jsonl:7: history"):
        read({"instruction": "I", "output": "O", "history": history})


def test_a_long_bad_turn_is_shown_cut() -> None:
    with pytest.raises(UserError) as caught:
        read({"messages": ["x" * 1000]})
    assert str(caught.value) == "chats.jsonl:7: message 1: expected role and content, found '" + "x" * 79


def test_a_record_that_is_not_of_the_named_format() -> None:
    with pytest.raises(UserError) as caught:
        find_format("messages", {"text": "Plain."}, PLACE)
    assert str(caught.value) == (
        "chats.jsonl:7: a record of no known form: it has the keys text; expected messages: [{role, content}, …]"
    )


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (SAMPLES["messages"], "data.jsonl:2: not of the form of the records before it; expected text"),
        ({"foo": 1}, f"data.jsonl:2: a record of no known form: it has the keys foo; expected {ALL_FORMS}"),
    ],
)
def test_all_records_have_the_form_of_the_first(
    second: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(json.dumps(SAMPLES["text"]) + "\n" + json.dumps(second) + "\n")
    with pytest.raises(UserError) as caught:
        list(read_examples("data.jsonl", "auto", "train"))
    assert str(caught.value) == message
