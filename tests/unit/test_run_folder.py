import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tunesmith.config_file import config_from_dict
from tunesmith.errors import UserError
from tunesmith.run_folder import EventLog, RunFolder, read_events, write_folder, write_text

CONFIG = config_from_dict({"model": "demo", "data": "demo", "output": "ü/run"})


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        RunFolder(folder).check_free()
    return str(caught.value)


def test_a_folder_that_is_absent_or_empty_is_free(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b").check_free()
    RunFolder(tmp_path).check_free()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_not_free(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    RunFolder(folder).claim(CONFIG)
    assert refusal(folder) == (
        f"{folder}: already holds a run; go on with it: tunesmith train --resume {folder}, or choose another output"
    )


def test_a_folder_that_holds_something_else_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt"):
        assert refusal(path) == f"{path}: exists and is no empty folder; choose another output"


def test_the_configuration_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    folder.claim(CONFIG)
    assert folder.read_config() == CONFIG
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).read_config()
    assert str(caught.value) == f"{tmp_path}: holds no run (no config.yaml); give the output folder of a run"


def test_the_manifest_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_manifest() == {}
    folder.write_manifest({"a": {"b": "ü"}})
    assert folder.read_manifest() == {"a": {"b": "ü"}}


def test_write_text_replaces_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text in ("a long first text\n", "ü\n"):
        write_text(file, text)
        assert file.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [file]


def test_write_text_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(_descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    file = tmp_path / "a.txt"
    write_text(file, "old")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(UserError, match="No space left on device"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_write_folder_replaces_a_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    write_folder(folder, lambda aside: _write(aside / "old", "1"))
    assert tree(tmp_path) == {"run/model/old": "1"}
    write_folder(folder, lambda aside: _write(aside / "new", "2"))
    assert tree(tmp_path) == {"run/model/new": "2"}


def _write(file: Path, text: str) -> None:
    file.write_text(text)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "[Errno 28] No space left on device"), (RuntimeError("a\nb"), "a b")],
)
def test_write_folder_keeps_the_old_folder_when_the_writer_fails(error: Exception, reason: str, tmp_path: Path) -> None:
    def fail(aside: Path) -> NoReturn:
        _write(aside / "new", "half")
        raise error

    folder = tmp_path / "model"
    message = (
        f"{folder}: the model could not be written: {reason}; the last checkpoint is intact: make room, then write it with "
        "--resume"
    )
    for expected in ({}, {"model/old": "1"}):
        with pytest.raises(UserError) as caught:
            write_folder(folder, fail)
        assert str(caught.value) == message
        assert tree(tmp_path) == expected
        write_folder(folder, lambda aside: _write(aside / "old", "1"))


def test_write_folder_is_not_disturbed_by_what_a_killed_process_left(tmp_path: Path) -> None:
    def killed(aside: Path) -> NoReturn:
        _write(aside / "rubbish", "half")
        raise KeyboardInterrupt

    folder = tmp_path / "model"
    write_folder(folder, lambda aside: _write(aside / "old", "1"))
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, killed)
    assert tree(folder) == {"old": "1"}
    write_folder(folder, lambda aside: _write(aside / "new", "2"))
    assert tree(tmp_path) == {"model/new": "2"}


def write_events(file: Path, *events: tuple[str, dict[str, Any]]) -> None:
    log = EventLog(file)
    for event, fields in events:
        log.write(event, **fields)
    log.close()


def shown(file: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in read_events(file)]


def test_events_are_appended_as_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    write_events(file, ("start", {"step": 0, "steps": 2}), ("step", {"step": 1, "loss": 0.5}))
    write_events(file, ("end", {"step": 2, "text": "ü\u2028"}))
    lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    assert all(isinstance(line.pop("time"), float) for line in lines)
    assert lines == [
        {"event": "start", "step": 0, "steps": 2},
        {"event": "step", "step": 1, "loss": 0.5},
        {"event": "end", "step": 2, "text": "ü\u2028"},
    ]
    assert [{k: v for k, v in event.items() if k != "time"} for event in read_events(file)] == lines


def test_an_event_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=1)
    assert shown(tmp_path / "events.jsonl") == [("step", 1)]
    log.close()


def test_no_events_yet(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []


@pytest.mark.parametrize("torn", ['{"event": "st', '{"event": "step", "step": 2', '{"event": "step", "text": "\xc3'])
def test_a_torn_line_is_left_behind_and_the_next_begins_on_its_own(torn: str, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    write_events(file, ("start", {"step": 0}), ("step", {"step": 1}))
    with file.open("ab") as stream:
        stream.write(torn.encode("latin-1"))
    assert shown(file) == [("start", 0), ("step", 1)]
    write_events(file, ("resume", {"step": 1}), ("step", {"step": 2}))
    assert shown(file) == [("start", 0), ("step", 1), ("resume", 1), ("step", 2)]
    assert file.read_bytes().count(b"\n") == 5


def test_what_a_resume_went_back_behind_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    write_events(file, ("start", {"step": 0}), *(("step", {"step": step}) for step in (1, 2, 3)), ("eval", {"step": 3}))
    write_events(file, ("resume", {"step": 2}), ("step", {"step": 3}), ("step", {"step": 4}))
    write_events(file, ("resume", {"step": 3}), ("step", {"step": 4}), ("eval", {"step": 4}))
    assert shown(file) == [
        ("start", 0),
        ("step", 1),
        ("step", 2),
        ("resume", 2),
        ("step", 3),
        ("resume", 3),
        ("step", 4),
        ("eval", 4),
    ]


def test_a_folder_without_permission_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as for a user who is not root
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "a" / "run").check_free()
    assert str(caught.value) == f"{tmp_path}/a/run: no permission to write in {tmp_path}; choose another output"
