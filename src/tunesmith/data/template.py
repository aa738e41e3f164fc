"""The tokenizer's own chat template: a conversation to text, and where in the text each turn stands.

A turn's place is found in one of four ways, each exact or refused:
- marks: the template says itself what is learnt, by `{% generation %}`;
- shape: conversations of the same roles have the same text between their contents, learnt once from placeholders;
- prefixes: the conversation up to the turn, and up to its end, both begin the whole text;
- sentinels: characters that no text holds are put around each turn's words, and found again.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tunesmith.data.habits import Habits, Refused, Tools
from tunesmith.data.spelling import Dicts, Spelling, as_dicts, has_all_calls, thought_and_words, unwrap, wrap
from tunesmith.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIRST_PLACEHOLDER = 0x108000  # in the last private plane of Unicode, above the sentinels
THINKS = re.compile(r"</?\w*:?think")
PLACEHOLDER = re.compile("[\U00108000-\U0010fffd]")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: dict[int, Span]
    """Turn → the characters that the model writes in it, end-of-turn token included."""
    without_reasoning: frozenset[int] = frozenset()
    """Turns whose reasoning the template left out."""
    without_words: frozenset[int] = frozenset()
    """Turns of which the template left out what they say beside a tool call."""


@dataclass(frozen=True)
class _Shape:
    """What a template puts around the contents of conversations with the same roles."""

    gaps: list[str]
    """Text before the first content, between contents, and after the last one."""
    around: dict[int, tuple[int, int]]
    """Turn → characters before and after its content that belong to its span; turns that can be placed."""

    def spans(self, contents: Sequence[str], text: str) -> dict[int, Span] | None:
        """Where the turns stand, if the text is exactly these gaps and the contents, trimmed or not."""
        if not text.startswith(self.gaps[0]):
            return None
        spans, position = {}, len(self.gaps[0])
        for turn, content in enumerate(contents):
            if not text.startswith(content + self.gaps[turn + 1], position):
                content = content.strip()
                if not text.startswith(content + self.gaps[turn + 1], position):
                    return None
            if turn in self.around:
                lead, tail = self.around[turn]
                spans[turn] = position - lead, position + len(content) + tail
            position += len(content) + len(self.gaps[turn + 1])
        return spans if position == len(text) else None


@dataclass
class ChatTemplate:
    """One tokenizer's template with its variables. Methods raise Refused."""

    tokenizer: PreTrainedTokenizerBase
    variables: dict[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None
    """The day that a template prints which prints today's; None: today."""
    _shapes: dict[tuple[str, ...], _Shape | None] = field(default_factory=dict)

    def text(self, messages: Dicts, tools: Tools = None, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, up to where the assistant's next answer begins."""
        return self._jinja(messages, tools, add_generation_prompt=prompt)[0]

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], turns: Iterable[int]) -> Rendered:
        """The conversation, and where the wanted turns stand in it."""
        dicts, given, wanted = self.dicts(messages), list(tools) or self.habits.no_tools, sorted(turns)
        if GENERATION_MARK.search(self.source(given)):
            text, spans = self._by_marks(messages, dicts, given, wanted)
            return self._checked(messages, text, spans)
        text = self.text(dicts, given)
        if not wanted:
            return Rendered(text, {})
        if not given and all(self._is_plain(message) for message in messages):
            found = self._by_shape(tuple(m.role for m in messages), [str(m.content) for m in messages], text)
            if found is not None and found.keys() >= set(wanted):
                return Rendered(text, {turn: found[turn] for turn in wanted})
        return self._checked(messages, text, self._slowly(dicts, given, text, wanted))

    def source(self, tools: Tools = None) -> str:
        """The Jinja source that is used with these tools."""
        return self._pinned_date + self.tokenizer.get_chat_template(tools=tools)

    @property
    def prints_the_date(self) -> bool:
        return "strftime_now" in str(self.tokenizer.chat_template)

    @cached_property
    def habits(self) -> Habits:
        """What this template does."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return Habits(self.text, "think>" in str(self.tokenizer.chat_template), special)

    def dicts(self, messages: Sequence[Message]) -> Dicts:
        """Messages as this template reads them."""
        spelling = Spelling()
        if any(message.tool_calls for message in messages):
            spelling = self.habits.spelling_of_calls
        if any(message.reasoning for message in messages):
            spelling = replace(spelling, thought_in_content=self.habits.reads_thought_in_content)
        return as_dicts(messages, spelling)

    def _jinja(self, messages: Dicts, tools: Tools, **options: Any) -> Any:
        """(text, character spans of `{% generation %}` blocks)."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self.tokenizer.special_tokens_map, **self.variables}
        try:
            texts, marks = render_jinja_template(
                [messages], tools, chat_template=self.source(tools), **options, **variables
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Refused(
                f"the model's chat template refuses this conversation: {reason}",
                "change the record, or set model.chat_template to a template that takes it",
            ) from error
        return texts[0], marks[0] if marks else []

    @cached_property
    def _pinned_date(self) -> str:
        """Jinja source that makes `strftime_now` give the fixed day: the same conversation has the same tokens tomorrow."""
        if not (self.prints_the_date and self.date):
            return ""
        formats = re.findall(r"""strftime_now\(\s*(?:'([^']*)'|"([^"]*)")""", str(self.tokenizer.chat_template))
        dates = {text: self.date.strftime(text) for pair in formats for text in pair}
        return f"{{% macro strftime_now(format) %}}{{{{ {json.dumps(dates)}[format] }}}}{{% endmacro %}}{{{{ '' }}}}"

    def _by_marks(
        self, messages: Sequence[Message], dicts: Dicts, tools: Tools, wanted: list[int]
    ) -> tuple[str, dict[int, Span]]:
        text, marks = self._jinja(dicts, tools, return_assistant_tokens_mask=True)
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if len(marks) != len(answers):
            raise Refused(
                f"the model's chat template marks {len(marks)} stretches as generated, but the conversation has "
                f"{len(answers)} assistant turns, so their weights cannot be placed",
                "set model.chat_template to a template that marks each turn, or one without {% generation %} marks",
            )
        spans = dict(zip(answers, marks, strict=True))
        others = [turn for turn in wanted if turn not in spans]
        return text, {turn: spans[turn] for turn in wanted if turn in spans} | (
            self._slowly(dicts, tools, text, others) if others else {}
        )

    def _is_plain(self, message: Message) -> bool:
        """Nothing but words, of which none can belong to the prompt."""
        return (
            isinstance(message.content, str)
            and not (message.reasoning or message.tool_calls or message.role == "tool")
            and not (self.habits.mentions_thinking and "<think>" in message.content)
        )

    def _by_shape(self, roles: tuple[str, ...], contents: list[str], text: str) -> dict[int, Span] | None:
        if roles not in self._shapes:
            self._shapes[roles] = self._learn_shape(roles)
        shape = self._shapes[roles]
        return None if shape is None else shape.spans(contents, text)

    def _learn_shape(self, roles: tuple[str, ...]) -> _Shape | None:
        """From a conversation whose contents are one placeholder character each; None if they do not come out in order."""
        placeholders = [chr(FIRST_PLACEHOLDER + turn) for turn in range(len(roles))]
        messages = [Message(role, content) for role, content in zip(roles, placeholders, strict=True)]
        dicts = self.dicts(messages)
        text = self.text(dicts, self.habits.no_tools)
        if PLACEHOLDER.findall(text) != placeholders:
            return None
        at = [text.index(placeholder) for placeholder in placeholders]
        gaps = [text[start + 1 : stop] for start, stop in pairwise([-1, *at, len(text)])]
        around: dict[int, Span] = {}
        for of_assistant in (True, False):
            wanted = [turn for turn, role in enumerate(roles) if (role == "assistant") == of_assistant]
            with suppress(Refused):
                spans = self._slowly(dicts, self.habits.no_tools, text, wanted)
                around |= {turn: (at[turn] - start, stop - at[turn] - 1) for turn, (start, stop) in spans.items()}
        return _Shape(gaps, around)

    def _slowly(self, dicts: Dicts, tools: Tools, text: str, wanted: list[int]) -> dict[int, Span]:
        """By prefixes, else by sentinels; of what the model does not write, the words and what ends them."""
        answers = [turn for turn in wanted if dicts[turn]["role"] == "assistant"]
        others = [turn for turn in wanted if turn not in answers]
        unstable = Refused(
            "the model's chat template puts more than the answer at the end, so the loss cannot be placed",
            "set model.chat_template to one that puts it there for add_generation_prompt alone",
        )
        spans = self._by_sentinels(dicts, tools, text, others, unstable) if others else {}
        try:
            if self.habits.appends_to_the_end:
                raise unstable
            return spans | self._by_prefixes(dicts, tools, text, answers)
        except Refused as reason:
            return spans | self._by_sentinels(dicts, tools, text, answers, reason)

    def _by_prefixes(self, dicts: Dicts, tools: Tools, text: str, wanted: list[int]) -> dict[int, Span]:
        spans = {}
        for turn in wanted:
            before = self.text(dicts[:turn], tools, prompt=True) if turn else ""
            after = self.text(dicts[: turn + 1], tools)
            for prefix in (before, after):
                if not text.startswith(prefix):
                    raise Refused(*_unstable(prefix, text, turn))
            spans[turn] = (len(before), len(before) + len(self.habits.own(text[len(before) : len(after)])))
        return spans

    def _by_sentinels(
        self, dicts: Dicts, tools: Tools, text: str, wanted: list[int], unstable: Refused
    ) -> dict[int, Span]:
        """Raises `unstable`, which shows the first difference, where the sentinels do not come through unharmed."""
        for wrapped in (range(len(dicts)), wanted):  # a template may look at the words of some turns, of users' mostly
            unwrapped, found = self._unwrapped(dicts, tools, wrapped)
            if unwrapped == text:
                break
        else:
            raise unstable
        spans = {}
        for turn in wanted:
            if turn not in found:
                raise left_out("tool calls" if dicts[turn].get("tool_calls") else "what this turn says", turn)
            first, last = found[turn]
            earlier = [found[n][1] for n in found if n < turn and dicts[n]["role"] != "system"]
            later = [found[n][0] for n in found if n > turn]
            low, high = max(earlier, default=0), min(later, default=len(text))
            if not low <= first <= last <= high:  # the template moves turns
                raise unstable
            if dicts[turn]["role"] != "assistant":
                end = self.habits.own(self.habits.tails[0])
                spans[turn] = first, last + (len(end) if text.startswith(end, last) else 0)
            else:
                start = self._start(dicts, tools, text, turn, (low, first))
                stop = self._stop(dicts, tools, turn, text[last:high])
                if start is None or stop is None:
                    raise unstable
                spans[turn] = start, last + stop
        return spans

    def _unwrapped(
        self, dicts: Dicts, tools: Tools, wrapped: Iterable[int], prompt: bool = False
    ) -> tuple[str | None, dict[int, Span]]:
        chosen = set(wrapped)
        try:
            given = [wrap(turn, n) if n in chosen else turn for n, turn in enumerate(dicts)]
            return unwrap(self.text(given, tools, prompt))
        except Refused:  # sentinels can be taken amiss
            return None, {}

    def _start(self, dicts: Dicts, tools: Tools, text: str, turn: int, gap: Span) -> int | None:
        """Where the model begins to write: behind the prompt, or what of it stands in the gap; or at its own words."""
        low, first = gap
        try:
            before, prompt = (self.text(dicts[:turn], tools, prompt=prompt) for prompt in (False, True))
        except Refused:
            before = prompt = ""
        if prompt and text.startswith(prompt) and low <= len(prompt) <= first:
            return len(prompt)
        asked, found = self._unwrapped(dicts[:turn], tools, [turn - 1], prompt=True)
        if asked is not None and turn - 1 in found:
            tail = asked[found[turn - 1][1] :]
            if tail and text.startswith(tail, low) and low + len(tail) <= first:
                return low + len(tail)
        header = prompt[len(before) :] if prompt.startswith(before) else ""
        without_thinking, role = THINKS.split(header)[0], header[: header.find("\n") + 1]
        for begun in (header, without_thinking, role):
            at = text.rfind(begun, low, first) if begun else -1
            if at >= 0:
                return at + len(begun)
        return None if dicts[turn].get("tool_calls") else first

    def _stop(self, dicts: Dicts, tools: Tools, turn: int, gap: str) -> int | None:
        """How much of the gap behind the turn's words is the model's: what the template puts there if the turn is last."""
        unwrapped, found = self._unwrapped(dicts[: turn + 1], tools, [turn])
        if unwrapped is None or turn not in found:
            return None
        own = self.habits.own(unwrapped[found[turn][1] :])
        if gap.startswith(own) and (own or not dicts[turn].get("tool_calls")):  # the arguments stand behind the name
            return len(own)
        end = self.habits.last_special(own)
        if end is not None and end in gap:
            return gap.index(end) + len(end)
        return None if dicts[turn].get("tool_calls") else 0

    def _checked(self, messages: Sequence[Message], text: str, spans: dict[int, Span]) -> Rendered:
        """The template may have left words out. Raises where these are of a tool call."""
        without_reasoning, without_words = set(), set()
        for turn, (start, stop) in spans.items():
            own, (thought, words) = text[start:stop], thought_and_words(messages[turn])
            if thought not in own:
                without_reasoning.add(turn)
            if words.strip() not in own and "".join(words.split()) not in "".join(own.split()):
                without_words.add(turn)
            if not has_all_calls(messages[turn], own):
                raise left_out("tool calls", turn)
        return Rendered(text, spans, frozenset(without_reasoning), frozenset(without_words))


def left_out(what: str, turn: int) -> Refused:
    return Refused(
        f"the model's chat template leaves {what} out",
        "use a model whose template knows tools, or set model.chat_template"
        if what == "tool calls"
        else "set data.learn to each, or model.chat_template to a template that keeps it",
        turn,
    )


def _unstable(prefix: str, text: str, turn: int) -> tuple[str, str, int]:
    same = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text)))
    start = max(0, same - 20)
    return (
        "the model's chat template renders the beginning of a conversation otherwise than the same turns inside it, so "
        f"the loss cannot be placed: {prefix[start : same + 20]!r} became {text[start : same + 20]!r}",
        "set data.learn to each, or model.chat_template to a template with {% generation %} marks",
        turn,
    )
