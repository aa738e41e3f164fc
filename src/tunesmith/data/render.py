"""Examples to text with loss weights: which words of a record the model learns, before they become tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunesmith.config import DataConfig
from tunesmith.data.formats.base import STEP_BREAK
from tunesmith.data.forms import check_form, equal_answers, nothing_to_learn
from tunesmith.data.parts import PartsTemplate, wants_parts
from tunesmith.data.template import ChatTemplate, Refused, left_out
from tunesmith.errors import DataError
from tunesmith.types import Example, Media, Message, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.media import MediaFile, Processor
    from tunesmith.types import Form

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
    marks: tuple[tuple[int, float], ...] = ()
    """(character, loss weight), in order: of the token that holds this character, wherever it begins and ends."""
    literals: tuple[tuple[int, int], ...] = ()
    """Characters that spell a special token but are the data's own text, so that they must not become that token."""
    plain: bool = False
    """Not rendered by a chat template: the tokenizer's beginning and end are added."""
    end: float = 1.0
    """Loss weight of the end that is added to plain text."""
    media: tuple[Media, ...] = ()
    """What stands behind the template's placeholders, in order."""
    files: tuple[MediaFile, ...] = ()
    """The same, found and read; the text then holds the processor's tokens in place of the placeholders."""


@dataclass(frozen=True)
class Sample:
    """The sequences that belong together, and what the data says of them. Iterates over the sequences."""

    sequences: tuple[Marked, ...]
    """One; or a preference pair, the chosen one first; or, until it is encoded, a question once with each of its answers."""
    label: float = 0.0
    """Of a pair its margin, of feedback 1 for desirable and 0 for not, of a question the number of the right answer."""
    num_choices: int = 0
    """Answers that a question is put with."""

    def __iter__(self) -> Iterator[Marked]:
        return iter(self.sequences)

    def __len__(self) -> int:
        return len(self.sequences)


Rendered = list[tuple[Example, Sample]]
"""Examples and their samples."""


