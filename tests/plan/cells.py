"""Runs of tiny models for which the plan is compared with what happens, and the comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.families import make_model, train_tokenizer
from tunesmith.assemble import Run
from tunesmith.config import RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.data.dataset import EvaluationBatches
from tunesmith.engines import with_engine
from tunesmith.plan.flops import FORMULAS
from tunesmith.plan.ledger import Ledger, Peak
from tunesmith.plan.trace import Traced, first, first_of_two_alike, keep_numbers, recorded, take_step, trace
from tunesmith.plan.worst import worst_batch
from tunesmith.run import build
from tunesmith.run_data import open_data

SHORT, LONG = 48, 200
"""Tokens of the longest sample."""


@dataclass(frozen=True)
class Cell:
    """One run; what is not said is as usual: fp32, AdamW, one sequence a row, two micro-batches a step."""

    family: str
    method: str = "lora"
    objective: str = "sft"
    precision: str = "fp32"
    optimizer: str = "adamw"
    tokens: int = SHORT
    pack: bool = False
    checkpointing: bool = False
    micro_batches: int = 2
    of_method: Mapping[str, Any] = field(default_factory=dict)
    of_objective: Mapping[str, Any] = field(default_factory=dict)
    of_optimizer: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        marks = [self.precision, f"{self.tokens}t", *["packed"] * self.pack, *["checkpointing"] * self.checkpointing]
        more = {**self.of_method, **self.of_objective, **self.of_optimizer}
        said = [f"{name}={value}" for name, value in more.items()]
        return " ".join([self.family, self.method, self.objective, self.optimizer, *marks, *said])


LORA: dict[str, Any] = {"rank": 4}
FREEZE: dict[str, Any] = {"last_blocks": 1}
CHUNK: dict[str, Any] = {"num_chunks": 3, "row_alignment": 8, "updates_per_chunk": 1, "order": "ascending"}
PROBES: dict[str, Any] = {"queries": 2}
MUON, LION, SGD, ADAFACTOR, ADAMW_8 = "muon", "lion", "sgd", "adafactor", "adamw8bit"

CELLS = (
    Cell("llama", of_method=LORA),
    Cell("llama", of_method=LORA, precision="bf16", pack=True, tokens=LONG, checkpointing=True),
    Cell("llama", of_method=LORA | {"dora": True}, precision="mixed"),
    Cell("llama", of_method=LORA | {"dropout": 0.1, "rslora": True}, tokens=LONG),
    Cell("llama", of_method=LORA | {"init": "pissa"}),
    Cell("llama", of_method=LORA | {"modules_to_save": ["lm_head"]}, precision="bf16", tokens=LONG),
    Cell("llama", "full", precision="bf16", optimizer=LION, pack=True),
    Cell("llama", "full", "pretrain", precision="mixed", optimizer=MUON, tokens=LONG, checkpointing=True),
    Cell("llama", "full", optimizer=ADAMW_8, tokens=LONG),
    Cell("llama", "full", optimizer=SGD, of_optimizer={"momentum": 0.9}, micro_batches=1),
    Cell("llama", "chunk", of_method=CHUNK, precision="bf16"),
    Cell("llama", "chunk", of_method=CHUNK | {"state": "8bit", "offload": "host"}, precision="bf16", tokens=LONG),
    Cell("llama", "chunk", of_method=CHUNK | {"memory": "64GiB"}, pack=True),
    Cell("llama", "chunk", of_method=CHUNK | {"weights": "stream", "offload": "host"}, precision="bf16", checkpointing=True),
    Cell("qwen3", "chunk", of_method=CHUNK | {"weights": "stream", "offload": "disk"}, tokens=LONG),
    Cell("llama", "chunk", of_method=CHUNK | {"rounding": "stochastic"}, precision="bf16", micro_batches=1),
    Cell("llama", "zeroth", of_method=PROBES | {"scorer": "batched"}, precision="bf16", optimizer=SGD),
    Cell("llama", "zeroth", of_method=PROBES | {"scorer": "in_place", "directions": "dense"}, optimizer=SGD),
    Cell("llama", "zeroth", of_method=PROBES | {"adapter_rank": 4, "directions": "dense"}, optimizer=SGD, tokens=LONG),
    Cell("llama", of_method=LORA, objective="dpo"),
    Cell("llama", "full", "dpo", precision="mixed", of_objective={"reference": "live"}),
    Cell("llama", "full", "dpo", of_objective={"reference": "precompute"}, tokens=LONG),
    Cell("llama", of_method=LORA, objective="kto", precision="bf16"),
    Cell("llama", of_method=LORA, objective="orpo", checkpointing=True, tokens=LONG),
    Cell("llama", of_method=LORA, objective="reward", precision="bf16"),
    Cell("llama", of_method=LORA, objective="classify"),
    Cell("llama", "full", "prm", precision="mixed"),
    Cell("llama", of_method=LORA, objective="distill"),
    Cell("llama", "full", "distill", of_objective={"top_k": 8, "scores": "precompute"}, tokens=LONG),
    Cell("llama", "zeroth", "classify", of_method=PROBES, optimizer=SGD),
    Cell("qwen3", of_method=LORA, precision="mixed", tokens=LONG, checkpointing=True),
    Cell("qwen3", "full", optimizer=ADAFACTOR, pack=True),
    Cell("qwen3", "chunk", of_method=CHUNK, precision="bf16", optimizer=LION, tokens=LONG),
    Cell("qwen3", "chunk", "dpo", of_method={"layout": "layers", "updates_per_chunk": 1}, precision="bf16"),
    Cell("qwen3", "freeze", of_method={"patterns": ["*.q_proj.*"]}, precision="bf16", pack=True),
    Cell("qwen3_moe", of_method=LORA, precision="bf16", pack=True),
    Cell("qwen3_moe", "full", precision="mixed", tokens=LONG, checkpointing=True),
    Cell("qwen3_moe", "chunk", of_method=CHUNK),
    Cell("qwen3_moe", "zeroth", of_method=PROBES, optimizer=SGD, precision="bf16"),
    Cell("qwen3_moe", of_method=LORA, of_objective={"router_loss": 0.01}),
    Cell("gemma2", of_method=LORA, tokens=LONG),
    Cell("gemma2", "full", precision="bf16", checkpointing=True),
    Cell("gemma2", "chunk", of_method=CHUNK, precision="bf16"),
    Cell("gemma3_text", of_method=LORA | {"dora": True}, precision="bf16", tokens=LONG, pack=True),
    Cell("gemma3_text", "full", "simpo", precision="mixed"),
    Cell("gemma3_text", "freeze", of_method=FREEZE, tokens=LONG),
    Cell("gpt2", of_method=LORA, tokens=LONG),
    Cell("gpt2", "full", "pretrain", precision="bf16", optimizer=MUON),
    Cell("gpt2", "chunk", of_method=CHUNK),
    Cell("gpt_neox", of_method=LORA, precision="mixed", checkpointing=True),
    Cell("gpt_neox", "full", tokens=LONG, pack=True),
    Cell("opt", of_method=LORA),
    Cell("opt", "freeze", of_method=FREEZE, precision="bf16", tokens=LONG),
    Cell("phi", of_method=LORA, tokens=LONG, precision="bf16"),
    Cell("phi", "full", optimizer=SGD),
    Cell("phi3", of_method=LORA, pack=True),
    Cell("phi3", "chunk", of_method=CHUNK, precision="bf16", tokens=LONG),
    Cell("mixtral", of_method=LORA, precision="bf16"),
    Cell("mixtral", "full", checkpointing=True, tokens=LONG),
    Cell("olmo2", of_method=LORA | {"dora": True}, tokens=LONG),
    Cell("olmo2", "full", "orpo", precision="mixed"),
    Cell("granite", of_method=LORA, tokens=LONG, pack=True),
    Cell("granite", "full", precision="bf16"),
    Cell("cohere", of_method=LORA),
    Cell("cohere", "full", precision="mixed", tokens=LONG, checkpointing=True),
    Cell("falcon_h1", of_method=LORA),
    Cell("falcon_h1", "full", precision="bf16", tokens=LONG, checkpointing=True),
    Cell("mamba", of_method=LORA, tokens=LONG),
    Cell("mamba", "full", optimizer=LION),
)  # fmt: skip


class Workplace:
    """A folder with models and data, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        train_tokenizer().save_pretrained(folder / "tokenizer")

    def model(self, family: str, seed: int = 0) -> Path:
        """A tiny random model with a tokenizer."""
        made = self.folder / f"{family}-{seed}"
        if not made.exists():
            make_model(family, seed=seed).save_pretrained(made)
            for file in (self.folder / "tokenizer").iterdir():
                (made / file.name).write_bytes(file.read_bytes())
        return made

    def data(self, form: str, tokens: int) -> dict[str, Any]:
        """A data section: 24 records of ragged length, the longest of them cut at so many tokens."""
        file = self.folder / f"{form}-{tokens}.jsonl"
        if not file.exists():
            records = [_record(form, n, tokens) for n in range(24)]
            file.write_text("".join(json.dumps(record) + "\n" for record in records))
        labels = {"labels": ["even", "odd"]} if form == "choices" else {}
        return {"path": str(file), "max_tokens": tokens, "eval_fraction": 0.2, **labels}

    def config(self, cell: Cell) -> RunConfig:
        from tunesmith.objectives import OBJECTIVES

        kind = OBJECTIVES[cell.objective]
        teacher = {"teacher": str(self.model("llama", seed=1))} if "teacher" in kind.needs else {}
        rows = {"pairs": 2}.get(kind.form, 1) * 4
        return config_from_dict(
            {
                "model": {"path": str(self.model(cell.family)), "precision": cell.precision},
                "data": {**self.data(kind.form, cell.tokens), "pack": cell.pack},
                "objective": {"name": cell.objective, **teacher, **cell.of_objective},
                "method": {"name": cell.method, **cell.of_method},
                "optimizer": {"name": cell.optimizer, "lr": 1e-4, **cell.of_optimizer},
                "engine": {"name": "single", "device": "cpu", "activation_checkpointing": cell.checkpointing},
                "train": {
                    "batch_size": 4,
                    "steps": 12,
                    "micro_batch_tokens": rows * cell.tokens // cell.micro_batches,
                    "foresee": False,
                },
                "output": str(self.folder / "run"),
            }
        )


