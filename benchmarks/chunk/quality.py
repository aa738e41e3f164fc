"""How well each method learns for equal tokens: held-out loss of SmolLM2-135M on gsm8k along the way.

    python benchmarks/chunk/quality.py gsm8k/train.jsonl [--samples 256] [--steps 1024] [--methods full chunk …]
                                       [--lr chunk=1e-4] [--picture docs/images/chunk_quality.png]

Every method takes the same batches from the same start, with fp32 weights. Prints a row each: learning rate,
held-out loss before and after, and its fall over that of full fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import print_machine
from sides import SIDES, build_side

from tunesmith.data.dataset import evaluation_batches
from tunesmith.schedules import build_schedule

LR = {
    "full": 5e-5, "chunk": 1e-4, "chunk, reset": 1e-4, "chunk as BAdam": 1e-4, "badam": 1e-4, "lora": 5e-4, "galore": 5e-4,
}  # fmt: skip


def curve(name: str, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss by step, and seconds of a step."""
    method = {"num_chunks": args.num_chunks} if name in ("chunk", "chunk, reset") else {}
    if method and args.updates_per_chunk:
        method["updates_per_chunk"] = args.updates_per_chunk
    run = build_side(
        name,
        {
            "model": {"path": "demo", "precision": args.precision},
            "data": {**args.parts, "max_tokens": args.max_tokens, "max_eval_samples": args.eval_samples},
            "method": method,
            "optimizer": {"lr": lr},
            "train": {"steps": args.steps, "batch_size": args.batch_size, "micro_batch_tokens": 1024},
            "output": "unused",
        },
        args.switch_every,
    )  # fmt: skip
    held_out = evaluation_batches(run.held_out, args.batch_size, args.max_tokens, run.pack, run.share)
    lr_of = build_schedule(run.config.schedule, lr, run.steps)
    losses, seconds, tokens = {}, 0.0, 0
    for step in range(run.steps + 1):
        if step % max(1, args.steps // 8) == 0 or step == run.steps:
            losses[str(step)] = float(run.learner.evaluate(run.objective, held_out, run.helpers)["loss"])
        if step < run.steps:
            start = perf_counter()
            run.learner.engine.seed(0, step)
            tokens += int(run.learner.step(run.objective, run.data(step), lr_of(step))["tokens"])
            seconds += perf_counter() - start
    return {"lr": lr, "losses": losses, "seconds": seconds / run.steps, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--methods", nargs="+", choices=list(SIDES), default=list(LR))
    parser.add_argument("--lr", nargs="*", default=[], help="name=learning rate")
    parser.add_argument("--precision", choices=["fp32", "mixed"], default="fp32", help="mixed: where bf16 is fast.")
    parser.add_argument(
        "--samples", type=int, default=256, help="Samples to train on; more steps go over them again. 0: all."
    )
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--num-chunks", type=int, default=4)
    parser.add_argument("--updates-per-chunk", type=int, default=0)
    parser.add_argument("--switch-every", type=int, default=5, help="Updates of a block under BAdam.")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--save", type=Path, help="Add the curves to this .json, and show those in it too.")
    args = parser.parse_args()
    print_machine()
    with TemporaryDirectory() as folder:
        args.parts = {"path": args.data, "eval_fraction": 0.05}
        if args.samples:
            lines = Path(args.data).read_text(encoding="utf-8").splitlines(keepends=True)
            for name, part in (("path", lines[: args.samples]), ("eval_path", lines[-args.eval_samples :])):
                args.parts[name] = f"{folder}/{name}.jsonl"
                Path(args.parts[name]).write_text("".join(part), encoding="utf-8")
        compare(args)


def compare(args: argparse.Namespace) -> None:
    rates = LR | {name: float(lr) for name, _, lr in (pair.partition("=") for pair in args.lr)}
    curves = json.loads(args.save.read_text()) if args.save and args.save.exists() else {}
    for name in args.methods:
        curves[name] = found = curve(name, rates[name], args)
        fall = {key: c["losses"]["0"] - min(c["losses"].values()) for key, c in curves.items()}
        share = f" · {fall[name] / fall['full']:.1%} of full's fall" if "full" in fall else ""
        first, *_, last = found["losses"].values()
        lowest = min(found["losses"].values())
        print(
            f"{name:15} lr {found['lr']:g} · {found['tokens']} tokens · held-out loss {first:.4f} → {last:.4f}, lowest "
            f"{lowest:.4f}{share} · {found['seconds']:.2f} s/step",
            flush=True,
        )
        if args.save:
            args.save.write_text(json.dumps(curves, indent=1))
    if args.picture:
        draw(curves, args.picture)


def draw(curves: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for name, found in curves.items():
        steps = [int(step) for step in found["losses"]]
        axes.plot(steps, list(found["losses"].values()), label=f"{name} (lr {found['lr']:g})")
    axes.set_xlabel("updates")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")


if __name__ == "__main__":
    main()
