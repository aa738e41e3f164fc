"""What a run is made of, for the header and for manifest.json: versions, hardware, hashes, sizes, what it will cost."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tunesmith.config import RunConfig
from tunesmith.data.dataset import Dataset
from tunesmith.data.samples import Counts
from tunesmith.display import short_bytes, short_number
from tunesmith.engines.place import place
from tunesmith.models.load import model_source
from tunesmith.plan.forecast import as_numbers

if TYPE_CHECKING:
    from tunesmith.assemble import Run

PACKAGES = ("tunesmith", "torch", "transformers", "peft", "safetensors")


def describe(run: Run) -> list[tuple[str, str]]:
    """What will train, on what, and what it costs: the rows of the header."""
    config, samples, counts = run.config, run.samples, run.samples.counts
    parameters = {name: (p.numel(), p.element_size()) for name, p in run.learner.model.named_parameters()}
    trained = {name: (p.numel(), p.element_size()) for name, p in run.learner.method.params.items()}
    total, active = (sum(elements for elements, _ in shapes.values()) for shapes in (parameters, trained))
    num_tokens = run.data.epoch_tokens if isinstance(run.data, Dataset) else int(samples.lengths().sum())
    epoch = "an epoch" if isinstance(run.data, Dataset) else "in the first window of the stream"
    memory = run.learner.method.memory(trained)
    weights_bytes = sum(elements * size for elements, size in parameters.values())
    held = weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
    alone = "one sequence a row" + (" (this model cannot keep two apart)" if config.data.pack else "")
    packing = ("packed" if run.pack else alone) + (", shared prompts once" if run.share else "")
    update = f"{config.optimizer.name}, {config.schedule.name}, lr {config.optimizer.lr:g}"
    world = run.learner.engine.group.world
    ranks = f" · {world} ranks" if world > 1 else ""
    return [
        ("model", f"{config.model.path} · {short_number(total)} parameters · {config.model.precision}"),
        ("method", f"{config.method.name} · {short_number(active)} parameters train ({active / total:.2%})"),
        *[("", text) for text in [run.learner.method.describe()] if text],
        ("objective", f"{config.objective.name} · {samples.target_share():.0%} of the tokens are targets"),
        *[(name, text) for name, helper in run.helpers.items() if (text := helper.describe())],
        ("data", f"{config.data.shown()} · {len(samples)} samples{lost(counts)} · {len(run.held_out)} held out"),
        *[("", f"{number} {note}") for note, number in counts.notes.items()],
        ("tokens", f"{short_number(num_tokens)} {epoch} · longest {samples.lengths().max()} · {packing}"),
        ("steps", f"{run.steps} of {config.train.batch_size} samples · {update}"),
        ("engine", f"{config.engine.name} on {run.learner.engine.device} · {torch.get_num_threads()} threads{ranks}"),
        (
            "memory",
            f"weights {short_bytes(weights_bytes)} + gradients {short_bytes(memory.gradients_bytes)} + optimizer "
            f"{short_bytes(memory.optimizer_bytes)} = {short_bytes(held)}, and activations",
        ),
    ]  # fmt: skip


def lost(counts: Counts) -> str:
    """What of the records is not, or not wholly, among the samples."""
    cut = f" (first: {counts.first_cut})" if counts.first_cut else ""
    skipped = f", {counts.skipped} skipped (first: {counts.first_skipped})" if counts.skipped else ""
    return f", {counts.truncated} truncated, {counts.dropped} dropped{cut}{skipped}"


def manifest(run: Run, facts: list[tuple[str, str]]) -> dict[str, Any]:
    """All that is needed to tell what made a result, and to make it again."""
    return {
        "versions": versions(),
        "hardware": hardware(run.learner.engine.device),
        "job": place().job,
        "seed": run.config.seed,
        "steps": run.steps,
        "base_model": model_source(run.config.model),
        "base_weights_hash": weights_hash(model_source(run.config.model)),
        **{f"{setting}_hash": found for setting, (_, found) in other_models(run.config).items()},
        "chat_template_hash": text_hash(run.tokenizer.chat_template),
        "data_fingerprint": run.samples.fingerprint(),
        "held_out_fingerprint": run.held_out.fingerprint(),
        "packed": run.pack,
        "shared_prompts": run.share,
        "loss_unit": run.objective.unit,
        "shows": list(run.objective.shows),
        "header": facts,
        "foreseen": as_numbers(run.forecast) if run.forecast else None,
    }


def dropped_template(manifest: Mapping[str, Any]) -> bool:
    """Whether the tokenizer came without a chat template and none was needed, so that the model was saved without."""
    return manifest.get("chat_template_hash") == text_hash(None)


def other_models(config: RunConfig) -> dict[str, tuple[str, str | None]]:
    """The models beside the one that trains: setting → (path, hash of its weights)."""
    named = {setting: getattr(config.objective, setting, None) for setting in ("reference_model", "teacher")}
    return {setting: (path, weights_hash(str(Path(path).expanduser()))) for setting, path in named.items() if path}


def versions() -> dict[str, str]:
    """Installed versions of all that decides the numbers of a run."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, as far as a run depends on it."""
    facts: dict[str, Any] = {
        "device": str(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def weights_hash(folder: str) -> str | None:
    """Hash of a local checkpoint: names, sizes, and the first and last MiB of each weight file. None for a hub id.

    The ends hold safetensors' header and the last tensors: enough to tell two checkpoints apart in no time at any size.
    """
    if not Path(folder).is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("*.bin")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read())
    return digest.hexdigest()


def text_hash(text: Any) -> str:
    """Hash of a chat template or any other text."""
    return hashlib.sha256(str(text).encode()).hexdigest()
