"""YAML files and `a.b=c` overrides to a RunConfig; every error names its file and line, or the override. Imports no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tunesmith.config import RunConfig
from tunesmith.errors import UserError

Keys = tuple[str, ...]

HUMAN_TYPES = {
    "model_type": "settings of its own (key: value)",
    "model_attributes_type": "settings of its own (key: value)",
    "dict_type": "settings of its own (key: value)",
    "tuple_type": "a list",
    "string_type": "text",
}
"""pydantic's error types whose own messages speak of Python."""


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration. Raises UserError with one line per mistake."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file; write a run.yaml with model, data and output (see examples/)")
    tree, places = _read_yaml(file)
    for text in overrides:
        _override(tree, places, text)
    tree.setdefault("output", f"runs/{file.stem}")
    return _validate(tree, places, str(file))


def config_from_dict(tree: dict[str, Any], name: str = "config", overrides: Sequence[str] = ()) -> RunConfig:
    """The same from Python; `name` stands for the file in error messages. Overrides are laid into the tree."""
    places: dict[Keys, str] = {}
    for text in overrides:
        _override(tree, places, text)
    config = _validate(tree, places, name)
    if not config.output:
        raise UserError(f"{name}: output: missing; add it")
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> str:
    """JSON Schema of run.yaml: editors complete and check from it."""
    schema = RunConfig.model_json_schema()
    for name, field in schema["properties"].items():
        if members := [m for m in _members(RunConfig.model_fields[name].annotation) if "name" in m.model_fields]:
            short = {"enum": [member.model_fields["name"].default for member in members]}
            long = {key: field.pop(key) for key in ("oneOf", "discriminator", "$ref") if key in field}
            field["anyOf"] = [short, long]
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2)


def differing_keys(old: BaseModel, new: BaseModel) -> list[str]:
    """Lines `a.b: was 1, is 2` for every setting in which two configurations differ."""
    before, after = settings_of(old), settings_of(new)
    absent = "(absent)"
    pairs = ((key, before.get(key, absent), after.get(key, absent)) for key in {**before, **after})
    return [f"{key}: was {was}, is {now}" for key, was, now in pairs if was != now]


def settings_of(config: BaseModel) -> dict[str, Any]:
    """Every setting by its name, such as `method.rank`; numbers, text and lists."""
    return {".".join(key): value for key, value in _leaves(config.model_dump(mode="json"))}


def _leaves(tree: Any, prefix: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*prefix, key))
    else:
        yield prefix, tree


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[Keys, str]]:
    """The file's tree, and for each key the place it stands at (`run.yaml:7`)."""
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{file}:{line}: not valid YAML: {problem}; check indentation and quotes") from error
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise UserError(f"{file}:1: expected keys such as model, data and output, found {found}")
    places: dict[Keys, str] = {}
    _mark(root, (), file, places)
    return tree, places


def _mark(node: Any, prefix: Keys, file: Path, places: dict[Keys, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        path, place = (*prefix, str(key_node.value)), f"{file}:{key_node.start_mark.line + 1}"
        if path in places:
            raise UserError(f"{place}: {'.'.join(path)}: given twice, first at {places[path]}; remove one")
        places[path] = place
        _mark(value_node, path, file, places)


def _override(tree: dict[str, Any], places: dict[Keys, str], text: str) -> None:
    """Apply `a.b=c` in place; c is read as YAML."""
    name, equals, value = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"{text!r}: an override is written a.b=value, such as method.rank=8")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{text!r}: the value is not valid YAML; quote it") from error
    for depth in range(1, len(keys)):
        places.setdefault(keys[:depth], f"override {text}")
    for depth, key in enumerate(keys[:-1], start=1):
        below = tree.get(key)
        if not isinstance(below, dict):
            # `method=lora method.rank=8`, or a file that says `method: lora`: the short form grows into the long one
            short = "path" if keys[:depth] in (("model",), ("data",)) else "name"
            tree[key] = {} if below is None else {short: below}
        tree = tree[key]
    tree[keys[-1]] = parsed
    places[keys] = f"override {text}"


def _validate(tree: dict[str, Any], places: dict[Keys, str], file: str) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems: dict[str, str] = {}  # one line a setting: of a union's members each complains
        for problem in error.errors():
            line = _explain(problem, tree, places, file)
            problems.setdefault(_setting(problem, tree), line)
        raise UserError("\n".join(problems.values())) from None


def _setting(problem: Any, tree: dict[str, Any]) -> str:
    return ".".join(part for part in _config_path(problem["loc"], tree) if not part.isdigit())


def _explain(problem: Any, tree: dict[str, Any], places: dict[Keys, str], file: str) -> str:
    path = _config_path(problem["loc"], tree)
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), file)
    name, kind = ".".join(path), problem["type"]
    if kind == "extra_forbidden":
        return f"{place}: {name}: unknown{_nearest(path[-1], _section(path[:-1], tree).model_fields)}"
    if kind == "missing":
        return f"{place}: {name}: missing; add it"
    if kind == "union_tag_invalid":
        names = _names(path[0])
        return f"{place}: {name}: unknown name {problem['ctx']['tag']!r}{_nearest(problem['ctx']['tag'], names)}"
    if kind in HUMAN_TYPES:
        found = "nothing" if problem["input"] is None else repr(problem["input"])
        return f"{place}: {name}: expected {HUMAN_TYPES[kind]}, got {found}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if isinstance(problem["input"], dict | BaseModel) else f", got {problem['input']!r}"
    return f"{place}: {name}: {message}{given}" if name else f"{place}: {message}"


def _config_path(loc: Sequence[str | int], tree: Any) -> Keys:
    """pydantic's location without the tags that it inserts for the members of a union."""
    path: list[str] = []
    for index, part in enumerate(loc):
        is_tag = index == 1 and part in _names(str(loc[0])) and not (isinstance(tree, dict) and part in tree)
        is_branch = not isinstance(tree, dict) and index > 0 and not isinstance(part, int)
        if is_tag or is_branch:
            continue
        path.append(str(part))
        tree = _below(tree, part)
    return tuple(path)


def _below(tree: Any, key: str | int) -> Any:
    """What stands under a key, or in a list's place; None if nothing does."""
    if isinstance(tree, list):
        return tree[int(key)]
    return tree.get(key) if isinstance(tree, dict) else None


def _names(axis: str) -> list[str]:
    """The names that a choice has; none for other settings."""
    field = RunConfig.model_fields.get(axis)
    members = _members(field.annotation) if field else []
    return [member.model_fields["name"].default for member in members if "name" in member.model_fields]


def _nearest(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _section(path: Keys, tree: Any) -> type[BaseModel]:
    """The config class that holds the settings below `path`."""
    section: type[BaseModel] = RunConfig
    for key in path:
        tree = _below(tree, key)
        if key.isdigit():
            continue  # one of a list, whose class is known already
        field = section.model_fields[key]
        members = _members(field.annotation)
        usual = type(field.default) if isinstance(field.default, BaseModel) else members[0]
        name = tree.get("name") if isinstance(tree, dict) else tree
        named = (m for m in members if name and "name" in m.model_fields and m.model_fields["name"].default == name)
        section = next(named, usual)
    return section


def _members(annotation: Any) -> list[type[BaseModel]]:
    if parts := get_args(annotation):
        return [member for part in parts for member in _members(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
