import csv
import gzip
import io
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config import SetConfig
from tunesmith.data import sources
from tunesmith.data.demo import demo_records
from tunesmith.data.sources import DEMO_SAMPLES, Source, find_sources, read_records
from tunesmith.errors import UserError
from tunesmith.types import Place

TEXTS = ["one", "zwei ü", "三 🙂", 'a {brace} and a "quote"']
RECORDS: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
READABLE = ".json, .jsonl, .ndjson, .csv, .tsv, .txt (each also with .gz or .zst behind it), .parquet and .arrow"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def memory() -> Iterator[Callable[[str, bytes], str]]:
    """Writes files of a file system in memory."""
    filesystem = fsspec.filesystem("memory")

    def write_there(path: str, content: bytes) -> str:
        filesystem.pipe(path, content)
        return f"memory://{path}"

    yield write_there
    filesystem.rm("/", recursive=True)


def write(name: str, content: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(pack(name, content if isinstance(content, bytes) else content.encode()))
    return name


def pack(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    return pyarrow.compress(content, "zstd", asbytes=True) if name.endswith(".zst") else content


def find(path: str, **config: Any) -> list[Source]:
    return find_sources(SetConfig(path=path, **config))


def read(path: str, **config: Any) -> list[Any]:
    return [found for source in find(path, **config) for found in read_records(source)]


def refusal(path: str, **config: Any) -> str:
    with pytest.raises(UserError) as caught:
        find_sources(SetConfig(path=path, **config), "data.eval_path")
    return str(caught.value)


# ---- records in every container


def as_jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_json(records: list[Any]) -> bytes:
    return json.dumps(records, ensure_ascii=False, indent=1).encode()


def as_csv(records: list[Any], delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(records[0]), delimiter=delimiter, quoting=quoting, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue().encode()


def as_quoted_tsv(records: list[Any]) -> bytes:
    return as_csv(records, "\t", csv.QUOTE_ALL)


def as_parquet(records: list[Any]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), stream, row_group_size=2)
    return stream.getvalue()


def as_arrow(records: list[Any], new: Any = pyarrow.ipc.new_stream) -> bytes:
    table = pyarrow.Table.from_pylist(records)
    stream = io.BytesIO()
    with new(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return stream.getvalue()


def as_arrow_file(records: list[Any]) -> bytes:
    return as_arrow(records, pyarrow.ipc.new_file)


CHARACTERS = st.characters(codec="utf-8", exclude_characters="\x00")
WORDS = st.text(CHARACTERS, max_size=12) | st.sampled_from(
    ['"', '""', "a,b", "a\tb", "a\nb", "\r\n", '"a"', " ", "\u2028"]
)
ROWS = st.lists(st.fixed_dictionaries({"text": WORDS, 'b, "c"': WORDS}), min_size=1, max_size=5)
NESTED = st.lists(
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": WORDS, "n": st.none() | st.integers(-5, 5)}), max_size=3
            ),
            "score": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            "meta": st.none() | st.fixed_dictionaries({"ok": st.booleans()}),
        }
    ),
    min_size=1,
    max_size=5,
)
SAME = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        *((kind + packed, as_jsonl) for kind in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst")),
        *((".json" + packed, as_json) for packed in ("", ".gz", ".zst")),
        (".parquet", as_parquet),
        (".arrow", as_arrow),
        (".arrow", as_arrow_file),
    ],
)
@SAME
@given(records=NESTED)
def test_records_read_as_they_were_written(name: str, written: Any, records: list[Any]) -> None:
    write("a" + name, written(records))
    assert read("a" + name) == [(record, Place("a" + name, n)) for n, record in enumerate(records, start=1)]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        *((".csv" + packed, as_csv) for packed in ("", ".gz", ".zst")),
        (".tsv", as_quoted_tsv),
        (".tsv.gz", as_quoted_tsv),
    ],
)
@SAME
@given(rows=ROWS)
def test_rows_read_as_they_were_written(name: str, written: Any, rows: list[Any]) -> None:
    content = written(rows)
    write("a" + name, content)
    assert [record for record, _ in read("a" + name)] == rows
    header, *texts = [written([row]).decode() for row in rows]
    lines = [header.count("\n"), *(text.count("\n") - 1 for text in texts)]
    assert [place.line for _, place in read("a" + name)] == [2, *(1 + sum(lines[:n]) for n in range(1, len(rows)))]


