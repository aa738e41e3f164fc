"""A run's folder: what lies where, and how it is written so that a crash leaves nothing half-done."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tunesmith.config import RunConfig
from tunesmith.config_file import dump_config, load_config
from tunesmith.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME/ with config.yaml, manifest.json, events.jsonl, checkpoints/, model/, loss.png and report.md."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def updates(self) -> Path:
        """The log of a zeroth-order run's updates."""
        return self.path / "updates.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def has_ended(self) -> bool:
        """Whether the run is done, and `model` is its result."""
        events = read_events(self.events)
        return self.model.is_dir() and bool(events) and events[-1]["event"] == "end"

    def was_begun_by(self, job: str) -> bool:
        """Whether it holds a run of this job, whose processes were started again since. "" is no job."""
        return bool(job) and self.config.is_file() and self.read_manifest().get("job") == job

    def check_free(self, job: str = "") -> None:
        """Raises UserError if the folder holds anything but what this job has left before it had begun."""
        if job and self.read_manifest().get("job") == job:
            return
        if self.config.exists():
            raise UserError(
                f"{self.path}: already holds a run; go on with it: tunesmith train --resume {self.path}, "
                "or choose another output"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path}: exists and is no empty folder; choose another output")
        above = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not above.is_dir():
            raise UserError(f"{self.path}: {above} is a file; choose another output")
        if not os.access(above, os.W_OK):
            raise UserError(f"{self.path}: no permission to write in {above}; choose another output")

    def claim(self, config: RunConfig) -> None:
        """Make the folder and write the resolved configuration into it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, dump_config(config))

    def read_config(self) -> RunConfig:
        if not self.config.is_file():
            raise UserError(f"{self.path}: holds no run (no config.yaml); give the output folder of a run")
        return load_config(self.config)

    def read_manifest(self) -> dict[str, Any]:
        return json.loads(self.manifest.read_text(encoding="utf-8")) if self.manifest.is_file() else {}

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a whole file or nothing."""
    with writing(file) as stream:
        stream.write(text)


@contextmanager
def writing(file: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A stream for a text file that is put in place only when it is whole and on the disk."""
    aside = file.with_name(f".{file.name}.writing")
    try:
        with aside.open("w", encoding="utf-8", errors=errors) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{file}: could not be written: {error}") from error


def aside_of(folder: Path) -> Path:
    """Where a folder is written before it is put in place."""
    return folder.with_name(f".{folder.name}.writing")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, and put it in place only when it is whole and on the disk."""
    aside, doomed = aside_of(folder), folder.with_name(f".{folder.name}.removing")
    try:
        for left_over in (aside, doomed):
            shutil.rmtree(left_over, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if folder.exists():
            folder.rename(doomed)
        aside.rename(folder)
        shutil.rmtree(doomed, ignore_errors=True)
    except Exception as error:  # safetensors, transformers and PEFT each raise types of their own
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{folder}: the model could not be written: {' '.join(str(error).split())[:200]}; the last checkpoint is intact: "
            "make room, then write it with --resume"
        ) from error


class EventLog:
    """Appends one JSON object a line to events.jsonl, and to TensorBoard if a folder for it is given."""

    def __init__(self, file: Path, tensorboard: Path | None = None) -> None:
        torn = file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
        self.stream = file.open("a", encoding="utf-8")
        if torn:  # the process before was killed in the middle of a line
            self.stream.write("\n")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard))

    def write(self, event: str, **fields: Any) -> None:
        """Append `{"event": event, "time": …, **fields}`."""
        try:
            self.stream.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n")
            self.stream.flush()
        except OSError as error:
            raise UserError(
                f"{self.stream.name}: could not be written: {error}; make room, then go on with --resume"
            ) from error
        if self.writer and event in ("step", "eval"):
            for name, value in fields.items():
                if name != "step":
                    self.writer.add_scalar(f"{'train' if event == 'step' else 'eval'}/{name}", value, fields["step"])

    def close(self) -> None:
        self.stream.close()
        if self.writer:
            self.writer.close()


def read_events(file: Path) -> list[dict[str, Any]]:
    """All events of a run; what came after the step that a resume went back to is left out, as are torn lines."""
    events: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event.get("event") == "resume":
            events = [e for e in events if e.get("step", 0) <= event["step"]]
        events.append(event)
    return events
