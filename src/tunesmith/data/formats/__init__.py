"""The table of data formats. To add one: a file here, a line in the table, its name in `FormatName`."""

from __future__ import annotations

import difflib

from tunesmith.config import SetConfig
from tunesmith.data.formats.alpaca import Alpaca
from tunesmith.data.formats.base import Format, Record, first_key
from tunesmith.data.formats.classification import Classification
from tunesmith.data.formats.messages import Messages
from tunesmith.data.formats.preference import Preference
from tunesmith.data.formats.prompt_answer import QUESTIONS, REPLIES, PromptAnswer
from tunesmith.data.formats.prompt_completion import PromptCompletion
from tunesmith.data.formats.sharegpt import Sharegpt
from tunesmith.data.formats.steps import Steps
from tunesmith.data.formats.text import Text
from tunesmith.data.formats.unpaired import Unpaired
from tunesmith.errors import DataError
from tunesmith.types import Place

FORMATS: dict[str, type[Format]] = {
    # The first that matches wins. Those that add keys to another form come before it.
    "preference": Preference,
    "unpaired": Unpaired,
    "steps": Steps,
    "messages": Messages,
    "sharegpt": Sharegpt,
    "alpaca": Alpaca,
    "prompt_completion": PromptCompletion,
    "classification": Classification,
    "prompt_answer": PromptAnswer,
    "text": Text,
}
KEYS = (
    "messages", "conversations", "instruction", "input", "output", "prompt", "completion", "chosen", "rejected", "label",
    "question", "answer", "text", "choices", "completions", "labels",
)  # fmt: skip
"""Keys that a misspelt one may have been meant to be."""
ASKED = (*QUESTIONS, "query", "input", "q")
"""Keys that a question may have, for the example of a remedy."""
LONGEST_NAME = 40
"""A longer column name is no name."""


def find_format(config: SetConfig, record: Record, place: Place) -> Format:
    """The format that `config` names, or for auto the first that matches. Raises DataError when it does not fit."""
    name: str = config.format
    if name == "auto" and (config.labels or config.prompt):
        name = "classification"  # alone has these settings
    candidates = list(FORMATS.values()) if name == "auto" else [FORMATS[name]]
    for candidate in candidates:
        if candidate.matches(record) if name == "auto" else candidate.fits(record):
            return candidate(config)
    what = "a record of no known form" if name == "auto" else f"a record that is not of the form {name}"
    wanted = "; or ".join(candidate.keys for candidate in candidates)
    raise DataError(place, (), f"{what}, with the keys {_names(record)}", f"expected {wanted}; {_rename(record, name)}")


def check_format(form: Format, record: Record, place: Place) -> None:
    """Raises DataError where a later record is not of the form of those before it."""
    if not form.fits(record):
        what = f"not of the form of the records before it, with the keys {_names(record)}"
        raise DataError(place, (), what, f"expected {form.keys}; put records of another form into a file of their own")


def _names(record: Record) -> str:
    return ", ".join(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…" for name in record) or "(none)"


def _rename(record: Record, name: str) -> str:
    """How to say which column is which, with a misspelt key as the example."""
    if any(len(column) > LONGEST_NAME for column in record):
        return "the first line of the file seems to be data: name its columns in data.header"
    for column in record:
        close = difflib.get_close_matches(column, KEYS, n=1, cutoff=0.75)
        if close and close[0] not in record:
            return f"did you mean {close[0]}? then set data.columns to {{{close[0]}: {column}}}"
    if name != "auto":
        return "say which column is which in data.columns, or set data.format to auto"
    asked, told = first_key(record, ASKED) or "question", first_key(record, REPLIES) or "reply"
    return f"say which column is which in data.columns, such as {{instruction: {asked}, output: {told}}}"


__all__ = ["FORMATS", "Format", "check_format", "find_format"]
