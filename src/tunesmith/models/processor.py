"""A multimodal checkpoint's processor: how many tokens an image, audio or video takes, and the tensors that the model reads.

transformers' own processor does the work, with the checkpoint's settings; this is the little that training asks of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.config import ModelConfig
from tunesmith.errors import UserError
from tunesmith.models.load import is_multimodal, load_config, model_source
from tunesmith.types import Insert

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Where a checkpoint keeps its processor; one of the first two is always there."""

FRAMES_PER_SECOND = 2.0
"""Of a video where the checkpoint names neither a rate nor a number of frames. Qwen's own preparation uses the same."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What a processor calls the column that says of each token which kind of media it stands for."""

Content = tuple[str, Any]
"""Kind, and what was read: a PIL image; a mono waveform; or a video's frames and their VideoMetadata."""


class Unfit(ValueError):
    """The processor cannot place these media in this text."""


class Processor:
    """Wraps transformers' processor."""

    def __init__(self, inner: Any, source: str, whole: bool, revision: str | None = None) -> None:
        self.inner, self.source, self.whole, self.revision = inner, source, whole, revision

    def part(self, kind: str) -> Any:
        """The sub-processor of a kind; None if the model does not take it, or it cannot be loaded here."""
        names = {"image": ("image_processor",), "video": ("video_processor",)}
        found = (getattr(self.inner, name, None) for name in names.get(kind, ("audio_processor", "feature_extractor")))
        return next((part for part in found if part is not None), None)

    def refusal(self, kind: str) -> tuple[str, str] | None:
        """What is wrong with giving this model media of a kind, and the remedy; None if nothing is."""
        if self.part(kind) is not None and getattr(self.inner, f"{kind}_token", None):
            return None
        if kind == "video" and not self.whole:
            return (
                "a video, whose frames the model's processor prepares with torchvision, which is not installed",
                "pip install torchvision, from the same index as torch",
            )
        name = type(self.inner).__name__
        return f"{_article(kind)}, which the model's {name} does not take", "use a model that does"

    @property
    def chat_template(self) -> Any:
        """None if the processor has none of its own."""
        return getattr(self.inner, "chat_template", None)

    @property
    def settings(self) -> str:
        """All of the processor's settings."""
        return f"{type(self.inner).__name__} {self.inner.to_json_string()}"

    @property
    def sampling_rate(self) -> int:
        """Samples a second of the audio that the model takes."""
        return int(self.part("audio").sampling_rate)

    def sample_frames(self, metadata: Any) -> list[int]:
        """Which frames of a video the model sees: as the checkpoint says, else two a second."""
        part = self.part("video")
        unsaid = getattr(part, "fps", None) is None and getattr(part, "num_frames", None) is None
        rate = {"fps": min(FRAMES_PER_SECOND, metadata.fps)} if unsaid else {}
        indices = torch.as_tensor(part.sample_frames(metadata, **rate)).tolist()
        if not indices:  # shorter than the processor's step between frames
            indices = [0]
        return [min(int(index), metadata.total_num_frames - 1) for index in indices]

    def inserts(self, text: str, media: Sequence[Content]) -> list[Insert]:
        """What takes the place of each placeholder, in the order of the text. Raises Unfit."""
        names = [name for kind in {kind for kind, _ in media} for name in self.part(kind).model_input_names]
        if len(names) != len(set(names)):
            raise Unfit(
                f"{type(self.inner).__name__} gives one {names[0]} for images and videos: it takes one or the other"
            )
        arguments = {**_by_kind(media, self), "return_text_replacement_offsets": True, "return_tensors": "pt"}
        try:
            output = self.inner(text=[text], **arguments)
        except (ValueError, TypeError, IndexError, RuntimeError, StopIteration) as error:
            raise Unfit(" ".join(str(error).split())[:300] or type(error).__name__) from error
        replaced = (output.get("text_replacement_offsets") or [[]])[0]
        if len(replaced) != len(media):
            name = type(self.inner).__name__
            raise Unfit(f"{name} tells the place of {len(replaced)} of them, so that the loss cannot be placed")
        return [Insert(one["span"][0], one["span"][1], one["replacement"]) for one in replaced]

    def tensors(self, tokens: Sequence[int], media: Sequence[Content]) -> dict[str, Tensor]:
        """What the model's forward reads beside the token ids of a sequence that holds these media.

        The processor is given the bare placeholders in place of the text: its tensors do not depend on the words.
        """
        text = "".join(getattr(self.inner, f"{kind}_token") for kind, _ in media)
        output = dict(self.inner(text=[text], **_by_kind(media, self), return_tensors="pt"))
        ids = output.pop("input_ids")
        output.pop("attention_mask", None)
        for name in TOKEN_TYPES:
            if name in output:
                # of these tokens in place of the bare placeholders, by the rule that gave those of the placeholders
                if output[name].tolist() != self.inner.create_mm_token_type_ids(ids.tolist()):
                    raise UserError(
                        f"{self.source}: {type(self.inner).__name__} gives {name} by a rule of its own, which is not "
                        "supported; use another model"
                    )
                output[name] = torch.tensor(self.inner.create_mm_token_type_ids([list(tokens)])[0])
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}

    def save(self, folder: Path) -> None:
        """Beside a model, as the checkpoint had it."""
        if self.whole:
            self.inner.save_pretrained(folder)
            return
        for name in FILES:  # its video part could not be loaded here: it goes on as it is
            if (file := _file(self.source, name, self.revision)) is not None:
                shutil.copyfile(file, folder / name)