@SAME
@given(rows=st.lists(st.lists(st.text(st.sampled_from('ab "'), max_size=6), min_size=2, max_size=2), min_size=1))
def test_marks_between_tabs_are_ordinary_ones(rows: list[list[str]]) -> None:
    """But for those that double others, which only a program writes."""
    write("a.tsv", "a\tb\n" + "".join("\t".join(row) + "\n" for row in rows))
    expected = [
        next(csv.reader(['"' + field[1:-1] + '"'])) if doubled(field) else [field] for row in rows for field in row
    ]
    assert [[field] for record, _ in read("a.tsv") for field in record.values()] == expected


def doubled(field: str) -> bool:
    inside = field[1:-1].replace('""', "")
    return len(field) > 3 and field[0] == field[-1] == '"' and '""' in field[1:-1] and '"' not in inside


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@SAME
@given(
    texts=st.lists(st.text(st.sampled_from("ab \t\u2028ü"), max_size=5), min_size=1),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_units_of_text(packed: str, texts: list[str], end: str) -> None:
    texts = [*texts, "last"]
    name = write(f"a.txt{packed}", end.join(texts))
    lines = [(text, n) for n, text in enumerate(texts, start=1) if text.strip()]
    assert [(record["text"], place.line) for record, place in read(name)] == lines
    paragraphs: list[tuple[str, int]] = []
    for text, n in lines:
        if paragraphs and n == paragraphs[-1][1] + paragraphs[-1][0].count("\n") + 1:
            paragraphs[-1] = (f"{paragraphs[-1][0]}\n{text}", paragraphs[-1][1])
        else:
            paragraphs.append((text, n))
    assert [(record["text"], place.line) for record, place in read(name, text_unit="paragraph")] == paragraphs
    assert read(name, text_unit="file") == [({"text": "\n".join(texts)}, Place(name, 1))]


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    for name, content in [
        ("a.jsonl", "\n".join(LINES)),
        ("a.json", "[" + ",".join(LINES) + "]"),
        ("a.txt", "\n".join(TEXTS)),
        ("a.csv", as_csv(RECORDS).decode()),
        ("a.tsv", "text\n" + "\n".join(TEXTS)),
    ]:
        write(name, "\ufeff" + content)
        assert [record for record, _ in read(name)] == RECORDS


@pytest.mark.parametrize(("name", "lines"), [("a.jsonl", LINES), ("a.txt", TEXTS)])
def test_blank_lines_are_skipped_and_counted(name: str, lines: list[str]) -> None:
    write(name, f"\n{lines[0]}\n\n  \t\n{lines[1]}\r\n\r\n")
    assert read(name) == [(RECORDS[0], Place(name, 2)), (RECORDS[1], Place(name, 5))]


def test_numbers_of_a_table_stay_text() -> None:
    assert read(write("a.csv", "n,e\r\n007,\r\n1e3, 2\r\n,\r\n")) == [
        ({"n": "007", "e": ""}, Place("a.csv", 2)),
        ({"n": "1e3", "e": " 2"}, Place("a.csv", 3)),
        ({"n": "", "e": ""}, Place("a.csv", 4)),
    ]


def test_a_record_may_hold_what_json_can_spell() -> None:
    line = r'{"a": "\ud83d\ude42 \\ud83d", "b": "NaN", "c": 1e400, "": {"a": 1}}'
    assert [record for record, _ in read(write("a.jsonl", line))] == [json.loads(line)]


# ---- what is read, and how much of it


def test_max_samples_are_the_first_of_all_files() -> None:
    write("d/a.jsonl", as_jsonl(RECORDS))
    write("d/b.jsonl", as_jsonl(RECORDS))
    found = read("d")
    for number in (1, 3, 4, 6, 8, 9):
        assert read("d", max_samples=number) == found[:number]
    assert len(found) == 8


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.txt", "a.parquet", "a.arrow"])
def test_the_first_records_of_a_large_file_take_little_memory(name: str) -> None:
    text = {".csv": "a\n" + "x" * 1000, ".txt": "x" * 1000}.get(Path(name).suffix, json.dumps({"a": "x" * 1000}))
    if name in ("a.parquet", "a.arrow"):
        records = [{"a": f"{n} {'x' * 1000}"} for n in range(20_000)]
        table = pyarrow.Table.from_pylist(records)
        with pyarrow.OSFile(name, "wb") as stream:
            if name == "a.parquet":
                pyarrow.parquet.write_table(table, stream)
            else:
                pyarrow.feather.write_feather(table, stream, chunksize=1000)
    else:
        write(name, f"{text}\n" + f"{text.splitlines()[-1]}\n" * 20_000)
    [source] = find(name, max_samples=3)
    tracemalloc.start()
    assert len(list(read_records(source))) == 3
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 6e6  # of 20e6


def test_records_before_a_bad_one_come_first() -> None:
    [source] = find(write("a.jsonl", LINES[0] + "\n{bad\n"))
    records = read_records(source)
    assert next(records) == (RECORDS[0], Place("a.jsonl", 1))
    with pytest.raises(UserError):
        next(records)


def test_a_file_without_records_is_an_error_but_not_one_with_bad_ones() -> None:
    write("d/a.jsonl", LINES[0])
    write("d/b.jsonl", "[]")
    write("d/c.csv", "a,b\n")
    [source] = find("d")
    told: list[str] = []
    records = read_records(source, lambda error, raw: told.append(f"{error} <{raw}>"))
    assert next(records) == (RECORDS[0], Place("d/a.jsonl", 1))
    with pytest.raises(UserError) as caught:
        next(records)
    assert str(caught.value) == "d/c.csv: no records: give a file with at least one"
    assert told == [
        "d/b.jsonl:1:1: expected an object with keys, found a list: write a record as {…} "
        "(a whole JSON array? name the file .json) <[]>"
    ]


def test_demo_reads_both_splits() -> None:
    for split in ("train", "eval"):
        records = demo_records(split, DEMO_SAMPLES[split])
        [source] = find_sources(SetConfig(path="demo"), split=split)
        assert source.name == "demo"
        assert list(read_records(source)) == [(r, Place("demo", n)) for n, r in enumerate(records, start=1)]


# ---- folders, globs and files


def test_a_folder_is_all_its_files_in_order() -> None:
    for name in (
        "d/b.jsonl",
        "d/a/z.csv",
        "d/a/x.txt.gz",
        "d/c.JSON",
        "d/.hidden.jsonl",
        "d/.cache/a.jsonl",
        "d/README.md",
    ):
        write(name, "x")
    write("d/dataset_info.json", "{}")
    write("d/state.json", "{}")
    assert find("d") == [
        Source("d", SetConfig(path="d"), ("d/a/x.txt.gz", "d/a/z.csv", "d/b.jsonl", "d/c.JSON", "d/state.json"))
    ]
    write("d/data.arrow", "x")
    assert find("d")[0].files == ("d/a/x.txt.gz", "d/a/z.csv", "d/b.jsonl", "d/c.JSON", "d/data.arrow")


def test_a_glob_is_all_that_matches_in_order() -> None:
    for name in ("d/2.jsonl", "d/10.jsonl", "d/a/3.jsonl", "d/x.csv", "e[1].jsonl"):
        write(name, "x")
    Path("d/4.jsonl").mkdir()
    assert find("d/*.jsonl")[0].files == ("d/10.jsonl", "d/2.jsonl")
    assert find("d/**/*.jsonl")[0].files == ("d/10.jsonl", "d/2.jsonl", "d/a/3.jsonl")
    assert find("d/[13]*.jsonl")[0].files == ("d/10.jsonl",)
    assert find("d/?.*")[0].files == ("d/2.jsonl", "d/x.csv")
    assert find("d/../*/2.jsonl")[0].files == ("d/../d/2.jsonl",)
    assert find("e[1].jsonl")[0].files == ("e[1].jsonl",)
    assert find(str(Path.cwd() / "d" / "2*"))[0].files == (str(Path.cwd() / "d" / "2.jsonl"),)


def test_a_path_of_home(monkeypatch: pytest.MonkeyPatch) -> None:
    write("home/a.jsonl", LINES[0])
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    file = str(Path.cwd() / "home" / "a.jsonl")
    for path in ("~/a.jsonl", "~/*.jsonl", "~"):
        assert find(path) == [Source(path, SetConfig(path=path), (file,))]
    assert read("~/a.jsonl") == [(RECORDS[0], Place(file, 1))]


def test_finding_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write("d/a.jsonl.gz", "no matter")
    monkeypatch.setattr("builtins.open", None)
    for path in ("d", "d/*", "d/a.jsonl.gz"):
        assert find(path)[0].files == ("d/a.jsonl.gz",)


def test_paths_of_no_readable_file() -> None:
    here = Path.cwd()
    assert refusal("no.jsonl") == f"no.jsonl: no such data file; check data.eval_path (now in {here})"
    assert refusal("d/*.jsonl") == f"d/*.jsonl: no file matches; check data.eval_path (now in {here})"
    write("d/a.md", "x")
    write("d/b.jsonl", "")
    write("e/a.md", "x")
    assert refusal("e") == f"e: a folder without data files; let data.eval_path name one with any of {READABLE}"
    for path in ("d", "d/b.jsonl", "d/*.jsonl"):
        assert refusal(path) == "d/b.jsonl: the file is empty; let data.eval_path name files with at least one record"
    assert refusal("d/*") == f"d/a.md: unknown suffix '.md'; let data.eval_path name files of these: {READABLE}"
    for name, suffix in (("a", ""), ("a.jsonl.bz2", ".jsonl.bz2"), ("a.gz", ".gz"), ("a.parquet.gz", ".parquet.gz")):
        write(name, "x")
        assert refusal(name) == f"{name}: unknown suffix {suffix!r}; let data.eval_path name files of these: {READABLE}"


# ---- dataset_info.json


def test_a_dataset_info_is_read_by_its_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "tunesmith.data.dataset_info.sources_of", lambda file, config: asked.append((file, config)) or []
    )
    write("d/dataset_info.json", "{}")
    write("d/other.json", "{}")
    configs = [
        SetConfig(path="d/dataset_info.json"),
        SetConfig(path="d/other.json", names=("a",)),
        SetConfig(path="d", names=("a", "b")),
    ]
    assert [find_sources(config) for config in configs] == [[], [], []]
    files = [Path("d/dataset_info.json"), Path("d/other.json"), Path("d/dataset_info.json")]
    assert asked == list(zip(files, configs, strict=True))
    assert refusal("e", names=("a",)) == f"e: no such data file; check data.eval_path (now in {Path.cwd()})"
    for path in ("demo", "hub:a/b", "memory://dataset_info.json"):
        assert refusal(path, names=("a",)) == (
            f"{path}: data.names picks from a local dataset_info.json; remove it, or let data.eval_path name such a file"
        )


