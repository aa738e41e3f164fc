"""Full fine-tuning."""

from __future__ import annotations

from typing import Any, ClassVar

from tunesmith.methods.base import Method


class Full(Method):
    """Every parameter is trained."""

    trains_all: ClassVar[bool] = True

    def adapt(self, model: Any) -> None:
        model.requires_grad_(True)
