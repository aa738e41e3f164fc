"""What some architectures need and a probe cannot find out, as data. Most models have no row here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Quirks of one transformers `model_type`."""

    lora_excluded: tuple[str, ...] = ()
    """Modules that adapters must not wrap."""


# a fused state-space kernel reads these weights past the module's forward: an adapter on them would have no effect
_STATE_SPACE = Family(lora_excluded=("out_proj", "conv1d"))

FAMILIES: dict[str, Family] = {
    "falcon_h1": _STATE_SPACE,
    "falcon_mamba": _STATE_SPACE,
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "nemotron_h": _STATE_SPACE,
}


def family_of(model_type: str) -> Family:
    """The family's row, or the default."""
    return FAMILIES.get(model_type, Family())
