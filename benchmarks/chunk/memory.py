"""Memory over the weights and time of a step on this machine's CPU: chunk against full, LoRA, BAdam and GaLore (PyPI's).

    python benchmarks/chunk/memory.py ../shared/data/gsm8k/train.jsonl [--rounds 3] [--picture docs/images/chunk_memory.png]

Every side runs in a process of its own, in turn, on the same batches: SmolLM2-135M, weights in bf16, one micro-batch of
--tokens a step. Memory is the process's own (resident, without mapped files), watched 100 times a second; what it held
before the first step, weights included, is taken off. `foreseen` is what memory() and the activations' measurement say.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import median, print_machine

NAMES = ("full", "full, checkpointed", "chunk", "chunk, reset", "lora", "badam", "galore")


def side(name: str, args: argparse.Namespace) -> None:
    """Run one side, and print what was measured as JSON."""
    from sides import build_side, watched

    from tunesmith.engines.single import own_memory, return_freed_memory

    chunks = {"num_chunks": args.num_chunks, "updates_per_chunk": 3} if name.startswith("chunk") else {}
    run = build_side(
        name,
        {
            "model": {"path": "demo", "precision": args.precision},
            "data": {"path": args.data, "max_tokens": 256, "eval_fraction": 0.0, "max_samples": 2000},
            "method": chunks,
            "optimizer": {"lr": 1e-5},
            "train": {"steps": args.steps, "batch_size": args.batch_size, "micro_batch_tokens": args.tokens},
            "output": "unused",
        },
        switch_every=3,
    )
    return_freed_memory()
    learner = run.learner
    rows = max(1, args.tokens // 256)
    foreseen = learner.method.memory({n: (p.numel(), p.element_size()) for n, p in learner.method.params.items()})
    weights = sum(p.numel() * p.element_size() for p in learner.model.parameters())
    held, seconds = own_memory(), []
    with watched() as memory:
        for step in range(args.steps):
            start = perf_counter()
            learner.step(run.objective, run.data(step), 1e-5)
            seconds.append(perf_counter() - start)
    print(
        json.dumps(
            {
                "weights": weights,
                "over": memory["peak"] - held,
                "foreseen": foreseen.gradients_bytes + foreseen.optimizer_bytes,
                "rows": rows,
                "seconds": seconds[3:],
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
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-chunks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
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
            command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    reference = "full, checkpointed"
    print(f"{'':20} weights   over them: measured   foreseen (no activations)   s/step   of {reference}")
    for name, runs in found.items():
        ratio = ""
        if reference in found:
            pairs = zip(runs, found[reference], strict=True)
            ratio = f"{median(median(a['seconds']) / median(b['seconds']) for a, b in pairs):.2f}"
        print(
            f"{name:20} {runs[0]['weights'] / 2**20:4.0f} MiB   {median(r['over'] for r in runs) / 2**20:9.0f} MiB"
            f"   {runs[0]['foreseen'] / 2**20:19.0f} MiB   {median(median(r['seconds']) for r in runs):11.2f}   {ratio:>9}",
            flush=True,
        )
    if args.picture:
        draw({name: runs[0] for name, runs in found.items() if name in ("full", "lora", "chunk")}, args.picture)


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
