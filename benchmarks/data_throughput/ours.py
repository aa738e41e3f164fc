"""Seconds that tunesmith takes to load and prepare a file of conversations for packed SFT.

    python benchmarks/data_throughput/ours.py FILE TOKENIZER_FOLDER

Timed with a cold cache: hashing the file for the cache's key, reading, rendering, tokenizing, masking, writing the token
shards, and packing all samples into rows of 2048. Then the same once more with the cache, as a second start takes it.
Imports and loading the tokenizer are not timed. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from time import perf_counter

from measure import PeakMemory, print_results

from tunesmith.config import DataConfig, ModelConfig
from tunesmith.data.pack import pack_rows
from tunesmith.data.prepare import load_samples
from tunesmith.data.render import Renderer
from tunesmith.models.load import load_tokenizer

MAX_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(ModelConfig(path=str(arguments.tokenizer)))
    config = DataConfig(path=str(arguments.file), max_tokens=MAX_TOKENS, truncation="right", eval_fraction=0)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TUNESMITH_CACHE"] = cache
        with PeakMemory() as memory:
            start = perf_counter()
            samples, _ = load_samples(config, Renderer(tokenizer, config))
            rows = pack_rows(samples.lengths()[:, 0].tolist(), MAX_TOKENS)
            seconds = perf_counter() - start
            start = perf_counter()
            load_samples(config, Renderer(tokenizer, config))
            again = perf_counter() - start
        tokens = int(samples.lengths().sum())
        print_results(
            seconds, tokens, len(rows), memory, second_start=round(again, 3), fill=tokens / len(rows) / MAX_TOKENS
        )


if __name__ == "__main__":
    main()
