"""{"prompt": "…", "completion": "…"}: text as it is, or both as lists of messages.

Plain strings take no chat template: the prompt, then the completion that is learnt, then the end-of-text token.
"""

from __future__ import annotations

from tunesmith.data.formats.base import Format, Record, text_of
from tunesmith.data.formats.messages import Messages
from tunesmith.types import Example, Piece, Place


class PromptCompletion(Format):
    keys = "prompt, completion"

    def matches(self, record: Record) -> bool:
        return "prompt" in record and "completion" in record

    def read(self, record: Record, place: Place) -> Example:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return Messages().read({"messages": prompt + completion}, place)
        prompt, completion = text_of(prompt, place, "prompt"), text_of(completion, place, "completion")
        return Example(place, pieces=(Piece(prompt, learn=False), Piece(completion, learn=True)))