# ---- URLs


def test_files_behind_urls_read_the_same(memory: Callable[[str, bytes], str]) -> None:
    for name, written in [
        ("a.jsonl", as_jsonl),
        ("a.jsonl.gz", as_jsonl),
        ("a.json.zst", as_json),
        ("a.csv", as_csv),
        ("a.parquet", as_parquet),
        ("a.arrow", as_arrow),
        ("b.arrow", as_arrow_file),
    ]:
        url = memory(f"/d/{name}", pack(name, written(RECORDS)))
        assert [source.files for source in find(url)] == [(url,)]
        assert [record for record, _ in read(url)] == RECORDS
        assert [place.file for _, place in read(url)] == [url] * 4


def test_folders_and_globs_behind_urls(memory: Callable[[str, bytes], str]) -> None:
    files = [memory(f"/d/{name}", as_jsonl(RECORDS[:1])) for name in ("a.jsonl", "b/c.jsonl", "b/d.jsonl")]
    memory("/d/README.md", b"x")
    assert find("memory://d")[0].files == tuple(files)
    assert find("memory://d/*/*.jsonl")[0].files == tuple(files[1:])
    assert find("memory://d/**/c.*")[0].files == (files[1],)
    assert read("memory://d") == [(RECORDS[0], Place(file, 1)) for file in files]


