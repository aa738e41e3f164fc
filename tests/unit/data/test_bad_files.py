"""Files that are not what their names say: for each the whole message, and for each bad record what is read around it."""

import gzip
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config import SetConfig
from tunesmith.data.readers import COMPRESSIONS, READERS, TEXT_READERS, BadRecord
from tunesmith.data.sources import Source, find_sources, read_records
from tunesmith.errors import DataError, UserError
from tunesmith.types import Place

A, B = {"text": "one"}, {"text": "two"}
LINE = b'{"text": "one"}\n'
ONE = "one object per line is expected"
ARRAY = "(a whole JSON array? name the file .json)"
UTF8 = "save the file as UTF-8"
AGAIN = "check the file, or copy it again"
LOST = "mend it; nothing after it is read"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parquet(records: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), stream)
    return stream.getvalue()


def arrow(records: list[dict[str, Any]], as_file: bool) -> bytes:
    table = pyarrow.Table.from_pylist(records)
    stream = io.BytesIO()
    with (pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream)(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def twice(write: Any) -> bytes:
    """A file with two columns of one name."""
    stream = io.BytesIO()
    write(pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], ["text", "text"]), stream)
    return stream.getvalue()


def write_stream(table: pyarrow.Table, stream: io.BytesIO) -> None:
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)


NO_MAGIC = "Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."

