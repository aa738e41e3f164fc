"""What the plan says of a run's memory against what the run takes: a table of tiny runs over families, methods, objectives,
optimizers, precisions, lengths, packing and checkpointing.

    python benchmarks/plan/grid.py [--only llama chunk] [--allocator]

Foreseen and measured are bytes of tensors at the peak of a run on the CPU; what kernels take inside themselves is not among
them. --allocator: for a few runs also what torch's CPU allocator gives out at the peak of a step (torch.profiler), in which
that is.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from common import median, perf_counter, print_machine
from tests.plan.cells import CELLS, SEEN_BY_ALLOCATOR, Workplace, allocated, compare, table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=[], help="Runs that have all of these words in their name.")
    parser.add_argument("--allocator", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNESMITH_CACHE"] = folder
        workplace, start = Workplace(Path(folder)), perf_counter()
        if args.allocator:
            for cell in SEEN_BY_ALLOCATOR:
                ledger, allocator = allocated(workplace.config(cell))
                print(
                    f"{ledger:10} of tensors {allocator:10} allocated {allocator / ledger - 1:+8.2%}  {cell}",
                    flush=True,
                )
            return
        chosen = [cell for cell in CELLS if all(word in str(cell).split() for word in args.only)]
        found = [compare(workplace.config(cell), cell) for cell in chosen]
        print(table(found))
        errors = [one.error for one in found]
        equal = sum(one.flops == one.foreseen.flops for one in found)
        print(
            f"{len(found)} runs in {perf_counter() - start:.0f} s: median error {median(map(abs, errors)):.2%}, worst "
            f"{max(map(abs, errors)):.2%}, most under {min(0, *errors):.2%}; FLOPs equal in {equal}"
        )


if __name__ == "__main__":
    main()
