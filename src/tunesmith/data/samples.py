"""Tokenized samples. They lie in flat arrays on disk, mapped into memory: a million of them need hardly any RAM.

Shapes: S samples, Q sequences (S × group size), T tokens of all sequences together.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from tunesmith.config import SetConfig
from tunesmith.data.encode import Encoded
from tunesmith.data.media import MediaFile, Processor, read
from tunesmith.errors import DataError
from tunesmith.types import Place

if TYPE_CHECKING:
    from torch import Tensor

ARRAYS = {
    "tokens": "<i4",  # [T]
    "weights": "<f4",  # [T] loss weight of predicting each token
    "offsets": "<i8",  # [Q + 1] sequence q is tokens[offsets[q]:offsets[q+1]]
    "content": "<u8",  # [S] hash of the record, whatever the tokenizer
    "file": "<i4",  # [S] which file the record is from
    "line": "<i8",  # [S] and its line
    "label": "<f4",  # [S] what the data says of a sample beside its tokens
}
MEDIA_ARRAYS = {
    "media": "u1",  # a line of JSON for each sequence that has media, saying which
    "media_at": "<i8",  # [Q + 1] sequence q's is media[media_at[q]:media_at[q+1]]
    "blobs": "u1",  # files that lie inside of the records, end to end, each once
}
CHOICE_ARRAYS = {
    "choices": "<i4",  # the label words' tokens, in the order of the classes, those of all samples end to end
    "choices_at": "<i8",  # [S + 1] sample s's are choices[choices_at[s]:choices_at[s+1]]
}
"""Both kinds are written only where there is any."""
OPTIONAL_ARRAYS = MEDIA_ARRAYS | CHOICE_ARRAYS


@dataclass
class Counts:
    """What happened on the way from records to samples."""

    records: int = 0
    truncated: int = 0
    dropped: int = 0
    """Too long under truncation: drop, or without any target after the cut."""
    skipped: int = 0
    """Records that could not be used, under bad_records: skip."""
    first_cut: str | None = None
    """Place of the first record that was cut or dropped."""
    first_skipped: str | None = None
    """What was wrong with the first record that was skipped."""
    conversations: int = 0
    """Sequences that a chat template has rendered."""
    notes: dict[str, int] = field(default_factory=dict)
    """What else was left out or kept in an unusual way, and how often."""

    def __add__(self, other: Counts) -> Counts:
        notes = {note: self.notes.get(note, 0) + other.notes.get(note, 0) for note in {**self.notes, **other.notes}}
        return Counts(
            self.records + other.records,
            self.truncated + other.truncated,
            self.dropped + other.dropped,
            self.skipped + other.skipped,
            self.first_cut or other.first_cut,
            self.first_skipped or other.first_skipped,
            self.conversations + other.conversations,
            notes,
        )


@dataclass(frozen=True)
class Part:
    """The samples of one data set."""

    name: str
    tokens: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    content: np.ndarray
    file: np.ndarray
    line: np.ndarray
    label: np.ndarray
    files: tuple[str, ...]
    group_size: int
    """Sequences in a sample: 1, or 2 for preference pairs (chosen, rejected)."""
    fingerprint: str
    """Hash of every token, weight and border."""
    max_token: int
    counts: Counts
    media: np.ndarray | None = None
    media_at: np.ndarray | None = None
    blobs: np.ndarray | None = None
    choices: np.ndarray | None = None
    choices_at: np.ndarray | None = None

    @classmethod
    def open(cls, folder: Path) -> Part:
        """What a PartWriter wrote."""
        facts = json.loads((folder / "part.json").read_text())
        facts["counts"], facts["files"] = Counts(**facts["counts"]), tuple(facts["files"])
        kinds = ARRAYS | {name: kind for name, kind in OPTIONAL_ARRAYS.items() if (folder / f"{name}.bin").is_file()}
        arrays: dict[str, Any] = {
            name: np.memmap(folder / f"{name}.bin", kind, mode="r") for name, kind in kinds.items()
        }
        return cls(**arrays, **facts)

    def __len__(self) -> int:
        return len(self.content)

    def place(self, sample: int) -> Place:
        """The record that a sample comes from."""
        return Place(self.files[self.file[sample]], int(self.line[sample]))

    def sequences(self, sample: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, weights) of each sequence of a sample."""
        borders = self.offsets[sample * self.group_size : (sample + 1) * self.group_size + 1].tolist()
        return [(self.tokens[start:stop], self.weights[start:stop]) for start, stop in itertools.pairwise(borders)]

    def words(self, sample: int) -> np.ndarray:
        """int32 [K]: the label words' tokens at the sample's target, in the order of the classes; else empty."""
        if self.choices is None or self.choices_at is None:
            return np.zeros(0, np.int32)
        return self.choices[self.choices_at[sample] : self.choices_at[sample + 1]]

    def lengths(self) -> np.ndarray:
        """int64 [S, group size]: tokens of each sequence."""
        return np.diff(self.offsets).reshape(-1, self.group_size)

    def media_files(self, sample: int) -> list[tuple[MediaFile, ...]]:
        """The images, audio and video of each sequence of a sample."""
        if self.media is None or self.media_at is None:
            return [()] * self.group_size
        borders = self.media_at[sample * self.group_size : (sample + 1) * self.group_size + 1].tolist()
        lines = [self.media[start:stop].tobytes() for start, stop in itertools.pairwise(borders)]
        return [tuple(self._media_file(*entry) for entry in json.loads(line)) if line else () for line in lines]

    def _media_file(self, kind: str, source: str | int, num_bytes: int, mtime_ns: int) -> MediaFile:
        if isinstance(source, str):
            return MediaFile(kind, source, num_bytes, mtime_ns)
        assert self.blobs is not None
        return MediaFile(kind, self.blobs[source : source + num_bytes].tobytes(), num_bytes)

    def media_are_unchanged(self) -> bool:
        """Whether every file is as it was when the samples were made."""
        lines = set() if self.media is None else set(self.media.tobytes().splitlines())
        named = {tuple(entry) for line in lines for entry in json.loads(line) if isinstance(entry[1], str)}
        return all(self._media_file(*entry).is_unchanged() for entry in named)


