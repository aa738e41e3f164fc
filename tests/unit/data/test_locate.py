import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.data.locate import locate
from tunesmith.errors import DataError
from tunesmith.types import Place

FIRST = '{"messages": [{"role": "user", "content": "a"}, {"content": "ü", "role": 7}], "n": {"a b": null}}'
SECOND = '\t {"x": 1}'


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str, encoding: str = "utf-8") -> str:
    content = text.encode(encoding)
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if name.endswith(".zst"):
        content = pyarrow.compress(content, "zstd", asbytes=True)
    Path(name).write_bytes(content)
    return name


PATHS: list[tuple[tuple[str | int, ...], str]] = [
    ((), "1:1"),
    (("messages",), "1:14"),
    (("messages", 0), "1:15"),
    (("messages", 0, "role"), "1:24"),
    (("messages", 1), "1:49"),
    (("messages", 1, "content"), "1:61"),
    (("messages", 1, "role"), "1:74"),
    (("n", "a b"), "1:92"),
    # what is not there: the deepest part that is
    (("nothing",), "1:1"),
    (("messages", 2), "1:14"),
    (("messages", "role"), "1:14"),
    (("messages", 1, "name"), "1:49"),
    (("messages", 1, "role", 0), "1:74"),
    ((0,), "1:1"),
]


@pytest.mark.parametrize(("path", "where"), PATHS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_value_in_a_line(name: str, path: tuple[str | int, ...], where: str) -> None:
    write(name, f"{FIRST}\r\n\r\n{SECOND}\n", "utf-8-sig")
    assert locate(Place(name, 1), path) == f"{name}:{where}"
    assert locate(Place(name, 3), ("x",)) == f"{name}:3:9"
    assert locate(Place(name, 3), ()) == f"{name}:3:3"


@pytest.mark.parametrize(("path", "where"), PATHS)
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
def test_a_value_in_an_array(name: str, path: tuple[str | int, ...], where: str) -> None:
    write(name, f"[\n{SECOND}\n, {{}},\n{FIRST}]", "utf-8-sig")
    assert locate(Place(name, 3), path) == f"{name}:4:{where.partition(':')[2]}"
    assert locate(Place(name, 1), ("x",)) == f"{name}:2:9"
    assert locate(Place(name, 2), ("x",)) == f"{name}:3:3"


def test_a_value_on_a_line_of_its_own() -> None:
    record = {"a": [{"b": 1}, {"b": {"c": "x"}}]}
    write("a.json", json.dumps([record], indent=2))
    lines = Path("a.json").read_text().splitlines()
    assert lines[8] == '          "c": "x"'
    assert locate(Place("a.json", 1), ("a", 1, "b", "c")) == "a.json:9:16"


def test_an_array_that_breaks_off_is_searched_up_to_there() -> None:
    write("a.json", '[{"a": 1}, {"a": 2}, {"a')
    assert locate(Place("a.json", 2), ("a",)) == "a.json:1:18"
    assert locate(Place("a.json", 4), ("a",)) == "a.json: record 4"


def test_an_array_that_changed_is_searched_again() -> None:
    write("a.json", '[{"a": 1}]')
    assert locate(Place("a.json", 1), ("a",)) == "a.json:1:8"
    write("a.json", '[{"aa": 1, "a": 1}]')
    assert locate(Place("a.json", 1), ("a",)) == "a.json:1:17"


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_field_of_a_row(name: str) -> None:
    write(name, 'text,"b, c",n\r\nx,yy,3\r\n\r\n"1\r\n""2""\r\n",ü,"4"\r\n5,6,7')
    for line, column, where in [
        (2, "text", "2:1"),
        (2, "b, c", "2:3"),
        (2, "n", "2:6"),
        (4, "text", "4:1"),
        (4, "b, c", "6:3"),
        (4, "n", "6:5"),
        (7, "n", "7:5"),
        (7, "nothing", "7:1"),
    ]:
        assert locate(Place(name, line), (column,)) == f"{name}:{where}"
    assert locate(Place(name, 2), ()) == f"{name}:2:1"
    assert locate(Place(name, 9), ("n",)) == f"{name}:9"


def test_a_field_between_tabs() -> None:
    write("a.tsv", 'a\tb\n"x\ty"\n"1\t2"\t"3""4"\n"5""6"\t7\n')
    assert locate(Place("a.tsv", 2), ("b",)) == "a.tsv:2:4"
    assert locate(Place("a.tsv", 3), ("b",)) == "a.tsv:3:7"
    assert locate(Place("a.tsv", 4), ("b",)) == "a.tsv:4:8"


@pytest.mark.parametrize(
    ("file", "where"),
    [
        ("demo", "demo: record 17"),
        ("hub:owner/name", "hub:owner/name: record 17"),
        ("hub:owner/name.csv", "hub:owner/name.csv: record 17"),
        ("a.parquet", "a.parquet: record 17"),
        ("a.arrow", "a.arrow: record 17"),
        ("a.txt", "a.txt:17"),
        ("gone.jsonl", "gone.jsonl:17"),
        ("gone.csv.gz", "gone.csv.gz:17"),
        ("gone.json", "gone.json: record 17"),
        ("memory://a/b.jsonl", "memory://a/b.jsonl:17"),
        ("https://host/a.jsonl.gz?x=1", "https://host/a.jsonl.gz?x=1:17"),
        ("s3://bucket/a.json", "s3://bucket/a.json: record 17"),
    ],
)
def test_files_in_which_nothing_can_be_found(file: str, where: str) -> None:
    assert locate(Place(file, 17), ("text",)) == where


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.zst"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[", b"{", b'{"text"', b'{"text":', b'"', b"[1]"])
def test_a_file_that_changed_since_it_was_read(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    assert locate(Place(name, 3), ("text", 0)) in (f"{name}:3", f"{name}: record 3")
    assert locate(Place(name, 1), ("text", 0)).startswith(name)


def test_an_error_shows_line_column_and_path() -> None:
    write("a.jsonl", FIRST)
    error = DataError(Place("a.jsonl", 1), ("messages", 1, "role"), "unknown role 7", "write user")
    assert str(error) == "a.jsonl:1:74 messages[1].role: unknown role 7: write user"


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=2), inside, max_size=3),
    max_leaves=8,
)


def paths_of(value: Any) -> list[tuple[str | int, ...]]:
    inside = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(), *((key, *path) for key, part in inside for path in paths_of(part))]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    records=st.lists(st.dictionaries(st.text(max_size=2), VALUES, max_size=3), min_size=1, max_size=3),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_what_stands_at_the_place_is_the_value(records: list[Any], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    lines = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    for name, written in ((write("a.json", text), text), (write("a.jsonl", lines), lines)):
        for number, record in enumerate(records, start=1):
            for path in paths_of(record):
                file, line, column = locate(Place(name, number), path).split(":")
                value = record
                for part in path:
                    value = value[part]
                rest = "\n".join([*written.split("\n")[int(line) - 1 :]])[int(column) - 1 :]
                assert (file, json.JSONDecoder().raw_decode(rest)[0]) == (name, value)
