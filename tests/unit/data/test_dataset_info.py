import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import SetConfig
from tunesmith.data.dataset_info import sources_of
from tunesmith.data.examples import read_examples
from tunesmith.data.sources import find_sources
from tunesmith.errors import UserError
from tunesmith.types import Example, Media, Message, Piece, ToolCall

QA = (Message("user", "Q"), Message("assistant", "A"))


def registry(folder: Path, entry: Any, *records: Any, file_name: str = "x.jsonl") -> Path:
    if records:
        (folder / file_name).parent.mkdir(parents=True, exist_ok=True)
        (folder / file_name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "dataset_info.json").write_text(json.dumps({"demo": entry, "other": {"file_name": "other.json"}}))
    return folder / "dataset_info.json"


def read(folder: Path, entry: dict[str, Any], *records: Any) -> list[Example]:
    info = registry(folder, {"file_name": "x.jsonl", **entry}, *records)
    (source,) = find_sources(SetConfig(path=str(info), names=("demo",)))
    return list(read_examples(source))


def turns(*pairs: tuple[str, str], keys: tuple[str, str] = ("from", "value")) -> list[dict[str, str]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


OPENAI = ("role", "content")
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


@pytest.mark.parametrize(
    ("entry", "record", "messages"),
    [
        ({}, {"instruction": "Q", "input": "", "output": "A"}, QA),
        ({}, {"instruction": "Q", "output": "A", "label": True, "history": [["no", "no"]]}, QA),
        ({"columns": {"prompt": "q", "response": "a"}}, {"q": "Q", "a": "A", "input": "not named"}, QA),
        (
            {"columns": {"prompt": "q", "query": "x", "response": "a", "system": "s", "history": "h"}},
            {"q": "Q", "x": "X", "a": "A", "s": "S", "h": [["H", "I"]]},
            (Message("system", "S"), Message("user", "H"), Message("assistant", "I"), Message("user", "Q\nX"), QA[1]),
        ),
        ({"formatting": "sharegpt"}, {"conversations": turns(("human", "Q"), ("gpt", "A"))}, QA),
        (
            {"formatting": "sharegpt", "columns": {"messages": "chat", "system": "sys"}},
            {"chat": turns(("human", "Q"), ("gpt", "A")), "sys": "S", "label": True},
            (Message("system", "S"), *QA),
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS},
            {"messages": turns(("user", "Q"), ("assistant", "A"), keys=OPENAI)},
            QA,
        ),
        (
            {"formatting": "sharegpt", "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "Mensch",
                                                "assistant_tag": "Maschine", "system_tag": "Regie"}},
            {"conversations": turns(("Regie", "S"), ("Mensch", "Q"), ("Maschine", "A"), keys=("who", "said"))},
            (Message("system", "S"), *QA),
        ),
        (
            {"formatting": "openai", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS},
            {"messages": turns(("system", "S"), ("user", "Q"), ("assistant", "A"), keys=OPENAI)},
            (Message("system", "S"), *QA),
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "messages", "images": "pics"}, "tags": OPENAI_TAGS},
            {"messages": turns(("user", "<image>Q"), ("assistant", "A"), keys=OPENAI), "pics": ["1.png"]},
            (Message("user", (Media("image", "1.png"), "Q")), QA[1]),
        ),
    ],
)  # fmt: skip
def test_conversations(entry: dict[str, Any], record: Any, messages: Any, tmp_path: Path) -> None:
    (example,) = read(tmp_path, entry, record)
    assert example.messages == messages
    assert (example.desirable, example.rejected) == (None, None)


def test_tools_and_function_tags(tmp_path: Path) -> None:
    function = {"name": "add", "parameters": {}}
    chat = turns(("human", "Q"), ("call", '{"name": "add", "arguments": {"a": 1}}'), ("result", "1"), ("gpt", "A"))
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "functions"},
        "tags": {"function_tag": "call", "observation_tag": "result"},
    }
    (example,) = read(tmp_path, entry, {"conversations": chat, "functions": json.dumps([function])})
    assert example.tools == ({"type": "function", "function": function},)
    assert example.messages == (
        QA[0], Message("assistant", tool_calls=(ToolCall("add", {"a": 1}),)), Message("tool", "1"), QA[1]
    )  # fmt: skip


def test_other_keys_of_openai_turns_stay(tmp_path: Path) -> None:
    chat = [*turns(("user", "Q"), keys=OPENAI), {"role": "assistant", "tool_calls": [{"name": "f"}], "weight": 0}]
    entry = {"formatting": "openai", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS}
    (example,) = read(tmp_path, entry, {"messages": chat})
    assert example.messages[1] == Message("assistant", tool_calls=(ToolCall("f", {}),), weight=0.0)


@pytest.mark.parametrize(
    ("entry", "record"),
    [
        (
            {"formatting": "sharegpt", "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"}},
            {"conversations": turns(("human", "Q")), "good": turns(("gpt", "A"))[0], "bad": turns(("gpt", "B"))[0]},
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "c", "chosen": "chosen", "rejected": "rejected"},
             "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "u", "assistant_tag": "a"}},
            {"c": [{"who": "u", "said": "Q"}], "chosen": {"who": "a", "said": "A"}, "rejected": {"who": "a", "said": "B"}},
        ),
        (
            {"columns": {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}},
            {"question": "Q", "chosen": "A", "rejected": "B", "output": "not named"},
        ),
    ],
)  # fmt: skip
def test_ranking(entry: dict[str, Any], record: Any, tmp_path: Path) -> None:
    (example,) = read(tmp_path, {**entry, "ranking": True}, record)
    assert example.rejected is not None
    assert (example.messages, example.rejected.messages) == (QA, (QA[0], Message("assistant", "B")))


