import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config import SetConfig
from tunesmith.data.examples import content_hash, media_path, read_examples
from tunesmith.data.sources import Source, find_sources
from tunesmith.errors import DataError, UserError
from tunesmith.types import Example, Media, Message, Piece, Place, ToolCall

PLACE = Place("x.jsonl", 1)


def write(file: Path, *records: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return file


def read(file: Path, as_chat: bool | None = None, transform: Any = None, **settings: Any) -> list[Example]:
    (source,) = find_sources(SetConfig(path=str(file), **settings))
    return list(read_examples(replace(source, transform=transform), as_chat))


def test_records_become_examples_with_their_place_and_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "a" / "x.jsonl", {"text": "A"}, {"text": "B"})
    assert read(file) == [
        Example(
            Place(str(file), line), pieces=(Piece(text, learn=True),), columns=("text",), folder=str(tmp_path / "a")
        )
        for line, text in ((1, "A"), (2, "B"))
    ]


def test_the_worse_side_of_a_pair_has_the_folder_too(tmp_path: Path) -> None:
    (example,) = read(write(tmp_path / "x.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "B"}))
    assert example.rejected is not None
    assert example.folder == example.rejected.folder == str(tmp_path)


def test_columns_give_the_keys_their_names(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"answer": "4", "question": "2+2", "input": "?"})
    (example,) = read(file, columns={"instruction": "question", "output": "answer"})
    assert example.messages == (Message("user", "2+2\n?"), Message("assistant", "4"))


def test_a_column_hides_the_key_that_it_takes_the_place_of(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"text": "title", "body": "Body."})
    (example,) = read(file, columns={"text": "body"})
    assert example.pieces == (Piece("Body.", learn=True),)


def test_columns_may_be_swapped(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "A", "completion": "Q"})
    (example,) = read(file, columns={"prompt": "completion", "completion": "prompt"})
    assert example.pieces == (Piece("Q", learn=False), Piece("A", learn=True))


def test_an_optional_column_may_be_missing_once_it_was_seen(tmp_path: Path) -> None:
    full, bare = {"sys": "S", "instruction": "Q", "output": "A"}, {"instruction": "Q", "output": "A"}
    columns = {"system": "sys"}
    examples = read(write(tmp_path / "x.jsonl", full, bare), columns=columns)
    assert [len(example.messages) for example in examples] == [3, 2]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "x.jsonl", bare, full), columns=columns)
    assert caught.value.what == "no column sys, which data.columns names for system, among instruction, output"


def test_the_path_of_an_error_has_the_name_in_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"question": "2+2", "reply": 4})
    with pytest.raises(DataError) as caught:
        read(file, columns={"instruction": "question", "output": "reply"})
    assert caught.value.path == ("reply",)


def test_a_transform_comes_after_the_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"body": "text"})
    (example,) = read(file, columns={"text": "body"}, transform=lambda record: {"text": record["text"].upper()})
    assert example.pieces == (Piece("TEXT", learn=True),)


def test_reading_goes_on_after_bad_records_and_the_first_good_one_says_the_form(tmp_path: Path) -> None:
    bad: list[Any] = [{"foo": "ü"}, {"text": 5}, {"prompt": "Q", "completion": "A"}]
    file = write(tmp_path / "x.jsonl", bad[0], bad[1], {"text": "A"}, bad[2], {"text": "B"})
    (source,) = find_sources(SetConfig(path=str(file)))
    reported: list[tuple[UserError, str | None]] = []
    examples = list(read_examples(source, report=lambda error, raw: reported.append((error, raw))))
    assert [example.place.line for example in examples] == [3, 5]
    assert [(error.place.line, error.path) for error, _ in reported if isinstance(error, DataError)] == [
        (1, ()), (2, ("text",)), (4, ())
    ]  # fmt: skip
    assert [json.loads(raw or "") for _, raw in reported] == bad


CHAT = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A", "reasoning": "R"},
        {"role": "user", "content": "Q2", "weight": 1},
        {"role": "assistant", "content": "A2", "weight": 0},
    ]
}


@pytest.mark.parametrize(
    ("record", "as_chat", "messages", "pieces"),
    [
        ({"prompt": "Q", "completion": "A"}, True, [("user", "Q"), ("assistant", "A")], []),
        ({"prompt": "Q", "completion": "A"}, False, [], [("Q", False), ("A", True)]),
        ({"text": "T"}, True, [], [("T", True)]),
        ({"instruction": "Q", "output": "A"}, True, [("user", "Q"), ("assistant", "A")], []),
        ({"instruction": "Q", "output": "A"}, False, [], [("Q\n", False), ("A", True)]),
        (CHAT, False, [], [("S\nQ\n", False), ("R\nA", True), ("\n", False), ("Q2", True), ("\nA2", False)]),
        (
            {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]},
            False,
            [],
            [("\n", False)],
        ),
    ],
)
def test_as_chat(record: Any, as_chat: bool, messages: list[Any], pieces: list[Any], tmp_path: Path) -> None:
    (example,) = read(write(tmp_path / "x.jsonl", record), as_chat)
    assert example.messages == tuple(Message(*message) for message in messages)
    assert example.pieces == tuple(Piece(*piece) for piece in pieces)


def test_as_chat_turns_both_sides_of_a_pair(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "B"})
    (example,) = read(file, as_chat=True)
    assert example.rejected is not None
    assert example.messages == (Message("user", "Q"), Message("assistant", "A"))
    assert example.rejected.messages == (Message("user", "Q"), Message("assistant", "B"))
    assert (example.pieces, example.rejected.pieces) == ((), ())


