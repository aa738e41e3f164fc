"""The same numbers as TRL's trainers, losses and gradients, from the same log-probabilities in fp64."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.objectives.scored import PAIR_WEIGHTS, POLICY, REFERENCE, logprobs, make_batch, prepared, ragged_weights
from tunesmith.config_objectives import (
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    RewardConfig,
    SftConfig,
    SimpoConfig,
)
from tunesmith.objectives import Objective, build_objective
from tunesmith.objectives.kto import mismatched
from tunesmith.objectives.sequences import weighted_sums
from tunesmith.types import Batch, Scores

pytest.importorskip("trl")

NAMES = {"js": "js_divergence", "alpha": "alpha_divergence"}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, check_dtype=False)


def scored(batch: Batch) -> Scores:
    leaf = logprobs(batch).requires_grad_()
    return Scores(leaf, observed={"entropy": torch.ones_like(leaf)})


def ours(objective: Objective, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(mean loss, its gradient by log-probability, metrics)."""
    ready = prepared(objective, batch)
    scores = scored(ready)
    loss, metrics = objective.loss(scores, ready)
    loss = loss / objective.count(ready)
    loss.backward()
    assert scores.logprobs_BT.grad is not None
    return loss.detach(), scores.logprobs_BT.grad, {name: x[0] / x[1] for name, x in metrics.items()}


def trainer(**fields: Any) -> Any:
    """What a trainer's loss reads of it."""
    model = torch.nn.Module()
    model.is_gradient_checkpointing = False  # type: ignore[assignment]
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )
    common = {
        "model": model, "accelerator": accelerator, "aux_loss_enabled": False, "_total_train_tokens": 0, "_tp_size": 1,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }  # fmt: skip
    return SimpleNamespace(**common | fields)


def on_targets(leaf: Tensor, batch: Batch) -> Tensor:
    return leaf * (batch.weights_BT != 0)


class Model:
    """Says fixed log-probabilities, [sequences, length - 1]."""

    def __init__(self, logprobs_NT: Tensor) -> None:
        self.logprobs_NT = logprobs_NT
        self.is_gradient_checkpointing = False

    def __call__(self, **_inputs: Any) -> Any:
        x = self.logprobs_NT
        return SimpleNamespace(log_probs=x, entropy=torch.ones_like(x), mean_logits=x, is_top1=x > -1)


PAIRS = make_batch(PAIR_WEIGHTS, group_size=2)
ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
"""TRL's: all chosen answers first."""


def theirs_of_pairs(
    config: DpoConfig, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
    from trl.trainer.dpo_trainer import DPOTrainer

    leaf = logprobs(PAIRS).to(dtype).requires_grad_()
    fake = trainer(
        ld_alpha=None if config.ld_alpha == 1 else config.ld_alpha,
        precompute_ref_logps=False,
        ref_model=Model(REFERENCE.logprobs(PAIRS).to(dtype)[ORDER][:, 1:]),
        f_divergence_type=NAMES.get(config.f_divergence, config.f_divergence),
        f_alpha_divergence_coef=1 - config.alpha_divergence,
        loss_types=list(config.loss),
        loss_weights=list(config.loss.values()),
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=config.discopop_tau, gradient_checkpointing_kwargs=None),
    )
    inputs = {
        "input_ids": PAIRS.tokens_BT[ORDER],
        "attention_mask": (PAIRS.sequence_BT >= 0).long()[ORDER],
        "completion_mask": (PAIRS.weights_BT != 0).long()[ORDER],
    }
    loss = DPOTrainer._compute_loss(fake, Model(on_targets(leaf, PAIRS)[ORDER][:, 1:]), inputs, False)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, fake._metrics["train"]


PLAIN = [
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "apo_zero",
    "apo_down",
    "discopop",
]


