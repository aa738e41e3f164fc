"""Seconds to load, render, tokenize, mask and pack 20,000 conversations: tunesmith against TRL and LLaMA-Factory.

    python benchmarks/data_throughput/run.py [--llamafactory-python .venv-llamafactory/bin/python] [--rounds 3]

Each side runs in a process of its own with cold caches, in turn, so that a busy machine slows all alike; the peers both
as they come (one process) and with a worker a core. Prints medians, the memory, and the ratio to the fastest peer.
README.md says what is timed, and how LLaMA-Factory's environment is made; without it that side is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tunesmith.models.demo import demo_model_folder

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llamafactory-python", default=".venv-llamafactory/bin/python")
    parser.add_argument("--tokenizer", type=Path, help="folder; by default the demo model's")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = str(arguments.tokenizer or demo_model_folder())
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/conversations.jsonl"
        subprocess.run([sys.executable, HERE / "conversations.py", file], check=True, stdout=sys.stderr)
        sides = commands(file, tokenizer, arguments.llamafactory_python)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for round_ in range(arguments.rounds):
            for name, command in sides.items():
                result = run(command)
                results[name].append(result)
                print(f"round {round_ + 1}  {name:<28}{result['seconds']:8.1f} s", flush=True)
    report(results)


def commands(file: str, tokenizer: str, llamafactory: str) -> dict[str, list[str]]:
    """One command a side; the rows in which TRL masks what is not the assistant's, as the other two do."""
    marked = ["--chat-template", str(HERE / "smollm2_training.jinja")]
    sides = {"tunesmith": [sys.executable, str(HERE / "ours.py"), file, tokenizer]}
    for label, workers in (("1 process", "1"), (f"{os.cpu_count()} workers", str(os.cpu_count()))):
        sides[f"TRL, {label}"] = [sys.executable, str(HERE / "peer_trl.py"), file, tokenizer, workers, *marked]
        if Path(llamafactory).exists():
            peer = str(HERE / "peer_llamafactory.py")
            sides[f"LLaMA-Factory, {label}"] = [llamafactory, peer, file, tokenizer, workers]
    return sides


def run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    ours = median(result["seconds"] for result in results["tunesmith"])
    print(f"\n{'':<28}{'median s':>9}{'tokens':>12}{'peak GiB':>10}{'ratio':>8}")
    for name, rounds in results.items():
        seconds, memory = median(r["seconds"] for r in rounds), median(r["pss_bytes"] for r in rounds)
        print(f"{name:<28}{seconds:>9.1f}{rounds[0]['tokens']:>12}{memory / 2**30:>10.2f}{seconds / ours:>8.2f}")
    again = median(result["second_start"] for result in results["tunesmith"])
    peers = {name: median(r["seconds"] for r in rounds) for name, rounds in results.items() if name != "tunesmith"}
    fastest = min(peers, key=lambda name: peers[name])
    print(f"\nsecond start of tunesmith, from its cache: {again:.3f} s")
    print(f"{peers[fastest] / ours:.2f} × the speed of the fastest peer ({fastest})")


if __name__ == "__main__":
    main()
