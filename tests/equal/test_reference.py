"""Our numbers against transformers', PEFT's and torch's own, in loops written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.batches import ragged_batch, ragged_samples
from tests.families import FAMILIES, make_model
from tests.samples import make_samples
from tunesmith.config import AdamWConfig, FullConfig, LoraConfig, RunConfig, SftConfig, SgdConfig, SingleConfig
from tunesmith.data.pack import collate
from tunesmith.engines import build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS, Method
from tunesmith.objectives import build_objective
from tunesmith.run import build, train
from tunesmith.types import Batch


def make_learner(model: Any, method: Method) -> Learner:
    return Learner(model, build_engine(SingleConfig(device="cpu"), "fp32"), method, 10**6)


def one_sequence(tokens: list[int], targets_from: int) -> Batch:
    weights = np.array([float(t >= targets_from) for t in range(len(tokens))], np.float32)
    return collate(make_samples([tokens], [weights]), [0], max_tokens=len(tokens), pack=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_transformers_own(family: str) -> None:
    """`model(input_ids, labels=…)` on one sequence."""
    tokens = torch.arange(3, 27)[None]
    labels = tokens.clone()
    labels[:, :10] = -100
    theirs = make_model(family, torch.float64)
    theirs.config.output_router_logits = False
    loss = theirs(input_ids=tokens, labels=labels).loss
    loss.backward()

    method = METHODS["full"](FullConfig(), SgdConfig(lr=1e-30), None)
    learner = make_learner(make_model(family, torch.float64), method)
    metrics = learner.step(build_objective(SftConfig()), one_sequence(tokens[0].tolist(), targets_from=10), lr=1e-30)
    # transformers computes its loss in fp32 whatever the model's dtype: the comparison ends there
    assert float(metrics["loss"]) == pytest.approx(float(loss), abs=2e-6)
    for name, p in theirs.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(method.params[name].grad, p.grad, rtol=1e-4, atol=2e-6, msg=name)


def test_adamw_steps_equal_a_loop_by_hand_bit_for_bit() -> None:
    """Full AdamW in fp32. 16 targets a batch, so that dividing by the count is exact wherever it happens."""
    tokens = [[(7 * s + 3 * t) % 300 + 3 for t in range(24)] for s in range(5)]
    method = METHODS["full"](FullConfig(), AdamWConfig(lr=1e-2, weight_decay=0.1), max_grad_norm=1.0)
    learner = make_learner(make_model("llama"), method)
    for row in tokens:
        learner.step(build_objective(SftConfig()), one_sequence(row, targets_from=8), lr=1e-2)

    model = make_model("llama").train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for row in tokens:
        ids = torch.tensor([row])
        hidden = model.model(input_ids=ids)[0][0, 7:-1]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[0, 8:], reduction="sum") / 16
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    ours = dict(learner.model.named_parameters())
    unequal = [name for name, p in model.named_parameters() if not torch.equal(p, ours[name])]
    assert unequal == []
    start = dict(make_model("llama").named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"rslora": True},
        {"dora": True},
        {"init": "pissa"},
        {"modules_to_save": ("lm_head",)},
        {"targets": ("q_proj",)},
    ],
    ids=lambda variant: next(iter(variant), "plain"),
)
def test_lora_equals_peft_in_a_loop_by_hand(variant: dict[str, Any]) -> None:
    import peft

    batch = ragged_batch(pack=False)
    method = METHODS["lora"](
        LoraConfig(rank=4, alpha=8, lr_ratio=4.0, **variant), SgdConfig(lr=0.1), max_grad_norm=None
    )
    model = make_model("llama")
    torch.manual_seed(1)
    learner = make_learner(model, method)
    for _ in range(3):
        learner.step(build_objective(SftConfig()), batch, lr=0.1)

    base = make_model("llama")
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora="rslora" in variant, use_dora="dora" in variant,
        init_lora_weights=variant.get("init", True), target_modules=list(variant.get("targets", ())) or "all-linear",
        modules_to_save=list(variant.get("modules_to_save", ())) or None,
    )  # fmt: skip
    model = peft.get_peft_model(base, settings).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [p], "lr": 0.4 if "lora_B" in name else 0.1} for name, p in trained.items()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attention = (batch.sequence_BT >= 0).long()
    for _ in range(3):
        logits = model(input_ids=batch.tokens_BT, attention_mask=attention).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.tokens_BT[:, 1:], reduction="none")
        loss = (losses * batch.weights_BT[:, 1:]).sum() / batch.weights_BT.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    prefix = "base_model.model."
    assert {prefix + name for name in method.params} == set(trained)
    for name, p in method.params.items():
        torch.testing.assert_close(p, trained[prefix + name], rtol=1e-4, atol=1e-6, msg=name)


VARIANTS = [
    {"name": "full"},
    {"name": "freeze", "last_blocks": 1},
    {"name": "lora", "rank": 4},
    {"name": "lora", "rank": 4, "dora": True},
    {"name": "lora", "rank": 4, "init": "pissa"},
    {"name": "lora", "rank": 4, "rslora": True, "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("method", VARIANTS, ids=lambda m: "-".join(str(v) for v in m.values()))
def test_the_saved_model_gives_the_same_logits(make_config: Callable[..., RunConfig], method: dict[str, Any]) -> None:
    """Loaded by transformers or PEFT as is, from the folder that a run leaves."""
    config = make_config(method=method, train={"steps": 3})
    result = train(config)
    trained = build(config)
    assert trained.steps == 3
    state = torch.load(result.folder / "checkpoints/step-3/state.pt", weights_only=True)
    trained.learner.method.load_state_dict(state)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = trained.learner.model.eval()(input_ids=tokens).logits
        found = load_as_users_do(result.folder / "model")(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    untrained = make_model("llama")(input_ids=tokens).logits
    assert (found - untrained).abs().max() > 1e-3


def load_as_users_do(folder: Path) -> Any:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def test_ragged_samples_are_ragged() -> None:
    samples = ragged_samples()
    assert len(set(samples.lengths()[:, 0].tolist())) > 3
    assert set(samples.parts[0].weights.tolist()) == {0.0, 0.5, 1.0, 2.0}
