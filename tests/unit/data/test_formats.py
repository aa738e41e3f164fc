import base64
import json
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config import SetConfig
from tunesmith.config_data import FormatName
from tunesmith.data.formats import FORMATS, check_format, find_format
from tunesmith.errors import DataError, UserError
from tunesmith.types import Example, Media, Message, Piece, Place, ToolCall

PLACE = Place("chats.jsonl", 7)
CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "Two and two?"),
    Message("assistant", "Four."),
    Message("user", "And one more?\nIn words."),
    Message("assistant", "Five."),
)
TURNS = [{"role": message.role, "content": message.content} for message in CONVERSATION]

SAMPLES: dict[str, dict[str, Any]] = {
    "preference": {"prompt": TURNS[:-1], "chosen": TURNS[-1:], "rejected": [{"role": "assistant", "content": "Six."}]},
    "unpaired": {"messages": TURNS, "label": False},
    "steps": {"prompt": TURNS[:-1], "completions": ["Four plus one", "is five."], "labels": [True, False]},
    "messages": {"messages": TURNS},
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
    "prompt_completion": {"prompt": TURNS[:-1], "completion": TURNS[-1:]},
    "classification": {"text": "Fine.", "label": "good"},
    "prompt_answer": {"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"},
    "text": {"text": "Two and two are four."},
}
"""One record for each format. A new format without one fails below."""

EXPECTED = {name: Example(PLACE, messages=CONVERSATION) for name in SAMPLES} | {
    "preference": Example(
        PLACE,
        messages=CONVERSATION,
        rejected=Example(PLACE, messages=(*CONVERSATION[:-1], Message("assistant", "Six."))),
    ),
    "unpaired": Example(PLACE, messages=CONVERSATION, desirable=False),
    "steps": Example(
        PLACE,
        messages=(*CONVERSATION[:-1], Message("assistant", "Four plus one\n\nis five.")),
        steps=(("Four plus one", True), ("is five.", False)),
    ),
    "classification": Example(PLACE, messages=(Message("user", "Fine."), Message("assistant", "good"))),
    "prompt_answer": Example(
        PLACE, messages=(Message("user", "Two and two?"), Message("assistant", "2 + 2 = 4\n#### 4")), answer="4"
    ),
    "text": Example(PLACE, pieces=(Piece("Two and two are four.", learn=True),)),
}


def read(record: dict[str, Any], **settings: Any) -> Example:
    form = find_format(SetConfig(path="x", **settings), record, PLACE)
    check_format(form, record, PLACE)
    return form.read(record, PLACE)


def chat(*turns: tuple[str, Any], **fields: Any) -> Example:
    return Example(PLACE, messages=tuple(Message(*turn) for turn in turns), **fields)


def test_every_format_has_a_sample_and_a_name() -> None:
    assert list(SAMPLES) == list(FORMATS)
    assert {"auto", *FORMATS} == set(get_args(FormatName))


@pytest.mark.parametrize("name", FORMATS)
def test_a_sample_reads_as_the_canonical_example(name: str) -> None:
    assert read(SAMPLES[name], format=name) == EXPECTED[name]


@pytest.mark.parametrize("name", FORMATS)
def test_auto_finds_the_format(name: str) -> None:
    assert type(find_format(SetConfig(path="x"), SAMPLES[name], PLACE)) is FORMATS[name]


def test_a_named_format_wins_over_what_auto_would_find() -> None:
    record = {**SAMPLES["messages"], "text": "Plain."}
    assert read(record) == EXPECTED["messages"]
    assert read(record, format="text") == Example(PLACE, pieces=(Piece("Plain.", learn=True),))