CASES = [
    # ---- .jsonl: not JSON
    ("a.jsonl", b"{text: 1}", "{file}:1:2: not JSON: Expecting property name enclosed in double quotes: " + ONE),
    ("a.jsonl", LINE + b"\n{'text': 1}\n", "{file}:3:2: not JSON: Expecting property name enclosed in double quotes: "
     "write strings in double quotes"),
    ("a.jsonl", b'{"text": \'x\'}', "{file}:1:10: not JSON: Expecting value: write strings in double quotes"),
    ("a.jsonl", b'{"a": True}', "{file}:1:7: not JSON: Expecting value: write true for True"),
    ("a.jsonl", b'{"a": [None]}', "{file}:1:8: not JSON: Expecting value: write null for None"),
    ("a.jsonl", b'  {"a": 1,}', "{file}:1:10: not JSON: a comma before the closing }: remove it"),
    ("a.jsonl", b'{"a": [1, 2 ,  ]}', "{file}:1:13: not JSON: a comma before the closing ]: remove it"),
    ("a.jsonl", b'{"b": [1, 2], "c": }', "{file}:1:20: not JSON: Expecting value: " + ONE),
    ("a.jsonl", b'{"a" 1}', "{file}:1:6: not JSON: Expecting ':' delimiter: " + ONE),
    ("a.jsonl", b'{"a": 1 "b": 2}', "{file}:1:9: not JSON: Expecting ',' delimiter: " + ONE),
    ("a.jsonl", b'{"a": "x', "{file}:1:7: not JSON: Unterminated string starting at: " + ONE),
    ("a.jsonl", b'{"a": "x\ty"}', r"{file}:1:9: not JSON: Invalid control character at: write a line break in a string "
     r"as \n, a tab as \t"),
    ("a.jsonl", rb'{"a": "C:\data"}', r"{file}:1:10: not JSON: Invalid \escape: write a backslash as \\"),
    ("a.jsonl", LINE[:-1] + b" " + LINE, "{file}:1:17: not JSON: Extra data: " + ONE),
    ("a.jsonl", b'{"text":\n"one"}\n', "{file}:1:9: not JSON: Expecting value: " + ONE),
    ("a.jsonl", b"[\n" + LINE + b"]", f"{{file}}:1:2: not JSON: Expecting value: {ONE} {ARRAY}"),
    ("a.jsonl", b'\xef\xbb\xbf{"a": x}', "{file}:1:7: not JSON: Expecting value: " + ONE),
    ("a.ndjson", b'{"a":' * 100_000, "{file}:1:1: not JSON: nested too deeply: " + ONE),
    # ---- .jsonl: JSON, but no record
    ("a.jsonl", b"[" + LINE[:-1] + b"]", "{file}:1:1: expected an object with keys, found a list: write a record as {…} "
     + ARRAY),
    ("a.jsonl", LINE + b'"text"\n', "{file}:2:1: expected an object with keys, found text: write a record as {…}"),
    ("a.jsonl", b" 12", "{file}:1:2: expected an object with keys, found a number: write a record as {…}"),
    ("a.jsonl", b"null", "{file}:1:1: expected an object with keys, found null: write a record as {…}"),
    ("a.jsonl", b"true", "{file}:1:1: expected an object with keys, found true or false: write a record as {…}"),
    ("a.jsonl", b'{"a": 1, "b": {"c": 1, "c": 2}}', '{file}:1:24: the key "c" stands twice in one object: remove one of '
     "the two"),
    ("a.jsonl", b'{"a": [1, NaN]}', "{file}:1:11: NaN is no JSON: write a number, or null"),
    ("a.jsonl", b'{"a": "NaN", "b": -Infinity}', "{file}:1:19: -Infinity is no JSON: write a number, or null"),
    ("a.jsonl", b'{"n": -' + b"1" * 5000 + b"}", "{file}:1:7: a number of 5000 digits: write it as a string"),
    ("a.jsonl", rb'{"a": "\ud83d\ude42", "b": "xy\ud83d"}', r"{file}:1:28: character 3 of the string is half of a "
     r"surrogate pair (\ud83d): write the whole pair, or remove it"),
    ("a.jsonl", rb'{"\udc00": 1}', r"{file}:1:2: character 1 of the string is half of a surrogate pair (\udc00): "
     r"write the whole pair, or remove it"),
    # ---- .jsonl: bytes
    ("a.jsonl", LINE + "{'ü': '".encode() + b"\xff'}\n", "{file}:2:8: not UTF-8 text (byte 0xff): " + UTF8),
    ("a.jsonl", LINE.decode().encode("utf-16"), "{file}: UTF-16 text: " + UTF8),
    ("a.jsonl", gzip.compress(LINE, mtime=0), "{file}: compressed with gzip: end its name in .gz"),
    ("a.jsonl", pyarrow.compress(LINE, "zstd", asbytes=True), "{file}: compressed with zstd: end its name in .zst"),
    ("a.jsonl", b"PK\x03\x04...", "{file}: a zip archive: unpack it"),
    ("a.csv", parquet([A]), "{file}: a parquet file: end its name in .parquet"),
    ("a.json", arrow([A], as_file=True), "{file}: an arrow file: end its name in .arrow"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
     "{file}: a Git LFS pointer, not the file itself: run git lfs pull"),
    ("a.jsonl", b" \n\n", "{file}: no records: give a file with at least one"),
    # ---- .json
    ("a.json", b" \n", "{file}: no records: give a file with at least one"),
    ("a.json", b"[ ]", "{file}: no records: give a file with at least one"),
    ("a.json", LINE + LINE, "{file}:1:1: expected a JSON array of records, found an object: one object per line? "
     "name the file .jsonl; else write [{…}, {…}]"),
    ("a.json", b'\n{"data": [' + LINE + b"]}", "{file}:2:1: expected a JSON array of records, found an object: the "
     'records stand under "data"? make that array the whole file'),
    ("a.json", LINE, "{file}:1:1: expected a JSON array of records, found an object: one record alone? write it as [{…}]"),
    ("a.json", b"{1}", "{file}:1:2: not JSON: Expecting property name enclosed in double quotes: write the records as "
     "[{…}, {…}]"),
    ("a.json", b'"text"', "{file}:1:1: expected a JSON array of records: write the records as [{…}, {…}]"),
    ("a.json", b"<html>", "{file}:1:1: expected a JSON array of records: write the records as [{…}, {…}]"),
    ("a.json", b"[\n" + LINE + LINE + b"]", "{file}:3:1: not JSON: no comma between two records: write one; nothing after "
     "it is read"),
    ("a.json", b"[\n" + LINE, "{file}:3:1: not JSON: the file ends inside its array: copy it again, or close the array "
     "with ]"),
    ("a.json", b"[" + LINE + b", ", "{file}:2:3: not JSON: the file ends inside its array: copy it again, or close the "
     "array with ]"),
    ("a.json", b"[" + LINE + b",]", "{file}:2:1: not JSON: a comma before the closing ]: remove it"),
    ("a.json", b"[" + LINE + b"]\n ]", "{file}:3:2: not JSON: text behind the array's end: remove it"),
    ("a.json", b"[" + LINE + b', {"a" 1}]', "{file}:2:8: not JSON: Expecting ':' delimiter: " + LOST),
    ("a.json", b"[" + LINE + b', {"a": 1,}]', "{file}:2:10: not JSON: a comma before the closing }: remove it; nothing "
     "after it is read"),
    ("a.json", b"[" * 100_000, "{file}:1:2: not JSON: nested too deeply: " + LOST),
    ("a.json", b"[" + LINE + b", [1]]", "{file}:2:3: expected an object with keys, found a list: write a record as {…}"),
    ("a.json", b'[{"a": 1,\n"a": 2}]', '{file}:2:1: the key "a" stands twice in one object: remove one of the two'),
    ("a.json", b'[{"a": 1,\n"a": 2, b}]', '{file}:2:9: not JSON: Expecting property name enclosed in double quotes: '
     + LOST),
    ("a.json", b'[{"a": Infinity}]', "{file}:1:8: Infinity is no JSON: write a number, or null"),
    ("a.json", b'[\n\n"\xff"]', "{file}:3:2: not UTF-8 text (byte 0xff): " + UTF8),
    # ---- .csv and .tsv
    ("a.csv", b"a,b\n1,2\n3\n", "{file}:3: 1 field, but the header has 2: a field that holds commas stands in "
     '"quotation marks"'),
    ("a.csv", b'a,b\n"1\n\n2",3,4\n', "{file}:2: 3 fields, but the header has 2: a field that holds commas stands in "
     '"quotation marks"'),
    ("a.tsv", b"a\tb\n1\t2\t3\n", "{file}:2: 3 fields, but the header has 2: remove tabs inside fields"),
    ("a.csv", b",text\n0,x\n", "{file}:1: column 1 of the header has no name: name it, or write the file without row "
     "numbers (pandas: index=False)"),
    ("a.csv", b"\na,b,a\n1,2,3\n", '{file}:2: two columns named "a": rename one of them'),
    ("a.csv", b"a,b\n", "{file}: no records: give a file with at least one"),
    ("a.csv", b"\n\n", "{file}: no records: give a file with at least one"),
    ("a.csv", b'a,b\n1,"2\n3,4\n', "{file}:2:3: a quoted field without an end: close the quotation mark; inside a quoted "
     "field write two for one"),
    ("a.csv", b'a,b\n1,"2" 3\n', "{file}:2:6: text behind a closing quotation mark: inside a quoted field write two "
     "quotation marks for one"),
    ("a.csv", b'a,b\n1,"2\n3" 4\n', "{file}:3:3: text behind a closing quotation mark: inside a quoted field write two "
     "quotation marks for one"),
    ("a.csv", b'"a,b\n1,2\n', "{file}:1:1: a quoted field without an end: close the quotation mark; inside a quoted field "
     "write two for one"),
    ("a.csv", b"a,b\n1,\xe9\n", "{file}:2:3: not UTF-8 text (byte 0xe9): " + UTF8),
    ("a.csv", b"\xe9,b\n1,2\n", "{file}:1:1: not UTF-8 text (byte 0xe9): " + UTF8),
    ("a.csv", b'a,b\n1,"x\ny\xe9"\n', "{file}:3:2: not UTF-8 text (byte 0xe9): " + UTF8),
    # ---- .txt
    ("a.txt", b" \n\t\n", "{file}: no records: give a file with at least one"),
    ("a.txt", b"one\ntwo \xff", "{file}:2:5: not UTF-8 text (byte 0xff): " + UTF8),
    # ---- archives
    ("a.jsonl.gz", LINE, "{file}: cannot be read: Not a gzipped file (b'{\"'): " + AGAIN),
    ("a.jsonl.gz", gzip.compress(LINE, mtime=0)[:-9], "{file}: cannot be read: Compressed file ended before the end-of-stream "
     "marker was reached: " + AGAIN),
    ("a.csv.zst", pyarrow.compress(LINE, "zstd", asbytes=True)[:-5], "{file}: cannot be read: Truncated compressed stream: "
     + AGAIN),
    ("a.json.zst", LINE, "{file}: cannot be read: ZSTD decompress failed: Unknown frame descriptor: " + AGAIN),
    ("a.txt.gz", gzip.compress(b"", mtime=0), "{file}: no records: give a file with at least one"),
    # ---- binary
    ("a.parquet", b"no parquet at all", f"{{file}}: cannot be read: {NO_MAGIC}: {AGAIN}"),
    ("a.parquet", parquet([A])[:-10], f"{{file}}: cannot be read: {NO_MAGIC}: {AGAIN}"),
    ("a.parquet", parquet([A][:0]), "{file}: no records: give a file with at least one"),
    ("a.parquet", twice(pyarrow.parquet.write_table), '{file}: two columns named "text": rename one of them'),
    ("a.arrow", twice(write_stream), '{file}: two columns named "text": rename one of them'),
    ("a.arrow", arrow([A][:0], as_file=False), "{file}: no records: give a file with at least one"),
    ("a.arrow", arrow([A], as_file=True)[:-1], "{file}: cannot be read: Not an Arrow file: " + AGAIN),
]  # fmt: skip


