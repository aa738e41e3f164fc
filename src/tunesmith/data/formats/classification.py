"""Classification: a text, or two, and a label; or multiple choice, {"query", "choices", "gold"}.

A label that is a number stands for the word in `labels`; without `labels` it is its own word. A label that is one of the
words stands for itself. The prompt is the text (two texts: two lines), or what the setting `prompt` makes of the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Any

from tunesmith.config import SetConfig
from tunesmith.data.formats.base import Format, Record, first_key, hint, show, text_of, word_of
from tunesmith.data.formats.turns import conversation
from tunesmith.errors import DataError, UserError
from tunesmith.types import Example, Message, Place

TEXTS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text",), ("sentence",), ("question",), ("query",),
)  # fmt: skip
"""Keys of what is classified; pairs first, so that neither half is taken alone."""
GOLDS = ("gold", "answer", "label")


class Classification(Format):
    keys = "text (or sentence1, sentence2), label; or query, choices, gold"

    def __init__(self, config: SetConfig) -> None:
        super().__init__(config)
        self.template = _parse(config.prompt)
        self.columns = {column: key for key, column in config.columns.items()}

    @classmethod
    def matches(cls, record: Record) -> bool:
        has_text = any(all(key in record for key in keys) for keys in TEXTS)
        return has_text and ("label" in record or _is_multiple_choice(record))

    @classmethod
    def fits(cls, record: Record) -> bool:
        return "label" in record or _is_multiple_choice(record)  # `prompt` may be made of any columns

    def read(self, record: Record, place: Place) -> Example:
        choices: Sequence[str] = self.config.labels
        key = "label"
        if _is_multiple_choice(record):
            key = first_key(record, GOLDS) or key
            choices = [word_of(word, place, ("choices", index)) for index, word in enumerate(record["choices"])]
        word = _word(record[key], choices, place, key)
        messages = [Message("user", self._prompt(record, place)), Message("assistant", word)]
        system = text_of(record.get("system"), place, ("system",))
        if system:
            messages.insert(0, Message("system", system))
        return conversation(messages, record, place, (key,), choices=tuple(choices))

    def _prompt(self, record: Record, place: Place) -> str:
        if not self.template:
            keys = next((keys for keys in TEXTS if all(key in record for key in keys)), None)
            if keys is None:
                what = f"no text to classify among the columns {', '.join(record)}"
                raise DataError(place, (), what, "set data.columns, such as {text: …}, or data.prompt")
            return "\n".join(text_of(record[key], place, (key,)) for key in keys)
        return "".join(literal + self._column(name, record, place) for literal, name in self.template)

    def _column(self, name: str, record: Record, place: Place) -> str:
        if not name:
            return ""
        key = name if name in record else self.columns.get(name, name)
        if key not in record:
            what = f"data.prompt names the column {name}, which is not here"
            raise DataError(place, (), what, hint(name, record))
        return word_of(record[key], place, (key,))


def _is_multiple_choice(record: Record) -> bool:
    return isinstance(record.get("choices"), list) and first_key(record, GOLDS) is not None


def _parse(prompt: str) -> list[tuple[str, str]]:
    """The prompt as pairs of text and the column that follows on it ("": none)."""
    try:
        parts = list(Formatter().parse(prompt))
    except ValueError as error:
        raise UserError(
            f"data.prompt: {error}; write columns as {{text}}, and a brace of the text itself twice"
        ) from error
    if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
        raise UserError("data.prompt: write columns as {text}, with the name alone in the braces")
    return [(text, name or "") for text, name, _, _ in parts]


def _word(label: Any, choices: Sequence[str], place: Place, key: str) -> str:
    """The word of a label."""
    if label is None or label == "":
        raise DataError(place, (key,), "no label", "give one, or remove the record")
    if not choices:
        return word_of(int(label) if isinstance(label, bool) else label, place, (key,))
    if isinstance(label, str) and label in choices:
        return label
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and 0 <= label < len(choices):
        return choices[label]
    if isinstance(label, int):
        what = f"label {int(label)} is out of range: there are {len(choices)} classes, counted from 0"
        raise DataError(place, (key,), what, f"the classes are {', '.join(choices)}; name all of them")
    raise DataError(place, (key,), f"unknown label {show(label)}", hint(label, choices))