@pytest.mark.parametrize("setting", [{"labels": ("bad", "good")}, {"prompt": "{question}"}])
def test_settings_of_classification_choose_it(setting: dict[str, Any]) -> None:
    record = {"question": "Is it?", "answer": "Yes.", "label": 1}
    assert type(find_format(SetConfig(path="x", **setting), record, PLACE)) is FORMATS["classification"]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"messages": TURNS, "label": "maths"}, "messages"),
        ({"messages": TURNS, "prompt": "Q", "answer": "4"}, "messages"),
        ({"messages": TURNS, "label": True}, "unpaired"),
        ({"prompt": "Q", "completion": "A", "label": "False"}, "unpaired"),
        ({"prompt": "Q", "completion": "A", "label": 3}, "prompt_completion"),
        ({"instruction": "I", "output": ["good", "bad"]}, "preference"),
        ({"question": "Q", "choices": ["a", "b"], "answer": 1}, "classification"),
        ({"question": "Q", "sentence": "S", "label": 1}, "classification"),
        ({"problem": "P", "solution": "S", "answer": "A"}, "prompt_answer"),
        ({"prompt": "P", "test": "T", "entry_point": "f"}, "prompt_answer"),
        ({"prompt": "P", "completion": "C", "text": "T"}, "prompt_completion"),
        ({"question": "Q", "text": "T"}, "text"),
    ],
)
def test_auto_of_records_with_more_keys(record: dict[str, Any], name: str) -> None:
    assert type(find_format(SetConfig(path="x"), record, PLACE)) is FORMATS[name]


# Messages and ShareGPT


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (
            {"conversations": [{"from": r, "value": r.upper()} for r in ("system", "user", "bot", "human", "gpt")]},
            [("system", "SYSTEM"), ("user", "USER"), ("assistant", "BOT"), ("user", "HUMAN"), ("assistant", "GPT")],
        ),
        (
            {"messages": [{"role": role, "content": None} for role in ("developer", "user", "model")]},
            [("system", ""), ("user", ""), ("assistant", "")],
        ),
        ({"messages": [{"role": "user", "content": "Q"}]}, [("user", "Q")]),
        ({"messages": [{"from": "human", "value": "Q"}]}, [("user", "Q")]),
        ({"conversations": [{"role": "user", "content": "Q", "id": 5}]}, [("user", "Q")]),
        ({"system": "S", "messages": [{"role": "user", "content": "Q"}]}, [("system", "S"), ("user", "Q")]),
        ({"system": "", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]},
         [("system", "S"), ("user", "Q")]),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "text", "text": None, "value": "b"}, "c"]}]},
            [("user", "abc")],
        ),
        ({"messages": [{"role": "user", "content": "<image> in <b>HTML</b>"}]}, [("user", "<image> in <b>HTML</b>")]),
        ({"messages": [{"role": "user", "content": "<image>"}], "images": None}, [("user", "<image>")]),
    ],
)  # fmt: skip
def test_dialects_of_turns(record: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    assert read(record) == chat(*messages)


CALL = ToolCall("add", {"a": 2, "b": [2]}, "c1")
ARGUMENTS = {"a": 2, "b": [2]}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [{"id": "c1", "type": "function",
                                          "function": {"name": "add", "arguments": json.dumps(ARGUMENTS)}}]},
        {"tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": ARGUMENTS}}]},
        {"content": "", "tool_calls": [{"id": "c1", "name": "add", "arguments": ARGUMENTS}]},
        {"content": "", "tool_calls": json.dumps([{"id": "c1", "name": "add", "arguments": ARGUMENTS}])},
        {"content": "", "function_call": {"id": "c1", "name": "add", "arguments": ARGUMENTS}},
        {"content": [{"type": "tool_call", "value": json.dumps({"id": "c1", "name": "add", "arguments": ARGUMENTS})}]},
    ],
)  # fmt: skip
def test_tool_calls(turn: dict[str, Any]) -> None:
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", **turn},
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    assert read({"messages": turns}).messages == (
        Message("user", "2 + 2?"),
        Message("assistant", tool_calls=(CALL,)),
        Message("tool", "4", name="add", call_id="c1"),
        Message("assistant", "4"),
    )


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_without_arguments(arguments: Any) -> None:
    turns = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "tool_calls": [{"name": "go", "arguments": arguments}]},
    ]
    assert read({"messages": turns}).messages[1] == Message("assistant", tool_calls=(ToolCall("go", {}),))


