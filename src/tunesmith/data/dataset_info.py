"""LLaMA-Factory's registry of data sets, dataset_info.json, as it is.

An entry says where the data lies, which columns hold what, and in which words its turns are written. Only the columns that
it names are read, as there. Unlike there, `formatting: openai` adds nothing to system prompts, no record is dropped in
silence, and `num_samples` takes the first records, not random ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.config import SetConfig
from tunesmith.data.formats.base import CALL_ROLE, ROLES, Record, hint
from tunesmith.data.formats.turns import CONTENT_KEYS, ROLE_KEYS
from tunesmith.data.sources import Source, find_sources
from tunesmith.errors import UserError

FORMATTINGS = ("alpaca", "sharegpt", "openai")
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    "history": "history",
    "system": "system",
    "tools": "tools",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
}
"""LLaMA-Factory's name of a column → the formats' key."""
ALPACA_ONLY = ("prompt", "query", "response", "history")
DEFAULTS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}
"""Columns of an entry that names none."""
TAG_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": CALL_ROLE,
    "system_tag": "system",
}
"""Tag → the role that its word stands for."""
KEY_TAGS = {"role_tag": "from", "content_tag": "value"}
SOURCES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")
KEYS = (*SOURCES, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")


@dataclass(frozen=True)
class FromEntry:
    """Makes a renamed record what the entry says: its named columns alone, and its turns in the formats' words."""

    keys: tuple[str, ...]
    """Keys that are read."""
    role_key: str = "from"
    content_key: str = "value"
    roles: tuple[tuple[str, str], ...] = ()
    """The data's word for a role, and the formats'."""

    def __call__(self, record: Record) -> Record:
        kept = {key: record[key] for key in self.keys if key in record}
        for key in ("conversations", "chosen", "rejected"):
            value = kept.get(key)
            if isinstance(value, list):
                kept[key] = [self._turn(turn) for turn in value]
            elif isinstance(value, dict):
                kept[key] = self._turn(value)
        return kept

    def _turn(self, turn: Any) -> Any:
        if not isinstance(turn, dict) or self.role_key not in turn:
            return turn  # the format says what is wrong with it
        taken = (self.role_key, self.content_key, *ROLE_KEYS, *CONTENT_KEYS)
        made = {key: value for key, value in turn.items() if key not in taken}
        role = turn[self.role_key]
        # A key that the formats know stays, so that an error's path is that of the file.
        role_key = self.role_key if self.role_key in ROLE_KEYS else ROLE_KEYS[0]
        made[role_key] = dict(self.roles).get(role, role) if isinstance(role, str) else role
        if self.content_key in turn:
            content_key = self.content_key if self.content_key in CONTENT_KEYS else CONTENT_KEYS[0]
            made[content_key] = turn[self.content_key]
        return made


def sources_of(file: Path, config: SetConfig) -> list[Source]:
    """The data sets that `config.names` picks from a dataset_info.json. Raises UserError."""
    if config.columns or config.format != "auto":
        raise UserError(
            f"{file}: its entries say format and columns; remove data.format and data.columns, or mend the entry"
        )
    entries = _read(file)
    if not config.names:
        raise UserError(
            f"{file}: which of its data sets? set data.names to some of them, which LLaMA-Factory calls `dataset`: "
            f"{', '.join(entries)}"
        )
    return [source for name in config.names for source in _sources(file, name, entries, config)]


def _read(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}; mend the file") from error
    if not isinstance(entries, dict):
        raise UserError(f"{file}: expected an object, found {type(entries).__name__}; write {{name: {{file_name: …}}}}")
    return entries


