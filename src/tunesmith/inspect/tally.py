"""What one data set holds, counted while it is read: a few hundred bytes a record stay, whatever the record's size."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.data.examples import content_hash
from tunesmith.data.samples import Chunk, Counts
from tunesmith.inspect.words import NUM_CODE_POINTS, NUM_HASHES, code_points, signatures
from tunesmith.types import Example, Message, Place

CHUNK_CHARACTERS = 2**20
"""Texts of about so many characters are counted at once."""


@dataclass
class Tally:
    """The numbers of one data set, or of several together. Arrays hold one number an example, in the order of reading."""

    name: str
    held_out: bool = False
    """Read from data.eval_path, not trained on."""
    bad: int = 0
    """Records that cannot be used."""
    unread: int = 0
    """Of them those that became no example."""
    role_errors: int = 0
    samples: int = 0
    tokens: int = 0
    """Of the samples, after truncation."""
    learnt: int = 0
    """Of the tokens those with a loss weight other than 0."""
    empty_turns: int = 0
    labels: Counter[float] = field(default_factory=Counter)
    signs: set[float] = field(default_factory=set)
    """Of the weights of targets: a wrong step's is negative."""
    """How often each label occurs among the samples."""
    counts: Counts = field(default_factory=Counts)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """Tokens of each sequence before truncation."""
    turns: array[int] = field(default_factory=lambda: array("i"))
    """Messages of each conversation."""
    content: array[int] = field(default_factory=lambda: array("Q"))
    """Content hash."""
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    """Hash of what stands before the last answer; 0: nothing."""
    files: dict[str, int] = field(default_factory=dict)
    file: array[int] = field(default_factory=lambda: array("i"))
    line: array[int] = field(default_factory=lambda: array("q"))
    signatures: list[np.ndarray] = field(default_factory=list)
    """uint32 [examples of a chunk, NUM_HASHES]."""
    code_points: np.ndarray = field(default_factory=lambda: np.zeros(NUM_CODE_POINTS, np.int64))
    """How often each code point occurs."""
    compare: bool = True
    """Whether signatures are wanted."""
    _texts: list[str] = field(default_factory=list)
    _characters: int = 0
    """Of `_texts`."""

    @property
    def rows(self) -> int:
        """Records, bad ones included."""
        return self.counts.records + self.unread

    def watch(self, examples: Iterator[Example]) -> Iterator[Example]:
        """The same examples, counted as they pass."""
        for example in examples:
            self._add(example)
            if self._characters >= CHUNK_CHARACTERS:
                self._add_words()
            yield example
        self._add_words()

    def measure(self, lengths: np.ndarray) -> None:
        """Note how long sequences are before truncation, int64 [sequences]."""
        self.lengths.extend(lengths.tolist())

    def add_samples(self, chunk: Chunk) -> None:
        """Count samples as they are trained on."""
        self.samples += len(chunk.places)
        self.tokens += len(chunk.encoded.tokens)
        self.learnt += int(np.count_nonzero(chunk.encoded.weights))
        self.labels.update(chunk.labels)
        self.signs.update(np.unique(np.sign(chunk.encoded.weights)).tolist())

    def place(self, example: int) -> Place:
        """The record that an example comes from."""
        return Place(list(self.files)[self.file[example]], self.line[example])

    def signatures_of(self, wanted: np.ndarray) -> np.ndarray:
        """uint32 [wanted, NUM_HASHES] of the examples whose flag (bool [examples]) is true."""
        found = np.zeros((int(wanted.sum()) if self.compare else 0, NUM_HASHES), np.uint32)
        seen = filled = 0
        for chunk in self.signatures:  # one by one: all of them twice would be what needs the most memory here
            chosen = chunk[wanted[seen : seen + len(chunk)]]
            found[filled : filled + len(chosen)] = chosen
            seen, filled = seen + len(chunk), filled + len(chosen)
        return found

    def _add(self, example: Example) -> None:
        self.content.append(content_hash(example))
        self.prompts.append(_hash(prompt_of(example)))
        self.file.append(self.files.setdefault(example.place.file, len(self.files)))
        self.line.append(example.place.line)
        if example.messages:
            self.turns.append(len(example.messages))
            self.empty_turns += sum(_is_empty(message) for message in example.messages)
        self._texts.append(text_of(example))
        self._characters += len(self._texts[-1]) + 1

    def _add_words(self) -> None:
        if not self._texts:
            return
        codes, starts = code_points(self._texts)
        self._texts, self._characters = [], 0
        counts = np.bincount(codes)
        self.code_points[: len(counts)] += counts
        if self.compare:
            self.signatures.append(signatures(codes, starts))


def together(tallies: Sequence[Tally]) -> Tally:
    """The sum of several data sets, without what tells single records apart."""
    total = Tally("total")
    for tally in tallies:
        for name in ("bad", "unread", "role_errors", "samples", "tokens", "learnt", "empty_turns"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        total.counts += tally.counts
        total.labels += tally.labels
        total.signs |= tally.signs
        for name in ("lengths", "turns", "content"):
            getattr(total, name).extend(getattr(tally, name))
        total.code_points += tally.code_points
    return total


def prompt_of(example: Example) -> str:
    """What stands before the last answer; a system message aside, since whole data sets share one."""
    if not example.messages:
        return "".join(piece.text for piece in example.pieces if not piece.learn).strip()
    answers = [turn for turn, message in enumerate(example.messages) if message.role == "assistant"]
    before = example.messages[: answers[-1]] if answers else example.messages
    return "\n".join(f"{m.role}: {_words(m)}" for m in before if m.role != "system")


def text_of(example: Example) -> str:
    """All words of an example but the system message's."""
    texts = [_words(message) for message in example.messages if message.role != "system"]
    return "\n".join(texts) + "".join(piece.text for piece in example.pieces)


def _words(message: Message) -> str:
    parts = (message.content,) if isinstance(message.content, str) else message.content
    texts = [message.reasoning, *parts, *(f"{call.name} {call.arguments}" for call in message.tool_calls)]
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _is_empty(message: Message) -> bool:
    """A turn that says and does nothing. An image is something."""
    said = message.content.strip() if isinstance(message.content, str) else message.content
    return not (said or message.reasoning or message.tool_calls)


def _hash(text: str) -> int:
    if not text.strip():
        return 0
    data = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