def test_function_calls_and_observations_of_sharegpt() -> None:
    one, two = ({"name": "add", "arguments": {"a": number}} for number in (1, 2))
    turns = [
        ("human", "Add."), ("function_call", json.dumps(one)), ("observation", "1"),
        ("function_call", f"<think>\nMore.\n</think>\n\n{json.dumps([one, two])}"), ("observation", "1"), ("observation", "2"),
        ("gpt", "Done."),
    ]  # fmt: skip
    assert read({"conversations": [{"from": role, "value": value} for role, value in turns]}).messages == (
        Message("user", "Add."),
        Message("assistant", tool_calls=(ToolCall("add", {"a": 1}),)),
        Message("tool", "1"),
        Message("assistant", reasoning="More.", tool_calls=(ToolCall("add", {"a": 1}), ToolCall("add", {"a": 2}))),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", "Done."),
    )


FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([FUNCTION], (WRAPPED,)),
        ([WRAPPED, FUNCTION], (WRAPPED, WRAPPED)),
        ([{"function": FUNCTION}], (WRAPPED,)),
        (json.dumps([FUNCTION]), (WRAPPED,)),
        ("[]", ()),
        ("", ()),
        ("null", ()),
        ([], ()),
        (None, ()),
    ],
)
@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt_completion"])
def test_tools(name: str, tools: Any, expected: tuple[dict[str, Any], ...]) -> None:
    assert read({**SAMPLES[name], "tools": tools}) == replace(EXPECTED[name], tools=expected)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_content(key: str) -> None:
    turns = [{"role": "user", "content": "Q", key: None}, {"role": "assistant", "content": "A", key: "Hm."}]
    assert read({"messages": turns}).messages[1] == Message("assistant", "A", reasoning="Hm.")


@pytest.mark.parametrize(("type_", "key"), [("reasoning", "value"), ("thinking", "thinking"), ("reasoning", "text")])
def test_reasoning_in_parts(type_: str, key: str) -> None:
    parts = [{"type": type_, key: "Hm."}, {"type": "text", "value": "A"}]
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": parts}]
    assert read({"messages": turns}).messages[1] == Message("assistant", "A", reasoning="Hm.")


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({"weight": 0}, 0.0),
        ({"weight": 1.5}, 1.5),
        ({"loss_weight": 1.0}, 1.0),
        ({"weight": True}, 1.0),
        ({"weight": None}, None),
    ],
)
def test_weights_of_turns(given: dict[str, Any], weight: float | None) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", **given}]
    assert read({"messages": turns}).messages[1] == Message("assistant", "A", weight=weight)


# Media


PNG = b"\x89PNG not really"
DATA = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    ("part", "media"),
    [
        ({"type": "image", "path": "a/b.png"}, Media("image", "a/b.png")),
        ({"type": "image", "text": None, "path": "a/b.png"}, Media("image", "a/b.png")),
        ({"type": "image", "image": "C:\\b.png"}, Media("image", "C:\\b.png")),
        ({"type": "image", "url": "file:///a/b.png"}, Media("image", "/a/b.png")),
        ({"type": "image", "bytes": PNG}, Media("image", PNG)),
        ({"type": "image", "base64": DATA}, Media("image", PNG)),
        ({"type": "image", "image": {"bytes": PNG, "path": "b.png"}}, Media("image", PNG)),
        ({"type": "image", "image": {"bytes": None, "path": "b.png"}}, Media("image", "b.png")),
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}}, Media("image", PNG)),
        ({"type": "image_url", "image_url": "b.png"}, Media("image", "b.png")),
        ({"type": "image_url", "value": "data/b.png"}, Media("image", "data/b.png")),
        ({"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}}, Media("audio", PNG)),
        ({"type": "audio", "audio": "b.wav"}, Media("audio", "b.wav")),
        ({"type": "audio_url", "value": "b.wav"}, Media("audio", "b.wav")),
        ({"type": "video", "path": "b.mp4"}, Media("video", "b.mp4")),
        ({"type": "video_url", "video_url": {"url": "b.mp4"}}, Media("video", "b.mp4")),
    ],
)
def test_media_in_parts(part: dict[str, Any], media: Media) -> None:
    parts = [part, {"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
    assert read({"messages": [{"role": "user", "content": parts}]}) == chat(("user", (media, "What is it?")))


def test_placeholders_take_the_listed_files_in_order() -> None:
    record = {
        "messages": [
            {"role": "user", "content": "<image>Is it <video>?"},
            {"role": "assistant", "content": "Like <image>."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And <audio>?"}]},
        ],
        "images": ["1.png", {"bytes": PNG, "path": None}, "3.png"],
        "videos": "1.mp4",
    }
    assert read(record) == chat(
        ("user", (Media("image", "1.png"), "Is it ", Media("video", "1.mp4"), "?")),
        ("assistant", ("Like ", Media("image", PNG), ".")),
        ("user", (Media("image", "3.png"), "And <audio>?")),
    )


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "<image>", "input": "Who?", "output": "Kane."},
        {"prompt": "<image>\nWho?", "completion": "Kane."},
        {"question": "<image>\nWho?", "answer": "Kane."},
    ],
)
def test_listed_files_in_other_forms(record: dict[str, Any]) -> None:
    example = read({**record, "images": ["1.png"]})
    assert example.messages == (Message("user", (Media("image", "1.png"), "\nWho?")), Message("assistant", "Kane."))