@pytest.mark.parametrize(
    "config",
    [
        *(DpoConfig(loss=name, beta=0.3) for name in PLAIN),
        *(DpoConfig(loss=name, beta=0.3, label_smoothing=0.1) for name in ("robust", "exo_pair", "aot")),
        *(DpoConfig(loss=name, beta=0.3, ld_alpha=0.4) for name in PLAIN),
        *(
            DpoConfig(loss=name, beta=0.3, f_divergence=f)
            for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "discopop")
            for f in ("forward_kl", "js")
        ),
        DpoConfig(loss={"sigmoid": 0.8, "bco_pair": 0.2}),
    ],
    ids=lambda config: f"{'+'.join(config.loss)}-{config.label_smoothing}-{config.ld_alpha}-{config.f_divergence}",
)
def test_dpo(config: DpoConfig) -> None:
    loss, grad, metrics = ours(build_objective(config), PAIRS)
    their_loss, their_grad, their_metrics = theirs_of_pairs(config)
    assert_close(loss, their_loss)
    assert_close(grad, their_grad)
    names = {
        "rewards/chosen": "rewards/chosen",
        "rewards/rejected": "rewards/rejected",
        "rewards/accuracy": "rewards/accuracies",
        "rewards/margin": "rewards/margins",
        **({"logprobs/chosen": "logps/chosen", "logprobs/rejected": "logps/rejected"} if config.ld_alpha == 1 else {}),
    }
    for name, theirs in names.items():
        assert metrics[name].item() == pytest.approx(their_metrics[theirs][0], rel=1e-6)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_alpha_divergence_is_theirs_of_one_minus_alpha(alpha: float) -> None:
    """Theirs knows no fp64."""
    config = DpoConfig(beta=0.3, f_divergence="alpha", alpha_divergence=alpha)
    loss, grad, _ = ours(build_objective(config), PAIRS)
    their_loss, their_grad, _ = theirs_of_pairs(config, torch.float32)
    torch.testing.assert_close(loss.float(), their_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.float(), their_grad, rtol=1e-4, atol=1e-6)


