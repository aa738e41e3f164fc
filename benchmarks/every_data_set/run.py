"""Every data set of a folder trains for 20 steps, each from a configuration of at most three lines.

    python benchmarks/every_data_set/run.py FOLDER [--tokenizer FOLDER] [--only TEXT]

FOLDER holds data sets, one folder each; --tokenizer is a tokenizer whose chat template knows tools (Qwen3's, say). Models
are tiny and random: this shows that the data is read, rendered and learnt from, not how well. Prints a row for each file:
its three lines, how many samples it gave, what was left out, and the training loss at the first and the last step.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tunesmith.config_file import load_config
from tunesmith.data.readers import READERS, kind_of
from tunesmith.models.demo import demo_model_folder
from tunesmith.run import train
from tunesmith.run_folder import RunFolder, read_events

SETTINGS = ["train.steps=20", "train.batch_size=4", "optimizer.lr=0.01", "method=full", "data.max_eval_samples=8"]

DATA = {
    "humaneval/HumanEval.jsonl": "{path: PATH, columns: {completion: canonical_solution}}",
    "glue_rte/val.tsv": "{path: PATH, header: [index, sentence1, sentence2, label]}",
    "sst2/train.tsv": "{path: PATH, labels: [negative, positive]}",
    "hh_rlhf/harmless-base-test.jsonl": "{path: PATH, bad_records: skip}",
    "tinyshakespeare/input.txt": "{path: PATH, text_unit: paragraph}",
}
"""What a data set needs beside its path."""

PROMPTS_ONLY = ("ifeval/input_data.jsonl",)
"""No answers: pretrain learns the prompts."""

TOOLS = ("glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl")

MEDIA = ("mllm", "multimodal", "mnist_vqa")
"""Data sets for which a model with eyes or ears is needed; docs/multimodal.md has their runs."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="for data with tools")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    files = [file for file in sorted(arguments.folder.glob("*/*")) if file.is_file() and kind_of(file.name) in READERS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        usual = tiny_model(str(demo_model_folder()), folder / "usual")
        tools = tiny_model(str(arguments.tokenizer), folder / "tools") if arguments.tokenizer else None
        for file in files:
            known = "/".join(file.parts[-2:])
            if arguments.only not in known or file.name == "dataset_info.json" or any(word in known for word in MEDIA):
                continue
            model = tools if file.name in TOOLS else usual
            if model is None:
                print(f"{known}: needs --tokenizer")
                continue
            lines = [f"model: {model}", f"data: {DATA.get(known, 'PATH').replace('PATH', str(file))}"]
            if known in PROMPTS_ONLY:
                lines.append("objective: pretrain")
            print(f"{known:<55} {run(lines, folder / known.replace('/', '-'))}", flush=True)


def tiny_model(tokenizer_folder: str, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32768, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(lines: list[str], place: Path) -> str:
    file = place.with_suffix(".yaml")
    file.write_text("\n".join(lines) + "\n")
    result = train(load_config(file, [*SETTINGS, f"output={place}"]), console=Console(quiet=True))
    folder = RunFolder(result.folder)
    losses = [event["loss"] for event in read_events(folder.events) if event["event"] == "step"]
    header = dict(folder.read_manifest()["header"])
    data = header["data"].split(" · ", 1)[1]
    return f"{len(losses)} steps, loss {losses[0]:.2f} → {losses[-1]:.2f}; {data}"


if __name__ == "__main__":
    main()
