"""What a step costs: seconds over (tokens, states), for all states in one pass and for LOZO's in-place loop.

    python benchmarks/zeroth/step_time.py [--sizes 10M 30M 106M] [--rounds 3] [--device cpu]

Random weights; sentences of uneven length, of which `tokens` counts what is no padding. Sides take turns; each cell is the
median over the rounds. A line is fitted to each side's cells: seconds = intercept + slope · tokens · states. The loop looks
along one direction at a time, so two directions are two of its steps.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from common import in_turn, median, print_machine
from shapes import SHAPES, learner_of, loop_of, make_batch, make_model, sentence_lengths, step_of_ours, steps_of_loop

from tunesmith.models.probe import isolates_sequences


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["10M", "30M", "106M"])
    parser.add_argument("--sentences", nargs="+", type=int, default=[4, 16, 32])
    parser.add_argument("--queries", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    print_machine()
    print("size    side              ms before any token   ms per 1000 tokens · states    R²   loop / ours by cell")
    for size in args.sizes:
        measure(size, args)


def measure(size: str, args: argparse.Namespace) -> None:
    cells: dict[str, list[tuple[int, float]]] = {"all in one pass": [], "LOZO loop": []}
    ratios = []
    for queries in args.queries:
        model = make_model(size, args.device, getattr(torch, args.dtype))
        pack = isolates_sequences(model)
        learner = learner_of(model, args.device, queries, rank=2, eps=1e-3)
        loop = loop_of(learner)
        for sentences in args.sentences:
            lengths = sentence_lengths(sentences)
            batch = make_batch(lengths, pack)
            sides = {
                "all in one pass": partial(step_of_ours, learner, batch),
                "LOZO loop": partial(steps_of_loop, learner, loop, batch, queries),
            }
            seconds = in_turn(sides, args.rounds)
            for name, found in seconds.items():
                cells[name].append((sum(lengths) * 2 * queries, median(found)))
            ratios.append(median(seconds["LOZO loop"]) / median(seconds["all in one pass"]))
    for name, found in cells.items():
        x, y = np.array(found).T
        slope, intercept = np.polyfit(x, y, 1)
        r2 = 1 - ((y - intercept - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
        shown = " ".join(f"{ratio:.1f}" for ratio in ratios) if name == "LOZO loop" else ""
        print(f"{size:7} {name:16} {1e3 * intercept:16.0f} {1e6 * slope:28.0f} {r2:14.3f}   {shown}", flush=True)


if __name__ == "__main__":
    main()