def first_error(name: str, content: bytes) -> UserError:
    Path(name).write_bytes(content)
    [source] = find_sources(SetConfig(path=name))
    with pytest.raises(UserError) as caught:
        list(read_records(source))
    return caught.value


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}: {case[1][:40]!r}")
def test_the_whole_message(case: tuple[str, bytes, str]) -> None:
    name, content, message = case[:3]
    assert str(first_error(name, content)) == message.replace("{file}", name)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 35
    assert {Path(case[0]).suffixes[0] for case in CASES} == set(READERS)


def read_all(name: str, content: bytes, **config: Any) -> tuple[list[Any], list[tuple[str, str | None]]]:
    """What is read around bad records: (line, values) of each; and message and raw text of the bad ones."""
    Path(name).write_bytes(content)
    bad: list[tuple[str, str | None]] = []
    [source] = find_sources(SetConfig(path=name, **config))
    records = list(read_records(source, lambda error, raw: bad.append((str(error), raw))))
    assert all(place.file == name for _, place in records)
    return [(place.line, *record.values()) for record, place in records], bad


def test_lines_after_a_bad_one_are_read() -> None:
    assert read_all("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2\n\xff\n[]\r\n{"a": 1, "a": 2}\n\n{"a": 3}') == (
        [(1, 1), (7, 3)],
        [
            ("a.jsonl:2:8: not JSON: Expecting ',' delimiter: " + ONE, '{"a": 2'),
            ("a.jsonl:3:1: not UTF-8 text (byte 0xff): " + UTF8, "\\xff"),
            ("a.jsonl:4:1: expected an object with keys, found a list: write a record as {…}", "[]"),
            ('a.jsonl:5:10: the key "a" stands twice in one object: remove one of the two', '{"a": 1, "a": 2}'),
        ],
    )


