"""Seconds and memory that it takes to foresee a run of a large model, of which there is a configuration and no weights.

    OMP_NUM_THREADS=2 python benchmarks/plan/speed.py [--models llama-8b llama-70b qwen3-30b-a3b] [--methods lora full chunk]

Each in a process of its own. Seconds as they pass, and of a processor, which other
work does not lengthen. Memory is the process's at its peak, Python and torch included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path
from time import process_time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from common import in_own_process, perf_counter, print_machine
from tests.plan.shapes import write_model, write_text

METHODS = {
    "lora": ("bf16", {"name": "lora", "rank": 16}),
    "full": ("mixed", {"name": "full"}),
    "chunk": ("bf16", {"name": "chunk", "num_chunks": 16}),
}
TOKENS = 4096


def one(model: str, method: str) -> None:
    """Foresee one run, and print what it took."""
    from tunesmith.config_file import config_from_dict
    from tunesmith.plan.trace import trace
    from tunesmith.run_data import open_data

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TUNESMITH_CACHE"] = str(folder / "cache")
        precision, section = METHODS[method]
        tree = {
            "model": {"path": str(write_model(folder, model))},
            "data": {"path": str(write_text(folder, TOKENS)), "max_tokens": TOKENS},
            "objective": "pretrain", "method": section, "output": str(folder / "run"),
            "train": {"batch_size": 2, "steps": 50, "micro_batch_tokens": TOKENS},
            "engine": {"name": "single", "device": "cpu", "activation_checkpointing": True},
        }  # fmt: skip
        data = open_data(config_from_dict(tree))
        start = perf_counter(), process_time()
        found = trace(data, precision, kind="cuda")
        seconds, busy = perf_counter() - start[0], process_time() - start[1]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps({"seconds": seconds, "busy": busy, "memory": used, "peak": found.peak.bytes, "phase": found.phase})
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["llama-8b", "llama-70b", "qwen3-30b-a3b"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--one", nargs=2)
    args = parser.parse_args()
    if args.one:
        one(*args.one)
        return
    print_machine()
    for model in args.models:
        for method in args.methods:
            found = in_own_process(__file__, "--one", model, method, quiet=True)
            taken = (
                f"{found['seconds']:5.1f} s, of a processor {found['busy']:5.1f} s · {found['memory'] / 2**30:.2f} GiB"
            )
            peak = f"the run would hold {found['peak'] / 2**30:7.1f} GiB at most ({found['phase']})"
            print(f"{model:14} {method:6} {TOKENS} tokens: {taken} · {peak}", flush=True)


if __name__ == "__main__":
    main()
