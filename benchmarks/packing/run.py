"""How full packed rows are, and how long packing takes.

    python benchmarks/packing/run.py DATA [DATA …] [--model demo] [--max-tokens 2048]

For each data set: tokens over cells (rows × row length) when the whole set is packed at once; and as a run packs, inside
each batch, where a cell is what goes through the model: micro-batches are cut to their longest row. The last line packs a
million made-up lengths, twice as many as the line before, to show that the time grows in proportion.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import numpy as np

from tunesmith.config import DataConfig, ModelConfig
from tunesmith.data.dataset import Dataset
from tunesmith.data.pack import pack_rows
from tunesmith.data.prepare import load_samples
from tunesmith.data.render import Renderer
from tunesmith.data.samples import Samples
from tunesmith.models.load import chatml_for, load_tokenizer

BATCH_SIZES = (16, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="*", default=["demo"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-tokens", type=int, default=2048)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(ModelConfig(path=arguments.model))
    tokenizer.chat_template = tokenizer.chat_template or chatml_for(tokenizer)
    print(
        f"{'data':<40}{'samples':>9}{'tokens':>11}{'whole set':>11}"
        + "".join(f"{f'batch {n}':>11}" for n in BATCH_SIZES)
    )
    for path in arguments.data:
        config = DataConfig(
            path=path, max_tokens=arguments.max_tokens, truncation="right", eval_fraction=0, bad_records="skip"
        )
        samples, _ = load_samples(config, Renderer(tokenizer, config))
        tokens = int(samples.lengths().sum())
        fills = [whole_set(samples, arguments.max_tokens), *(in_batches(samples, config, n) for n in BATCH_SIZES)]
        name = "/".join(path.split("/")[-2:])
        print(f"{name:<40}{len(samples):>9}{tokens:>11}" + "".join(f"{fill:>11.2%}" for fill in fills))
    for count in (500_000, 1_000_000):
        lengths = np.random.default_rng(0).lognormal(5.5, 1.0, count).clip(1, 2048).astype(int).tolist()
        start = perf_counter()
        rows = pack_rows(lengths, 2048)
        print(f"{count} lengths in {perf_counter() - start:.1f} s: {sum(lengths) / (len(rows) * 2048):.2%} full")


def whole_set(samples: Samples, max_tokens: int) -> float:
    lengths = samples.lengths().sum(axis=1).tolist()
    return sum(lengths) / (len(pack_rows(lengths, max_tokens)) * max_tokens)


def in_batches(samples: Samples, config: DataConfig, batch_size: int) -> float:
    data = Dataset(samples, config, min(batch_size, len(samples)), pack=True, seed=0)
    tokens = cells = 0
    for step in range(max(1, min(50, len(samples) // batch_size))):
        batch = data(step)
        tokens += int(batch.num_tokens())
        cells += sum(micro.tokens_BT.numel() for micro in batch.split(max(4096, 2 * config.max_tokens)))
    return tokens / cells


if __name__ == "__main__":
    main()