def test_a_file_url_is_a_local_path() -> None:
    write("d/a.jsonl", LINES[0])
    file = str(Path.cwd() / "d" / "a.jsonl")
    for url in (f"file://{file}", f"file://{Path(file).parent}", f"file://{Path(file).parent}/*.jsonl"):
        assert find(url) == [Source(url, SetConfig(path=url), (file,))]


def test_urls_behind_which_is_nothing(memory: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch) -> None:
    memory("/d/a.md", b"x")
    memory("/d/b.jsonl", b"")
    for url in ("memory://no.jsonl", "memory://d/*.csv"):
        assert refusal(url) == f"{url}: no data file there; check data.eval_path"
    assert refusal("memory:///d/a.md") == (
        f"memory:///d/a.md: unknown suffix '.md'; let data.eval_path name files of these: {READABLE}"
    )
    for url in ("memory:///d/b.jsonl", "memory://d", "memory://d/*.jsonl"):
        assert refusal(url) == (
            "memory:///d/b.jsonl: the file is empty; let data.eval_path name files with at least one record"
        )
    assert refusal("no-such://a.jsonl") == (
        "no-such://a.jsonl: cannot be reached: Protocol not known: no-such; "
        "check data.eval_path, the network and your credentials"
    )

    def refuse(url: str) -> Any:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    assert refusal("memory://d/b.jsonl") == (
        "memory://d/b.jsonl: cannot be reached: Forbidden; check data.eval_path, the network and your credentials"
    )


