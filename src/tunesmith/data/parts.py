"""Chat templates that read a message's content in parts alone, as those of some multimodal models do."""

from __future__ import annotations

from typing import Any

from tunesmith.data.template import ChatTemplate, Dicts, Refused, Tools

WORDS = "\U0010fffd"  # in no template


class PartsTemplate(ChatTemplate):
    """Gives plain words to the template as the one part of their message."""

    def _jinja(self, messages: Dicts, tools: Tools, **options: Any) -> Any:
        return super()._jinja([_in_parts(message) for message in messages], tools, **options)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def wants_parts(template: ChatTemplate) -> bool:
    """Whether plain words are lost in this template, and are not where they stand in a part."""
    said = {"role": "user", "content": WORDS}

    def shows(message: dict[str, Any]) -> bool:
        try:
            return WORDS in template.text([message])
        except Refused:
            return False

    return not shows(said) and shows(_in_parts(said))
