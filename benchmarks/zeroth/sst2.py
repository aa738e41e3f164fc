"""SST-2 by prompt (MeZO's setting), SmolLM2-135M: accuracy over steps and time for tuning by scoring, and by backpropagation.

    python benchmarks/zeroth/sst2.py SST-2 [--sides ours "LOZO loop" …] [--steps 1000] [--picture docs/images/zeroth_sst2.png]

SST-2 is a folder with train.tsv and test.tsv (columns sentence, label). Every side runs in a process of its own, in turn, on
the same batches of 16; sides other than `ours` and `lora` take as many steps as --loop-steps, since they are slow. `ours, vLLM`
is left out unless it is named: it needs vLLM (`make vllm`). Accuracy is that on test.tsv; taking it is not in the seconds.
`ours` and the LOZO loop walk along the same directions, so their losses should agree.
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

from common import in_own_process, median, print_machine, synchronize

SIDES = ("ours", "ours, in place", "ours, vLLM", "LOZO loop", "MeZO loop", "lora")
RATES = {"ours": 2e-5, "ours, in place": 2e-5, "ours, vLLM": 2e-5, "LOZO loop": 2e-5, "MeZO loop": 1e-6, "lora": 2e-4}
TEMPLATE = "{% for m in messages %}{{ m.content if m.role != 'assistant' else ' ' + m.content }}{% endfor %}"


def side(name: str, args: argparse.Namespace) -> None:
    """Run one side, and print what was measured as JSON."""
    from loops import LozoLoop, MezoLoop

    from tunesmith.config_file import config_from_dict
    from tunesmith.data.dataset import evaluation_batches
    from tunesmith.run import build

    method: dict[str, Any] = {"name": "zeroth", "eps": args.eps, "rank": args.rank, "refresh_every": args.refresh_every}
    if name == "ours, in place":
        method["scorer"] = "in_place"
    if name == "ours, vLLM":
        method["scorer"] = "vllm"
    if name == "lora":
        method = {"name": "lora", "rank": 8}
    template = Path(args.template)
    steps = args.steps if name in ("ours", "lora") else args.loop_steps
    run = build(
        config_from_dict(
            {
                "model": {"path": args.model, "precision": args.precision, "chat_template": str(template)},
                "data": {
                    "path": f"{args.data}/train.tsv", "eval_path": f"{args.data}/test.tsv", "prompt": "{sentence}It was",
                    "labels": ["terrible", "great"], "max_tokens": 512, "max_eval_samples": args.eval_samples,
                },
                "objective": "classify",
                "method": method,
                "optimizer": {"lr": args.lr or RATES[name]},
                "schedule": {"name": "constant", "warmup_fraction": 0.0},
                "train": {"steps": steps, "batch_size": args.batch_size, "micro_batch_tokens": args.micro_batch_tokens},
                "output": "unused",
            }
        )
    )  # fmt: skip
    learner, lr = run.learner, run.config.optimizer.lr
    loop: Any = None
    if name == "LOZO loop":
        loop = LozoLoop(
            learner.model.eval(),
            learner.method.directions.layers,
            args.eps,
            args.rank,
            args.refresh_every,
            run.config.seed,
        )
    if name == "MeZO loop":
        loop = MezoLoop(learner.model.eval(), args.eps)
    held_out = evaluation_batches(run.held_out, 64, 512, run.pack, run.share)
    losses, seconds, accuracy = [], [], {}
    for step in range(steps + 1):
        if step % args.every == 0 or step == steps:
            accuracy[step] = float(learner.evaluate(run.objective, held_out, run.helpers)["accuracy"])
            print(name, step, f"accuracy {accuracy[step]:.3f}", *losses[-1:], file=sys.stderr, flush=True)
        if step == steps:
            break
        batch = run.data(step)
        synchronize()
        start = perf_counter()
        if loop is not None:
            with learner.method.directions.off():  # the loop's model is the bare one
                losses.append(loop.step(batch, lr))
        else:
            learner.engine.seed(0, step)
            losses.append(float(learner.step(run.objective, batch, lr)["loss"]))
        synchronize()
        seconds.append(perf_counter() - start)
    print(json.dumps({"lr": lr, "losses": losses, "seconds": seconds, "accuracy": accuracy}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--template", default="", help=argparse.SUPPRESS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[side for side in SIDES if "vLLM" not in side])
    parser.add_argument("--precision", choices=["fp32", "bf16", "mixed"], default="fp32")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--loop-steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--eval-samples", type=int, default=872)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--refresh-every", type=int, default=50)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--save", type=Path, help="Add the curves to this .json, and show those in it too.")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.side:
        side(args.side, args)
        return
    print_machine()
    found = json.loads(args.save.read_text()) if args.save and args.save.exists() else {}
    with TemporaryDirectory() as folder:
        template = Path(folder) / "prompt.jinja"
        template.write_text(TEMPLATE)
        for name in args.sides:
            found[name] = in_own_process(__file__, "--side", name, "--template", str(template))
            if args.save:
                args.save.write_text(json.dumps(found))
    print(f"{'':16}     lr  accuracy                    steps   steps/s   over the LOZO loop   loss of steps 1 to 40")
    for name, run in found.items():
        speed = 1 / median(run["seconds"])
        ratio = f"{speed * median(found['LOZO loop']['seconds']):.2f}" if "LOZO loop" in found else ""
        first, *_, last = run["accuracy"].values()
        losses = run["losses"][:40]
        print(
            f"{name:16} {run['lr']:6g}  {first:.3f} → {last:.3f} (best {max(run['accuracy'].values()):.3f})   "
            f"{len(run['seconds']):5}   {speed:7.2f}   {ratio:18}   {sum(losses) / len(losses):.5f}"
        )
    if args.picture:
        draw(found, args.picture)


def draw(found: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=120, sharey=True)
    for name, run in found.items():
        steps = [int(step) for step in run["accuracy"]]
        per_step = median(run["seconds"])
        left.plot(steps, list(run["accuracy"].values()), "o-", markersize=3, label=f"{name} (lr {run['lr']:g})")
        right.plot([step * per_step for step in steps], list(run["accuracy"].values()), "o-", markersize=3)
    left.set_xlabel("steps")
    left.set_ylabel("accuracy on held-out sentences")
    right.set_xlabel("seconds of training")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")


if __name__ == "__main__":
    main()