def test_a_protocol_or_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub"), ("https", "aiohttp")):
        url = f"{protocol}://bucket/a.jsonl"
        assert refusal(url) == (
            f"{url}: {protocol}:// needs a package: pip install {package}, or let data.eval_path name a local copy"
        )
    assert refusal("hub:a/b") == (
        "hub:a/b: data.eval_path names a hub data set, which needs a package: pip install datasets"
    )


# ---- the hub


class Streamed(list[Any]):
    """What load_dataset gives back, as far as it is used."""

    def decode(self, enable: bool) -> "Streamed":
        assert enable is False
        return self


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub with one data set; the list of what is asked of it."""
    asked: list[Any] = []

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> Streamed:
        asked.append((name, subset, split, streaming))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such'\n doesn't exist")
        return Streamed(RECORDS if name == "a/b" else [])

    monkeypatch.setattr(sources, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_hub_data_set_is_streamed(hub: list[Any]) -> None:
    config = SetConfig(path="hub:a/b", split="test[:5%]", subset="en", max_samples=3)
    assert find_sources(config) == [Source("hub:a/b", config)]
    assert hub == []
    records = [(record, Place("hub:a/b", n)) for n, record in enumerate(RECORDS[:3], start=1)]
    assert list(read_records(Source("an entry", config))) == records
    assert hub == [("a/b", "en", "test[:5%]", True)]


def test_hub_data_sets_that_cannot_be_read(hub: list[Any]) -> None:
    for path, message in [
        (
            "hub:no/such",
            "hub:no/such: cannot be read: Dataset 'no/such' doesn't exist: "
            "check the name, data.subset, data.split, the network and your token (hf auth login)",
        ),
        ("hub:empty", "hub:empty: no records: check data.subset and data.split"),
    ]:
        [source] = find(path)
        with pytest.raises(UserError) as caught:
            list(read_records(source))
        assert str(caught.value) == message
    for path in ("hub:", "hub:a/b/c", "hub:a b"):
        assert refusal(path) == f"{path}: no name of a hub data set; write hub:owner/name in data.eval_path"