def _sources(file: Path, name: str, entries: Mapping[str, Any], config: SetConfig) -> list[Source]:
    if name not in entries:
        raise UserError(f"{file}: no data set {name}; {hint(name, entries)}")
    entry, where = entries[name], f"{file}: {name}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, found {type(entry).__name__}; write {{file_name: …}}")
    for group, known in (
        (entry, KEYS),
        (_group(entry, "columns", where), COLUMNS),
        (_group(entry, "tags", where), _tags()),
    ):
        for key in group:
            if key not in known:
                raise UserError(f"{where}: unknown setting {key}; {hint(key, known)}")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        raise UserError(f"{where}: unknown formatting {formatting!r}; {hint(formatting, FORMATTINGS)}")
    columns = _columns(entry, formatting)
    limits = [limit for limit in (entry.get("num_samples"), config.max_samples) if limit is not None]
    if not all(type(limit) is int and limit > 0 for limit in limits):
        raise UserError(
            f"{where}: num_samples: expected a number of records, found {entry['num_samples']!r}; write 1 or more"
        )
    found = config.model_copy(
        update={
            "path": _path(file, entry, where),
            "names": (),
            "format": _format(entry, columns),
            "columns": {ours: column for ours, column in columns.items() if ours != column},
            "split": entry.get("split") or "train",
            "subset": entry.get("subset"),
            "max_samples": min(limits, default=None),
        }
    )
    transform = _transform(_group(entry, "tags", where), columns)
    return [replace(source, transform=transform) for source in find_sources(found)]


def _tags() -> tuple[str, ...]:
    return (*KEY_TAGS, *TAG_ROLES)


def _group(entry: Record, key: str, where: str) -> dict[str, str]:
    """An entry's columns or tags; null counts as absent."""
    group = entry.get(key) or {}
    if not isinstance(group, dict) or not all(isinstance(value, str | None) for value in group.values()):
        raise UserError(f"{where}: {key}: expected names, found {group!r:.80}; write {{name: name}}")
    return {name: value for name, value in group.items() if value is not None}


def _columns(entry: Record, formatting: str) -> dict[str, str]:
    """The formats' key → the file's column. An entry with columns has these alone, as in LLaMA-Factory."""
    kind = "alpaca" if formatting == "alpaca" else "sharegpt"
    named = {key: column for key, column in (entry.get("columns") or {}).items() if column is not None}
    if "columns" not in entry:
        named = DEFAULTS[kind]
    elif kind == "sharegpt":
        named = {**DEFAULTS[kind], **named}
    skipped = ("messages",) if kind == "alpaca" else ALPACA_ONLY
    return {COLUMNS[key]: column for key, column in named.items() if key not in skipped}


def _format(entry: Record, columns: dict[str, str]) -> str:
    """The form of the records. A prompt with no answer is plain text: its column moves to `text`."""
    if "kto_tag" in columns:
        return "unpaired"
    if entry.get("ranking"):
        return "preference"
    if "conversations" in columns:
        return "sharegpt"
    if "output" in columns:
        return "alpaca"
    if "instruction" in columns:
        columns["text"] = columns.pop("instruction")
    return "text"


def _transform(tags: dict[str, str], columns: dict[str, str]) -> FromEntry:
    keys = {tag: tags.get(tag, default) for tag, default in KEY_TAGS.items()}
    roles = tuple((tags[tag], role) for tag, role in TAG_ROLES.items() if tag in tags and ROLES.get(tags[tag]) != role)
    return FromEntry(tuple(columns), keys["role_tag"], keys["content_tag"], roles)


def _path(file: Path, entry: Record, where: str) -> str:
    """What `data.path` would be for the entry."""
    if entry.get("hf_hub_url"):
        if entry.get("folder"):
            raise UserError(
                f"{where}: folder {entry['folder']!r} of a hub data set cannot be read; download it, and set file_name"
            )
        return f"hub:{entry['hf_hub_url']}"
    for key, hub in (("ms_hub_url", "ModelScope"), ("om_hub_url", "Modelers")):
        if entry.get(key):
            raise UserError(f"{where}: {hub} cannot be read; download {entry[key]}, and set file_name")
    if entry.get("script_url"):
        raise UserError(
            f"{where}: script_url runs code of others and is not supported; save its data, and set file_name"
        )
    if entry.get("cloud_file_name"):
        return str(entry["cloud_file_name"])
    if not entry.get("file_name"):
        raise UserError(f"{where}: no file_name; give file_name, hf_hub_url or cloud_file_name")
    return str(file.parent / str(entry["file_name"]))