def test_both_sides_of_a_pair_show_the_listed_files() -> None:
    record = {"prompt": "<image>Who?", "chosen": "Kane.", "rejected": "Nobody.", "images": ["1.png"]}
    question = ("user", (Media("image", "1.png"), "Who?"))
    assert read(record) == chat(question, ("assistant", "Kane."), rejected=chat(question, ("assistant", "Nobody.")))


# Alpaca, prompt and completion


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
            {"instruction": "Add.", "context": "2+2", "response": "4", "category": "maths"},
            [("user", "Add.\n2+2"), ("assistant", "4")],
        ),
    ],
)
def test_dialects_of_alpaca(record: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    assert read(record) == chat(*messages)


def test_prompt_and_completion_as_strings_are_plain_text() -> None:
    assert read({"prompt": "2+2=", "completion": "4"}) == Example(
        PLACE, pieces=(Piece("2+2=", learn=False), Piece("4", learn=True))
    )


def test_prompt_and_completion_beside_a_system_prompt_are_turns() -> None:
    assert read({"prompt": "2+2=", "completion": "4", "system": "Add."}) == chat(
        ("system", "Add."), ("user", "2+2="), ("assistant", "4")
    )


# Preference


def pair(better: Example, worse: Example) -> Example:
    return replace(better, rejected=worse)


def plain(*pieces: tuple[str, bool]) -> Example:
    return Example(PLACE, pieces=tuple(Piece(*piece) for piece in pieces))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [turn("user", "Q")]
PAIR = pair(chat(("user", "Q"), ("assistant", "A")), chat(("user", "Q"), ("assistant", "B")))
A, B = turn("assistant", "A"), turn("assistant", "B")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "chosen": [A], "rejected": [B]},
        {"prompt": ASKED, "chosen": A, "rejected": B},
        {"prompt": ASKED, "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": [A], "rejected": [B]},
        {"prompt": "Q", "chosen": [*ASKED, A], "rejected": [*ASKED, B], "messages": [*ASKED, A]},
        {"chosen": [*ASKED, A], "rejected": [*ASKED, B]},
        {"chosen_messages": [*ASKED, A], "rejected_messages": [*ASKED, B]},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A", "rejected": " B"},
        {"instruction": "Q", "chosen": "A", "rejected": "B", "output": "A"},
        {"instruction": "", "input": "Q", "output": ["A", "B"]},
        {"question": "Q", "chosen": "A", "rejected": "B"},
        {"input": "Q", "chosen": "A", "rejected": "B"},
        {"conversations": [{"from": "human", "value": "Q"}],
         "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
        {"messages": ASKED, "chosen": "A", "rejected": "B"},
    ],
)  # fmt: skip
def test_dialects_of_conversations_in_pairs(record: dict[str, Any]) -> None:
    assert read(record) == PAIR


