"""Tool calls and the schemas of tools, in the ways that data sets write them."""

from __future__ import annotations

from typing import Any

from tunesmith.data.formats.base import Record, json_of, show
from tunesmith.errors import DataError
from tunesmith.errors import Path as ValuePath
from tunesmith.types import Place, ToolCall

CALL = 'write {"name": "…", "arguments": {…}}'
SCHEMA = 'write {"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}'


def read_calls(value: Any, place: Place, path: ValuePath) -> tuple[ToolCall, ...]:
    """One call or a list of them, as objects or as JSON in a string. None and nothing else is no call."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = json_of(value, place, path)
    if isinstance(value, list):
        return tuple(read_call(item, place, (*path, index)) for index, item in enumerate(value))
    return (read_call(value, place, path),)


def read_call(value: Any, place: Place, path: ValuePath) -> ToolCall:
    """{"name", "arguments"}, or OpenAI's {"id", "type", "function": {"name", "arguments"}}; or either as JSON."""
    if isinstance(value, str):
        value = json_of(value, place, path)
    function, inner = value, path
    if isinstance(value, dict) and "function" in value:
        function, inner = value["function"], (*path, "function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(place, inner, f"expected a tool call with a name, found {show(function)}", CALL)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = json_of(arguments, place, (*inner, "arguments")) if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        what = f"expected the arguments by name, found {show(arguments)}"
        raise DataError(place, (*inner, "arguments"), what, 'write an object such as {"city": "Oslo"}')
    call_id = value.get("id")
    return ToolCall(function["name"], arguments or {}, None if call_id is None else str(call_id))


def read_tools(record: Record, place: Place) -> tuple[dict[str, Any], ...]:
    """The record's `tools`: a list or its JSON; schemas in OpenAI's form, or bare functions as in LLaMA-Factory."""
    value = record.get("tools")
    if isinstance(value, str):
        value = json_of(value, place, ("tools",)) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(place, ("tools",), f"expected a list of tools, found {show(value)}", f"{SCHEMA} in a list")
    return tuple(_read_tool(item, place, ("tools", index)) for index, item in enumerate(value))


def _read_tool(value: Any, place: Place, path: ValuePath) -> dict[str, Any]:
    if isinstance(value, dict):
        if isinstance(value.get("function"), dict) and isinstance(value["function"].get("name"), str):
            return value if "type" in value else {"type": "function", **value}
        if isinstance(value.get("name"), str):
            return {"type": "function", "function": value}
    raise DataError(place, path, f"expected a tool with a name, found {show(value)}", SCHEMA)
