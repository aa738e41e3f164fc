"""Memory over the weights and time of a step on this machine's CPU: chunk against full, LoRA, BAdam and GaLore (PyPI's).

    python benchmarks/chunk/memory.py ../shared/data/gsm8k/train.jsonl [--rounds 3] [--picture docs/images/chunk_memory.png]

Every side runs in a process of its own, in turn, on the same batches: SmolLM2-135M, one micro-batch of --tokens a step.
Methods that train a part at a time go once through all their parts, from the embeddings up. Memory is the process's own
(resident, without mapped files), watched 100 times a second; what it held before the first step, weights included, is taken
off. `foreseen` is what memory() declares of gradients and optimizer state, plus the measured activations of the worst part.
Seconds are the mean over all parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_own_process, median, print_machine

NAMES = (
    "full", "full, checkpointed", "chunk", "chunk, checkpointed", "chunk, in a budget", "chunk, reset", "lora", "badam",
    "galore",
)  # fmt: skip
DRAWN = ("full", "lora", "chunk", "chunk, in a budget")
WARM_UP = 2


def side(name: str, args: argparse.Namespace) -> None:
    """Run one side, and print what was measured as JSON."""
    from sides import build_side, foreseen, watched

    from tunesmith.engines.single import own_memory, return_freed_memory

    chunks = {"num_chunks": args.num_chunks, "updates_per_chunk": 2, "order": "ascending"}
    if name == "chunk, in a budget":
        chunks["memory"] = args.budget
    parts = 2 * args.num_chunks if name.startswith("chunk") else 30 if name == "badam" else 10
    run = build_side(
        name,
        {
            "model": {"path": "demo", "precision": args.precision},
            "data": {"path": args.data, "max_tokens": 256, "eval_fraction": 0.0, "max_samples": 2000},
            "method": chunks if name.startswith("chunk") else {},
            "optimizer": {"lr": 1e-5},
            "train": {"steps": parts + WARM_UP, "batch_size": args.batch_size, "micro_batch_tokens": args.tokens},
            "output": "unused",
        },
        switch_every=1,
    )
    return_freed_memory()
    learner = run.learner
    declared, expected = foreseen(learner, max(1, args.tokens // 256), 256, in_full=name not in ("badam", "galore"))
    weights = sum(p.numel() * p.element_size() for p in learner.model.parameters())
    held, seconds = own_memory(), []
    with watched() as memory:
        for step in range(run.steps):
            start = perf_counter()
            learner.step(run.objective, run.data(step), 1e-5)
            seconds.append(perf_counter() - start)
    print(
        json.dumps(
            {
                "weights": weights,
                "over": memory["peak"] - held,
                "declared": declared,
                "foreseen": expected,
                "seconds": mean(seconds[WARM_UP:]),
                "trace": memory["trace"][::5],
                "held": held,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--side", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--budget", default="1650MiB", help="Of the whole process, for that side.")
    parser.add_argument("--num-chunks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.side:
        side(args.side, args)
        return
    print_machine()
    found: dict[str, list[dict]] = {name: [] for name in args.methods}
    for _ in range(args.rounds):
        for name in args.methods:
            found[name].append(in_own_process(__file__, "--side", name, quiet=True))
    reference = "full, checkpointed"
    print(f"{'':20} weights   over them: measured   foreseen   of it memory()   s/step   over {reference}")
    for name, runs in found.items():
        ratio, foreseen = "", "not ours"
        if reference in found:
            ratio = f"{median(a['seconds'] / b['seconds'] for a, b in zip(runs, found[reference], strict=True)):.2f}"
        if runs[0]["foreseen"]:
            foreseen = f"{runs[0]['foreseen'] / 2**20:4.0f} MiB   {runs[0]['declared'] / 2**20:9.0f} MiB"
        print(
            f"{name:20} {runs[0]['weights'] / 2**20:4.0f} MiB   {median(r['over'] for r in runs) / 2**20:14.0f} MiB   "
            f"{foreseen:25}   {median(r['seconds'] for r in runs):6.2f}   {ratio}",
            flush=True,
        )
    if args.picture:
        draw({name: found[name][0] for name in DRAWN if name in found}, args.picture)


def draw(found: dict[str, dict], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for name, run in found.items():
        axes.plot([t for t, _ in run["trace"]], [b / 2**30 for _, b in run["trace"]], label=name, linewidth=1)
    axes.set_xlabel("seconds")
    axes.set_ylabel("memory of the process, GiB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")


if __name__ == "__main__":
    main()
