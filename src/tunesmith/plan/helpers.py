"""What an objective needs beside the model, in a run that is only foreseen: nothing is scored beforehand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.config import RunConfig
from tunesmith.helpers import StoredReference, Watch, build_helpers
from tunesmith.learner import Learner
from tunesmith.models.load import load_tokenizer
from tunesmith.objectives import Objective
from tunesmith.teacher import StoredTeacher, num_tokens
from tunesmith.types import Batch


@dataclass(frozen=True)
class HollowStore:
    """Numbers about targets that would have been taken beforehand."""

    widths: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """By name the shape and type of what is kept of a target."""

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        shape = batch.tokens_BT.shape
        return {name: torch.zeros(*shape, *more, dtype=dtype) for name, (more, dtype) in self.widths.items()}

    def num_bytes(self) -> int:
        return 0


def foreseen_helpers(
    config: RunConfig, objective: Objective, learner: Learner, batches: Iterable[Batch], fingerprint: str, watch: Watch
) -> dict[str, Any]:
    """As `build_helpers`. A model that scores before training and then is let go is not among them."""
    section: Any = config.objective
    stored: dict[str, Any] = {}
    if "reference" in objective.needs and section.reference != "live":
        stored["reference"] = StoredReference(HollowStore({"logprobs": ((), torch.float32)}), "")  # type: ignore[arg-type]
    if "teacher" in objective.needs and section.scores != "live":
        rows = learner.model.get_input_embeddings().weight.shape[0]
        vocabulary = min(num_tokens(load_tokenizer(config.model).get_vocab()), rows)
        size = min(section.top_k, vocabulary)
        kept = {"teacher_tokens": ((size,), torch.int32), "teacher_logprobs": ((size + 1,), torch.float32)}
        stored["teacher"] = StoredTeacher(HollowStore(kept), vocabulary)  # type: ignore[arg-type]
    return stored | build_helpers(config, objective, learner, batches, fingerprint, watch, skip=stored.keys())
