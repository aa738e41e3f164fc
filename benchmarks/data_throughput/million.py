"""Memory and time for a million short conversations.

    python benchmarks/data_throughput/million.py [--count 1000000] [--model demo]

Writes them to a temporary file, tokenizes them with a cold cache, starts a second time from the cache, and asks for the
batches of step 0 and of step 1,000,000. Prints the peak resident memory of the process, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from time import perf_counter

from measure import PeakMemory

from tunesmith.config import DataConfig, ModelConfig
from tunesmith.data.dataset import Dataset
from tunesmith.data.prepare import load_samples
from tunesmith.data.render import Renderer
from tunesmith.models.load import load_tokenizer

WORDS = [
    "a",
    "sum",
    "of",
    "two",
    "numbers",
    "is",
    "asked",
    "for",
    "here",
    "and",
    "its",
    "answer",
    "comes",
    "at",
    "once",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--model", default="demo")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(ModelConfig(path=arguments.model))
    with tempfile.TemporaryDirectory() as name:
        os.environ["TUNESMITH_CACHE"] = f"{name}/cache"
        file = Path(name) / "million.jsonl"
        write(file, arguments.count)
        config = DataConfig(path=str(file), eval_fraction=0.01)
        with PeakMemory() as memory:
            start = perf_counter()
            samples, _ = load_samples(config, Renderer(tokenizer, config))
            first = perf_counter() - start
            start = perf_counter()
            samples, held_out = load_samples(config, Renderer(tokenizer, config))
            second = perf_counter() - start
            data = Dataset(samples, config, 32, True, 0)
            start = perf_counter()
            data(0)
            near = perf_counter() - start
            start = perf_counter()
            data(1_000_000)
            far = perf_counter() - start
        tokens = int(samples.lengths().sum())
        print(
            f"{file.stat().st_size / 1e6:.0f} MB, {len(samples) + len(held_out)} conversations, {tokens} tokens to train on"
        )
        print(
            f"first start {first:.1f} s, second {second:.2f} s; step 0 in {near * 1e3:.1f} ms, step 10^6 in {far * 1e3:.1f} ms"
        )
        print(f"peak memory {memory.rss_bytes / 2**30:.2f} GiB resident, imports {memory.start_bytes / 2**30:.2f} GiB")


def write(file: Path, count: int) -> None:
    draw = random.Random(0)
    with file.open("w") as lines:
        for number in range(count):
            question = f"{number}: {' '.join(draw.choices(WORDS, k=draw.randint(4, 16)))}?"
            turns = [("user", question), ("assistant", " ".join(draw.choices(WORDS, k=draw.randint(2, 20))))]
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
