"""What the plan says of runs on one GPU against what they take: memory by CUDA's allocator, and seconds of a step.

    python benchmarks/plan/gpu.py [--only lora-2k chunk] [--steps 5] [--tiny]

Random weights of true shape; data are full rows, so that all steps are alike. Memory should come within 5 %, time within 20 %
of the middle of what is foreseen. --tiny: small models with short rows, which also run where there is no GPU; measured is
then what tensors hold.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from common import median, perf_counter, print_machine, synchronize
from tests.plan.shapes import write_model, write_text

from tunesmith.assemble import Run, assemble
from tunesmith.config import RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.engines import SingleEngine
from tunesmith.models.load import shape_of_model
from tunesmith.plan.forecast import Forecast, foresee
from tunesmith.plan.ledger import Ledger
from tunesmith.plan.start import device_here
from tunesmith.plan.trace import recorded
from tunesmith.plan.worst import worst_batch
from tunesmith.run_data import open_data

LORA, ADAMW, SGD = {"name": "lora", "rank": 16}, {"name": "adamw", "lr": 1e-5}, {"name": "sgd", "lr": 1e-6}
RUNS: dict[str, dict[str, Any]] = {
    "lora-2k": {"method": LORA, "tokens": 2048},
    "lora-8k": {"method": LORA, "tokens": 8192},
    "lora-8k-checkpointing": {"method": LORA, "tokens": 8192, "checkpointing": True},
    "lora-32k": {"method": LORA, "tokens": 32768, "checkpointing": True},
    "dora-2k": {"method": {**LORA, "dora": True}, "tokens": 2048},
    "dpo-lora-2k": {"method": LORA, "tokens": 2048, "objective": "dpo", "checkpointing": True},
    "chunk-4k": {"method": {"name": "chunk", "num_chunks": 16}, "tokens": 4096, "checkpointing": True},
    "freeze-4k": {"method": {"name": "freeze", "last_blocks": 2}, "tokens": 4096},
    "zeroth-4k": {"method": "zeroth", "tokens": 4096, "optimizer": SGD},
    "full-1b-4k": {"method": "full", "tokens": 4096, "model": "llama-1b", "precision": "mixed"},
}
"""8B but where another model is named, in bf16."""


class RandomEngine(SingleEngine):
    """One device, and a model with random weights, made where they stay."""

    def load(self, config: Any, dtype: torch.dtype, *more: Any, **named: Any) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM

        architecture = shape_of_model(config, dtype).config
        with self.device:
            model: Any = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
        return model, model


def config_of(wanted: Mapping[str, Any], folder: Path, tiny: bool) -> RunConfig:
    tokens = wanted["tokens"] // 32 if tiny else wanted["tokens"]
    pairs = wanted.get("objective") == "dpo"
    rows = 2 if pairs else 1
    return config_from_dict(
        {
            "model": {
                "path": str(write_model(folder, "tiny" if tiny else wanted.get("model", "llama-8b"))),
                "precision": wanted.get("precision", "bf16"),
            },
            "data": {
                "path": str(write_text(folder, tokens, "pairs" if pairs else "text")),
                "max_tokens": tokens,
                "pack": False,
            },
            "objective": wanted.get("objective", "pretrain"),
            "method": wanted["method"],
            "optimizer": wanted.get("optimizer", ADAMW),
            "train": {"batch_size": 1, "steps": 64, "micro_batch_tokens": rows * tokens},
            "engine": {"name": "single", "activation_checkpointing": wanted.get("checkpointing", False)},
            "output": str(folder / "run"),
        }
    )


def taken(run: Run, steps: int) -> tuple[int, float]:
    """(bytes at the peak of some steps, seconds of one). Of a model that trains in parts, each part has its turn."""
    batch, device = worst_batch(run), run.learner.engine.device
    turns = len(getattr(run.learner.method, "chunks", ()))
    seconds, ledger = [], Ledger()

    def step() -> None:
        for ready in run.objective.prepare(batch, run.helpers):
            run.learner.step(run.objective, ready, 1e-6)

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(max(steps, 2 * turns)):
        synchronize()
        start = perf_counter()
        step()
        synchronize()
        seconds.append(perf_counter() - start)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(), median(seconds)
    with recorded(run, ledger):
        for _ in range(max(2, 2 * turns)):
            step()
    return max(peak.bytes for peak in ledger.peaks.values()), median(seconds)


def shown(name: str, forecast: Forecast, measured: int, seconds: float) -> str:
    foreseen = forecast.traced.peak.bytes
    line = f"{name:22} {foreseen / 2**20:10.1f} {measured / 2**20:10.1f} MiB {foreseen / measured - 1:+7.1%}"
    if forecast.step_s is None:
        return f"{line} {seconds:8.3f} s"
    low, high = forecast.step_s
    middle = (low + high) / 2
    return f"{line}   {low:7.3f} … {high:7.3f} {seconds:8.3f} s {middle / seconds - 1:+7.1%}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print_machine()
    print(f"{'':22} {'foreseen':>10} {'measured':>10}")
    with tempfile.TemporaryDirectory() as name:
        os.environ["TUNESMITH_CACHE"] = str(Path(name) / "cache")
        for run_name in args.only:
            data = open_data(config_of(RUNS[run_name], Path(name), args.tiny))
            engine = RandomEngine(data.config.engine, data.config.model.precision)
            forecast = foresee(data.config, device_here(engine.device, None), data)
            run = assemble(data, engine, lambda what, number: None)
            print(shown(run_name, forecast, *taken(run, args.steps)), flush=True)
            del run, engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
