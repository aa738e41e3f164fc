"""Data sets to tokenized samples: read, render, encode, cut, and keep in the cache.

The cache's key is the content: bytes of the data, chat template, tokenizer, settings and the code that renders. A
changed template is a new key, and a second start maps the files of the first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.cache import cache_folder
from tunesmith.config import DataConfig, SetConfig
from tunesmith.data.encode import Encoded, Encoder, FastDisagrees
from tunesmith.data.examples import content_hash, read_examples
from tunesmith.data.media import insert_media
from tunesmith.data.render import Renderer, Sample
from tunesmith.data.samples import Counts, Part, PartWriter, Samples, encoded_of, sequences_of, whole
from tunesmith.data.sources import Report, Source, find_sources, raise_error
from tunesmith.errors import DataError, UserError
from tunesmith.types import Example, Place

CHUNK = 1024
"""Examples that are encoded at once."""

Watch = Callable[[str, int], None]
"""Told the name of a data set and how many of its records are done."""


def unwatched(name: str, records: int) -> None:
    """Nobody is told."""


def load_samples(config: DataConfig, renderer: Renderer, watch: Watch = unwatched) -> tuple[Samples, Samples]:
    """Training and held-out samples. Raises UserError for the first record that cannot be used."""
    samples = load_sources(training_sources(config), config, renderer, watch)
    if held_out_sources := eval_sources(config):
        return samples, first_by_content(
            load_sources(held_out_sources, config, renderer, watch), config.max_eval_samples
        )
    side = held_out_side(samples, config)
    train = samples.select([~flags for flags in side])
    if not len(train):
        raise UserError(f"data.eval_fraction: {config.eval_fraction} leaves nothing of the data to train on")
    return train, first_by_content(samples.select(side), config.max_eval_samples)


def load_sources(sources: list[Source], config: DataConfig, renderer: Renderer, watch: Watch = unwatched) -> Samples:
    """All samples of the data sets, one after the other."""
    parts = [load_part(source, config, renderer, watch) for source in sources]
    return whole(parts, [source.config for source in sources], renderer.processor)


def held_out_below(config: DataConfig) -> np.uint64:
    """Samples with a lower content hash are held out."""
    return np.uint64(min(int(config.eval_fraction * 2**64), 2**64 - 1))


def held_out_side(samples: Samples, config: DataConfig) -> list[np.ndarray]:
    """For each part, which of its samples are held out: those whose content hash is in the lowest eval_fraction."""
    return [
        part.content[chosen] < held_out_below(config)
        for part, chosen in zip(samples.parts, samples.chosen, strict=True)
    ]


def training_sources(config: DataConfig) -> list[Source]:
    """The data to train on, of which a share may be held out."""
    return [source for part in config.all_sets() for source in find_sources(part)]


def eval_sources(config: DataConfig) -> list[Source]:
    """The held-out data, where it is not a share of the training data."""
    if config.eval_path:
        like = config.all_sets()[0].model_dump() | {"max_samples": None, "names": (), "split": config.eval_split}
        return find_sources(SetConfig(**like | {"path": config.eval_path}), "data.eval_path", "eval")
    if config.path == "demo":
        return find_sources(SetConfig(path="demo"), split="eval")
    return []


def first_by_content(samples: Samples, count: int) -> Samples:
    """The `count` samples with the lowest content hash: the choice hardly changes when the data grows."""
    if len(samples) <= count:
        return samples
    hashes = np.concatenate([part.content[chosen] for part, chosen in zip(samples.parts, samples.chosen, strict=True)])
    flags = np.zeros(len(hashes), bool)
    flags[np.argsort(hashes, kind="stable")[:count]] = True
    return samples.select(np.split(flags, np.cumsum([len(chosen) for chosen in samples.chosen])[:-1]))


def load_part(source: Source, config: DataConfig, renderer: Renderer, watch: Watch = unwatched) -> Part:
    """One data set's samples, from the cache or made now."""
    key = _key(source, config, renderer)
    if key is None:  # nobody knows whether the data has changed: it is made anew each time
        folder = Path(tempfile.mkdtemp(prefix="tunesmith-"))
        try:
            _write(folder, source, config, renderer, watch)
            return Part.open(folder)
        finally:
            shutil.rmtree(folder)  # what is mapped stays readable
    folder = cache_folder() / "data" / key
    try:
        if folder.exists() and not _is_whole(folder):
            shutil.rmtree(folder)
        return Part.open(folder) if folder.exists() else _make_part(folder, source, config, renderer, watch)
    except OSError as error:
        raise UserError(
            f"{cache_folder()}: the cache of tokenized data cannot be written: {error}; make room, or set TUNESMITH_CACHE to "
            "another folder"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether a part is all there, and the media that it names are still what they were: its key cannot know them."""
    return (folder / "part.json").is_file() and Part.open(folder).media_are_unchanged()


def _make_part(folder: Path, source: Source, config: DataConfig, renderer: Renderer, watch: Watch) -> Part:
    """Make a part aside, and put it in its place in the cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        _write(aside, source, config, renderer, watch)
        part = Part.open(aside)
        if part.counts.skipped and renderer.processor is not None:
            return part  # a file that was missing may be there next time
        with suppress(OSError):  # another process may have been faster
            aside.replace(folder)
        return Part.open(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # what is mapped stays readable


def make_samples(
    examples: Iterator[Example],
    config: DataConfig,
    renderer: Renderer,
    encoder: Encoder,
    counts: Counts,
    report: Report,
) -> Iterator[tuple[Encoded, list[Place], list[int]]]:
    """Chunks of (samples end to end, place of each, content hash of each); what happens on the way is counted.

    While one chunk is encoded, in threads of its own, the next one is rendered.
    """
    waiting: deque[tuple[Rendered, Future[Encoded]]] = deque()
    with ThreadPoolExecutor(1, "encode") as pool:
        for rendered in _rendered_chunks(examples, renderer, counts, report):
            texts = [marked for _, sample in rendered for marked in sample]
            waiting.append((rendered, pool.submit(encoder.encode, texts)))
            if len(waiting) > 1:
                done, encoded = waiting.popleft()
                yield _cut(done, encoded.result(), config, counts, report)
        for done, encoded in waiting:
            yield _cut(done, encoded.result(), config, counts, report)


Rendered = list[tuple[Example, Sample]]


def _rendered_chunks(
    examples: Iterator[Example], renderer: Renderer, counts: Counts, report: Report
) -> Iterator[Rendered]:
    while chunk := list(islice(examples, CHUNK)):
        counts.records += len(chunk)
        rendered: Rendered = []
        for example in chunk:
            try:
                samples = [insert_media(sample, example, renderer.processor) for sample in renderer.render(example)]
                rendered += [(example, sample) for sample in samples]
            except DataError as error:
                report(error, None)
        yield rendered


def _write(folder: Path, source: Source, config: DataConfig, renderer: Renderer, watch: Watch) -> None:
    """Read, render, encode and write a data set. Raises UserError."""
    for fast in (True, False):
        counts = Counts()
        report = reporter(config, counts)
        renderer.reset()
        writer = PartWriter(folder, source.name, 2 if renderer.pairs else 1)
        examples = read_examples(source, config.as_chat, report)
        try:
            for chunk in make_samples(examples, config, renderer, Encoder(renderer.tokenizer, fast), counts, report):
                writer.add(*chunk)
                watch(source.name, counts.records)
        except FastDisagrees:
            continue
        break
    counts.notes, counts.conversations = dict(renderer.notes), renderer.conversations
    if not writer.num_samples:
        raise UserError(_nothing_left(source, config, counts))
    writer.close(counts)


def reporter(config: DataConfig, counts: Counts) -> Report:
    """What becomes of records that cannot be used: an error, or with bad_records: skip a count."""

    def skip(error: UserError, raw: str | None = None) -> None:
        counts.skipped += 1
        counts.first_skipped = counts.first_skipped or str(error)

    return skip if config.bad_records == "skip" else raise_error


def _nothing_left(source: Source, config: DataConfig, counts: Counts) -> str:
    reasons = [f"{number} {note}" for note, number in counts.notes.items()]
    if counts.dropped:
        reasons.append(f"{counts.dropped} lost their answers at data.max_tokens: {config.max_tokens}")
    if counts.skipped:
        reasons.append(f"{counts.skipped} could not be used, the first: {counts.first_skipped}")
    remedy = "raise data.max_tokens, or set data.truncation: left" if counts.dropped else "give other data"
    return f"{source.name}: nothing to learn from in {counts.records} records: {'; '.join(reasons)}; {remedy}"


def _cut(
    rendered: Rendered, encoded: Encoded, config: DataConfig, counts: Counts, report: Report
) -> tuple[Encoded, list[Place], list[int]]:
    """Samples shortened to max_tokens by the truncation policy. A sample without any target is no sample."""
    group = len(rendered[0][1]) if rendered else 1
    files = [marked.files for _, sample in rendered for marked in sample]
    if any(files):
        encoded = replace(encoded, files=tuple(files))
    lengths = np.diff(encoded.offsets)
    targets = np.add.reduceat(np.append(encoded.weights != 0, False), encoded.offsets[:-1]) if len(lengths) else lengths
    usable = (lengths > 0) & (lengths <= config.max_tokens) & (targets > 0)
    fine = [all(group_usable) for group_usable in usable.reshape(-1, group).tolist()]
    places, content = [example.place for example, _ in rendered], [content_hash(example) for example, _ in rendered]
    if all(fine):
        return encoded, places, content
    sequences = list(sequences_of(encoded))
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    owners: list[int] = []
    for n, (example, sample) in enumerate(rendered):
        own = sequences[n * group : (n + 1) * group]
        try:
            samples = [own] if fine[n] else _shorten(own, sample, config, example.place)
        except DataError as error:
            report(error, None)
            continue
        if not fine[n]:
            counts.truncated += bool(samples)
            counts.dropped += not samples
            counts.first_cut = counts.first_cut or str(example.place)
        for part in samples:
            kept += part
            owners.append(n)
    cut = encoded_of(kept)
    if any(files):
        cut = replace(cut, files=tuple(own for n in owners for own in files[n * group : (n + 1) * group]))
    return cut, [places[n] for n in owners], [content[n] for n in owners]


def _shorten(
    own: list[tuple[np.ndarray, np.ndarray]], sample: Sample, config: DataConfig, place: Place
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """What is left of a sample longer than max_tokens: none, one, or with `split` several. Raises DataError."""
    longest, limit = max(len(tokens) for tokens, _ in own), config.max_tokens
    if longest <= limit:
        raise DataError(
            place,
            (),
            "nothing to learn from: its answer makes no token of its own",
            "give an assistant turn or completion that is not empty, or remove the record",
        )
    if config.truncation == "error":
        remedy = "raise it, or set data.truncation to right, left, split or drop"
        raise DataError(place, (), f"{longest} tokens, more than data.max_tokens: {limit}", remedy)
    if config.truncation == "drop" or any(marked.media for marked in sample):  # an image's tokens are never cut
        return []
    if config.truncation == "split" and len(own) == 1:
        tokens, weights = own[0]
        starts = range(0, len(tokens), limit)
        pieces = [[_slice(tokens, weights, start, start + limit)] for start in starts]
        return [piece for piece in pieces if piece[0][1].any()]
    left = config.truncation == "left"
    start = longest - limit if left else 0  # the same for both sides of a pair, whose prompts then stay the same
    cut = [_slice(tokens, weights, start, start + limit) for tokens, weights in own]
    return [cut] if all(weights.any() for _, weights in cut) else []


def _slice(tokens: np.ndarray, weights: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    weights = weights[start:stop].copy()
    weights[:1] = 0.0
    return tokens[start:stop], weights


SETTINGS = (
    "max_tokens", "truncation", "learn", "as_chat", "template_variables", "date", "bad_records", "parse_special_tokens"
)  # fmt: skip
"""Of DataConfig, what decides a sample's tokens and weights."""


def _key(source: Source, config: DataConfig, renderer: Renderer) -> str | None:
    """Hash of all that decides the samples; None if the data's bytes cannot be known."""
    files = [file_content(file) for file in source.files]
    if None in files or source.name.startswith("hub:"):
        return None
    tokenizer = renderer.tokenizer
    digest = hashlib.blake2b(digest_size=16)
    facts: list[Any] = [
        _code_version(),
        [version(package) for package in ("transformers", "tokenizers", "jinja2")],
        source.name,
        source.config.model_dump(mode="json", exclude={"weight", "repeat"}),
        repr(source.transform),
        list(zip(source.files, files, strict=True)),
        config.model_dump(mode="json", include=set(SETTINGS)),
        [renderer.learns_all, renderer.pairs],
        [str(tokenizer.chat_template), tokenizer.special_tokens_map],
        renderer.processor and renderer.processor.settings,
    ]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _code_version() -> str:
    """Hash of this package's sources: samples that other code made are not taken for its own."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def file_content(file: str) -> str | None:
    """Hash of a file's bytes, remembered for as long as its size and time stay; of a URL what its server says."""
    if file.startswith(("http://", "https://")):
        return None  # a server need not tell whether the file has changed
    if "://" in file:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(file)
        return str(filesystem.ukey(path)) if hasattr(filesystem, "ukey") else None
    path, stat = Path(file).resolve(), Path(file).stat()
    stamp = hashlib.blake2b(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=16).hexdigest()
    memo = cache_folder() / "files" / stamp
    if memo.is_file():
        return memo.read_text()
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "blake2b").hexdigest()[:32]
    if time.time() - stat.st_mtime > 2:  # a file written this instant may change within the clock's grain
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(found)
    return found
