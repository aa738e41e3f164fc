"""Images, audio and video: found and read where a record names them, and given their tokens in its text.

Only where a file lies is kept with the samples, not its pixels: they are read again for each batch.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tunesmith.data.examples import media_path
from tunesmith.data.render import LITERAL_PLANE, Marked, Sample
from tunesmith.errors import DataError
from tunesmith.types import Example, Insert, Media, Place

if TYPE_CHECKING:
    from torch import Tensor

Content = tuple[str, Any]
"""Kind, and what was read: a PIL image; a mono waveform; or a video's frames and their VideoMetadata."""

NEEDED = {"image": "PIL", "audio": "av", "video": "av"}
"""Package that reads each kind."""


class Processor(Protocol):
    """What the data asks of a model's processor."""

    @property
    def settings(self) -> str: ...
    @property
    def sampling_rate(self) -> int: ...
    def refusal(self, kind: str) -> tuple[str, str] | None: ...
    def sample_frames(self, metadata: Any) -> list[int]: ...
    def inserts(self, text: str, media: Sequence[Content]) -> list[Insert]: ...
    def tensors(self, tokens: Sequence[int], media: Sequence[Content]) -> dict[str, Tensor]: ...
    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class MediaFile:
    """A file as it was when the data was prepared."""

    kind: str
    source: str | bytes
    """Path, or the encoded file itself."""
    num_bytes: int
    mtime_ns: int = 0
    """When it was last written; 0 of one that lies in the data itself."""
    digest: str = ""
    """Hash of its bytes."""

    def is_unchanged(self) -> bool:
        """Whether size and time are still the same. Reading every file at each start to be surer would take minutes."""
        if isinstance(self.source, bytes):
            return True
        try:
            now = Path(self.source).stat()
        except OSError:
            return False
        return (now.st_size, now.st_mtime_ns) == (self.num_bytes, self.mtime_ns)

    def __str__(self) -> str:
        return self.source if isinstance(self.source, str) else f"the {self.kind} inside the record"


def insert_media(sample: Sample, example: Example, processor: Processor | None) -> Sample:
    """The sample with each placeholder written out as the processor does, and its files found and read. Raises DataError."""
    if not any(marked.media for marked in sample):
        return sample
    owners: tuple[Example, ...] = (example, example.rejected or example)
    if sample.num_choices:  # an example's answers share its files
        owners = (example,) * len(sample)
    inserted = (
        _insert(marked, owner, processor) if marked.media else marked
        for marked, owner in zip(sample, owners, strict=False)
    )
    return replace(sample, sequences=tuple(inserted))


def _insert(marked: Marked, example: Example, processor: Processor | None) -> Marked:
    place = example.place
    for kind in dict.fromkeys(part.kind for part in marked.media):
        if processor is None:
            what = f"holds {kind}s, but the model reads text alone (or lies there without its preprocessor_config.json)"
            raise DataError(place, (), what, "use a multimodal model, or remove the record")
        if refusal := processor.refusal(kind):
            raise DataError(place, (), f"holds {refusal[0]}", refusal[1])
    assert processor is not None
    files = tuple(_find(part, example) for part in marked.media)
    contents = [read(file, processor, place) for file in files]
    # the data's own words must not be taken for placeholders
    text = marked.text
    for start, stop in marked.literals:
        text = text[:start] + "".join(chr(LITERAL_PLANE + ord(c)) for c in text[start:stop]) + text[stop:]
    try:
        inserts = processor.inserts(text, contents)
    except ValueError as error:
        what = f"the model's processor cannot place the {len(files)} files of this conversation: {error}"
        raise DataError(place, (), what, "use a chat template and messages that give each file its place") from error
    return _written_out(marked, inserts, files)


