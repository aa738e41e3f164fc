"""What all parts of the configuration share. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for unit, base in (("", 1024), ("IB", 1024), ("B", 1000))
}


def bytes_of(value: Any) -> Any:
    """14GiB, 14G → 15032385536; 14GB → 14·10⁹; numbers are bytes. Raises ValueError."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", value)
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"{value!r} is no number of bytes: write it as 800MiB or 14GiB (or MB, GB)")
    return int(float(found[1]) * UNITS[found[2].upper()])


Size = Annotated[int, BeforeValidator(bytes_of), Field(gt=0)]
"""Bytes, as a number or as 14GiB."""


class Section(BaseModel):
    """A part of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class PathSection(Section):
    """A section that may be written as its path alone: `model: demo` means `model: {path: demo}`."""

    path: str

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema = handler(core_schema)
        return {"anyOf": [{"type": "string"}, handler.resolve_ref_schema(schema)]}
