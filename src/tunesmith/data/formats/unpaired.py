"""Unpaired feedback (KTO): an answer, and whether it is desirable.

{"prompt", "completion", "label"}, a conversation with `label`, or either of them or alpaca's form with `kto_tag`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tunesmith.config import SetConfig
from tunesmith.data.formats.alpaca import Alpaca
from tunesmith.data.formats.base import CONVERSATIONS, Format, Record, first_key, show
from tunesmith.data.formats.messages import Messages
from tunesmith.data.formats.prompt_completion import PromptCompletion
from tunesmith.data.formats.sharegpt import Sharegpt
from tunesmith.errors import DataError
from tunesmith.types import Example, Place

LABELS = ("kto_tag", "label")
FORMS: tuple[type[Format], ...] = (Messages, Sharegpt, Alpaca, PromptCompletion)
"""What the answer may be written in."""
WORDS = {"true": True, "1": True, "false": False, "0": False}
"""Labels in a table of text, such as a .csv file."""


class Unpaired(Format):
    keys = "prompt, completion, label (true or false; or messages with label)"

    def __init__(self, config: SetConfig) -> None:
        super().__init__(config)
        self.forms = [form(config) for form in FORMS]

    @classmethod
    def matches(cls, record: Record) -> bool:
        label = record.get("label")
        is_feedback = isinstance(label, bool) or (
            # Beside a conversation other labels are more likely a topic or a score.
            "completion" in record and _truth(label) is not None and first_key(record, CONVERSATIONS) is None
        )
        return cls.fits(record) and ("kto_tag" in record or is_feedback)

    @classmethod
    def fits(cls, record: Record) -> bool:
        return first_key(record, LABELS) is not None and any(form.fits(record) for form in FORMS)

    def read(self, record: Record, place: Place) -> Example:
        key = first_key(record, LABELS)
        assert key is not None, "read a record that does not fit"
        desirable = _truth(record[key])
        if desirable is None:
            raise DataError(place, (key,), f"expected true or false, found {show(record[key])}", "write true or false")
        form = next(form for form in self.forms if form.fits(record))
        return replace(form.read(record, place), desirable=desirable)


def _truth(label: Any) -> bool | None:
    if isinstance(label, bool):
        return label
    return WORDS.get(str(label).lower()) if isinstance(label, str | int) else None
