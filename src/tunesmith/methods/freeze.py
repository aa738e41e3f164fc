"""Partial fine-tuning: some parameters train as they are."""

from __future__ import annotations

from typing import Any

from tunesmith.errors import UserError
from tunesmith.methods.base import Method, matching
from tunesmith.models.load import blocks, head_kind, value_head


class Freeze(Method):
    """The first or last n transformer blocks, or parameters by name pattern; everything else stays.

    A value head, which may start at random, always trains.
    """

    def adapt(self, model: Any) -> None:
        model.requires_grad_(False)
        found = blocks(model)
        first, last = self.config.first_blocks, self.config.last_blocks
        if max(first, last) > len(found):
            raise UserError(
                f"method: the model has {len(found)} blocks, fewer than first_blocks {first} or last_blocks {last}"
            )
        for _, block in found[:first] + found[len(found) - last :]:
            block.requires_grad_(True)
        if head_kind(model) != "language":
            value_head(model).requires_grad_(True)
        wanted = matching(model, self.config.patterns, "method.patterns")
        for p in model.parameters():
            if id(p) in wanted:
                p.requires_grad_(True)
