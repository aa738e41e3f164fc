"""Every objective trains SmolLM2-135M on real data, with LoRA; the curves of docs/objectives.md.

    python benchmarks/objectives/run.py FOLDER [--only dpo kto …] [--steps 10] [--pictures docs/images/objectives]

FOLDER holds the data sets: hh_rlhf/, llamafactory_demo/ and sst2/ as their owners publish them. Objectives on preferences
train on two of them. Prints a row a run: objective, data, loss and metrics at the first and the last step, and the held-out
ones before and after.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from rich.console import Console

from tunesmith.config_file import config_from_dict
from tunesmith.models.demo import demo_model_folder
from tunesmith.objectives import OBJECTIVES
from tunesmith.run import train
from tunesmith.run_folder import read_events

PAIRS = ("hh_rlhf/harmless-base-test.jsonl", "llamafactory_demo/dpo_en_demo.json")
FEEDBACK = ("llamafactory_demo/kto_en_demo.json", "hh_rlhf/harmless-base-test.jsonl")
ANSWERS = ("llamafactory_demo/alpaca_en_demo.json",)
FILES = {
    "pairs": PAIRS,
    "feedback": FEEDBACK,
    "answers": ANSWERS,
    "choices": ("sst2/train.tsv",),
    "text": ("llamafactory_demo/wiki_demo.txt",),
}
LR = {"classify": 2e-4, "distill": 2e-4, "sft": 2e-4, "pretrain": 2e-4, "reward": 2e-4, "orpo": 5e-5, "prm": 2e-4}
"""Higher than the defaults: few steps are to show something. 2e-5 for the rest."""
OF_DATA = {"sst2/train.tsv": {"labels": ["negative", "positive"]}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--data", default="", help="Only files whose name holds this.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--eval-samples", type=int, default=6)
    parser.add_argument("--pictures", type=Path, help="Copy each objective's first curve here.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for objective in arguments.only:
            for number, data in enumerate(data_of(objective, arguments)):
                folder = Path(name) / f"{objective}-{number}"
                print(f"{objective:9} {row(objective, data, folder, arguments)}", flush=True)
                if arguments.pictures and number == 0:
                    arguments.pictures.mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / "loss.png", arguments.pictures / f"{objective}.png")
                shutil.rmtree(folder)


def data_of(objective: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    form = OBJECTIVES[objective].form
    if form == "steps":
        yield {"path": str(Path(__file__).parents[2] / "examples/data/steps.jsonl")}
        return
    for file in FILES[form]:
        if arguments.data in file:
            yield {"path": str(arguments.folder / file), **OF_DATA.get(file, {})}


def row(objective: str, data: dict[str, Any], folder: Path, arguments: argparse.Namespace) -> str:
    """One run, in a line."""
    model, section = "demo", {"name": objective}
    if objective == "distill":  # the student: the same model without ten of its blocks
        model, section = str(pruned(folder.with_name("student"))), section | {"teacher": str(demo_model_folder())}
    config = config_from_dict(
        {
            "model": {"path": model, "precision": "fp32"},
            "data": {
                **data, "max_tokens": arguments.max_tokens, "truncation": "left", "bad_records": "skip",
                "max_eval_samples": arguments.eval_samples, "eval_fraction": 0.1,
            },
            "objective": section,
            "method": {"name": "lora", "rank": 16},
            "optimizer": {"lr": LR.get(objective, 2e-5)},
            "train": {"steps": arguments.steps, "batch_size": arguments.batch_size, "micro_batch_tokens": 1024},
            "output": str(folder),
        }
    )  # fmt: skip
    with Console(file=sys.stderr) as console:
        train(config, console=console)
    events = read_events(folder / "events.jsonl")
    shown = ["loss", *OBJECTIVES[objective].shows]
    steps, evals = ([event for event in events if event["event"] == kind] for kind in ("step", "eval"))
    parts = [Path(data["path"]).name]
    for kind, found in (("training", steps), ("held-out", evals)):
        parts += [
            f"{kind} {name} {found[0][name]:.3f} → {found[-1][name]:.3f}"
            for name in shown
            if found and name in found[0]
        ]
    seconds = (steps[-1]["time"] - steps[0]["time"]) / max(1, len(steps) - 1)
    return " · ".join([*parts, f"{seconds:.1f} s/step"])


def pruned(folder: Path) -> Path:
    """SmolLM2-135M with 20 of its 30 blocks: the first 15 and the last 5."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.exists():
        source = demo_model_folder()
        model = AutoModelForCausalLM.from_pretrained(source)
        model.model.layers = model.model.layers[:15] + model.model.layers[25:]
        model.config.num_hidden_layers = 20
        model.config.layer_types = None
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