def _written_out(marked: Marked, inserts: Sequence[Insert], files: tuple[MediaFile, ...]) -> Marked:
    """Texts in place of their placeholders, with all spans moved accordingly. What stands for media is never learnt."""
    text, end, silent = "", 0, []
    for insert in inserts:
        text += marked.text[end : insert.start]
        silent.append((len(text), len(text) + len(insert.text), 0.0))
        text += insert.text
        end = insert.stop
    text += marked.text[end:]

    def moved(position: int) -> int:
        return position + sum(len(one.text) - (one.stop - one.start) for one in inserts if one.stop <= position)

    return replace(
        marked,
        text=text,
        spans=(*((moved(start), moved(stop), weight) for start, stop, weight in marked.spans), *silent),
        marks=tuple((moved(character), weight) for character, weight in marked.marks),
        literals=tuple((moved(start), moved(stop)) for start, stop in marked.literals),
        files=files,
    )


def _find(media: Media, example: Example) -> MediaFile:
    if isinstance(media.source, bytes):
        return MediaFile(media.kind, media.source, len(media.source), digest=_digest(media.source))
    path = media_path(example.folder, media.source)
    if path is None:
        what = f"no such {media.kind} file: {media.source!r}"
        remedy = (
            f"correct the path; relative ones count from {Path(example.folder or '.').absolute()} or a folder above"
        )
        raise DataError(example.place, (), what, remedy)
    try:
        stat, data = path.stat(), path.read_bytes()
    except OSError as error:
        raise DataError(example.place, (), f"{path} cannot be read: {error.strerror}", "make it readable") from error
    return MediaFile(media.kind, str(path.absolute()), stat.st_size, stat.st_mtime_ns, _digest(data))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read(file: MediaFile, processor: Processor, place: Place) -> Content:
    """What the processor takes. Raises DataError."""
    package = NEEDED[file.kind]
    if not find_spec(package):
        what = f"{file}: reading {file.kind} files needs {package}, which is not installed"
        raise DataError(place, (), what, "pip install 'tunesmith[media]'")
    source = file.source if isinstance(file.source, str) else io.BytesIO(file.source)
    try:
        if file.kind == "image":
            return file.kind, _read_image(source)
        if file.kind == "audio":
            return file.kind, _read_audio(source, processor.sampling_rate)
        return file.kind, _read_video(source, processor.sample_frames)
    except (
        OSError,
        ValueError,
        SyntaxError,
        LookupError,
        ArithmeticError,
    ) as error:  # Pillow and PyAV raise all of these
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            place, (), f"{file}: not a whole {file.kind} file: {reason}", "replace it or remove the record"
        ) from error


def _read_image(source: str | io.BytesIO) -> Any:
    from PIL import Image, ImageOps

    with Image.open(source) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _read_audio(source: str | io.BytesIO, rate: int) -> np.ndarray:
    """float32 [samples], mono, at the given rate."""
    import av

    with av.open(source) as container:
        if not container.streams.audio:
            raise ValueError("it holds no sound")
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        pieces = [out.to_ndarray()[0] for f in container.decode(audio=0) for out in resampler.resample(f)]
        pieces += [out.to_ndarray()[0] for out in resampler.resample(None)]
    if not sum(map(len, pieces)):
        raise ValueError("it is empty")
    return np.concatenate(pieces)


def _read_video(source: str | io.BytesIO, sample: Callable[[Any], list[int]]) -> tuple[np.ndarray, Any]:
    """The frames that `sample` chooses, uint8 [frames, height, width, 3], and the video's metadata."""
    import av
    from transformers.video_utils import VideoMetadata

    with av.open(source) as container:
        if not container.streams.video:
            raise ValueError("it holds no pictures")
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 24)
        # counted, since a container may state another number than it holds
        count = sum(1 for _ in container.decode(stream))
        if not count:
            raise ValueError("it is empty")
        metadata = VideoMetadata(
            total_num_frames=count, fps=rate, width=stream.width, height=stream.height, duration=count / rate,
            video_backend="pyav",
        )  # fmt: skip
    metadata.frames_indices = sample(metadata)
    wanted, found = set(metadata.frames_indices), {}
    if isinstance(source, io.BytesIO):
        source.seek(0)
    with av.open(source) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                found[index] = frame.to_ndarray(format="rgb24")
    return np.stack([found[index] for index in metadata.frames_indices]), metadata