@pytest.mark.parametrize(
    ("entry", "record"),
    [
        (
            {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": OPENAI_TAGS},
            {"messages": turns(("user", "Q"), ("assistant", "A"), keys=OPENAI), "label": False},
        ),
        (
            {"columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"}},
            {"prompt": "Q", "completion": "A", "label": False},
        ),
    ],
)
def test_feedback(entry: dict[str, Any], record: Any, tmp_path: Path) -> None:
    (example,) = read(tmp_path, entry, record)
    assert (example.messages, example.desirable) == (QA, False)


@pytest.mark.parametrize("column", ["text", "content"])
def test_a_prompt_without_answer_is_plain_text(column: str, tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"columns": {"prompt": column}}, {column: "T", "label": 1})
    assert example.pieces == (Piece("T", learn=True),)


def test_num_samples_takes_the_first(tmp_path: Path) -> None:
    records = [{"instruction": "Q", "output": str(n)} for n in range(5)]
    assert [e.messages[1].content for e in read(tmp_path, {"num_samples": 2}, *records)] == ["0", "1"]


def test_a_folder_and_several_names(tmp_path: Path) -> None:
    record = {"instruction": "Q", "output": "A"}
    registry(tmp_path, {}, record, file_name="parts/a.jsonl")
    registry(tmp_path, {}, record, file_name="parts/b.jsonl")
    info = registry(tmp_path, {"file_name": "parts"})
    (tmp_path / "other.json").write_text(json.dumps([record]))
    sources = find_sources(SetConfig(path=str(info), names=("demo", "other"), weight=3.0))
    examples = [example for source in sources for example in read_examples(source)]
    assert [Path(example.place.file).name for example in examples] == ["a.jsonl", "b.jsonl", "other.json"]
    assert [example.messages for example in examples] == [QA] * 3
    assert {source.config.weight for source in sources} == {3.0}


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        ({"hf_hub_url": "o/n", "ms_hub_url": "m/n", "subset": "en", "split": "full"}, "hub:o/n"),
        ({"cloud_file_name": "s3://bucket/x.json"}, "s3://bucket/x.json"),
    ],
)
def test_data_sets_elsewhere(entry: dict[str, Any], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SetConfig] = []
    monkeypatch.setattr("tunesmith.data.dataset_info.find_sources", lambda config: asked.append(config) or [])
    sources_of(registry(tmp_path, entry), SetConfig(path="x", names=("demo",), max_samples=7))
    assert asked == [
        SetConfig(
            path=path, format="alpaca", split=entry.get("split", "train"), subset=entry.get("subset"), max_samples=7
        )
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "expected an object, found list; write {file_name: …}"),
        ({}, "no file_name; give file_name, hf_hub_url or cloud_file_name"),
        ({"file": "x"}, "unknown setting file; did you mean file_name?"),
        ({"file_name": "x", "formatting": "sharegtp"}, "unknown formatting 'sharegtp'; did you mean sharegpt?"),
        ({"file_name": "x", "columns": {"promt": "x"}}, "unknown setting promt; did you mean prompt?"),
        ({"file_name": "x", "tags": {"role": "x"}}, "unknown setting role; did you mean role_tag?"),
        ({"file_name": "x", "columns": ["a"]}, "columns: expected names, found ['a']; write {name: name}"),
        (
            {"file_name": "x", "num_samples": "5"},
            "num_samples: expected a number of records, found '5'; write 1 or more",
        ),
        ({"ms_hub_url": "m/n"}, "ModelScope cannot be read; download m/n, and set file_name"),
        ({"om_hub_url": "m/n"}, "Modelers cannot be read; download m/n, and set file_name"),
        ({"script_url": "x"}, "script_url runs code of others and is not supported; save its data, and set file_name"),
        (
            {"hf_hub_url": "o/n", "folder": "python"},
            "folder 'python' of a hub data set cannot be read; download it, and set file_name",
        ),
    ],
)
def test_a_bad_entry(entry: Any, message: str, tmp_path: Path) -> None:
    info = registry(tmp_path, entry)
    with pytest.raises(UserError) as caught:
        sources_of(info, SetConfig(path=str(info), names=("demo",)))
    assert str(caught.value) == f"{info}: demo: {message}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            "which of its data sets? set data.names to some of them, which LLaMA-Factory calls `dataset`: demo, other",
        ),
        ({"names": ("dem",)}, "no data set dem; did you mean demo?"),
        ({"names": ("xyz",)}, "no data set xyz; known: demo, other"),
        (
            {"names": ("demo",), "format": "alpaca"},
            "its entries say format and columns; remove data.format and data.columns, or mend the entry",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    info = registry(tmp_path, {"file_name": "x"})
    with pytest.raises(UserError) as caught:
        sources_of(info, SetConfig(path=str(info), **settings))
    assert str(caught.value) == f"{info}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object, found list; write {name: {file_name: …}}"),
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); mend the file"),
    ],
)
def test_a_bad_registry(text: str, message: str, tmp_path: Path) -> None:
    info = tmp_path / "dataset_info.json"
    info.write_text(text)
    with pytest.raises(UserError) as caught:
        sources_of(info, SetConfig(path=str(info), names=("demo",)))
    assert str(caught.value) == f"{info}: {message}"


def test_the_same_tags_make_an_equal_transform(tmp_path: Path) -> None:
    info = registry(tmp_path, {"file_name": "x.jsonl"}, {"instruction": "Q", "output": "A"})
    first, second = (sources_of(info, SetConfig(path=str(info), names=("demo",)))[0].transform for _ in range(2))
    assert first == second
    assert repr(first) == repr(second)