def test_records_after_a_bad_one_of_an_array_are_read_up_to_a_fault_of_form() -> None:
    assert read_all("a.json", b'[{"a": 1},\n {"b": NaN}, 3,\n{"a": 4}, {"a": 5,}, {"a": 6}]') == (
        [(1, 1), (4, 4)],
        [
            ("a.json:2:8: NaN is no JSON: write a number, or null", '{"b": NaN}'),
            ("a.json:2:14: expected an object with keys, found a number: write a record as {…}", "3"),
            ("a.json:3:18: not JSON: a comma before the closing }: remove it; nothing after it is read", None),
        ],
    )
    assert read_all("a.json", b'[{"a": 1}, ]')[0] == [(1, 1)]
    assert read_all("a.json", b'[{"a": 1}] 2')[0] == [(1, 1)]


def test_rows_after_a_bad_one_are_read() -> None:
    assert read_all("a.csv", b'a,b\n1,2\n3\n"4,\n5,"6\n"\n"7" 8,9\n"x\n\xff",9\n10,"1\n\n1"\n12,"13\n14,15\n') == (
        [(2, "1", "2"), (5, "5", "6\n"), (10, "10", "1\n\n1"), (14, "14", "15")],
        [
            ("a.csv:3: 1 field, but the header has 2: a field that holds commas stands in \"quotation marks\"", "3"),
            ("a.csv:5:4: text behind a closing quotation mark: inside a quoted field write two quotation marks for one",
             '"4,'),
            ("a.csv:7:4: text behind a closing quotation mark: inside a quoted field write two quotation marks for one",
             '"7" 8,9'),
            ("a.csv:9:1: not UTF-8 text (byte 0xff): " + UTF8, '"x\n\\xff",9'),
            ("a.csv:13:4: a quoted field without an end: close the quotation mark; inside a quoted field write two for one",
             '12,"13'),
        ],
    )  # fmt: skip


