"""Seconds that LLaMA-Factory takes to load and prepare a file of conversations for packed SFT.

python benchmarks/data_throughput/peer_llamafactory.py FILE TOKENIZER_FOLDER NUM_PROC [--template NAME]

Its own argument parser reads the settings (stage sft, neat_packing, cutoff_len 2048) and its own `get_dataset` is timed:
`load_dataset("json")` with cold caches, conversion of the messages, rendering, tokenizing, packing. Imports, the parsing
of arguments and the tokenizer are not timed. Runs in an environment of its own, as the README tells.

`neat_packing` keeps packed conversations apart, as TRL's packing does. Without --template, LLaMA-Factory derives its
template from the tokenizer's chat template. It masks all but the assistant's turns. Packing takes one token off
cutoff_len: longer conversations are cut to 2047. NUM_PROC 0 or 1 means `preprocessing_num_workers: null`, all in the main
process. Prints one line of JSON; `tokens` are those in the packed rows, without padding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from time import perf_counter
from types import ModuleType

from measure import PeakMemory, cold_caches, print_results

CUTOFF_LENGTH = 2048


def stand_in_for_torchaudio() -> None:
    """LLaMA-Factory imports torchaudio, which has no CPU build on PyPI, but uses it only to load audio."""
    if importlib.util.find_spec("torchaudio") is None:
        module = ModuleType("torchaudio")
        module.__spec__ = ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = module


def measure(file: Path, tokenizer_folder: Path, workers: int, template_name: str | None, cache: Path) -> None:
    stand_in_for_torchaudio()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    description = {
        "file_name": str(file),
        "formatting": "sharegpt",  # its "openai" adds "detailed thinking off" to every system message
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    (cache / "dataset_info.json").write_text(json.dumps({"conversations": description}))
    settings = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(tokenizer_folder),
        "dataset": "conversations",
        "dataset_dir": str(cache),
        "template": template_name,
        "cutoff_len": CUTOFF_LENGTH,
        "neat_packing": True,
        "preprocessing_num_workers": workers if workers > 1 else None,
        "output_dir": str(cache / "output"),
        "use_cpu": True,
        "report_to": "none",
    }
    model_args, data_args, training_args, _, _ = get_train_args(settings)
    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    with PeakMemory() as memory:
        start = perf_counter()
        module = get_dataset(template, model_args, data_args, training_args, stage="sft", **tokenizer_module)
        seconds = perf_counter() - start
    packed = module["train_dataset"]
    tokens = sum(row["sequence_boundaries"][-1] - row["right_padding_length"] for row in packed["packing_params"])
    print_results(seconds, tokens, len(packed), memory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time LLaMA-Factory's data preparation.")
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer_folder", type=Path)
    parser.add_argument("num_proc", type=int)
    parser.add_argument("--template", help="one of LLaMA-Factory's own; default: derived from the tokenizer's")
    arguments = parser.parse_args()
    folder = arguments.tokenizer_folder.resolve()
    with cold_caches() as cache:
        measure(arguments.file.resolve(), folder, arguments.num_proc, arguments.template, cache)


if __name__ == "__main__":
    main()
