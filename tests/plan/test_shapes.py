"""Runs of large models are foreseen from their configuration alone, and agree with closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.plan.shapes import SHAPES, write_model, write_text
from tunesmith.config_file import config_from_dict
from tunesmith.plan.trace import Traced, trace
from tunesmith.run_data import open_data

TOKENS = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def foresee(folder: Path, name: str, precision: str, **sections: Any) -> Traced:
    """One row of 512 tokens in a step, all but the first of them targets."""
    tree = {
        "model": {"path": str(write_model(folder, name))},
        "data": {"path": str(write_text(folder, TOKENS)), "max_tokens": TOKENS, "pack": False},
        "objective": "pretrain", "train": {"batch_size": 1, "steps": 50, "micro_batch_tokens": TOKENS},
        "engine": {"name": "single", "device": "cpu"}, "output": str(folder / "run"), **sections,
    }  # fmt: skip
    return trace(open_data(config_from_dict(tree)), precision, kind="cuda")


def in_blocks(shape: dict[str, Any], active: bool = False) -> int:
    """Numbers in the matrices of all blocks; active: of those that a token meets."""
    width, heads, kv = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    attention = width * shape["head_dim"] * (2 * heads + 2 * kv)
    if experts := shape.get("num_experts"):
        met = shape["num_experts_per_tok"] if active else experts
        feed_forward = width * (3 * shape["moe_intermediate_size"] * met + experts)
    else:
        feed_forward = 3 * width * shape["intermediate_size"]
    return shape["num_hidden_layers"] * (attention + feed_forward)


def in_all(shape: dict[str, Any]) -> int:
    """Numbers of the whole model."""
    norms = shape["num_hidden_layers"] * 2 + 1
    of_heads = 2 * shape["num_hidden_layers"] * shape["head_dim"] if "num_experts" in shape else 0
    return (2 * shape["vocab_size"] + norms) * shape["hidden_size"] + of_heads + in_blocks(shape)


def attention_flops(shape: dict[str, Any]) -> int:
    """Forward: 2 for each of 2 products of all pairs of tokens; backward: 5 such products."""
    return 7 * 2 * TOKENS**2 * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]


def test_full_training_of_8b(folder: Path) -> None:
    shape = SHAPES["llama-8b"]
    found = foresee(folder, "llama-8b", "mixed", method="full", optimizer={"name": "adamw", "lr": 1e-5})
    assert found.parameters == found.trained == in_all(shape) == 8_030_261_248
    held = found.peaks["update"].kinds
    assert 0 <= held["weights"] - 4 * found.parameters < 2**16  # and the frequencies of rotary positions
    assert 0 <= held["optimizer state"] - 8 * found.parameters < 2**16  # and each matrix's count of updates
    assert held["gradients"] == 4 * found.parameters
    head = shape["vocab_size"] * shape["hidden_size"]
    assert found.flops == 6 * in_blocks(shape) * TOKENS + 6 * head * (TOKENS - 1) + attention_flops(shape)
    assert found.flops == pytest.approx(6 * found.parameters * TOKENS, rel=0.1)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-8b", 8_030_261_248), ("llama-70b", 70_553_706_496), ("qwen3-30b-a3b", 30_532_122_624)],
)
def test_lora(folder: Path, name: str, parameters: int) -> None:
    shape, rank = SHAPES[name], 16
    found = foresee(folder, name, "bf16", method={"name": "lora", "rank": rank, "targets": ["q_proj", "v_proj"]})
    assert found.parameters - found.trained == in_all(shape) == parameters
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    outputs = shape["head_dim"] * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    assert found.trained == rank * layers * (2 * width + outputs)
    held = found.peaks["update"].kinds
    assert 0 <= held["weights"] - 2 * parameters < 2**16
    assert held["adapter"] == 4 * found.trained
    assert held["optimizer state"] == 8 * found.trained + 4 * (4 * layers)
    assert held["gradients"] == 4 * found.trained
    active = in_blocks(shape, active=True) + shape["vocab_size"] * width
    assert found.flops == pytest.approx(
        4 * active * TOKENS + 6 * found.trained * TOKENS + attention_flops(shape), rel=0.02
    )


def test_chunks_of_8b(folder: Path) -> None:
    found = foresee(
        folder, "llama-8b", "bf16", method={"name": "chunk", "num_chunks": 16}, optimizer={"name": "adamw", "lr": 1e-5}
    )
    assert found.trained == found.parameters == 8_030_261_248
    # the master copy and two moments in fp32 of one chunk, and of the next one, which comes while the last step of a turn goes
    # on; cuts fall between rows, so that chunks are not all of one size
    of_chunk = 12 * found.parameters / 16
    assert 2 * of_chunk <= found.peaks["update"].kinds["optimizer state"] < 2.3 * of_chunk
    assert "on the host" not in found.peak.kinds
    assert found.peak.bytes < 0.25 * 16 * found.parameters  # what all at once would take


def test_chunks_within_a_budget(folder: Path) -> None:
    limit = 32 * 2**30
    adamw = {"name": "adamw", "lr": 1e-5}
    found = foresee(folder, "llama-8b", "bf16", method={"name": "chunk", "memory": "32GiB"}, optimizer=adamw)
    assert found.parameters == 8_030_261_248
    assert 0.75 * limit <= found.peak.bytes <= limit


def test_zeroth_order_of_8b(folder: Path) -> None:
    found = foresee(folder, "llama-8b", "bf16", method="zeroth", optimizer={"name": "sgd", "lr": 1e-6})
    assert found.parameters == 8_030_261_248
    assert found.peak.bytes < 1.2 * 2 * found.parameters