def _article(kind: str) -> str:
    return f"{'a' if kind == 'video' else 'an'} {kind}"


def _by_kind(media: Sequence[Content], processor: Processor) -> dict[str, Any]:
    """Arguments of a processor's call."""
    found: dict[str, list[Any]] = {}
    for kind, content in media:
        found.setdefault(kind, []).append(content)
    arguments: dict[str, Any] = {}
    if "image" in found:
        arguments["images"] = found["image"]
    if "audio" in found:
        arguments |= {"audio": found["audio"], "audio_kwargs": {"sampling_rate": processor.sampling_rate}}
    if "video" in found:
        frames, metadata = zip(*found["video"], strict=True)
        sampled = {"video_metadata": list(metadata), "do_sample_frames": False}
        arguments |= {"videos": list(frames), "videos_kwargs": sampled}
    return arguments


def load_processor(config: ModelConfig) -> Processor | None:
    """The processor of a multimodal checkpoint; None for a model of text, or one that comes without. Raises UserError."""
    source = model_source(config, has_weights=False)
    architecture = load_config(config)
    if not is_multimodal(architecture) or not any(_file(source, name, config.revision) for name in FILES[:2]):
        return None
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        kind = _processor_class(architecture, source, config.revision)
        if kind is None or "video_processor" not in kind.get_attributes() or is_torchvision_available():
            return Processor(AutoProcessor.from_pretrained(source, **options), source, whole=True)
        return Processor(_without_video(kind, source, options), source, whole=False, revision=config.revision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{config.path}: the processor cannot be loaded: {reason}") from error


def _processor_class(architecture: Any, source: str, revision: str | None) -> Any:
    """The class that the checkpoint's files name, else the architecture's; None if it comes with code of its own."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    for file in filter(None, (_file(source, name, revision) for name in FILES[:2])):
        if name := json.loads(Path(file).read_text(encoding="utf-8")).get("processor_class"):
            return getattr(transformers, name, None)
    return PROCESSOR_MAPPING.get(type(architecture), None)


def _without_video(kind: type, source: str, options: dict[str, Any]) -> Any:
    """transformers' video processors need torchvision, and a processor needs all its parts: one that does without videos."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    class Without(kind):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    Without.__name__ = kind.__name__
    autos: dict[str, Any] = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor}
    autos["feature_extractor"] = AutoFeatureExtractor
    settings, _ = Without.get_processor_dict(source, **options)
    parts = [
        autos[name].from_pretrained(source, **options) if name in autos else None for name in Without.get_attributes()
    ]
    return Without.from_args_and_dict(parts, settings)


def _file(source: str, name: str, revision: str | None) -> str | None:
    """A checkpoint's file in its folder or in the hub's cache; None if it has none of that name."""
    from transformers.utils import cached_file

    return cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
