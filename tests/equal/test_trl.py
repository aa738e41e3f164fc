"""Training runs against TRL's trainers, step by step, on the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config import RunConfig
from tunesmith.run import Run, build

STEPS, PAIRS, LR = 5, 4, 1e-3


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """20 pairs of ragged length."""
    file = tmp_path / "pairs.jsonl"
    records = [
        {
            "prompt": [{"role": "user", "content": f"What follows {n}?"}],
            "chosen": [{"role": "assistant", "content": f"After {n} comes {n + 1}." + " And so on." * (n % 3)}],
            "rejected": [{"role": "assistant", "content": f"After {n} comes {n * 7 % 5}." + " user" * (n % 4)}],
        }
        for n in range(STEPS * PAIRS)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def tokens_of(run: Run) -> dict[str, list[list[int]]]:
    """The pairs in the order of the run's steps, as TRL holds them."""
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for index in (index for step in range(STEPS) for index in run.data.at(step)[1]):
        (chosen, chosen_weights), (rejected, rejected_weights) = run.samples.sequences(index)
        # what comes after the last target (a line feed of the template) is not scored by us, but by TRL
        ends = [int(weights.nonzero()[0][-1]) + 1 for weights in (chosen_weights, rejected_weights)]
        start = int(chosen_weights.nonzero()[0][0])
        columns["prompt_ids"].append(chosen[:start].tolist())
        columns["chosen_ids"].append(chosen[start : ends[0]].tolist())
        columns["rejected_ids"].append(rejected[start : ends[1]].tolist())
    return columns


def our_losses(run: Run) -> list[dict[str, float]]:
    found = []
    for step in range(STEPS):
        (ready,) = run.objective.prepare(run.data(step), run.helpers)
        found.append({name: float(x) for name, x in run.learner.step(run.objective, ready, LR).items()})
    return found


def their_losses(run: Run, folder: Path, method: str, precompute: bool, **settings: Any) -> list[dict[str, float]]:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    import peft
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM

    losses: list[dict[str, float]] = []

    class Watched(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            metrics = {name: values[-1] for name, values in self._metrics["train"].items()}
            losses.append({"loss": float(loss.detach()), **metrics})
            return loss

    config = trl.DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=LR,
        max_grad_norm=1.0, optim="adamw_torch_fused", lr_scheduler_type="constant", gradient_checkpointing=False,
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, max_length=None,
        precompute_ref_log_probs=precompute, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(run.config.model.path, dtype=torch.float32)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    trainer = Watched(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_dict(tokens_of(run)),
        processing_class=run.tokenizer,
        peft_config=lora if method == "lora" else None,
    )
    if method == "lora":  # start where we start
        start = {name: p for name, p in run.learner.model.named_parameters() if "lora_" in name}
        theirs = {name.removeprefix("base_model.model."): p for name, p in trainer.model.named_parameters()}
        with torch.no_grad():
            for name, p in start.items():
                theirs[name].copy_(p)
    trainer.train()
    return losses


SAME_METRICS = {
    "rewards/chosen": "rewards/chosen", "rewards/rejected": "rewards/rejected", "rewards/margin": "rewards/margins",
    "rewards/accuracy": "rewards/accuracies", "logprobs/chosen": "logps/chosen", "logprobs/rejected": "logps/rejected",
    "entropy": "entropy",
}  # fmt: skip


@pytest.mark.parametrize("reference", ["live", "precompute"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_dpo_equals_trl(
    make_config: Callable[..., RunConfig], pairs_file: Path, tmp_path: Path, method: str, reference: str
) -> None:
    config = make_config(
        data={"path": str(pairs_file), "eval_fraction": 0.0, "share_prompt": reference == "live"},
        objective={"name": "dpo", "reference": reference},
        method={"name": method} | ({"rank": 4, "alpha": 8} if method == "lora" else {}),
        optimizer={"name": "adamw", "lr": LR},
        train={"batch_size": PAIRS, "steps": STEPS},
    )
    run = build(config)
    theirs = their_losses(run, tmp_path / "trl", method, reference == "precompute")
    ours = our_losses(run)
    assert ours[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 1e-2, "nothing was learnt: the comparison would prove nothing"
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        for name, their_name in SAME_METRICS.items():
            if step == 0 and name == "rewards/accuracy":
                continue  # all rewards are 0 up to rounding: which of two is larger means nothing
            assert mine[name] == pytest.approx(other[their_name], rel=1e-4, abs=2e-4), name
