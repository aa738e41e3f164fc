"""One training step of SmolLM2-135M: ours, a bare torch loop, and TRL's SFTTrainer; same rows, micro-batch and dtype.

    python benchmarks/loop_overhead/run.py [--method full|lora] [--rounds 7] [--no-trl]

Every row is one sequence of 256 tokens, all of them targets, 4 rows a step. bf16 autocast over fp32 weights on all sides.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from common import in_turn, median, perf_counter, print_machine, ratio

from tunesmith.config import AdamWConfig, FullConfig, LoraConfig, ModelConfig, PretrainConfig, SetConfig, SingleConfig
from tunesmith.data.pack import collate
from tunesmith.data.samples import Counts, Part, PartWriter, encoded_of, whole
from tunesmith.engines import build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS
from tunesmith.models.load import load_model, model_source
from tunesmith.objectives import build_objective
from tunesmith.types import Place

ROWS, LENGTH, LR = 4, 256, 1e-5
LORA = {"rank": 16, "alpha": 32.0}


def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(100, 40000, (ROWS, LENGTH)).astype(np.int32)


def ours(method: str) -> Callable[[], None]:
    section = FullConfig() if method == "full" else LoraConfig(**LORA)
    made = METHODS[method](section, AdamWConfig(lr=LR), max_grad_norm=1.0)
    model = load_model(ModelConfig(path="demo"), torch.float32)
    learner = Learner(model, build_engine(SingleConfig(device="cpu"), "mixed"), made, micro_batch_tokens=ROWS * LENGTH)
    objective = build_objective(PretrainConfig())
    weights = np.ones((ROWS, LENGTH), np.float32)
    weights[:, 0] = 0
    with tempfile.TemporaryDirectory() as folder:
        writer = PartWriter(Path(folder), "made", group_size=1)
        encoded = encoded_of(list(zip(rows(), weights, strict=True)))
        writer.add(encoded, [Place("made", n + 1) for n in range(ROWS)], range(ROWS))
        writer.close(Counts())
        samples = whole([Part.open(Path(folder))], [SetConfig(path="made")])

    def step() -> None:  # the batch is made anew each time, as in a run
        learner.step(objective, collate(samples, range(ROWS), LENGTH, pack=False), LR)

    return step


def bare(method: str) -> Callable[[], None]:
    model: Any = load_model(ModelConfig(path="demo"), torch.float32).train()
    if method == "lora":
        import peft

        model = peft.get_peft_model(model, peft_config())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)
    ids = torch.from_numpy(rows()).long()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def peft_config() -> Any:
    import peft

    return peft.LoraConfig(task_type="CAUSAL_LM", r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear")


def trl(method: str) -> Callable[[], float]:
    """SFTTrainer, one step a round, timed from its own `on_step_begin` to `on_step_end`: without its start-up."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(perf_counter() - self.start)

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=True, per_device_train_batch_size=ROWS, max_steps=1,
        learning_rate=LR, max_grad_norm=1.0, optim="adamw_torch_fused", lr_scheduler_type="constant",
        gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to=[], packing=False,
        max_length=LENGTH, disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    ids = rows().astype(np.int64).tolist()
    trainer = SFTTrainer(
        model=load_model(ModelConfig(path="demo"), torch.float32),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=AutoTokenizer.from_pretrained(model_source(ModelConfig(path="demo"))),
        peft_config=peft_config() if method == "lora" else None,
        callbacks=[Stopwatch()],
    )

    def step() -> float:
        with contextlib.redirect_stdout(io.StringIO()):  # its summary of each call
            trainer.train()
        return times[-1]

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=["full", "lora"], action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-trl", action="store_true")
    args = parser.parse_args()
    print_machine()
    for method in args.method or ["full", "lora"]:
        sides: dict[str, Callable[[], float | None]] = {"tunesmith": ours(method), "bare loop": bare(method)}
        if not args.no_trl:
            sides["TRL SFTTrainer"] = trl(method)
        seconds = in_turn(sides, args.rounds)
        print(f"\n{method}: {ROWS} × {LENGTH} tokens a step, median of {args.rounds} rounds in turn")
        for name, times in seconds.items():
            speed = ROWS * LENGTH / median(times)
            print(
                f"  {name:15} {speed:8.1f} tokens/s   ours over this: {ratio(seconds['tunesmith'], times):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
