"""Rows cut over ranks: losses and gradients are those of a single device, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from tests.batches import left_padded, ragged_batch, ragged_samples
from tests.equal.ranks import on_ranks
from tests.equal.test_fsdp import check_equal
from tests.families import FAMILIES, SMALL, make_model
from tests.samples import make_samples
from tunesmith.config import FsdpConfig, FullConfig, LoraConfig, RunConfig, SftConfig, SgdConfig, SingleConfig
from tunesmith.config_file import config_from_dict
from tunesmith.config_objectives import DpoConfig, KtoConfig, OrpoConfig
from tunesmith.data.pack import collate
from tunesmith.engines import build_engine, context
from tunesmith.engines.context import wire_bytes
from tunesmith.engines.context_check import check_architecture
from tunesmith.errors import UserError
from tunesmith.helpers import Policy, StartReference
from tunesmith.learner import Learner
from tunesmith.methods import METHODS
from tunesmith.objectives import build_objective
from tunesmith.run import train
from tunesmith.tensors import whole
from tunesmith.types import Batch

LORA = LoraConfig(rank=4, alpha=8.0)

ON_TWO: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"pack": True},
    "left padded": {"left": True},
    "positions by the mask": {"family": "opt"},
    "accumulated": {"tokens": 24},
    "packed, accumulated": {"pack": True, "tokens": 16},
    "one sequence": {"rows": 1},
    "no target on a rank": {"rows": 1, "targets": 1},
    "checkpointed": {"pack": True, "engine": {"activation_checkpointing": True}},
    "lora": {"method": LORA, "tokens": 24},
    "lora on the head": {"method": LoraConfig(rank=4, alpha=8.0, targets=("lm_head",)), "pack": True},
    "dpo": {"objective": DpoConfig(), "tokens": 48},
    "dpo, lora, packed": {"objective": DpoConfig(), "method": LORA, "pack": True},
    "kto": {"objective": KtoConfig(), "pack": True},
    "orpo": {"objective": OrpoConfig(), "tokens": 48},
    "router": {"family": "qwen3_moe", "objective": SftConfig(router_loss=0.1), "pack": True, "tokens": 24},
    **{
        f"{family} {name}": {"family": family, "pack": pack}
        for family in ("qwen3", "gemma3_text", "gpt2", "qwen3_moe")
        for name, pack in (("padded", False), ("packed", True))
    },
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "four parts": {"context": 4, "pack": True},
    "four parts, window": {"context": 4, "family": "gemma3_text"},
    "two of two": {"tokens": 24},
    "two of two, packed": {"pack": True, "tokens": 16, "family": "qwen3_moe"},
    "layers cut, too": {"engine": {"tensor_parallel": 2}, "pack": True},
    "two replicas": {"tokens": 24, "engine": {"replicate": 2}},
    "two of two, dpo": {"objective": DpoConfig(), "tokens": 24},
    "two of two, kto, lora": {"objective": KtoConfig(), "method": LORA, "tokens": 24},
    "more ranks than rows": {"rows": 1},
}

BOUND = {"gemma3_text": 1e-7}
"""1e-12 else. Gemma's own code sums in fp32 whatever the dtype."""


def batch_of(case: dict[str, Any]) -> Batch:
    section, pack = case.get("objective", SftConfig()), case.get("pack", False)
    if section.name == "sft":
        batch = ragged_batch(pack)
    else:
        one = ragged_samples()
        tokens, weights = zip(*(one.sequences(n)[0] for n in range(8)), strict=True)
        pairs = section.name != "kto"
        labels = [0.0] * 4 if pairs else [1.0, 0.0] * 4
        samples = make_samples(tokens, weights, group_size=2 if pairs else 1, labels=labels)
        batch = collate(samples, range(len(samples)), max_tokens=16, pack=pack)
    batch = left_padded(batch) if case.get("left") else batch
    batch = batch.rows(0, case["rows"]) if "rows" in case else batch
    if "targets" in case:
        batch.weights_BT[:, case["targets"] + 1 :] = 0.0
    return batch