@dataclass(frozen=True)
class Samples:
    """Chosen samples of one or several parts, numbered through: those of the first part first."""

    parts: tuple[Part, ...]
    chosen: tuple[np.ndarray, ...]
    """For each part the int64 indices of its samples that belong here."""
    sets: tuple[SetConfig, ...]
    """For each part its settings, with its share of a mixture."""
    processor: Processor | None = None
    """What makes tensors of media."""

    def __len__(self) -> int:
        return sum(map(len, self.chosen))

    @property
    def counts(self) -> Counts:
        """Of all parts, whole."""
        return sum((part.counts for part in self.parts), Counts())

    @property
    def group_size(self) -> int:
        return self.parts[0].group_size

    def find(self, index: int) -> tuple[Part, int]:
        """The part that a sample stands in, and its number there."""
        for part, chosen in zip(self.parts, self.chosen, strict=True):
            if index < len(chosen):
                return part, int(chosen[index])
            index -= len(chosen)
        raise IndexError(index)

    def sequences(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, weights) of each sequence of a sample."""
        part, sample = self.find(index)
        return part.sequences(sample)

    def place(self, index: int) -> Place:
        """The record that a sample comes from."""
        part, sample = self.find(index)
        return part.place(sample)

    def label(self, index: int) -> float:
        """Of a preference pair its margin, of feedback 1 for desirable and 0 for not, of a classification the right class."""
        part, sample = self.find(index)
        return float(part.label[sample])

    def labels(self) -> np.ndarray:
        """float32 [S]: all of them."""
        labels = [part.label[chosen] for part, chosen in zip(self.parts, self.chosen, strict=True)]
        return np.concatenate(labels) if labels else np.zeros(0, np.float32)

    def choices(self, index: int) -> np.ndarray:
        """int32 [K]: the label words' tokens at the sample's target, in the order of the classes; else empty."""
        part, sample = self.find(index)
        return part.words(sample)

    def lengths(self) -> np.ndarray:
        """int64 [S, group size]: tokens of each sequence."""
        lengths = [part.lengths()[chosen] for part, chosen in zip(self.parts, self.chosen, strict=True)]
        return np.concatenate(lengths) if lengths else np.zeros((0, 1), np.int64)

    def max_token(self) -> int:
        """Largest token id of the parts; -1 without samples."""
        return max((part.max_token for part in self.parts if len(part)), default=-1)

    def select(self, wanted: Sequence[np.ndarray]) -> Samples:
        """Of each part those whose flag is true: bool [chosen of the part]."""
        chosen = tuple(chosen[flags] for chosen, flags in zip(self.chosen, wanted, strict=True))
        return replace(self, chosen=chosen)

    @property
    def have_media(self) -> bool:
        """Whether any sample of the parts has an image, audio or video."""
        return any(part.media is not None for part in self.parts)

    def media_tensors(self, index: int) -> list[dict[str, Tensor]]:
        """For each sequence of a sample what the model reads beside its tokens. Raises UserError if a file has changed."""
        part, sample = self.find(index)
        return [
            self._media_tensors(files, tokens, part.place(sample)) if files else {}
            for files, (tokens, _) in zip(part.media_files(sample), part.sequences(sample), strict=True)
        ]

    def _media_tensors(self, files: tuple[MediaFile, ...], tokens: np.ndarray, place: Place) -> dict[str, Tensor]:
        assert self.processor is not None, "samples with media are made by a processor"
        for file in files:
            if not file.is_unchanged():
                what = f"{file} has changed or gone since the data was prepared"
                raise DataError(place, (), what, "put it back, or start anew")
        return self.processor.tensors(tokens.tolist(), [read(file, self.processor, place) for file in files])

    def target_share(self) -> float:
        """Share of the tokens that carry loss, estimated from 1000 samples."""
        some = range(0, len(self), max(1, len(self) // 1000))
        weights = [part for index in some for _, part in self.sequences(index)]
        return float(np.mean(np.concatenate(weights) != 0)) if weights else 0.0

    def fingerprint(self) -> str:
        """Hash of all samples here, for the manifest and the resume check."""
        digest = hashlib.blake2b(digest_size=16)
        for part, chosen in zip(self.parts, self.chosen, strict=True):
            digest.update(part.fingerprint.encode() + np.asarray(chosen, "<i8").tobytes())
        return digest.hexdigest()


def whole(parts: Iterable[Part], sets: Iterable[SetConfig], processor: Processor | None = None) -> Samples:
    """All samples of the parts."""
    parts = tuple(parts)
    return Samples(parts, tuple(np.arange(len(part)) for part in parts), tuple(sets), processor)


class Chunk(NamedTuple):
    """Samples end to end, on their way into the arrays."""

    encoded: Encoded
    places: list[Place]
    content: list[int]
    """Content hash of each sample's record."""
    labels: list[float]
    choices: list[np.ndarray]
    """int32 [K] of each sample; no list at all where no sample has any."""


