"""OPT on one GPU with random weights of true shape: seconds of a zeroth-order step, all states in one pass against LOZO's loop.

    python benchmarks/zeroth/gpu.py [--sizes opt-1.3b opt-2.7b opt-6.7b opt-13b] [--batches 16 128] [--dtype bfloat16]
    python benchmarks/zeroth/gpu.py --device cpu --sizes tiny-opt --dtype float32 --batches 4    # to see that it runs

Sentences are as long as SST-2's with the prompt. The loop does as LOZO's program does: it writes each state into the weights,
pads, scores a sequence for each of the two words, and makes logits everywhere. Prints the median of the steps, and the peak of
the allocator over both sides.
"""

from __future__ import annotations

import argparse
import gc
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from common import in_turn, median, ratio
from shapes import SHAPES, learner_of, loop_of, make_batch, make_model, sentence_lengths, step_of_ours, steps_of_loop

from tunesmith.models.probe import isolates_sequences


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--sizes", nargs="+", choices=list(SHAPES), default=["opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b"]
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name} · torch {torch.__version__} · transformers {transformers.__version__} · {args.dtype}")
    print("size       batch  tokens   ours, ms   loop, ms   loop / ours   tokens·states/s   peak GiB")
    for size in args.sizes:
        learner = learner_of(
            make_model(size, args.device, getattr(torch, args.dtype)), args.device, 1, rank=2, eps=1e-3
        )
        pack, loop = isolates_sequences(learner.model), loop_of(learner)
        for number in args.batches:
            lengths = sentence_lengths(number)
            batch = make_batch(lengths, pack)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            sides = {
                "ours": partial(step_of_ours, learner, batch),
                "loop": partial(steps_of_loop, learner, loop, batch),
            }
            seconds = in_turn(sides, args.rounds)
            ours = median(seconds["ours"])
            peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
            print(
                f"{size:10} {number:5} {sum(lengths):7} {1e3 * ours:10.2f} {1e3 * median(seconds['loop']):10.2f} "
                f"{ratio(seconds['ours'], seconds['loop']):13.2f} {2 * sum(lengths) / ours:17.0f} {peak:10.2f}",
                flush=True,
            )
        del learner, loop
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
