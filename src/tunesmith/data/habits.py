"""What a chat template does, found by trying it on conversations of placeholders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from tunesmith.data.spelling import Dicts, Spelling, as_dicts
from tunesmith.types import Message, ToolCall

Tools = list[dict[str, Any]] | None

A, B = "\U0010fffc", "\U0010fffd"  # characters that no text holds
ASKED, ANSWERED = Message("user", "a"), Message("assistant", A)
AS_USUAL = Spelling()
SOME_TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "f",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string", "description": "a"}},
                "required": ["a"],
            },
        },
    }
]


class Refused(ValueError):
    """The template cannot render a conversation, or the place of a turn cannot be found in it."""

    def __init__(self, reason: str, remedy: str, turn: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.remedy, self.turn = reason, remedy, turn


@dataclass
class Habits:
    """Tries are made when they are first asked for."""

    render: Callable[[Dicts, Tools, bool], str]
    """Messages, tools, and whether the next answer is to begin → text. Raises Refused."""
    mentions_thinking: bool
    """The template's source holds a think tag."""
    special: Iterable[str]
    """The special tokens' names."""

    @cached_property
    def ends_answers(self) -> bool:
        """Whether a special token ends the last answer: without it, the model does not learn where to stop."""
        return self.last_special(self.own(self.tails[0])) is not None

    @cached_property
    def tails(self) -> tuple[str, ...]:
        """What stands behind an answer at the end of a conversation, and behind one that another question follows."""
        return tuple(self._tried([ASKED, ANSWERED, *more]).partition(A)[2] for more in ([], [ASKED]))

    @cached_property
    def appends_to_the_end(self) -> bool:
        """Whether the template ends every conversation with words that are not the answer's, as the next one's beginning."""
        last, inner = (tail.rstrip() for tail in self.tails)
        return bool(inner) and not inner.startswith(last) and last != self.last_special(last)

    def own(self, tail: str) -> str:
        """What is the model's of a text that begins in a conversation's last answer and ends with the conversation."""
        if self.appends_to_the_end:
            token = self._special.search(tail) if self._special else None
            if token is None:
                return ""
            begins_a_turn = self._header.startswith(token.group())
            return tail[: token.start() if begins_a_turn else token.end()]
        return (
            tail.rstrip() if self.last_special(tail) else tail
        )  # generation stops before white space behind the token

    def last_special(self, tail: str) -> str | None:
        """The special token with which the text ends, but for white space."""
        tokens = self._special.findall(tail) if self._special else []
        return tokens[-1] if tokens and tail.rstrip().endswith(tokens[-1]) else None

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        longest_first = sorted(set(self.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def _header(self) -> str:
        """What begins an answer."""
        before, prompt = (self._tried([ASKED], prompt=prompt) for prompt in (False, True))
        return prompt[len(before) :] if prompt.startswith(before) else ""

    @cached_property
    def no_tools(self) -> Tools:
        """An empty list where the template takes nothing else for no tools."""
        choices: tuple[Tools, ...] = (None, [])
        for tools in choices:
            with suppress(Refused):
                self.render(as_dicts([ASKED, ANSWERED]), tools, False)
                return tools
        return None

    @cached_property
    def spelling_of_calls(self) -> Spelling:
        """That in which a call's name and arguments come out."""
        turn = Message("assistant", tool_calls=(ToolCall(A, {"a": B}),))
        for no_content, as_text in product((False, True), repeat=2):
            spelling = Spelling(as_text, no_content)
            text = self._tried([ASKED, turn], spelling)
            if A in text and B in text:
                return spelling
        return AS_USUAL

    @cached_property
    def renders_reasoning(self) -> bool:
        """Whether the reasoning of a conversation's last answer comes out at all."""
        return self._reads_reasoning or self.reads_thought_in_content

    @cached_property
    def reads_thought_in_content(self) -> bool:
        """Whether reasoning comes out only if it stands in the content, in <think> tags."""
        if self._reads_reasoning or not self.mentions_thinking:
            return False
        turn = Message("assistant", "a", reasoning=A)
        return A in self._tried([ASKED, turn], Spelling(thought_in_content=True))

    @cached_property
    def _reads_reasoning(self) -> bool:
        return A in self._tried([ASKED, Message("assistant", "a", reasoning=A)])

    def _tried(self, messages: Sequence[Message], spelling: Spelling = AS_USUAL, prompt: bool = False) -> str:
        """Empty where the template refuses the messages, without tools and with them."""
        for tools in (self.no_tools, SOME_TOOLS):
            with suppress(Refused):
                return self.render(as_dicts(messages, spelling), tools, prompt)
        return ""
