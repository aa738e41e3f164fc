"""Examples to text with loss weights: which words of a record the model learns, before they become tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunesmith.config import DataConfig
from tunesmith.data.parts import PartsTemplate, wants_parts
from tunesmith.data.template import ChatTemplate, Refused, left_out
from tunesmith.errors import DataError
from tunesmith.types import Example, Media, Message, Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.media import MediaFile, Processor

LITERAL_PLANE = 0xF0000  # a private plane of Unicode: characters that stand there for those of a special token's name
LITERAL = re.compile("[\U000f0000-\U000ffffd]+")


@dataclass(frozen=True)
class Marked:
    """The text of one sequence, and the loss weight of its parts."""

    text: str
    base: float = 0.0
    """Loss weight of all that `spans` does not cover."""
    spans: tuple[tuple[int, int, float], ...] = ()
    """(start, stop, loss weight): characters, in order."""
    literals: tuple[tuple[int, int], ...] = ()
    """Characters that spell a special token but are the data's own text, so that they must not become that token."""
    plain: bool = False
    """Not rendered by a chat template: the tokenizer's beginning and end are added, and the end is learnt."""
    media: tuple[Media, ...] = ()
    """What stands behind the template's placeholders, in order."""
    files: tuple[MediaFile, ...] = ()
    """The same, found and read; the text then holds the processor's tokens in place of the placeholders."""


Sample = tuple[Marked, ...]
"""The sequences that belong together: one, or a preference pair."""


