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
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.cache import cache_folder
from tunesmith.config import DataConfig, SetConfig
from tunesmith.data.choices import choose, divider
from tunesmith.data.encode import Encoded, Encoder, FastDisagrees
from tunesmith.data.examples import content_hash, read_examples
from tunesmith.data.media import insert_media
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.samples import Chunk, Counts, Part, PartWriter, Samples, whole
from tunesmith.data.sources import Report, Source, find_sources, raise_error
from tunesmith.data.truncate import long_prompts, shorten
from tunesmith.errors import DataError, UserError
from tunesmith.types import Example

CHUNK = 1024
"""Examples that are encoded at once."""

Watch = Callable[[str, int], None]
"""Told the name of a data set and how many of its records are done."""


def unwatched(name: str, records: int) -> None:
    """Nobody is told."""


Measure = Callable[[np.ndarray], None]
"""Told the lengths of sequences before truncation, int64 [sequences]."""


def unmeasured(lengths: np.ndarray) -> None:
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
    measure: Measure = unmeasured,
) -> Iterator[Chunk]:
    """Chunks of samples; what happens on the way is counted.

    While one chunk is encoded, in threads of its own, the next one is rendered.
    """
    waiting: deque[tuple[Rendered, Future[Encoded]]] = deque()
    with ThreadPoolExecutor(1, "encode") as pool:
        for rendered in _rendered_chunks(examples, renderer, counts, report):
            texts = [marked for _, sample in rendered for marked in sample]
            waiting.append((rendered, pool.submit(encoder.encode, texts)))
            if len(waiting) > 1:
                done, encoded = waiting.popleft()
                yield _finish(done, encoded.result(), config, counts, report, measure)
        for done, encoded in waiting:
            yield _finish(done, encoded.result(), config, counts, report, measure)


def _finish(
    rendered: Rendered, encoded: Encoded, config: DataConfig, counts: Counts, report: Report, measure: Measure
) -> Chunk:
    """What is encoded, as samples."""
    choices: list[np.ndarray] = []
    if rendered and rendered[0][1].num_choices:
        rendered, encoded, choices = choose(rendered, encoded, report)
    measure(np.diff(encoded.offsets))
    labels = [sample.label for _, sample in rendered]
    cut, owners = shorten(rendered, encoded, config, counts, report)
    return Chunk(
        cut,
        [rendered[n][0].place for n in owners],
        [content_hash(rendered[n][0]) for n in owners],
        [labels[n] for n in owners],
        [choices[n] for n in owners] if choices else [],
    )


def _rendered_chunks(
    examples: Iterator[Example], renderer: Renderer, counts: Counts, report: Report
) -> Iterator[Rendered]:
    divide = divider(renderer.tokenizer) if renderer.form == "choices" else None
    while chunk := list(islice(examples, CHUNK)):
        counts.records += len(chunk)
        rendered: Rendered = []
        for example in chunk:
            try:
                samples = [insert_media(sample, example, renderer.processor) for sample in renderer.render(example)]
                rendered += [(example, divide(sample) if divide else sample) for sample in samples]
            except DataError as error:
                report(error, None)
        yield rendered


def _write(folder: Path, source: Source, config: DataConfig, renderer: Renderer, watch: Watch) -> None:
    """Read, render, encode and write a data set. Raises UserError."""
    for fast in (True, False):
        counts = Counts()
        report = reporter(config, counts)
        renderer.reset()
        writer = PartWriter(folder, source.name, renderer.group_size)
        examples = read_examples(source, config.as_chat, report)
        try:
            for chunk in make_samples(examples, config, renderer, Encoder(renderer.tokenizer, fast), counts, report):
                writer.add(*chunk)
                watch(source.name, counts.records)
        except FastDisagrees:
            continue
        break
    counts.notes |= renderer.notes
    counts.conversations = renderer.conversations
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
    if others := counts.dropped - counts.notes.get(long_prompts(config.max_tokens), 0):
        lost = "are longer than" if config.truncation == "drop" else "lost their answers at"
        reasons.append(f"{others} {lost} data.max_tokens: {config.max_tokens}")
    if counts.skipped:
        reasons.append(f"{counts.skipped} could not be used, the first: {counts.first_skipped}")
    remedy = "raise data.max_tokens, or set data.truncation: left" if counts.dropped else "give other data"
    return f"{source.name}: nothing to learn from in {counts.records} records: {'; '.join(reasons)}; {remedy}"


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
        renderer.form,
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
