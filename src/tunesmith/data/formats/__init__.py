"""The table of data formats. To add one: a file here, a line in the table, its name in `DataConfig.format`."""

from __future__ import annotations

from tunesmith.data.formats.alpaca import Alpaca
from tunesmith.data.formats.base import Format, Record
from tunesmith.data.formats.messages import Messages
from tunesmith.data.formats.prompt_completion import PromptCompletion
from tunesmith.data.formats.sharegpt import Sharegpt
from tunesmith.data.formats.text import Text
from tunesmith.errors import UserError
from tunesmith.types import Place

FORMATS: dict[str, Format] = {
    "messages": Messages(),
    "sharegpt": Sharegpt(),
    "alpaca": Alpaca(),
    "prompt_completion": PromptCompletion(),
    "text": Text(),
}


def find_format(name: str, record: Record, place: Place) -> Format:
    """The named format, or for `auto` the first that recognises the record. Raises UserError when none does."""
    candidates = list(FORMATS.values()) if name == "auto" else [FORMATS[name]]
    for candidate in candidates:
        if candidate.matches(record):
            return candidate
    wanted = "; or ".join(candidate.keys for candidate in candidates)
    raise UserError(
        f"{place}: a record of no known form: it has the keys {', '.join(record) or '(none)'}; expected {wanted}"
    )


__all__ = ["FORMATS", "Format", "find_format"]