class PartWriter:
    """Appends samples to the arrays in a folder."""

    def __init__(self, folder: Path, name: str, group_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.group_size = folder, name, group_size
        self.streams: dict[str, BinaryIO] = {array: (folder / f"{array}.bin").open("wb") for array in ARRAYS}
        self.digest = hashlib.blake2b(digest_size=16)
        self.files: dict[str, int] = {}
        self.num_tokens, self.num_samples, self.max_token = 0, 0, -1
        self.choices_at = [0]
        self.media_at, self.blobs, self.num_blob_bytes = [0], dict[str, int](), 0
        self._put("offsets", [0])

    def add(
        self,
        encoded: Encoded,
        places: Sequence[Place],
        content: Sequence[int],
        labels: Sequence[float] = (),
        choices: Sequence[np.ndarray] = (),
    ) -> None:
        """A chunk. Labels are 0 where none are given."""
        self._put("tokens", encoded.tokens)
        self._put("weights", encoded.weights)
        self._put("offsets", encoded.offsets[1:] + self.num_tokens)
        self._put("content", content)
        self._put("file", [self.files.setdefault(place.file, len(self.files)) for place in places])
        self._put("line", [place.line for place in places])
        self._put("label", labels or [0.0] * len(places))
        for array, kind in ((encoded.tokens, "<i4"), (encoded.weights, "<f4"), (np.diff(encoded.offsets), "<i8")):
            self.digest.update(np.ascontiguousarray(array, kind).tobytes())
        for files in encoded.files or [()] * (len(encoded.offsets) - 1):
            self._add_media(files)
        if any(labels):
            self.digest.update(np.asarray(labels, ARRAYS["label"]).tobytes())
        for words in choices:
            self.digest.update(len(words).to_bytes(4, "little") + np.asarray(words, "<i4").tobytes())
            self._stream("choices").write(np.asarray(words, CHOICE_ARRAYS["choices"]).tobytes())
            self.choices_at.append(self.choices_at[-1] + len(words))
            self.max_token = max(self.max_token, *words.tolist())
        self.num_tokens += len(encoded.tokens)
        self.num_samples += len(places)
        self.max_token = max(self.max_token, int(encoded.tokens.max(initial=-1)))

    def _add_media(self, files: Sequence[MediaFile]) -> None:
        """What the next sequence has."""
        entries: list[tuple[str, str | int, int, int]] = []
        for file in files:
            self.digest.update(f"{len(self.media_at)} {file.kind} {file.digest}".encode())
            source: str | int
            if isinstance(file.source, str):
                source = file.source
            else:
                if file.digest not in self.blobs:
                    self.blobs[file.digest] = self.num_blob_bytes
                    self._stream("blobs").write(file.source)
                    self.num_blob_bytes += file.num_bytes
                source = self.blobs[file.digest]
            entries.append((file.kind, source, file.num_bytes, file.mtime_ns))
        line = (json.dumps(entries) + "\n").encode() if entries else b""
        if line:
            self._stream("media").write(line)
        self.media_at.append(self.media_at[-1] + len(line))

    def _stream(self, array: str) -> BinaryIO:
        if array not in self.streams:
            self.streams[array] = (self.folder / f"{array}.bin").open("wb")
        return self.streams[array]

    def close(self, counts: Counts) -> None:
        """Write what is known at the end. The folder is then what Part.open reads."""
        if self.media_at[-1]:
            self._stream("media_at").write(np.asarray(self.media_at, MEDIA_ARRAYS["media_at"]).tobytes())
        if self.choices_at[-1]:
            assert len(self.choices_at) == self.num_samples + 1, "all samples of a part have choices, or none"
            self._stream("choices_at").write(np.asarray(self.choices_at, CHOICE_ARRAYS["choices_at"]).tobytes())
        for stream in self.streams.values():
            stream.close()
        facts = {
            "name": self.name,
            "files": list(self.files),
            "group_size": self.group_size,
            "fingerprint": self.digest.hexdigest(),
            "max_token": self.max_token,
            "counts": asdict(counts),
        }
        (self.folder / "part.json").write_text(json.dumps(facts))

    def _put(self, array: str, values: Sequence[float] | np.ndarray) -> None:
        self.streams[array].write(np.asarray(values, ARRAYS[array]).tobytes())


def sequences_of(encoded: Encoded) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, weights) of each sequence."""
    for start, stop in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True):
        yield encoded.tokens[start:stop], encoded.weights[start:stop]


def encoded_of(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> Encoded:
    """The inverse of `sequences_of`."""
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(tokens) for tokens, _ in sequences], out=offsets[1:])
    tokens = np.concatenate([tokens for tokens, _ in sequences] or [np.zeros(0, np.int32)])
    weights = np.concatenate([weights for _, weights in sequences] or [np.zeros(0, np.float32)])
    return Encoded(tokens.astype(np.int32), weights.astype(np.float32), offsets)
