"""One side of the comparison in a process of its own: `side.py ours|trl …` prints one line of JSON.

Both sides get the same token ids: the pairs are rendered, tokenized and cut once, by tunesmith.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
from time import perf_counter
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch

from tunesmith.config import RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.models.load import load_model, load_tokenizer

LR = 1e-5


def run_config(args: argparse.Namespace) -> RunConfig:
    return config_from_dict(
        {
            "model": {"path": args.model, "precision": args.precision},
            "data": {"path": args.data, "max_tokens": 512, "eval_fraction": 0.0, "bad_records": "skip"},
            "objective": {"name": "dpo", "reference": args.reference},
            "method": {"name": args.method} | ({"rank": 16, "alpha": 32.0} if args.method == "lora" else {}),
            "optimizer": {"lr": LR},
            "engine": {"name": "single", "device": "cpu"},
            "train": {"batch_size": args.pairs, "steps": args.steps, "micro_batch_tokens": 1024},
            "output": "unused",
        }
    )


def ours(args: argparse.Namespace) -> list[float]:
    from tunesmith.run import build

    run, times, losses = build(run_config(args)), [], []
    for step in range(args.steps):
        start = perf_counter()
        run.learner.engine.seed(0, step)
        (ready,) = run.objective.prepare(run.data(step), run.helpers)
        metrics = run.learner.step(run.objective, ready, LR)
        losses.append(float(metrics["loss"]))
        times.append(perf_counter() - start)
    print("ours", losses, file=sys.stderr)
    return times


def trl(args: argparse.Namespace) -> list[float]:
    import peft
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from tunesmith.run_data import open_data

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(perf_counter() - self.start)

    class Prepared(DPOTrainer):
        """On pairs that are tokenized already, in their order."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset)

    config = run_config(args)
    data = open_data(config)
    records: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for index in (index for step in range(args.steps) for index in data.batches.at(step)[1]):
        (chosen, weights), (rejected, _) = data.samples.sequences(index)
        prompt = int((weights != 0).argmax())
        for name, tokens in (("prompt", chosen[:prompt]), ("chosen", chosen[prompt:]), ("rejected", rejected[prompt:])):
            records[f"{name}_ids"].append(tokens.tolist())
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32.0, target_modules="all-linear")
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=args.precision == "mixed", per_device_train_batch_size=args.trl_batch,
        gradient_accumulation_steps=args.pairs // args.trl_batch, max_steps=args.steps, learning_rate=LR, max_grad_norm=1.0,
        optim="adamw_torch_fused", lr_scheduler_type="constant", gradient_checkpointing=False, logging_strategy="no",
        save_strategy="no", report_to=[], disable_tqdm=True, max_length=None, beta=0.1,
        precompute_ref_log_probs=args.reference == "precompute",
    )  # fmt: skip
    stopwatch = Stopwatch()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    trainer = Prepared(
        model=load_model(config.model, dtype),
        ref_model=None,
        args=settings,
        train_dataset=Dataset.from_dict(records),
        processing_class=load_tokenizer(config.model),
        peft_config=lora if args.method == "lora" else None,
        callbacks=[stopwatch],
    )
    trainer.train()
    return stopwatch.times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "trl"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", required=True)
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--reference", default="live", choices=["live", "precompute"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "mixed", "bf16"])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--trl-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        times = {"ours": ours, "trl": trl}[args.side](args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": times, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