def test_a_bad_row_of_tabs_takes_no_other_with_it() -> None:
    content = b'a\tb\n"1\t2"\n3 "x"\n"4 five\n6\t"7\n"8""9"\t"10"\n"11\t12"\t"13\n14"\n'
    assert read_all("a.tsv", content) == (
        [(2, '"1', '2"'), (5, "6", '"7'), (6, '8"9', '"10"'), (7, "11\t12", "13\n14")],
        [
            ("a.tsv:3: 1 field, but the header has 2: remove tabs inside fields", '3 "x"'),
            ("a.tsv:4: 1 field, but the header has 2: remove tabs inside fields", '"4 five'),
        ],
    )


def test_a_bad_document_of_text() -> None:
    content = b"one\r\ntwo\n\n\xff\nthree\n\nfour"
    flaw = ("a.txt:4:1: not UTF-8 text (byte 0xff): " + UTF8, "\\xff\nthree")
    assert read_all("a.txt", content, text_unit="paragraph") == ([(1, "one\ntwo"), (7, "four")], [flaw])
    assert read_all("a.txt", content, text_unit="file") == (
        [],
        [(flaw[0], "one\ntwo\n\n\\xff\nthree\n\nfour")],
    )


def test_a_bad_record_knows_its_place() -> None:
    error = first_error("a.json", b"[{}, 2]")
    assert isinstance(error, BadRecord)
    assert isinstance(error, DataError)
    assert (error.place, error.path, error.at) == (Place("a.json", 2), (), "1:6")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_quoted_field_without_an_end_does_not_take_the_whole_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.csv_text.MAX_QUOTED_CHARACTERS", 100)
    rows = "".join(f"{number},x\n" for number in range(100))
    records, bad = read_all("a.csv", f'a,b\n0,"{rows}{rows}'.encode())
    assert [line for line, *_ in records] == list(range(3, 202))
    assert [message.partition(": ")[0] for message, _ in bad] == ["a.csv:2:3"]


NAMES = [*READERS, *(kind + packed for kind in TEXT_READERS for packed in COMPRESSIONS)]
RECORDS = [{"text": 'one, "two"\n3', "n": {"m": [1, None]}}, {"text": "zwei ü", "n": {"m": None}}]


def whole_file(kind: str) -> bytes:
    """A good file, to be damaged."""
    return {
        ".json": json.dumps(RECORDS).encode(),
        ".csv": b'a,b\n1,"2\n3"\n"x""y",\xc3\xbc\n',
        ".tsv": b'a\tb\n1\t"2"\n"x""y"\t\xc3\xbc\n',
        ".txt": b"one\n\ntwo \xc3\xbc\n",
        ".parquet": parquet(RECORDS),
        ".arrow": arrow(RECORDS, as_file=False),
    }.get(kind, "\n".join(map(json.dumps, RECORDS)).encode())


def pack(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    return pyarrow.compress(content, "zstd", asbytes=True) if name.endswith(".zst") else content


def only_user_errors(name: str, content: bytes) -> None:
    Path(name).write_bytes(content or b" ")
    source = Source(name, SetConfig(path=name), (name,))
    told: list[UserError] = []
    for _ in range(2):
        try:
            for record, place in read_records(source, lambda error, raw: told.append(error)):
                assert all(isinstance(key, str) for key in record)
                assert place.line > 0
        except UserError as error:
            told.append(error)
    for error in told:
        assert isinstance(error, UserError)
        assert str(error).startswith(name)


FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(content=st.one_of(st.binary(max_size=200), st.text('[]{}",:\\u0d8a1\n\t ', max_size=60).map(str.encode)))
def test_any_bytes_end_in_records_or_user_errors(name: str, content: bytes) -> None:
    only_user_errors("a" + name, content)
    only_user_errors("a" + name, pack(name, content))


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(data=st.data())
def test_a_damaged_file_ends_in_records_or_user_errors(name: str, data: st.DataObject) -> None:
    content = bytearray(pack(name, whole_file("." + name.split(".")[1])))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    only_user_errors("a" + name, bytes(content[: data.draw(st.integers(0, len(content)))]))
