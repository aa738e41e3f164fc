"""Seconds that TRL's SFTTrainer takes to load and prepare a file of conversations for packed SFT.

python benchmarks/data_throughput/peer_trl.py FILE TOKENIZER_FOLDER NUM_PROC [--chat-template FILE]

A real SFTTrainer is built around a tiny random model. Two spans are timed and added: `load_dataset("json")` with cold
caches, and `SFTTrainer._prepare_dataset`, where the trainer's constructor renders the chat template, tokenizes, builds
labels and packs. Imports, the model, the tokenizer and the rest of the constructor are not timed.

`assistant_only_loss` is on where the chat template marks the assistant's turns (`{% generation %}`) or TRL has such a
template in its place, else off, as TRL then refuses it. --chat-template gives one with marks, as `chat_template_path`.
NUM_PROC 0 or 1 means `dataset_num_proc=None`, all in the main process. Prints one line of JSON; `tokens` are those in
the packed rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

from measure import PeakMemory, cold_caches, print_results

MAX_LENGTH = 2048


def measure(file: Path, tokenizer_folder: Path, workers: int, template_file: Path | None, cache: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    class TimedTrainer(SFTTrainer):
        prepare_seconds = 0.0

        def _prepare_dataset(self, *args: object, **kwargs: object) -> object:
            start = perf_counter()
            dataset = super()._prepare_dataset(*args, **kwargs)
            self.prepare_seconds += perf_counter() - start
            return dataset

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if template_file:
        tokenizer.chat_template = template_file.read_text(encoding="utf-8")
    try:
        assistant_only = has_generation_markers(tokenizer.chat_template) or bool(get_training_chat_template(tokenizer))
    except ValueError:  # TRL knows no training template for this chat template
        assistant_only = False
    tiny = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    config = SFTConfig(
        output_dir=str(cache / "output"),
        packing=True,
        max_length=MAX_LENGTH,
        assistant_only_loss=assistant_only,
        chat_template_path=str(template_file) if template_file else None,
        dataset_num_proc=workers if workers > 1 else None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    model = LlamaForCausalLM(tiny)
    with PeakMemory() as memory:
        start = perf_counter()
        dataset = load_dataset("json", data_files=str(file), split="train")
        load_seconds = perf_counter() - start
        trainer = TimedTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    packed = trainer.train_dataset
    tokens = sum(map(sum, packed["seq_lengths"]))
    seconds = load_seconds + trainer.prepare_seconds
    print_results(seconds, tokens, len(packed), memory, assistant_only_loss=assistant_only)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time TRL's data preparation.")
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer_folder", type=Path)
    parser.add_argument("num_proc", type=int)
    parser.add_argument("--chat-template", type=Path, help="a Jinja file to use instead of the tokenizer's template")
    arguments = parser.parse_args()
    folder = arguments.tokenizer_folder.resolve()
    with cold_caches() as cache:
        measure(arguments.file.resolve(), folder, arguments.num_proc, arguments.chat_template, cache)


if __name__ == "__main__":
    main()