@pytest.mark.parametrize(
    ("record", "better", "worse"),
    [
        (
            {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
            [("2+2=", False), ("4", True)],
            [("2+2=", False), ("5", True)],
        ),
        (
            {"chosen": "It is  four.", "rejected": "It is  fourteen."},
            [("It is", False), ("  four.", True)],
            [("It is", False), ("  fourteen.", True)],
        ),
        ({"chosen": "Yes.", "rejected": "Yesterday."}, [("Yes.", True)], [("Yesterday.", True)]),
        ({"chosen": "a b", "rejected": "a b c"}, [("a", False), (" b", True)], [("a", False), (" b c", True)]),
        ({"chosen": "a b", "rejected": "a b"}, [("a", False), (" b", True)], [("a", False), (" b", True)]),
        ({"chosen": "a", "rejected": ""}, [("a", True)], [("", True)]),
        ({"prompt": "", "chosen": "a", "rejected": None}, [("a", True)], [("", True)]),
    ],
)
def test_pairs_of_plain_text(record: dict[str, Any], better: list[Any], worse: list[Any]) -> None:
    assert read(record) == pair(plain(*better), plain(*worse))


def test_a_transcript_with_a_speaker_twice() -> None:
    start = "\n\nHuman: Hi.\n\nAssistant: Hello."
    record = {
        "chosen": f"{start}\n\nAssistant: Hm?",
        "rejected": f"{start}\n\nHuman: I\n\nHuman: am.\n\nAssistant: So?",
    }
    hello = (("user", "Hi."), ("assistant", "Hello."))
    assert read(record) == pair(
        chat(hello[0], ("assistant", "Hello.\n\nHm?")), chat(*hello, ("user", "I\n\nam."), ("assistant", "So?"))
    )


def test_tools_and_history_of_a_pair() -> None:
    record = {
        "history": [["H", "I"]],
        "instruction": "Q",
        "chosen": "A",
        "rejected": "B",
        "tools": [FUNCTION],
        "system": "S",
    }
    start = (("system", "S"), ("user", "H"), ("assistant", "I"), ("user", "Q"))
    better, worse = (chat(*start, ("assistant", answer), tools=(WRAPPED,)) for answer in "AB")
    assert read(record) == pair(better, worse)


# Unpaired


@pytest.mark.parametrize(
    ("label", "desirable"),
    [(True, True), (False, False), (1, True), (0, False), ("True", True), ("false", False), ("0", False)],
)
def test_labels_of_feedback(label: Any, desirable: bool) -> None:
    assert read({"prompt": "Q", "completion": "A", "label": label}) == replace(
        plain(("Q", False), ("A", True)), desirable=desirable
    )


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*ASKED, A], "label": True},
        {"messages": [*ASKED, A], "kto_tag": True},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "kto_tag": True},
        {"instruction": "Q", "output": "A", "kto_tag": True},
        {"prompt": ASKED, "completion": [A], "label": True},
    ],
)
def test_dialects_of_feedback(record: dict[str, Any]) -> None:
    assert read(record) == chat(("user", "Q"), ("assistant", "A"), desirable=True)


# Questions with answers


@pytest.mark.parametrize(
    ("record", "said", "answer"),
    [
        ({"question": "Q", "answer": "4"}, "4", "4"),
        ({"question": "Q", "answer": 4}, "4", "4"),
        ({"question": "Q", "answer": 0.5}, "0.5", "0.5"),
        ({"prompt": "Q", "answer": "1 #### 2\n#### 4 "}, "1 #### 2\n#### 4 ", "4"),
        ({"problem": "Q", "solution": "2 + 2 = 4", "answer": "4"}, "2 + 2 = 4", "4"),
        ({"prompt": ASKED, "answer": "4"}, "4", "4"),
    ],
)
def test_dialects_of_answers(record: dict[str, Any], said: str, answer: str) -> None:
    assert read(record) == chat(("user", "Q"), ("assistant", said), answer=answer)


def test_a_prompt_alone() -> None:
    assert read({"prompt": "Q"}) == chat(("user", "Q"))
    assert read({"prompt": ASKED, "system": "S"}) == chat(("system", "S"), ("user", "Q"))


@pytest.mark.parametrize(("given", "answer"), [("4", "4"), (4, "4"), ("So:\n#### 4", "4"), (["4"], None), (None, None)])
def test_an_answer_beside_messages(given: Any, answer: str | None) -> None:
    assert read({"messages": [*ASKED, A], "answer": given}) == chat(("user", "Q"), ("assistant", "A"), answer=answer)


# Classification