def gradients(case: dict[str, Any], engine_config: Any) -> dict[str, Tensor]:
    """Gradients of one step that is hardly taken, what is said of it, and the held-out loss."""
    torch.manual_seed(0)
    section = case.get("method", FullConfig())
    method = METHODS[section.name](section, SgdConfig(lr=1e-30), max_grad_norm=None)
    model = make_model(case.get("family", "llama"), torch.float64)
    learner = Learner(model, build_engine(engine_config, "fp32"), method, case.get("tokens", 10**6))
    method.keep_start()
    move(method)
    objective = build_objective(case.get("objective", SftConfig()))
    helpers = {"policy": Policy(learner), "reference": StartReference(learner)}
    batch = batch_of(case)
    (ready,) = objective.prepare(batch, helpers)
    metrics = learner.step(objective, ready, lr=1e-30)
    grads = {name: whole(p.grad).clone() for name, p in method.params.items() if p.grad is not None}
    held_out = learner.evaluate(objective, [batch], helpers)
    return (
        grads
        | {f"metric {name}": value for name, value in metrics.items()}
        | {f"held out {name}": value for name, value in held_out.items()}
    )


def move(method: Any) -> None:
    """Away from the start, by the same steps on one device and on ranks: the reference then differs from the model."""
    with torch.no_grad():
        for p in method.params.values():
            p.add_(0.1 * p.sin() + (0.01 if p.ndim == 2 else 0.0))


def all_gradients(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        name: gradients(
            case, FsdpConfig(device="cpu", context_parallel=case.get("context", 2), **case.get("engine", {}))
        )
        for name, case in cases.items()
    }


@pytest.mark.parametrize(("world", "cases"), [(2, ON_TWO), (4, ON_FOUR)], ids=["2 ranks", "4 ranks"])
def test_gradients_of_cut_rows_are_those_of_one_device(
    world: int, cases: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    ranks = on_ranks(world, all_gradients, tmp_path, cases)
    for name, case in cases.items():
        alone, bound = gradients(case, SingleConfig(device="cpu")), BOUND.get(case.get("family", ""), 1e-12)
        assert max(float(value.abs().max()) for key, value in alone.items() if "." in key) > 1e-4, name
        for found in (of_rank[name] for of_rank in ranks):
            assert found.keys() == alone.keys(), name
            for key, value in alone.items():
                error, largest = (float(x.abs().max()) for x in (found[key].double() - value.double(), value))
                assert error <= bound * max(1.0, largest), (name, key)


# --- whole runs


WHOLE_RUNS = ("dpo", "kto", "reward", "prm", "classify", "distill")


def run_all(trees: dict[str, dict[str, Any]]) -> None:
    for tree in trees.values():
        train(config_from_dict(tree))


def test_whole_runs_on_cut_rows(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """Those among them with value heads, a teacher, a reference, and prompts that would be shared."""
    trees = {}
    for name in WHOLE_RUNS:
        config = make_config(
            **objective_sections(name),
            method={"name": "lora", "rank": 4}, optimizer={"name": "sgd", "lr": 0.1},
            train={"steps": 2, "batch_size": 5, "micro_batch_tokens": 300},
        )  # fmt: skip
        trees[name] = config.model_dump(mode="json")
    alone = {name: {**tree, "output": f"{tmp_path}/alone/{name}"} for name, tree in trees.items()}
    engine = {"name": "fsdp", "device": "cpu", "context_parallel": 2}
    ranks = {name: {**tree, "engine": engine, "output": f"{tmp_path}/ranks/{name}"} for name, tree in trees.items()}
    run_all(alone)
    on_ranks(2, run_all, tmp_path, ranks)
    for name in trees:
        check_equal(tmp_path / "ranks" / name, tmp_path / "alone" / name, bound=1e-6)


# --- refusals


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mamba", {}, "MambaForCausalLM has layers that are no plain attention"),
        ("falcon_h1", {}, "FalconH1ForCausalLM has layers that are no plain attention"),
        ("gemma2", {}, "Gemma2ForCausalLM has layers that are no plain attention"),
        ("gpt_oss", {}, "GptOssForCausalLM has layers that are no plain attention"),
        ("llama4_text", {}, "llama4_text has layers of chunked_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "depend on how long",
        ),
    ],
)
def test_what_needs_whole_rows_is_refused_before_loading(family: str, settings: dict[str, Any], message: str) -> None:
    base = {} if family in ("llama4_text", "gpt_oss") else {**SMALL, **FAMILIES.get(family, {})}
    with pytest.raises(UserError, match=message):
        check_architecture(CONFIG_MAPPING[family](**{**base, **settings}))


