from array import array

import numpy as np
import pytest

from tunesmith.errors import DataError, UserError
from tunesmith.inspect.bad_records import Errors
from tunesmith.inspect.tally import Tally, prompt_of, text_of, together
from tunesmith.types import Example, Media, Message, Piece, Place, ToolCall

PLACE = Place("a.jsonl", 1)


def conversation(*messages: Message, line: int = 1) -> Example:
    return Example(Place("a.jsonl", line), messages)


def tally_of(*examples: Example, compare: bool = True) -> Tally:
    tally = Tally("a.jsonl", compare=compare)
    assert list(tally.watch(iter(examples))) == list(examples)
    return tally


@pytest.mark.parametrize(
    ("example", "prompt"),
    [
        (conversation(Message("user", "q"), Message("assistant", "a")), "user: q"),
        (
            conversation(Message("system", "s"), Message("user", "q"), Message("assistant", "a")),
            "user: q",
        ),
        (
            conversation(*(Message(role, role[0]) for role in ("user", "assistant", "user", "assistant"))),
            "user: u\nassistant: a\nuser: u",
        ),
        (conversation(Message("user", "q")), "user: q"),
        (Example(PLACE, pieces=(Piece(" p ", False), Piece("c", True))), "p"),
        (Example(PLACE, pieces=(Piece("text", True),)), ""),
    ],
)  # fmt: skip
def test_prompt(example: Example, prompt: str) -> None:
    assert prompt_of(example) == prompt


def test_text_holds_all_words_but_the_system_message() -> None:
    picture = Message("user", ("look ", Media("image", "a.png"), "here"))
    call = Message("assistant", "", "hm", (ToolCall("find", {"x": 1}),))
    assert text_of(conversation(Message("system", "s"), picture, call)) == "look \nhere\nhm\nfind {'x': 1}"


def test_empty_turns() -> None:
    tally = tally_of(
        conversation(Message("user", " \n"), Message("assistant", "")),
        conversation(
            Message("user", (Media("image", "a.png"),)),
            Message("assistant", tool_calls=(ToolCall("f", {}),)),
            Message("assistant", reasoning="hm"),
        ),
        Example(PLACE, pieces=(Piece("x", True),)),
    )
    assert tally.empty_turns == 2
    assert tally.turns.tolist() == [2, 3]


def test_places_prompts_and_content_stand_in_the_order_of_reading() -> None:
    same = [conversation(Message("user", "q"), Message("assistant", "a"), line=n) for n in (3, 9)]
    other = Example(Place("b.jsonl", 1), pieces=(Piece("x", True),))
    tally = tally_of(*same, other)
    assert [tally.place(n) for n in range(3)] == [Place("a.jsonl", 3), Place("a.jsonl", 9), Place("b.jsonl", 1)]
    assert tally.content[0] == tally.content[1] != tally.content[2]
    assert tally.prompts[0] == tally.prompts[1] != 0
    assert tally.prompts[2] == 0


def test_signatures_do_not_depend_on_how_texts_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example(PLACE, pieces=(Piece(f"text number {n} of some words", True),)) for n in range(50)]
    whole = tally_of(*examples)
    monkeypatch.setattr("tunesmith.inspect.tally.CHUNK_CHARACTERS", 100)
    parts = tally_of(*examples)
    assert len(parts.signatures) > 3 > len(whole.signatures)
    wanted = np.arange(50) % 3 == 0
    assert np.array_equal(parts.signatures_of(wanted), whole.signatures[0][wanted])
    assert np.array_equal(parts.code_points, whole.code_points)
    assert tally_of(*examples, compare=False).signatures_of(wanted).shape == (0, 64)


def test_sums() -> None:
    one, other = tally_of(conversation(Message("user", "a"))), tally_of(conversation(Message("user", "b")))
    one.samples, other.samples, one.counts.truncated, other.counts.truncated = 2, 3, 1, 4
    one.lengths.extend([5, 6])
    total = together([one, other])
    assert (total.samples, total.counts.truncated, total.lengths, total.turns) == (
        5, 5, array("i", [5, 6]), array("i", [1, 1])
    )  # fmt: skip
    assert total.code_points[ord("a")] == total.code_points[ord("b")] == 1


def test_a_record_with_several_errors_is_one_bad_record() -> None:
    errors, tally = Errors(limit=2), Tally("a.jsonl")
    role = DataError(PLACE, ("messages", 0, "role"), "unknown role 'x'", "mend it")
    assert errors.add(role, tally)
    assert not errors.add(DataError(PLACE, (), "too long", "cut it"), tally)
    assert errors.add(DataError(Place("a.jsonl", 2), (), "a message without role", "add it"), tally)
    assert not errors.add(UserError("b.parquet: cannot be read: copy it again"), tally)
    assert (errors.number, len(errors.shown), tally.bad, tally.role_errors) == (4, 2, 2, 2)