def test_the_likelihood_beside_dpo_is_theirs_where_answers_are_equally_long() -> None:
    """TRL's `sft` is a mean over all tokens, ours one over answers."""
    from trl.trainer.dpo_trainer import DPOTrainer

    batch = make_batch(ragged_weights((6, 8, 7, 5), (2, 2, 3, 3)), group_size=2)
    order = torch.tensor([0, 2, 1, 3])
    leaf = logprobs(batch).requires_grad_()
    fake = trainer(
        ld_alpha=None, precompute_ref_logps=False, ref_model=Model(REFERENCE.logprobs(batch)[order][:, 1:]),
        f_divergence_type="reverse_kl", loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.1,
        label_smoothing=0.0, use_weighting=False, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    inputs = {
        "input_ids": batch.tokens_BT[order],
        "attention_mask": (batch.sequence_BT >= 0).long()[order],
        "completion_mask": (batch.weights_BT != 0).long()[order],
    }
    theirs = DPOTrainer._compute_loss(fake, Model(on_targets(leaf, batch)[order][:, 1:]), inputs, False)
    theirs.backward()
    loss, grad, _ = ours(build_objective(DpoConfig(sft_weight=0.5)), batch)
    assert_close(loss, theirs.detach())
    assert_close(grad, leaf.grad)  # type: ignore[arg-type]


LABELS = [1.0, 0.0, 1.0, 1.0, 0.0]
FEEDBACK = make_batch(ragged_weights((7, 5, 9, 4, 6), (3, 2, 4, 1, 5)), labels=LABELS)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: Any) -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    config = KtoConfig(loss=loss_type, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    other, _ = mismatched(FEEDBACK)
    leaf = logprobs(FEEDBACK).requires_grad_()
    policy_kl, reference_kl = (weighted_sums(helper.logprobs(other), other) for helper in (POLICY, REFERENCE))
    reference = Model(REFERENCE.logprobs(FEEDBACK)[:, 1:])
    model = Model(on_targets(leaf, FEEDBACK)[:, 1:])
    fake = trainer(
        precompute_ref_logps=False, ref_model=reference, calculate_KL=loss_type == "kto", loss_type=loss_type,
        beta=config.beta, desirable_weight=1.5, undesirable_weight=0.5,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _compute_kl_logps=lambda scorer, _batch: policy_kl if scorer is model else reference_kl,
    )  # fmt: skip
    inputs = {
        "input_ids": FEEDBACK.tokens_BT,
        "attention_mask": (FEEDBACK.sequence_BT >= 0).long(),
        "completion_mask": (FEEDBACK.weights_BT != 0).long(),
        "label": torch.tensor(LABELS),
    }
    theirs = KTOTrainer._compute_loss(fake, model, inputs, False)
    theirs.backward()
    loss, grad, metrics = ours(build_objective(config), FEEDBACK)
    assert_close(loss, theirs.detach())
    assert_close(grad, leaf.grad)  # type: ignore[arg-type]
    their_metrics = fake._metrics["train"]
    for name, their_name in {"rewards/chosen": "rewards/chosen", "logprobs/rejected": "logps/rejected"}.items():
        assert metrics[name].item() == pytest.approx(their_metrics[their_name][0], rel=1e-6)
    if loss_type == "kto":
        assert metrics["kl"].item() == pytest.approx(their_metrics["kl"][0], rel=1e-6)
        assert metrics["kl"] > 0


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward(center: float) -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    margins = [0.5, 0.5, 0.0, 0.0, 1.0, 1.0, 0.2, 0.2]
    batch = make_batch(PAIR_WEIGHTS, group_size=2, labels=margins)
    values_BTC = torch.randn(8, 12, 1, dtype=torch.float64, requires_grad=True)
    loss, _ = build_objective(RewardConfig(center=center)).loss(Scores(logprobs(batch), values_BTC=values_BTC), batch)
    (grad,) = torch.autograd.grad(loss / 4, values_BTC)

    ends = torch.tensor([len(weights) - 1 for weights in PAIR_WEIGHTS])
    rewards = values_BTC[torch.arange(8), ends]
    fake = trainer(args=SimpleNamespace(center_rewards_coefficient=center or None))
    inputs = {"margin": torch.tensor(margins)[ORDER[:4]], "attention_mask": torch.ones(8)}
    theirs = RewardTrainer.compute_loss(fake, lambda **_: SimpleNamespace(logits=rewards[ORDER]), inputs)
    (their_grad,) = torch.autograd.grad(theirs, values_BTC)
    assert_close(loss / 4, theirs)
    assert_close(grad, their_grad)


def sums_and_lengths(leaf: Tensor) -> tuple[Tensor, Tensor]:
    length_N = (PAIRS.weights_BT != 0).sum(1)
    return on_targets(leaf, PAIRS).sum(1), length_N


@pytest.mark.parametrize(
    ("config", "loss_type"),
    [
        (CpoConfig(beta=0.3, sft_weight=0.7), "sigmoid"),
        (CpoConfig(beta=0.3, label_smoothing=0.1, sft_weight=0.0), "sigmoid"),
        (CpoConfig(beta=0.3, loss="hinge"), "hinge"),
        (CpoConfig(beta=0.3, loss="ipo"), "ipo"),
        (SimpoConfig(beta=2.5, gamma=1.2), "simpo"),
        (SimpoConfig(beta=2.5, gamma=0.5, label_smoothing=0.1, sft_weight=0.2), "simpo"),
    ],
)
def test_cpo_and_simpo(config: Any, loss_type: str) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    leaf = logprobs(PAIRS).requires_grad_()
    sum_N, length_N = sums_and_lengths(leaf)
    score_N = sum_N / length_N if loss_type in ("ipo", "simpo") else sum_N
    fake = trainer(
        alpha=0.0, loss_type=loss_type, simpo_gamma=getattr(config, "gamma", None), beta=config.beta,
        label_smoothing=config.label_smoothing,
    )  # fmt: skip
    losses, chosen, rejected = CPOTrainer.cpo_loss(fake, score_N[0::2], score_N[1::2])
    theirs = losses.mean() - config.sft_weight * (sum_N / length_N)[0::2].mean()
    theirs.backward()
    loss, grad, metrics = ours(build_objective(config), PAIRS)
    assert_close(loss, theirs.detach())
    assert_close(grad, leaf.grad)  # type: ignore[arg-type]
    assert_close(metrics["rewards/chosen"], chosen.mean())
    assert_close(metrics["rewards/rejected"], rejected.mean())


def test_orpo(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    monkeypatch.setattr(Tensor, "float", Tensor.double)  # their odds ratio goes down to fp32
    leaf = logprobs(PAIRS).requires_grad_()
    sum_N, length_N = sums_and_lengths(leaf)
    mean_N = sum_N / length_N
    losses, chosen, _, _, _ = ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), mean_N[0::2], mean_N[1::2])
    theirs = -mean_N[0::2].mean() - losses.mean()
    theirs.backward()
    monkeypatch.undo()
    loss, grad, metrics = ours(build_objective(OrpoConfig(beta=0.3)), PAIRS)
    assert_close(loss, theirs.detach())
    assert_close(grad, leaf.grad)  # type: ignore[arg-type]
    assert_close(metrics["rewards/chosen"], chosen.mean())


def test_dft() -> None:
    """Their per-token loss times the token's probability, over the number of targets."""
    leaf = logprobs(PAIRS).requires_grad_()
    theirs = on_targets(-leaf * leaf.exp().detach(), PAIRS).sum() / (PAIRS.weights_BT != 0).sum()
    theirs.backward()
    loss, grad, metrics = ours(build_objective(SftConfig(loss="dft")), PAIRS)
    assert_close(loss, theirs.detach())
    assert_close(grad, leaf.grad)  # type: ignore[arg-type]
    assert_close(metrics["nll"], -leaf.detach().sum() / PAIRS.weights_BT.sum())