def test_other_attention_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.attention is eager"):
        check_architecture(CONFIG_MAPPING["llama"](**SMALL), "eager")


def refusals(families: list[str]) -> list[str]:
    """For each of them why it does not go, or nothing."""
    found = []
    for family in families:
        try:
            build_engine(FsdpConfig(device="cpu", context_parallel=2), "fp32").place(make_model(family, torch.float64))
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


def test_a_model_that_reads_cut_rows_otherwise_is_refused(tmp_path: Path) -> None:
    """Also where nothing is known of its architecture beforehand."""
    for mamba, falcon, llama in on_ranks(2, refusals, tmp_path, ["mamba", "falcon_h1", "llama"]):
        assert "mamba" in mamba
        assert "falcon_h1" in falcon
        assert not llama


def received_bytes() -> list[int]:
    """What a rank gets from others for keys and values in a step; with blocks computed once, and twice."""
    found, gather, scatter = [], context.all_gather, context.reduce_scatter

    def counting(exchange: Any) -> Any:
        def count(into: Tensor, of: Tensor, group: Any) -> None:
            found[-1] += max(into.nbytes, of.nbytes) - min(into.nbytes, of.nbytes)
            exchange(into, of, group=group)

        return count

    for checkpointing in (False, True):
        engine = build_engine(
            FsdpConfig(device="cpu", context_parallel=2, activation_checkpointing=checkpointing), "fp32"
        )
        method = METHODS["full"](FullConfig(), SgdConfig(lr=0.1), max_grad_norm=None)
        learner = Learner(make_model("llama", torch.float64), engine, method, 10**6)
        found.append(0)
        context.all_gather, context.reduce_scatter = counting(gather), counting(scatter)
        learner.step(build_objective(SftConfig()), ragged_batch(pack=False), lr=0.1)
        context.all_gather, context.reduce_scatter = gather, scatter
    return found


def test_as_many_bytes_go_over_the_wire_as_foretold(tmp_path: Path) -> None:
    rows, tokens = ragged_batch(pack=False).tokens_BT.shape
    tokens = -(-tokens // 4) * 4  # in chunks for two ranks
    foretold = [
        wire_bytes(2, 2 * 2 * 8, rows, tokens, ranks=2, element_bytes=8, checkpointing=twice) for twice in (False, True)
    ]
    assert on_ranks(2, received_bytes, tmp_path) == [foretold, foretold]


def test_bytes_on_the_wire() -> None:
    """2 layers of 2 heads of 8, keys and values in 4 bytes; three quarters of 3 rows of 40 tokens come from the others."""
    one_way = 3 * 30 * (2 * 2 * 8) * 4
    assert wire_bytes(2, 32, rows=3, tokens=40, ranks=4, element_bytes=4) == 2 * 2 * one_way
    assert wire_bytes(2, 32, rows=3, tokens=40, ranks=4, element_bytes=4, checkpointing=True) == 3 * 2 * one_way
    assert wire_bytes(2, 32, rows=3, tokens=40, ranks=4, element_bytes=4, trained_layers=1) == 3 * one_way
