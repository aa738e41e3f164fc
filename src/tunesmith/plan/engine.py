"""The engine of a run that is only foreseen: a model without numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import ModelConfig
from tunesmith.engines.single import SingleEngine, own_memory
from tunesmith.models.head import Head
from tunesmith.models.load import HeadKind, know_padding, shape_of_model
from tunesmith.models.probe import find_head_by
from tunesmith.models.save import pieces_of
from tunesmith.models.sibling import sibling
from tunesmith.plan.ledger import place_of
from tunesmith.plan.shadow import Shadow


class Foreseen(SingleEngine):
    """From `place` on, all that is computed has shapes alone. What models do is asked of their small siblings.

    Kernels are those of the CPU, also where another device is foreseen. A class beside it says which engine it foresees.
    """

    shadow: Shadow
    stack: ExitStack
    _is_apart = False

    @property
    def is_apart(self) -> bool:
        return self._is_apart

    def adapting(self, model: Any) -> AbstractContextManager[Any]:
        return torch.device("meta")

    def load(
        self, config: ModelConfig, dtype: torch.dtype, head: HeadKind = "language", num_labels: int = 0,
        needs_weights: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        with self.shadow.off():
            model = shape_of_model(config, dtype, head, num_labels)
            if head != "language":
                know_padding(config, model)
            self.small: Any = sibling(model)
        return model, self.small

    def place(self, model: Any) -> Any:
        with self.shadow.off():
            model = super().place(model)
        self.shadow.hollow_out(model)
        self.placed = model
        if not self.shadow.is_on:
            self.stack.enter_context(self.shadow)
        return model

    def _head_of(self, model: Any) -> Head:
        return find_head_by(self.small, model)

    def _move(self, model: Any) -> None:
        """Nothing is there to move."""

    def economize(self) -> None:
        """Nothing is held."""

    def save_model(self, model: Any, folder: Path) -> None:
        """What is made to be written, a tensor at a time; and nothing is."""
        with self.shadow.off():
            pieces = pieces_of(model)
        tensors = model.state_dict(keep_vars=True)
        for piece in pieces:
            piece.run(lambda name: tensors[name].detach())

    def save_adapter(self, peft_model: Any, folder: Path, **options: Any) -> None:
        """Nor here."""

    def held_bytes(self) -> int:
        sizes = {place_of(x): x.untyped_storage().nbytes() for x in (*self.placed.parameters(), *self.placed.buffers())}
        return sum(sizes.values()) + (0 if self.is_apart else own_memory())


class ForeseenEngine(Foreseen):
    """One device."""

    def __init__(self, config: Any, precision: str, shadow: Shadow, stack: ExitStack, is_apart: bool = False) -> None:
        """is_apart: of the device that is foreseen."""
        super().__init__(config.model_copy(update={"device": "cpu", "compile": False}), precision)
        self.shadow, self.stack, self._is_apart = shadow, stack, is_apart

    def another(self) -> ForeseenEngine:
        return ForeseenEngine(
            self.config.model_copy(update={"activation_checkpointing": False}), self.precision, self.shadow, self.stack,
            self.is_apart,
        )  # fmt: skip
