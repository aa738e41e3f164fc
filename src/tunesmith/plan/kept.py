"""Traces that have been made before: kept in the cache folder by a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.cache import cache_folder
from tunesmith.config import ModelConfig, RunConfig
from tunesmith.errors import UserError
from tunesmith.models.load import load_config
from tunesmith.plan.ledger import Peak, Work
from tunesmith.plan.trace import Traced, trace
from tunesmith.run_data import RunData
from tunesmith.run_folder import write_text

PACKAGES = ("torch", "transformers", "peft", "torchao")
"""What a trace depends on beside the program itself."""
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "data": ("path", "eval_path"),  # what is there, the samples say
    "optimizer": ("lr",),
    "train": ("memory", "foresee"),
    "schedule": (), "log": (), "output": (),
}  # fmt: skip
"""Settings that a trace does not depend on: of a section those that are named, or all."""
MOST = 2000
"""Traces that are kept, of a few KB each."""


def known(data: RunData, precision: str, kind: str) -> Traced | None:
    """What has been traced before; None if nothing has."""
    return _read(_file(data, precision, kind))


def traced(data: RunData, precision: str, kind: str) -> Traced:
    """As `trace`, which is not asked again for what it has said once."""
    file = _file(data, precision, kind)
    if (before := _read(file)) is not None:
        return before
    found = trace(data, precision, kind=kind)
    whole = {name: (peak.bytes, dict(peak.kinds)) for name, peak in found.peaks.items()}
    with suppress(OSError, UserError):  # then it is found again the next time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**vars(found), "peaks": whole}))
        _forget_oldest(file.parent)
    return found


def _forget_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in files[:-MOST]:
        file.unlink(missing_ok=True)


def _file(data: RunData, precision: str, kind: str) -> Path:
    return cache_folder() / "plans" / f"{key(data, precision, kind)}.json"


def _read(file: Path) -> Traced | None:
    """None if there is none that can be read."""
    try:
        numbers: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        peaks = {name: Peak(*peak) for name, peak in numbers.pop("peaks").items()}
        work, update = (Work(*numbers.pop(name)) for name in ("work", "update"))
        return Traced(peaks=peaks, work=work, update=update, **numbers)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def key(data: RunData, precision: str, kind: str) -> str:
    """Hash of the settings, the models' architectures, the samples, and the code that makes a trace of them."""
    digest = hashlib.blake2b(digest_size=20)
    for text in (
        json.dumps(_settings(data.config)),
        *_architectures(data.config),
        str(len(data.renderer.tokenizer or ())),
        data.samples.fingerprint(),
        data.held_out.fingerprint(),
        precision,
        kind,
        str(data.steps),
        *(f"{name} {version(name)}" for name in PACKAGES if find_spec(name)),
        _code(),
    ):
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


def _settings(config: RunConfig) -> dict[str, Any]:
    """Those that memory and work depend on."""
    tree = config.model_dump(mode="json")
    for section, names in WITHOUT_EFFECT.items():
        if not names:
            del tree[section]
        for name in names:
            del tree[section][name]
    return tree


def _architectures(config: RunConfig) -> Iterator[str]:
    """Settings of the model and its own code, if it brings some; settings of models that stand beside it."""
    yield load_config(config.model).to_json_string()
    if config.model.trust_remote_code:
        files = sorted(Path(config.model.path).expanduser().rglob("*.py"))
        yield from (hashlib.blake2b(file.read_bytes()).hexdigest() for file in files)
    for setting in ("reference_model", "teacher"):
        if path := getattr(config.objective, setting, None):
            yield load_config(ModelConfig(path=path)).to_json_string()


@cache
def _code() -> str:
    """Hash of the program's own files: between two versions, what it says of a run may change."""
    folder, digest = Path(tunesmith.__file__).parent, hashlib.blake2b(digest_size=20)
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