@dataclass
class Renderer:
    """Renders examples for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    form: Form = "answers"
    """What the objective's samples are."""
    template_is_ours: bool = False
    """ChatML stands in for a chat template that the tokenizer lacks."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was left out or kept in an unusual way, and how often: for the run's header and `data check`."""
    conversations: int = 0
    """Sequences rendered by the chat template so far."""
    processor: Processor | None = None
    """Of a multimodal model."""

    @property
    def group_size(self) -> int:
        """Sequences in a sample."""
        return 2 if self.form == "pairs" else 1

    def reset(self) -> None:
        """Count from zero."""
        self.notes.clear()
        self.conversations = 0

    def render(self, example: Example) -> list[Sample]:
        """The samples of an example: usually one; none where sft is not to learn it. Raises DataError."""
        check_form(self.form, example)
        if self.form == "pairs":
            return [self._pair(example)]
        if self.form == "feedback":
            return self._feedback(example)
        if self.form == "choices":
            return [self._question(example)]
        if self.form == "steps":
            return [Sample((self._solution(example),))]
        return [Sample((marked,)) for marked in self._answers(example)]

    def _answers(self, example: Example) -> list[Marked]:
        """What sft learns of an example; for pretraining, all of it."""
        if example.rejected is not None:
            self.notes["preference pairs of which the chosen answer is learnt"] += 1
        if example.steps and not all(right for _, right in example.steps):
            self.notes["solutions with steps marked as wrong, learnt whole"] += 1
        if example.desirable is False and self.form != "text":
            self.notes["answers marked as undesirable, left out"] += 1
            return []
        if self.config.learn == "each" and example.messages and self.form != "text":
            parts = [self._sequence(part) for part in _prefixes(example)]
            if not parts:
                raise nothing_to_learn(example.place)
            return parts
        return [self._sequence(example)]

    def _pair(self, example: Example) -> Sample:
        """The better and the worse answer; only what follows on the turns that they share is learnt."""
        worse = _other_answer(example)
        shared = _shared_turns(example, worse)
        sides = self._sequence(example, shared), self._sequence(worse, shared)
        if sides[0].text == sides[1].text and sides[0].media == sides[1].media:  # the template may trim what differs
            raise equal_answers(example.place)
        return Sample(sides, example.margin or 0.0)

    def _feedback(self, example: Example) -> list[Sample]:
        """The last answer with its mark; of a preference pair both, the better one as desirable."""
        if example.rejected is None:
            return [Sample((self._sequence(example),), float(bool(example.desirable)))]
        sides = example, _other_answer(example)
        return [Sample((self._sequence(side),), label) for side, label in zip(sides, (1.0, 0.0), strict=True)]

    def _question(self, example: Example) -> Sample:
        """The question once with each of its answers."""
        right, words = _last_answer(example), example.choices
        if len(words) < 2 or len(set(words)) < len(words):
            what = f"the classes are {', '.join(words)}: two or more different words are needed"
            raise DataError(example.place, (), what, "give each class a word of its own, in data.labels or choices")
        if right not in words:
            what = f"its answer {right!r} is none of its classes {', '.join(words)}"
            raise DataError(example.place, (), what, "name all classes in data.labels or choices")
        notes, conversations = self.notes.copy(), self.conversations
        sequences = []
        for word in words:
            self.notes, self.conversations = notes.copy(), conversations  # what is one record is counted once
            sequences.append(replace(self._sequence(_answered(example, word)), spans=()))
        return Sample(tuple(sequences), float(words.index(right)), len(words))

    def _solution(self, example: Example) -> Marked:
        """The whole solution, with weight 1 or -1 at the last token of each step: right or wrong."""
        answer = STEP_BREAK.join(step for step, _ in example.steps)
        marked = self._sequence(example)
        start, stop, _ = marked.spans[-1] if marked.spans else (0, 0, 0.0)
        at = marked.text.find(answer.strip(), start, stop)
        if at < 0:
            what = "its steps do not stand in its last answer as the chat template writes it"
            raise DataError(example.place, (), what, "set model.chat_template, or data.as_chat: false")
        at -= len(answer) - len(answer.lstrip())
        marks = []
        for step, right in example.steps:
            marks.append((at + len(step.rstrip()) - 1, 1.0 if right else -1.0))
            at += len(step) + len(STEP_BREAK)
        return replace(marked, spans=(), marks=tuple(marks), end=0.0)

    @property
    def _learns_all(self) -> bool:
        return self.form == "text" or (self.config.learn == "all" and not self._learns_last_answer)

    @property
    def _learns_last_answer(self) -> bool:
        """Whether it is the form that says what is learnt, and not `data.learn` or the data's own weights."""
        return self.form in ("feedback", "choices", "steps")

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
        if self._learns_all:
            return Marked(text, 1.0, plain=True)
        if not spans:
            raise nothing_to_learn(example.place)
        if self._learns_last_answer:
            spans = spans[-1:]
        return Marked(text, 0.0, tuple(spans), plain=True)

    def _conversation(self, example: Example, first: int) -> Marked:
        self.conversations += 1
        if self.template_is_ours:
            self.notes["conversations rendered as ChatML: the tokenizer has no chat template"] += 1
        messages = [self._escaped(message) for message in example.messages]
        base = 1.0 if self._learns_all else 0.0
        wanted = {} if self.form == "text" else self._turn_weights(messages, base, first)
        if not base and not any(wanted.values()):
            raise nothing_to_learn(example.place)
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
        if self._learns_last_answer:
            return {turn: 1.0 for turn in answers[-1:] if _says_something(messages[turn])}
        usual = dict.fromkeys(answers if self.config.learn == "assistant" else answers[-1:], 1.0)
        weights = {
            turn: usual.get(turn, base) if message.weight is None else message.weight
            for turn, message in enumerate(messages)
            if _says_something(message)
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
        if message.role == "assistant" and _says_something(message) and message.weight != 0:
            earlier = (replace(m, weight=None) if m.role == "assistant" else m for m in example.messages[:turn])
            yield replace(example, messages=(*earlier, message))


def _shared_turns(one: Example, other: Example) -> int:
    """How many turns two conversations have in common at their beginning: the prompt of a preference pair."""
    pairs = zip(one.messages, other.messages, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.messages), len(other.messages)))


def _says_something(message: Message) -> bool:
    return bool(message.content or message.reasoning or message.tool_calls)


def _other_answer(example: Example) -> Example:
    """The worse one of a preference pair. Raises DataError where it is the better one too."""
    worse = example.rejected
    assert worse is not None, "the form asks for pairs"
    if worse.messages == example.messages and worse.pieces == example.pieces:
        raise equal_answers(example.place)
    return worse


def _last_answer(example: Example) -> str:
    """The words of the last turn or piece."""
    if example.pieces:
        return example.pieces[-1].text
    content = example.messages[-1].content
    return content if isinstance(content, str) else ""


def _answered(example: Example, word: str) -> Example:
    """The example with another last answer."""
    if example.pieces:
        return replace(example, pieces=(*example.pieces[:-1], Piece(word, learn=True)))
    return replace(example, messages=(*example.messages[:-1], replace(example.messages[-1], content=word)))


def _tool_name(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))
