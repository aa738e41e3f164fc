import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tunesmith.data.demo import demo_records
from tunesmith.data.sources import DEMO_SAMPLES, read_records
from tunesmith.errors import UserError
from tunesmith.types import Place

TEXTS = ["one", "zwei ü", "三 🙂", 'a {brace} and a "quote"']
RECORDS = [{"text": text} for text in TEXTS]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def refusal(path: str) -> str:
    with pytest.raises(UserError) as caught:
        list(read_records(path))
    return str(caught.value)


def write_parquet(name: str, records: list) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), name)
    return name


def test_all_kinds_of_file_read_the_same() -> None:
    files = [
        write("a.jsonl", "\n".join(LINES) + "\n"),
        write("a.json", "[" + ",\n".join(LINES) + "]"),
        write_parquet("a.parquet", RECORDS),
        write("a.txt", "\n".join(TEXTS) + "\n"),
    ]
    for file in files:
        assert list(read_records(file)) == [(record, Place(file, n)) for n, record in enumerate(RECORDS, start=1)]


def test_nested_records_read_the_same_from_parquet() -> None:
    records = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "r"}]},
    ]
    assert [record for record, _ in read_records(write_parquet("a.parquet", records))] == records


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    for file in (
        write("a.jsonl", "\ufeff" + "\n".join(LINES)),
        write("a.json", "\ufeff[" + ",".join(LINES) + "]"),
        write("a.txt", "\ufeff" + "\n".join(TEXTS)),
    ):
        assert [record for record, _ in read_records(file)] == RECORDS


@pytest.mark.parametrize(("name", "lines"), [("a.jsonl", LINES), ("a.txt", TEXTS)])
def test_blank_lines_are_skipped_and_counted(name: str, lines: list[str]) -> None:
    write(name, f"\n{lines[0]}\n\n  \t\n{lines[1]}\n\n")
    assert list(read_records(name)) == [(RECORDS[0], Place(name, 2)), (RECORDS[1], Place(name, 5))]


@pytest.mark.parametrize(("name", "lines"), [("a.jsonl", LINES), ("a.txt", TEXTS)])
def test_windows_line_ends_are_no_part_of_the_text(name: str, lines: list[str]) -> None:
    write(name, "\r\n".join(lines) + "\r\n")
    assert [record for record, _ in read_records(name)] == RECORDS


def test_white_space_inside_a_line_of_text_stays() -> None:
    assert [record for record, _ in read_records(write("a.txt", "  def f():\n\tx\u2028y \n"))] == [
        {"text": "  def f():"},
        {"text": "\tx\u2028y "},
    ]


def test_demo_reads_both_splits() -> None:
    for split in ("train", "eval"):
        records = demo_records(split, DEMO_SAMPLES[split])
        assert list(read_records("demo", split)) == [(r, Place("demo", n)) for n, r in enumerate(records, start=1)]


def test_records_before_a_bad_one_come_first() -> None:
    records = read_records(write("a.jsonl", LINES[0] + "\n{bad\n"))
    assert next(records) == (RECORDS[0], Place("a.jsonl", 1))
    with pytest.raises(UserError):
        next(records)


def test_a_path_that_is_no_readable_file() -> None:
    assert refusal("no.jsonl") == f"no.jsonl: no such data file; check the path (now in {Path.cwd()})"
    Path("folder").mkdir()
    assert refusal("folder") == "folder: a folder; give one file of it as the path"
    for name, suffix in (("a.csv", ".csv"), ("a", ""), ("a.jsonl.gz", ".gz")):
        write(name, "x")
        assert refusal(name) == f"{name}: unknown suffix {suffix!r}; readable: .jsonl, .json, .parquet, .txt"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty; give a file with at least one sample"),
        ("a.json", "", "a.json: the file is empty; give a file with at least one sample"),
        ("a.parquet", "", "a.parquet: the file is empty; give a file with at least one sample"),
        ("a.txt", "", "a.txt: the file is empty; give a file with at least one sample"),
        ("a.jsonl", " \n\n", "a.jsonl: no records; give a file with at least one sample"),
        ("a.txt", " \n\t\n", "a.txt: no records; give a file with at least one sample"),
        ("a.json", "[]", "a.json: no records; give a file with at least one sample"),
        ("a.json", " \n", "a.json:2: not JSON: Expecting value"),
        (
            "a.jsonl",
            LINES[0] + "\n\n{text: 1}\n",
            "a.jsonl:3: not JSON: Expecting property name enclosed in double quotes; one object per line is expected",
        ),
        (
            "a.jsonl",
            LINES[0] + " " + LINES[1] + "\n",
            "a.jsonl:1: not JSON: Extra data; one object per line is expected",
        ),
        (
            "a.jsonl",
            "[\n" + LINES[0] + "]\n",
            "a.jsonl:1: not JSON: Expecting value; one object per line is expected "
            "(a whole JSON array? name the file .json)",
        ),
        (
            "a.jsonl",
            "[" + LINES[0] + "]\n",
            "a.jsonl:1: expected an object with keys, found list (a whole JSON array? name the file .json)",
        ),
        ("a.jsonl", LINES[0] + '\n"text"\n', "a.jsonl:2: expected an object with keys, found str"),
        (
            "a.jsonl",
            '{"a":' * 100_000,
            "a.jsonl:1: not JSON: nested too deeply; one object per line is expected",
        ),
        ("a.jsonl", LINES[0].encode() + b'\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8 text; save the file as UTF-8"),
        ("a.jsonl", LINES[0].encode("utf-16"), "a.jsonl:1: not UTF-8 text; save the file as UTF-8"),
        ("a.json", b'[\n\n"\xff"]', "a.json:3: not UTF-8 text (byte 4); save the file as UTF-8"),
        ("a.txt", b"one\ntwo \xff", "a.txt:2: not UTF-8 text (byte 8); save the file as UTF-8"),
        (
            "a.json",
            LINES[0] + "\n" + LINES[1],
            "a.json:2: not JSON: Extra data (one object per line? name the file .jsonl)",
        ),
        ("a.json", LINES[0], "a.json:1: expected a JSON array of records, found dict"),
        ("a.json", "[\n" + LINES[0] + "\n" + LINES[1] + "]", "a.json:3: not JSON: Expecting ',' delimiter"),
        ("a.json", "[" + LINES[0] + ", [1]]", "a.json:2: expected an object with keys, found list"),
        ("a.json", "[" * 100_000, "a.json:1: not JSON: nested too deeply"),
    ],
)
def test_a_file_that_is_not_what_its_suffix_says(name: str, content: str | bytes, message: str) -> None:
    write(name, content)
    assert refusal(name) == message


def test_a_broken_parquet_file() -> None:
    reason = "Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."
    whole = Path(write_parquet("a.parquet", RECORDS)).read_bytes()
    for content in (b"no parquet at all", whole[:-10]):
        write("b.parquet", content)
        assert refusal("b.parquet") == f"b.parquet: not a readable parquet file: {reason}"
    write("c.parquet", whole[:20] + b"\xff" * 40 + whole[60:])
    assert refusal("c.parquet").startswith("c.parquet: not a readable parquet file: ")


def test_a_parquet_file_without_rows() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "a.parquet")
    assert refusal("a.parquet") == "a.parquet: no records; give a file with at least one sample"


def test_a_number_with_more_digits_than_python_reads() -> None:
    write("a.jsonl", '{"text": "x", "n": ' + "1" * 5000 + "}\n")
    assert refusal("a.jsonl").startswith("a.jsonl:1: not JSON: ")
