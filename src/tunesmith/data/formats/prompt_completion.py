"""{"prompt": "…", "completion": "…"}: text as it is, or both as messages.

Plain strings take no chat template: the prompt, then the completion that is learnt, then the end-of-text token. Beside
`system`, `tools` or files, which only a conversation can hold, strings are its turns.
"""

from __future__ import annotations

from typing import Any

from tunesmith.data.formats.base import Format, Record, prompt_and_completion, text_of
from tunesmith.data.formats.turns import conversation, read_prompt, with_answer
from tunesmith.types import Example, Place

CHAT_KEYS = ("system", "tools", "images", "audios", "videos")


class PromptCompletion(Format):
    keys = "prompt, completion"

    @classmethod
    def matches(cls, record: Record) -> bool:
        return "prompt" in record and "completion" in record

    def read(self, record: Record, place: Place) -> Example:
        prompt, completion = record["prompt"], record["completion"]
        if is_chat(record, prompt, completion):
            messages = read_prompt(prompt, record, place, ("prompt",))
            messages = with_answer(messages, completion, record, place, ("completion",))
            return conversation(messages, record, place, ("prompt",))
        prompt, completion = (text_of(record[key], place, (key,)) for key in ("prompt", "completion"))
        return prompt_and_completion(prompt, completion, place)


def is_chat(record: Record, prompt: Any, completion: Any) -> bool:
    """Whether a prompt and what follows on it are turns of a conversation, and not plain text."""
    return isinstance(prompt, list) or isinstance(completion, list | dict) or any(key in record for key in CHAT_KEYS)
