"""Inside `Method.at_start` the model is what it was before training, to the bit, and outside nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import make_model
from tunesmith.config import RunConfig, SingleConfig
from tunesmith.config_file import config_from_dict
from tunesmith.engines import build_engine
from tunesmith.methods import Method, build_method
from tunesmith.types import Batch

SWITCHED_OFF: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "gaussian": {"name": "lora", "rank": 4, "init": "gaussian"},
    "orthogonal": {"name": "lora", "rank": 4, "init": "orthogonal"},
    "rslora": {"name": "lora", "rank": 4, "rslora": True, "dropout": 0.1},
    "embeddings": {"name": "lora", "rank": 4, "targets": ["embed_tokens", "q_proj"]},
    "saved whole": {"name": "lora", "rank": 4, "modules_to_save": ["lm_head"]},
}
COPIED: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "freeze": {"name": "freeze", "last_blocks": 1},
    "pissa": {"name": "lora", "rank": 4, "init": "pissa"},
}


def _batch() -> Batch:
    """Two rows of one sequence each."""
    tokens_BT = torch.randint(3, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    columns = torch.arange(10).expand(2, 10)
    return Batch(
        tokens_BT,
        columns,
        torch.tensor([[0], [1]]).expand(2, 10),
        (columns > 2).float(),
        torch.arange(2),
        torch.arange(2),
    )


def _config(method: dict[str, Any]) -> RunConfig:
    return config_from_dict({"model": "demo", "data": "demo", "output": "unused", "method": method})


def _bound(method_config: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Method]:
    """(model, engine, method), ready for a step."""
    config = _config(method_config)
    engine = build_engine(SingleConfig(device="cpu"), "fp32" if dtype == torch.float32 else "bf16")
    model, method = make_model("llama", dtype), build_method(config)
    method.adapt(model)
    model = engine.place(model)
    method.bind(model, engine)
    return model, engine, method


def _logprobs(model: Any, engine: Any, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        return engine.score(model, batch).logprobs_BT


def _train(model: Any, engine: Any, method: Method, batch: Batch, steps: int = 3) -> None:
    def loss_fn(micro_batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return -engine.score(model, micro_batch).logprobs_BT.sum(), {}

    model.train()
    for _ in range(steps):
        method.step(loss_fn, [batch], 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_an_adapter_is_switched_off_and_no_copy_kept(name: str, dtype: torch.dtype) -> None:
    batch = _batch()
    precision = "fp32" if dtype == torch.float32 else "bf16"
    engine = build_engine(SingleConfig(device="cpu"), precision)
    base = _logprobs(engine.place(make_model("llama", dtype)), engine, batch)
    _check_goes_back(SWITCHED_OFF[name], dtype, base, copied=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", COPIED)
def test_weights_trained_in_place_are_exchanged_with_a_copy(name: str, dtype: torch.dtype) -> None:
    model, engine, _ = _bound(COPIED[name], dtype)
    start = _logprobs(model, engine, _batch())
    if name != "pissa":  # its adapters and what they leave of the base are the base up to rounding
        base = _logprobs(engine.place(make_model("llama", dtype)), engine, _batch())
        assert torch.equal(start, base)
    _check_goes_back(COPIED[name], dtype, start, copied=True)


def _check_goes_back(method_config: dict[str, Any], dtype: torch.dtype, expected: Tensor, copied: bool) -> None:
    """After some steps the model is `expected` inside and its trained self outside, and trains on as if nothing had been."""
    batch = _batch()
    after: list[Tensor] = []
    for looks_back in (True, False):
        torch.manual_seed(0)
        model, engine, method = _bound(method_config, dtype)
        method.keep_start()
        torch.manual_seed(1)
        _train(model, engine, method, batch)
        if looks_back:
            trained = _logprobs(model, engine, batch)
            needs_grad = {name: p.requires_grad for name, p in model.named_parameters()}
            places = {name: p.data_ptr() for name, p in method.params.items()}
            with method.at_start():
                inside = _logprobs(model, engine, batch)
            assert torch.equal(inside, expected)
            assert not torch.equal(trained, expected)
            assert torch.equal(_logprobs(model, engine, batch), trained)
            assert {name: p.requires_grad for name, p in model.named_parameters()} == needs_grad
            assert {name: p.data_ptr() for name, p in method.params.items()} == places
        size = sum(p.numel() * p.element_size() for p in method.params.values())
        assert method.start_bytes() == (size if copied else 0)
        assert (method.start is not None) == copied
        torch.manual_seed(2)
        _train(model, engine, method, batch)
        after.append(_logprobs(model, engine, batch))
    assert torch.equal(*after)


def test_the_copy_is_of_the_start_after_a_resume_too() -> None:
    batch = _batch()
    model, engine, method = _bound(COPIED["full"])
    start = _logprobs(model, engine, batch)
    _train(model, engine, method, batch)
    saved = method.state_dict()

    model, engine, resumed = _bound(COPIED["full"])
    resumed.keep_start()
    resumed.load_state_dict(saved)
    with resumed.at_start():
        assert torch.equal(_logprobs(model, engine, batch), start)


def test_an_error_inside_leaves_the_trained_weights() -> None:
    batch = _batch()
    model, engine, method = _bound(COPIED["full"])
    method.keep_start()
    _train(model, engine, method, batch)
    trained = _logprobs(model, engine, batch)
    with pytest.raises(KeyboardInterrupt), method.at_start():
        raise KeyboardInterrupt
    assert torch.equal(_logprobs(model, engine, batch), trained)