@dataclass
class Renderer:
    """Renders examples for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    learns_all: bool = False
    """Loss on every token (pretrain)."""
    pairs: bool = False
    """Samples are preference pairs, (chosen, rejected); else a pair gives its chosen side."""
    template_is_ours: bool = False
    """ChatML stands in for a chat template that the tokenizer lacks."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was left out or kept in an unusual way, and how often: for the run's header and `data check`."""
    conversations: int = 0
    """Sequences rendered by the chat template so far."""
    processor: Processor | None = None
    """Of a multimodal model."""

    def reset(self) -> None:
        """Count from zero."""
        self.notes.clear()
        self.conversations = 0

    def render(self, example: Example) -> list[Sample]:
        """The samples of an example: usually one; none where it is marked as undesirable. Raises DataError."""
        if self.pairs:
            if example.rejected is None:
                raise DataError(
                    example.place, (), "no preference pair: no rejected answer", "add one, or use objective: sft"
                )
            shared = _shared_turns(example, example.rejected)
            return [(self._sequence(example, shared), self._sequence(example.rejected, shared))]
        if example.rejected is not None:
            self.notes["preference pairs of which the chosen answer is learnt"] += 1
        if example.desirable is False and not self.learns_all:
            self.notes["answers marked as undesirable, left out"] += 1
            return []
        if self.config.learn == "each" and example.messages and not self.learns_all:
            samples: list[Sample] = [(self._sequence(part),) for part in _prefixes(example)]
            if not samples:
                raise _nothing_to_learn(example.place)
            return samples
        return [(self._sequence(example),)]

    @cached_property
    def template(self) -> ChatTemplate:
        template = ChatTemplate(self.tokenizer, self.config.template_variables, self.config.date)
        if self.processor is None or not wants_parts(template):
            return template
        return PartsTemplate(self.tokenizer, self.config.template_variables, self.config.date)

    def _sequence(self, example: Example, first: int = 0) -> Marked:
        """`first`: the first turn that may be learnt."""
        marked = self._conversation(example, first) if example.messages else self._plain_text(example)
        if self._moved is None or marked.text.isascii() or not LITERAL.search(marked.text):
            return marked
        literals = tuple(match.span() for match in self._moved.finditer(marked.text))
        text = self._moved.sub(lambda match: "".join(chr(ord(c) - LITERAL_PLANE) for c in match.group()), marked.text)
        return replace(marked, text=text, literals=literals)

    def _plain_text(self, example: Example) -> Marked:
        text, spans = "", []
        for piece in example.pieces:
            start, text = len(text), text + self._escape(piece.text)
            if piece.learn and piece.text:
                spans.append((start, len(text), 1.0))
        if self.learns_all or self.config.learn == "all":
            return Marked(text, 1.0, plain=True)
        if not spans:
            raise _nothing_to_learn(example.place)
        return Marked(text, 0.0, tuple(spans), plain=True)

    def _conversation(self, example: Example, first: int) -> Marked:
        self.conversations += 1
        if self.template_is_ours:
            self.notes["conversations rendered as ChatML: the tokenizer has no chat template"] += 1
        messages = [self._escaped(message) for message in example.messages]
        base = 1.0 if self.learns_all or self.config.learn == "all" else 0.0
        wanted = {} if self.learns_all else self._turn_weights(messages, base, first)
        if not base and not any(wanted.values()):
            raise _nothing_to_learn(example.place)
        try:
            rendered = self.template.render(messages, [self._escaped_value(tool) for tool in example.tools], wanted)
            self._check_nothing_lost(example, messages, rendered.text)
        except Refused as refused:
            path = () if refused.turn is None else ("messages", refused.turn)
            raise DataError(example.place, path, refused.reason, refused.remedy) from refused
        for turn in rendered.without_reasoning:
            if self.template.habits.renders_reasoning:  # it would learn to answer without the thought that comes first
                wanted[turn] = 0.0
                self.notes["turns whose reasoning the chat template drops, not learnt"] += 1
            else:
                self.notes["turns learnt without their reasoning: the chat template knows none"] += 1
        if rendered.without_words:
            self.notes["turns whose words beside tool calls the chat template drops"] += len(rendered.without_words)
        if wanted and not self.template.habits.ends_answers:
            self.notes["conversations without an end-of-turn token: the model does not learn where to stop"] += 1
        spans = tuple((*rendered.spans[turn], wanted[turn]) for turn in sorted(wanted) if wanted[turn] != base)
        mixed = [message.content for message in messages if not isinstance(message.content, str)]
        media = tuple(part for content in mixed for part in content if isinstance(part, Media))
        return Marked(rendered.text, base, spans, media=media)

    def _turn_weights(self, messages: Sequence[Message], base: float, first: int) -> dict[int, float]:
        """Turn → loss weight, for turns that say or do something and are weighted otherwise than the rest."""
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant" and turn >= first]
        usual = dict.fromkeys(answers if self.config.learn == "assistant" else answers[-1:], 1.0)
        weights = {
            turn: usual.get(turn, base) if message.weight is None else message.weight
            for turn, message in enumerate(messages)
            if message.content or message.reasoning or message.tool_calls
        }
        return {turn: weight for turn, weight in weights.items() if weight != base}

    def _check_nothing_lost(self, example: Example, messages: Sequence[Message], text: str) -> None:
        for turn, message in enumerate(messages):
            if any(call.name not in text for call in message.tool_calls):
                raise left_out("tool calls", turn)
        if example.tools and not any(_tool_name(tool) in text for tool in example.tools):
            self.notes["records whose tools the chat template leaves out"] += 1

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Any special token's name."""
        longest_first = sorted(self._special_names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def _special_names(self) -> set[str]:
        return {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}

    def _escape(self, text: str, in_json: bool = False) -> str:
        """Special tokens' names in the data's own text, moved to characters that no template and no tokenizer knows.

        A name with a quotation mark, as Gemma 4's, is none in JSON, which spells the mark otherwise.
        """
        if self.config.parse_special_tokens or self._special is None or not self._special.search(text):
            return text
        self.notes["texts that spell special tokens, kept as text"] += 1
        return self._special.sub(
            lambda match: match.group() if in_json and '"' in match.group() else _moved(match.group()), text
        )

    @cached_property
    def _moved(self) -> re.Pattern[str] | None:
        """Any special token's name after that. Other characters of that plane are the data's: fonts of icons use it."""
        names = sorted(self._special_names, key=len, reverse=True)
        return re.compile("|".join(re.escape(_moved(name)) for name in names)) if names else None

    def _escaped(self, message: Message) -> Message:
        if self._special is None or self.config.parse_special_tokens:
            return message
        if message.tool_calls:
            calls = [
                replace(call, name=self._escape(call.name), arguments=self._escaped_value(call.arguments))
                for call in message.tool_calls
            ]
            message = replace(message, tool_calls=tuple(calls))
        if message.name:
            message = replace(message, name=self._escape(message.name))
        if isinstance(message.content, str) and not message.reasoning:
            if not self._special.search(message.content):
                return message
            return replace(message, content=self._escape(message.content))
        parts = (message.content,) if isinstance(message.content, str) else message.content
        escaped = tuple(part if isinstance(part, Media) else self._escape(part) for part in parts)
        content: Any = escaped[0] if isinstance(message.content, str) else escaped
        return replace(message, content=content, reasoning=self._escape(message.reasoning))

    def _escaped_value(self, value: Any) -> Any:
        """JSON data with its texts escaped."""
        if isinstance(value, dict):
            return {self._escape(key, in_json=True): self._escaped_value(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._escaped_value(part) for part in value]
        return self._escape(value, in_json=True) if isinstance(value, str) else value


def _moved(name: str) -> str:
    return "".join(chr(LITERAL_PLANE + ord(c)) for c in name)


def _prefixes(example: Example) -> Iterable[Example]:
    """The conversation up to each of the assistant's turns, of which only the last is learnt."""
    for turn, message in enumerate(example.messages):
        says_something = message.content or message.reasoning or message.tool_calls
        if message.role == "assistant" and says_something and message.weight != 0:
            earlier = (replace(m, weight=None) if m.role == "assistant" else m for m in example.messages[:turn])
            yield replace(example, messages=(*earlier, message))


def _shared_turns(one: Example, other: Example) -> int:
    """How many turns two conversations have in common at their beginning: the prompt of a preference pair."""
    pairs = zip(one.messages, other.messages, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.messages), len(other.messages)))


def _tool_name(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))


def _nothing_to_learn(place: Place) -> DataError:
    return DataError(
        place,
        (),
        "nothing to learn from: no answer in it",
        "give an assistant turn or completion that is not empty, or remove the record",
    )
