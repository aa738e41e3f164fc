"""The methods that are compared. All run in our loop on the same batches and the same chunked loss; of BAdam and GaLore the
optimizer is their own, from PyPI.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch

from tunesmith.config_file import config_from_dict
from tunesmith.engines.single import own_memory
from tunesmith.learner import Learner
from tunesmith.methods.budget import Budget
from tunesmith.run import Run, build

SIDES: dict[str, dict[str, Any]] = {
    "full": {"method": {"name": "full"}},
    "full, checkpointed": {"method": {"name": "full"}, "engine": {"activation_checkpointing": True}},
    "chunk": {"method": {"name": "chunk"}},
    "chunk, checkpointed": {"method": {"name": "chunk"}, "engine": {"activation_checkpointing": True}},
    "chunk, in a budget": {"method": {"name": "chunk"}},
    "chunk, reset": {"method": {"name": "chunk", "state": "reset"}},
    "chunk as BAdam": {
        "method": {"name": "chunk", "layout": "layers", "state": "reset", "order": "descending", "frozen": ["*embed*"]},
    },
    "lora": {"method": {"name": "lora", "rank": 16}},
    "badam": {"method": {"name": "full"}},
    "galore": {"method": {"name": "full"}},
}
"""Sections of the configuration by name of the side."""


def build_side(name: str, sections: dict[str, Any], switch_every: int) -> Run:
    """A run of this side; `sections` over its own, and method settings merged. BAdam changes blocks every so many updates."""
    own = SIDES[name]
    merged = {**sections, **own, "method": {**own["method"], **sections.get("method", {})}}
    if name == "chunk as BAdam":
        merged["method"].setdefault("updates_per_chunk", switch_every)
    run = build(config_from_dict(merged))
    method: Any = run.learner.method
    lr = run.config.optimizer.lr
    if name == "badam":
        from badam import BlockOptimizer

        named = list(run.learner.model.named_parameters())
        base = torch.optim.AdamW([p for _, p in named], lr=lr, weight_decay=0.0)
        method.optimizer = _Theirs(
            BlockOptimizer(base, named, switch_block_every=switch_every, switch_mode="descending", verbose=0)
        )
    if name == "galore":
        from galore_torch import GaLoreAdamW

        named = list(run.learner.model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and "layers" in n]
        rest = [p for n, p in named if not (p.ndim == 2 and "layers" in n)]
        projected = {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        method.optimizer = _Theirs(GaLoreAdamW([{"params": rest}, projected], lr=lr, no_deprecation_warning=True))
    return run


class _Theirs:
    """A torch optimizer in the place of ours."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


def foreseen(learner: Learner, rows: int, tokens: int, in_full: bool = True) -> tuple[int, int]:
    """(bytes over the weights that the method declares, the same with activations) at the peak of a step; 0 for optimizers
    that are not ours."""
    method: Any = learner.method
    if not in_full:
        return 0, 0
    declared = method.memory({name: (p.numel(), p.element_size()) for name, p in method.params.items()})
    declared_bytes = declared.gradients_bytes + declared.optimizer_bytes
    model: Any = learner.model
    on, trained = model.is_gradient_checkpointing, [p for p in model.parameters() if p.requires_grad]
    if getattr(method, "fit", None):
        found = method.fit.peak_bytes - method.budget.held
    elif method.config.name == "chunk":
        budget = Budget(
            2**60, model, learner.engine, replace(method.extent, rows=rows, tokens=tokens), method.pieces, ()
        )
        found = max(budget.peak(chunk, on) for chunk in method.chunks) - budget.held
    else:
        learner.engine.checkpoint_blocks(model, False)
        activations = learner.engine.activations(model.requires_grad_(False), rows, tokens)
        found = declared_bytes + activations.peak(-1, range(len(activations.blocks)), on)
    for p in trained:
        p.requires_grad_(True)
    learner.engine.checkpoint_blocks(model, on)
    return declared_bytes, round(found)


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Watch the process's own memory, 100 times a second: `peak`, and `trace`, (seconds, bytes) pairs."""
    found: dict[str, Any] = {"peak": own_memory(), "trace": []}
    done, start = threading.Event(), time.perf_counter()

    def watch() -> None:
        while not done.wait(0.01):
            now = own_memory()
            found["peak"] = max(found["peak"], now)
            found["trace"].append((time.perf_counter() - start, now))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