# Content hash


CHAT_MESSAGES = (Message("user", "Q"), Message("assistant", "A"))
EXAMPLE = Example(PLACE, messages=CHAT_MESSAGES)


def with_answer(**fields: Any) -> Example:
    return Example(PLACE, messages=(CHAT_MESSAGES[0], replace(CHAT_MESSAGES[1], **fields)))


DIFFERENT = [
    EXAMPLE,
    Example(PLACE, messages=CHAT_MESSAGES[:1]),
    Example(PLACE, messages=(Message("user", "QA"), Message("assistant", ""))),
    Example(PLACE, messages=(Message("user", "Q"), Message("user", "A"))),
    with_answer(reasoning="R"),
    with_answer(content="", reasoning="A"),
    with_answer(tool_calls=(ToolCall("f", {}),)),
    with_answer(tool_calls=(ToolCall("f", {"a": 1}),)),
    with_answer(tool_calls=(ToolCall("f", {"a": 1}, "id"),)),
    with_answer(tool_calls=(ToolCall("f", {"a": b"bytes"}),)),
    with_answer(weight=0.0),
    with_answer(weight=1.0),
    with_answer(name="A"),
    with_answer(call_id="A"),
    with_answer(content=("A",)),
    with_answer(content=("A", Media("image", "a"))),
    with_answer(content=("A", Media("video", "a"))),
    with_answer(content=("A", Media("image", b"a"))),
    with_answer(content=("A", Media("image", b"b"))),
    replace(EXAMPLE, tools=({"a": 1},)),
    replace(EXAMPLE, rejected=EXAMPLE),
    replace(EXAMPLE, rejected=Example(PLACE, pieces=(Piece("Q", learn=True),))),
    replace(EXAMPLE, desirable=True),
    replace(EXAMPLE, desirable=False),
    replace(EXAMPLE, answer=""),
    replace(EXAMPLE, answer="A"),
    replace(EXAMPLE, choices=("A",)),
    Example(PLACE, pieces=(Piece("Q", learn=False), Piece("A", learn=True))),
    Example(PLACE, pieces=(Piece("Q", learn=True), Piece("A", learn=True))),
    Example(PLACE, pieces=(Piece("QA", learn=True),)),
]


def test_every_difference_of_content_is_another_hash() -> None:
    assert len({content_hash(example) for example in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize("example", DIFFERENT)
def test_place_and_folder_are_no_content(example: Example) -> None:
    moved = replace(example, place=Place("y", 9), folder="z")
    if moved.rejected is not None:
        moved = replace(moved, rejected=replace(moved.rejected, place=Place("y", 9), folder="z"))
    assert content_hash(moved) == content_hash(example)


def test_the_hash_is_the_same_in_every_process_and_version() -> None:
    assert content_hash(EXAMPLE) == 3853867368277224723


def test_hashes_fill_64_bits() -> None:
    hashes = [content_hash(Example(PLACE, pieces=(Piece(str(n), learn=True),))) for n in range(200)]
    ones = [sum(h >> bit & 1 for h in hashes) for bit in range(64)]
    assert max(hashes) < 2**64
    assert all(60 <= count <= 140 for count in ones)


PAIRS = st.tuples(st.text(max_size=5), st.text(max_size=5))


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(max_size=5), min_size=2, max_size=2),
    others=st.lists(st.text(max_size=5), min_size=2, max_size=2),
)
def test_texts_never_run_together(texts: list[str], others: list[str]) -> None:
    first, second = (Example(PLACE, messages=tuple(Message("user", text) for text in pair)) for pair in (texts, others))
    assert (content_hash(first) == content_hash(second)) == (texts == others)


# Media


@pytest.mark.parametrize(
    ("file", "folder", "source"),
    [
        ("data/1.png", "data", "1.png"),
        ("data/images/1.png", "data", "images/1.png"),
        ("data/images/1.png", "data", "data/images/1.png"),
        ("data/images/1.png", "data/sets", "images/1.png"),
        ("data/images/1.png", "data/sets/a", "images/1.png"),
        ("data/images/1.png", "data/sets/a", "sets/images/1.png"),
    ],
)
def test_media_are_found_from_the_folder_and_above(file: str, folder: str, source: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / file, 1)
    assert media_path(str(tmp_path / folder), source) == tmp_path / file
    assert media_path(str(tmp_path / folder), "none.png") is None


def test_media_of_a_relative_or_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "data" / "1.png", 1)
    assert media_path("data", "1.png") == file
    assert media_path("", "data/1.png") == file
    assert media_path("elsewhere", str(file)) == file
    assert media_path("data", str(tmp_path / "none.png")) is None


def test_the_nearest_file_wins(tmp_path: Path) -> None:
    near, _ = write(tmp_path / "a" / "b" / "1.png", 1), write(tmp_path / "a" / "1.png", 2)
    assert media_path(str(tmp_path / "a" / "b"), "1.png") == near


def test_a_source_without_transform_is_the_default(tmp_path: Path) -> None:
    assert Source(name="x", config=SetConfig(path="x"), files=()).transform is None


def test_consumer_errors_are_not_reported(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"text": "A"}, {"text": "B"})
    (source,) = find_sources(SetConfig(path=str(file)))
    reported: list[Any] = []
    examples = read_examples(source, report=lambda error, raw: reported.append(error))
    next(examples)
    with pytest.raises(DataError):
        examples.throw(DataError(PLACE, (), "mine", "mine"))  # type: ignore[attr-defined]
    assert reported == []