def _record(form: str, n: int, tokens: int) -> dict[str, Any]:
    def said(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    question, answer = f"What follows {n}?", f"After {n} comes {n + 1}." + " And so on." * (n % 5 * tokens // 24)
    turns = {"prompt": [said("user", question)], "completion": [said("assistant", answer)]}
    if form == "pairs":
        return {
            "prompt": turns["prompt"],
            "chosen": turns["completion"],
            "rejected": [said("assistant", "No." * (1 + n % 4))],
        }
    if form == "feedback":
        return turns | {"label": bool(n % 3)}
    if form == "choices":
        return {"text": question if n % 2 else answer, "label": "odd" if n % 2 else "even"}
    if form == "steps":
        steps = (
            {"completions": ["And so on.", "No."], "labels": [True, False]}
            if n % 2
            else {"completions": [answer], "labels": [True]}
        )
        return {"prompt": question, **steps}
    return {"messages": [*turns["prompt"], *turns["completion"]]}


@dataclass(frozen=True)
class Compared:
    """A run's plan, and what the run took."""

    cell: Cell
    foreseen: Traced
    measured: Mapping[str, Peak]
    """By phase."""
    flops: int
    """By torch's own counter, of what was traced."""

    @property
    def bytes(self) -> int:
        """Measured at the peak."""
        return max(peak.bytes for peak in self.measured.values())

    @property
    def error(self) -> float:
        """Of the foreseen peak, relative; below 0 where it takes more than was foreseen."""
        return self.foreseen.peak.bytes / self.bytes - 1


def compare(config: RunConfig, cell: Cell) -> Compared:
    """Foresee a run and begin it, with the batch that takes most."""
    run = build(config)
    measured = measure(run)
    flops = counted_flops(run)
    return Compared(cell, trace(open_data(with_engine(config)), run.config.model.precision), measured, flops)


def measure(run: Run) -> Mapping[str, Peak]:
    """What a run on the CPU holds at most: each step twice, and evaluations."""
    keep_numbers(run.config)
    ledger, batch, config = Ledger(), worst_batch(run), run.config
    held_out = EvaluationBatches(run.held_out, config.train.batch_size, config.data.max_tokens, run.pack, run.share)
    with recorded(run, ledger):
        for _ in range(2 * num_turns(run)):
            take_step(run, batch, ledger)
            with torch.no_grad():
                run.learner.sums(run.objective, held_out, run.helpers)
    if config.optimizer.name == "adamw8bit":  # here it runs uncompiled
        ledger.peaks.pop("update", None)
    return dict(ledger.peaks)


def counted_flops(run: Run) -> int:
    """Of a step of what is traced, on average over the steps that differ."""
    batch, number = first(run, worst_batch(run)), num_turns(run)
    alike = first_of_two_alike(run, batch)
    batch = batch if alike is None else alike
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        for _ in range(number):
            for ready in run.objective.prepare(batch, run.helpers):
                run.learner.step(run.objective, ready, 1e-6)
    return counter.get_total_flops() // number


def num_turns(run: Run) -> int:
    """Steps until each part of a model that trains in parts has had its turn."""
    chunks = getattr(run.learner.method, "chunks", [()])
    return len(chunks)


def table(found: Sequence[Compared]) -> str:
    """Bytes at the peak of each cell, the phase it is in, and the error; the largest errors first."""
    lines = [f"{'foreseen':>10} {'measured':>10} {'error':>8}  phase       cell"]
    for one in sorted(found, key=lambda one: -abs(one.error)):
        foreseen = one.foreseen
        lines.append(f"{foreseen.peak.bytes:10} {one.bytes:10} {one.error:+8.2%}  {foreseen.phase:10}  {one.cell}")
    return "\n".join(lines)


SEEN_BY_ALLOCATOR = (
    Cell("llama", of_method=LORA, tokens=LONG),
    Cell("llama", "full", "dpo", precision="mixed", of_objective={"reference": "live"}),
    Cell("gpt2", "full", "pretrain", precision="bf16", optimizer=MUON),
    Cell("qwen3_moe", "full", precision="mixed", tokens=LONG, checkpointing=True),
)


def allocated(config: RunConfig) -> tuple[int, int]:
    """(bytes of tensors at the peak of a step, the same by what torch's CPU allocator gives out and takes back)."""
    run = build(config)
    batch, ledger = worst_batch(run), Ledger()
    for _ in range(2):
        take_step(run, batch, Ledger())
    with recorded(run, ledger):
        held = ledger.total
        take_step(run, batch, ledger)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take_step(run, batch, Ledger())
    found: Any = profiler.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(peak.bytes for peak in ledger.peaks.values()), held + max(accumulate(changes))