@pytest.mark.parametrize(
    ("record", "settings", "text", "word", "choices"),
    [
        ({"text": "T", "label": 1}, {}, "T", "1", ()),
        ({"text": "T", "label": True}, {}, "T", "1", ()),
        ({"sentence": "T", "label": "1"}, {}, "T", "1", ()),
        ({"sentence": "T", "label": "1"}, {"labels": ("bad", "good")}, "T", "good", ("bad", "good")),
        ({"sentence": "T", "label": 0.0}, {"labels": ("bad", "good")}, "T", "bad", ("bad", "good")),
        ({"sentence": "T", "label": "good"}, {"labels": ("bad", "good")}, "T", "good", ("bad", "good")),
        ({"text": "T", "label": "2"}, {"labels": ("1", "2", "3")}, "T", "2", ("1", "2", "3")),
        ({"text": "T", "label": 2}, {"labels": ("1", "2", "3")}, "T", "3", ("1", "2", "3")),
        ({"sentence1": "S", "sentence2": "T", "label": "no"}, {}, "S\nT", "no", ()),
        ({"premise": "S", "hypothesis": "T", "label": "no"}, {}, "S\nT", "no", ()),
        ({"question": "S", "sentence": "T", "label": "no"}, {}, "S\nT", "no", ()),
        ({"question": "T", "label": "no"}, {}, "T", "no", ()),
        ({"query": "T", "choices": ["A", "B"], "gold": 1}, {}, "T", "B", ("A", "B")),
        ({"question": "T", "choices": ["x", "y"], "answer": "y"}, {}, "T", "y", ("x", "y")),
        ({"text": "T", "label": "no"}, {"prompt": "Is {text} {{so}}? "}, "Is T {so}? ", "no", ()),
        ({"a": "T", "n": 3, "label": "no"}, {"prompt": "{a}{n}"}, "T3", "no", ()),
        ({"text": "T", "label": "no"}, {"prompt": "{review}!", "columns": {"text": "review"}}, "T!", "no", ()),
    ],
)
def test_classification(record: dict[str, Any], settings: dict[str, Any], text: str, word: str, choices: Any) -> None:
    assert read(record, **settings) == chat(("user", text), ("assistant", word), choices=choices)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "Is {text",
            "data.prompt: expected '}' before end of string; write columns as {text}, and a brace of the text itself twice",
        ),
        ("Is {}?", "data.prompt: write columns as {text}, with the name alone in the braces"),
        ("Is {text!r}?", "data.prompt: write columns as {text}, with the name alone in the braces"),
        ("Is {text:>9}?", "data.prompt: write columns as {text}, with the name alone in the braces"),
    ],
)
def test_a_bad_prompt(prompt: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read({"text": "T", "label": 1}, prompt=prompt)
    assert not isinstance(caught.value, DataError)
    assert str(caught.value) == message


# Round trips


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ANSWER = st.tuples(TEXT, TEXT)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """[system] (user assistant)+, texts of any characters."""
    messages = [Message("system", draw(TEXT.filter(bool)))] if draw(st.booleans()) else []
    for question, answer in draw(st.lists(ANSWER, min_size=1, max_size=3)):
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


def as_messages(messages: list[Message]) -> dict[str, Any]:
    return {"messages": [{"role": m.role, "content": m.content} for m in messages]}


def as_parts(messages: list[Message]) -> dict[str, Any]:
    return {
        "messages": [{"role": m.role, "content": [{"type": "text", "value": c} for c in m.content]} for m in messages]
    }


def as_sharegpt(messages: list[Message]) -> dict[str, Any]:
    words = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": words[m.role], "value": m.content} for m in messages]}


def as_alpaca(messages: list[Message]) -> dict[str, Any]:
    system = messages[0].content if messages[0].role == "system" else None
    texts = [m.content for m in messages if m.role != "system"]
    history = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    return {"system": system, "history": history, "instruction": texts[-2], "output": texts[-1]}


def as_prompt_completion(messages: list[Message]) -> dict[str, Any]:
    turns = as_messages(messages)["messages"]
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def as_answer(messages: list[Message]) -> dict[str, Any]:
    *prompt, answer = as_messages(messages)["messages"]
    return {"prompt": prompt, "answer": answer["content"]}


@pytest.mark.parametrize("write", [as_messages, as_parts, as_sharegpt, as_alpaca, as_prompt_completion, as_answer])
@settings(derandomize=True, max_examples=30, deadline=None)
@given(messages=conversations())
def test_a_conversation_written_in_any_form_is_read_back(write: Any, messages: list[Message]) -> None:
    record = json.loads(json.dumps(write(messages)))
    assert read(record).messages == tuple(messages)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(messages=conversations(), worse=TEXT, label=st.booleans())
def test_feedback_written_in_any_form_is_read_back(messages: list[Message], worse: str, label: bool) -> None:
    *prompt, better = as_messages(messages)["messages"]
    bad = {"role": "assistant", "content": worse}
    wanted = Example(PLACE, tuple(messages))
    other = Example(PLACE, (*messages[:-1], Message("assistant", worse)))
    if better["content"] or worse:
        for record in (
            {"prompt": prompt, "chosen": [better], "rejected": [bad]},
            {"chosen": [*prompt, better], "rejected": [*prompt, bad]},
            {"conversations": prompt, "chosen": better, "rejected": bad},
        ):
            assert read(record) == replace(wanted, rejected=other)
    for feedback in ({"messages": [*prompt, better], "label": label}, {**as_alpaca(messages), "kto_tag": label}):
        assert read(feedback) == replace(wanted, desirable=label)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(start=TEXT, better=TEXT, worse=TEXT)
def test_plain_pairs_keep_their_text_and_share_their_beginning(start: str, better: str, worse: str) -> None:
    chosen, rejected = start + better, start + worse
    if not (chosen or rejected) or chosen.startswith("\n\nHuman:") or rejected.startswith("\n\nHuman:"):
        return
    example = read({"chosen": chosen, "rejected": rejected})
    assert example.rejected is not None
    assert "".join(piece.text for piece in example.pieces) == chosen
    assert "".join(piece.text for piece in example.rejected.pieces) == rejected
    assert example.pieces[:-1] == example.rejected.pieces[:-1]
    if len(example.pieces) == 2:
        assert example.pieces[1].text[0].isspace()


TWO_ANSWERS = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("more", "margin"),
    [
        ({}, None),
        ({"margin": None, "chosen_score": 1}, None),
        ({"margin": 2}, 2.0),
        ({"margin": " -1.5e0 "}, -1.5),
        ({"chosen_score": 8.5, "rejected_score": 6}, 2.5),
        ({"score_chosen": "3", "score_rejected": "4"}, -1.0),
        ({"margin": 1, "score_chosen": 3, "score_rejected": 4}, 1.0),
    ],
)
def test_margins_of_pairs(more: dict[str, Any], margin: float | None) -> None:
    assert read(TWO_ANSWERS | more).margin == margin


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (TWO_ANSWERS | {"margin": "much"}, "margin: expected a number, found 'much': write a number, or leave it out"),
        (TWO_ANSWERS | {"margin": True}, "margin: expected a number, found True: write a number, or leave it out"),
        (
            TWO_ANSWERS | {"chosen_score": float("nan"), "rejected_score": 1},
            "chosen_score: expected a number, found nan: write a number, or leave it out",
        ),
    ],
)
def test_margins_that_are_none(record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(record)
    assert caught.value.reason == said


def test_steps_of_plain_text() -> None:
    record = {"prompt": "Q ", "completions": ["a", "b "], "labels": [False, True]}
    assert read(record) == Example(
        PLACE, pieces=(Piece("Q ", False), Piece("a\n\nb ", True)), steps=(("a", False), ("b ", True))
    )
    beside = read(record | {"system": "S"})
    assert beside.messages == (Message("system", "S"), Message("user", "Q "), Message("assistant", "a\n\nb "))


@pytest.mark.parametrize(
    ("completions", "labels", "said"),
    [
        (["a", "b"], [True], "labels: 1 labels for 2 steps: give each step of completions a label of its own"),
        ([], [], "completions: no steps: give at least one, or remove the record"),
        (
            ["a"],
            [1],
            "labels[0]: expected true or false, found 1: write true for a right step and false for a wrong one",
        ),
        (["a", " "], [True, True], "completions[1]: an empty step: remove it and its label"),
        (["a", 3], [True, True], "completions[1]: expected text, found int: write it as a string"),
        ("a", [True], "completions: expected a list, found 'a': write one entry for each step"),
    ],
)
def test_bad_steps(completions: Any, labels: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read({"prompt": "Q", "completions": completions, "labels": labels}, format="steps")
    assert caught.value.reason == said
