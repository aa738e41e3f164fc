"""Objectives on whole answers against closed forms: pairs, feedback, rewards, steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.unit.objectives.scored import (
    PAIR_WEIGHTS,
    POLICY,
    REFERENCE,
    logprobs,
    make_batch,
    prepared,
    ragged_weights,
)
from tunesmith.config_objectives import (
    BcoConfig,
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PrmConfig,
    RewardConfig,
    SimpoConfig,
)
from tunesmith.objectives import Objective, build_objective
from tunesmith.objectives.kto import mismatched
from tunesmith.objectives.orpo import log1mexp
from tunesmith.objectives.sequences import at_last_token, lengths, pairs, sums, target_ranks, weighted_sums
from tunesmith.types import Batch, Scores

PAIRS = make_batch(PAIR_WEIGHTS, [[0, 1, 2, 3], [4, 5], [6, 7]], group_size=2)
ANSWER_WEIGHTS = ragged_weights((7, 5, 9, 4, 6), (3, 2, 4, 1, 5))
LABELS = [1.0, 0.0, 1.0, 1.0, 0.0]


def scored(batch: Batch, logprobs_BT: Tensor | None = None) -> Scores:
    leaf = (logprobs(batch) if logprobs_BT is None else logprobs_BT).clone().requires_grad_()
    return Scores(leaf, observed={"entropy": torch.ones_like(leaf)})


def loss_of(objective: Objective, batch: Batch, scores: Scores | None = None) -> tuple[Tensor, dict[str, float]]:
    """(sum, quotients of the metrics) of a prepared batch."""
    loss, metrics = objective.loss(scores or scored(batch), batch)
    return loss, {name: (x[0] / x[1]).item() for name, x in metrics.items()}


def test_sums_lengths_and_ranks_by_sequence() -> None:
    batch = make_batch([[0.0, 1.0, 0.5], [0.0, 0.0, 2.0, 0.0, 1.0], [0.0, 1.0]], [[0, 1], [2]])
    ones = torch.ones(batch.tokens_BT.shape)
    assert sums(ones, batch).tolist() == [3, 5, 2]
    assert weighted_sums(ones, batch).tolist() == lengths(batch, ones).tolist() == [1.5, 3.0, 1.0]
    assert target_ranks(batch)[batch.weights_BT != 0].tolist() == [1, 2, 1, 2, 1]
    assert at_last_token(batch.positions_BT[..., None].double(), batch)[:, 0].tolist() == [2, 4, 1]


def test_a_micro_batch_knows_its_pairs_alone() -> None:
    piece = PAIRS.rows(1, 2)
    assert [x.tolist() for x in pairs(piece)] == [[4], [5]]
    assert sums(torch.ones(piece.tokens_BT.shape), piece).tolist() == [0, 0, 0, 0, 6, 6, 0, 0]
    assert at_last_token(piece.positions_BT[..., None].double(), piece)[:, 0].tolist() == [0, 0, 0, 0, 5, 5, 0, 0]
    assert build_objective(DpoConfig()).count(piece) == 1
    assert build_objective(DpoConfig()).count(PAIRS) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", math.log(2)), ("sigmoid_norm", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("nca_pair", 2 * math.log(2)),
        ("bco_pair", 2 * math.log(2)), ("sppo_hard", 50.0), ("aot", math.log(2)), ("apo_zero", 1.0), ("apo_down", 1.0),
        ("discopop", (math.log(2) + 1) / 2), ("robust", math.log(2)),
        ("exo_pair", -math.log(2) - (math.log(0.1) + math.log(0.9)) / 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_reference_the_loss_is_known(name: Any, expected: float, dtype: torch.dtype) -> None:
    smoothing = 0.1 if name in ("robust", "exo_pair") else 0.0
    objective = build_objective(DpoConfig(loss=name, label_smoothing=smoothing))
    batch = prepared(objective, PAIRS, reference=POLICY)
    batch = batch.with_columns(tokens={"reference": batch.token_columns["reference"].to(dtype)})
    loss, metrics = loss_of(objective, batch, scored(batch, logprobs(batch).to(dtype)))
    if name == "sigmoid":
        assert torch.equal(loss, torch.full((4,), math.log(2), dtype=dtype).sum())
    assert loss.item() / 4 == pytest.approx(expected, rel=1e-6)
    assert metrics["kl"] == metrics["rewards/margin"] == metrics["rewards/accuracy"] == 0


def test_dpo_at_the_reference_pulls_by_half_of_beta() -> None:
    objective = build_objective(DpoConfig(beta=0.3))
    batch = prepared(objective, PAIRS, reference=POLICY)
    scores = scored(batch)
    objective.loss(scores, batch)[0].backward()
    sign = 1 - 2 * (batch.sequence_BT % 2).double()  # chosen 1, rejected -1
    torch.testing.assert_close(scores.logprobs_BT.grad, -0.15 * sign * batch.weights_BT)


def test_dpo_reports_rewards_and_the_way_from_the_reference() -> None:
    objective = build_objective(DpoConfig(beta=0.3))
    batch = prepared(objective, PAIRS)
    _, metrics = loss_of(objective, batch)
    policy, reference = (weighted_sums(helper.logprobs(PAIRS), PAIRS) for helper in (POLICY, REFERENCE))
    ratio = policy - reference
    chosen, rejected = ratio[0::2], ratio[1::2]
    assert metrics == pytest.approx({
        "rewards/chosen": 0.3 * chosen.mean().item(),
        "rewards/rejected": 0.3 * rejected.mean().item(),
        "rewards/margin": 0.3 * (chosen - rejected).mean().item(),
        "rewards/accuracy": (chosen > rejected).double().mean().item(),
        "logprobs/chosen": policy[0::2].mean().item(),
        "logprobs/rejected": policy[1::2].mean().item(),
        "kl": ratio.mean().item(),
        "entropy": 1.0,
    })  # fmt: skip


def test_dpo_adds_losses_by_their_weights_and_the_likelihood_of_each_chosen_answer() -> None:
    def total(**settings: Any) -> Tensor:
        objective = build_objective(DpoConfig(beta=0.3, **settings))
        return loss_of(objective, prepared(objective, PAIRS))[0]

    policy = weighted_sums(logprobs(PAIRS), PAIRS)
    mean_nll = -(policy / lengths(PAIRS, policy))[0::2].sum()
    mixed = total(loss={"sigmoid": 0.8, "bco_pair": 0.2}, sft_weight=0.5)
    expected = 0.8 * total(loss="sigmoid") + 0.2 * total(loss="bco_pair") + 0.5 * mean_nll
    torch.testing.assert_close(mixed, expected)


def test_ld_dpo_weighs_what_exceeds_the_shorter_answer() -> None:
    batch = make_batch(ragged_weights((5, 8), (2, 2)), group_size=2)  # 3 and 6 targets
    objective = build_objective(DpoConfig(beta=1.0, ld_alpha=0.25))
    batch = prepared(objective, batch)
    policy, reference = logprobs(batch), REFERENCE.logprobs(batch)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.25, 0.25, 0.25])
    margin = (policy - reference)[0, 2:5].sum() - ((policy - reference)[1, 2:] * weights).sum()
    torch.testing.assert_close(loss_of(objective, batch)[0], -logsigmoid(margin))


def test_aot_compares_ranks_of_the_whole_batch() -> None:
    objective = build_objective(DpoConfig(loss="aot", beta=0.3))
    assert objective.needs == {"reference", "policy"}
    assert build_objective(DpoConfig()).needs == {"reference"}
    batch = prepared(objective, PAIRS)
    policy, reference = (weighted_sums(helper.logprobs(PAIRS), PAIRS) for helper in (POLICY, REFERENCE))
    ours, theirs = policy[0::2] - policy[1::2], reference[0::2] - reference[1::2]
    expected = -logsigmoid(0.3 * (ours.sort().values - theirs.sort().values)).sum()
    torch.testing.assert_close(loss_of(objective, batch)[0], expected)


def pair_numbers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums and means of the log-probabilities of chosen and rejected answers."""
    policy = weighted_sums(logprobs(PAIRS), PAIRS)
    mean = policy / lengths(PAIRS, policy)
    return policy[0::2], policy[1::2], mean[0::2], mean[1::2]


def test_orpo_is_the_likelihood_and_an_odds_ratio() -> None:
    _, _, chosen, rejected = pair_numbers()
    odds_c, odds_r = (x.exp() / (1 - x.exp()) for x in (chosen, rejected))
    expected = -chosen + 0.3 * torch.log(1 + odds_r / odds_c)
    loss, metrics = loss_of(build_objective(OrpoConfig(beta=0.3)), PAIRS)
    torch.testing.assert_close(loss, expected.sum())
    assert metrics["rewards/margin"] == pytest.approx(0.3 * (chosen - rejected).mean().item())


def test_simpo_wants_a_margin_between_means() -> None:
    _, _, chosen, rejected = pair_numbers()
    expected = torch.log(1 + torch.exp(-(2.5 * (chosen - rejected) - 1.2))) - 0.1 * chosen
    loss, _ = loss_of(build_objective(SimpoConfig(beta=2.5, gamma=1.2, sft_weight=0.1)), PAIRS)
    torch.testing.assert_close(loss, expected.sum())


def test_cpo_compares_sums() -> None:
    chosen, rejected, mean_c, mean_r = pair_numbers()
    expected = {
        "sigmoid": torch.log(1 + torch.exp(-0.3 * (chosen - rejected))),
        "hinge": (1 - 0.3 * (chosen - rejected)).clamp(min=0),
        "ipo": (mean_c - mean_r - 1 / 0.6) ** 2,
    }
    for name, loss_P in expected.items():
        loss, _ = loss_of(build_objective(CpoConfig(beta=0.3, loss=name, sft_weight=0.7)), PAIRS)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, (loss_P - 0.7 * mean_c).sum())


def test_log1mexp_is_accurate_at_both_ends() -> None:
    x = torch.tensor([-1e-5, -0.1, -0.693, -0.694, -3.0, -30.0])
    expected = torch.tensor([math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()])
    torch.testing.assert_close(log1mexp(x), expected, rtol=2e-6, atol=0)
    zero = torch.zeros(1, requires_grad=True)
    log1mexp(zero).sum().backward()
    assert log1mexp(zero).isfinite()
    assert zero.grad == 0


def test_kto_mixes_prompts_and_answers() -> None:
    batch = make_batch(ANSWER_WEIGHTS, [[0, 1], [2], [3, 4]])
    other, counts = mismatched(batch)
    assert counts.tolist() == [1.0] * 5
    found = other.sequences()
    expected = [
        [0, 1, 2, 12, 13, 14],
        [10, 11, 24, 25, 26, 27, 28],
        [20, 21, 22, 23, 31, 32, 33],
        [30, 45],
        [40, 41, 42, 43, 44, 3, 4, 5, 6],
    ]
    assert [tokens.tolist() for tokens, _ in found] == expected
    assert [int((weights != 0).sum()) for _, weights in found] == [3, 5, 3, 1, 4]


def test_kto_mixes_alike_however_the_batch_is_numbered() -> None:
    batch = make_batch(ANSWER_WEIGHTS)
    number = torch.tensor([3, 0, 4, 2, 1])  # of each sequence in the other batch
    here = batch.sequence_BT >= 0
    other = replace(
        batch,
        sequence_BT=torch.where(here, number[batch.sequence_BT], -1),
        sample_N=torch.empty_like(number).scatter_(0, number, batch.sample_N),
    )
    ours, theirs = mismatched(batch)[0].sequences(), mismatched(other)[0].sequences()
    for n, (tokens, weights) in enumerate(ours):
        assert torch.equal(theirs[number[n]][0], tokens)
        assert torch.equal(theirs[number[n]][1], weights)


def test_kto_never_gives_a_prompt_its_own_answer() -> None:
    """Both answers of a pair, marked as feedback, have one prompt and stand next to each other in the data."""
    batch = make_batch(ragged_weights((4, 5, 4, 5), (3, 3, 3, 3)))
    tokens = batch.tokens_BT.clone()
    for n, first in enumerate((50, 50, 60, 60)):  # two prompts, each twice
        tokens[(batch.sequence_BT == n) & (batch.weights_BT == 0) & (batch.positions_BT < 3)] = first
    other, counts = mismatched(replace(batch, tokens_BT=tokens))
    answers = [mine[3] for mine, _ in replace(batch, tokens_BT=tokens).sequences()]
    assert counts.tolist() == [1.0] * 4
    for (mixed, _), own in zip(other.sequences(), ([0, 1], [0, 1], [2, 3], [2, 3]), strict=True):
        assert mixed[3] not in [answers[n] for n in own]
    alike = torch.where(tokens == 60, 50, tokens)
    assert mismatched(replace(batch, tokens_BT=alike))[1].tolist() == [0.0] * 4


def test_kto_cuts_what_would_be_longer_than_the_longest() -> None:
    found = mismatched(make_batch(ragged_weights((8, 9), (7, 1))))[0].sequences()
    assert [tokens.tolist() for tokens, _ in found] == [[0, 1, 2, 3, 4, 5, 6, 11, 12], [10, 7]]


def test_kto_draws_answers_from_the_kl_estimate() -> None:
    batch = make_batch(ANSWER_WEIGHTS, labels=LABELS)
    objective = build_objective(KtoConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5))
    assert objective.needs == {"reference", "policy"}
    ready = prepared(objective, batch)
    other, _ = mismatched(batch)
    kl = (weighted_sums(POLICY.logprobs(other), other) - weighted_sums(REFERENCE.logprobs(other), other)).mean()
    assert kl > 0
    reward = 0.3 * (weighted_sums(logprobs(batch), batch) - weighted_sums(REFERENCE.logprobs(batch), batch))
    over, good = reward - 0.3 * kl, torch.tensor(LABELS) == 1
    expected = (1.5 * (1 - over[good].sigmoid())).sum() + (0.5 * (1 - (-over[~good]).sigmoid())).sum()
    loss, metrics = loss_of(objective, ready)
    torch.testing.assert_close(loss, expected)
    assert metrics["kl"] == pytest.approx(kl.item())
    assert metrics["rewards/chosen"] == pytest.approx(reward[good].mean().item())
    assert metrics["rewards/rejected"] == pytest.approx(reward[~good].mean().item())
    assert metrics["rewards/accuracy"] == pytest.approx(((over > 0) == good).double().mean().item())


def test_ktos_kl_estimate_is_never_negative() -> None:
    batch = make_batch(ANSWER_WEIGHTS, labels=LABELS)
    objective = build_objective(KtoConfig())
    swapped = prepared(objective, batch, policy=REFERENCE, reference=POLICY)
    assert swapped.sequence_columns["kl"].tolist() == [0.0] * 5
    assert prepared(objective, batch).sequence_columns["kl"][0] > 0.1


def test_one_answer_alone_has_no_kl_estimate() -> None:
    ready = prepared(build_objective(KtoConfig()), make_batch([[0.0, 1.0, 1.0]], labels=[1.0]))
    assert ready.sequence_columns["kl"].tolist() == [0.0]


def test_apo_zero_needs_no_kl_estimate() -> None:
    objective = build_objective(KtoConfig(loss="apo_zero_unpaired"))
    assert objective.needs == {"reference"}
    batch = prepared(objective, make_batch(ANSWER_WEIGHTS, labels=LABELS))
    assert "kl" not in batch.sequence_columns
    ratio = weighted_sums(logprobs(batch), batch) - weighted_sums(REFERENCE.logprobs(batch), batch)
    assert loss_of(objective, batch)[1]["kl"] == pytest.approx(ratio.mean().item())


def test_bco_judges_by_the_mean_reward_of_earlier_steps() -> None:
    objective = build_objective(BcoConfig(beta=0.3))
    batch = prepared(objective, make_batch(ANSWER_WEIGHTS, labels=LABELS))
    reward = 0.3 * (weighted_sums(logprobs(batch), batch) - weighted_sums(REFERENCE.logprobs(batch), batch))
    sign = 2 * torch.tensor(LABELS) - 1
    for delta, seen in ((0.0, 3.0), (3.0, 1.0), (2.0, 8.0), (4.0, 0.0)):
        loss, metrics = loss_of(objective, batch)
        torch.testing.assert_close(loss, torch.log(1 + torch.exp(-sign * (reward - delta))).sum())
        assert metrics["delta"] == delta
        assert metrics["kl"] == pytest.approx(reward.mean().item() / 0.3)
        assert metrics["rewards/mean"] == pytest.approx(reward.mean().item())
        objective.update({"rewards/mean": torch.tensor(seen)})


@pytest.mark.parametrize("config", [KtoConfig(), KtoConfig(loss="apo_zero_unpaired"), BcoConfig()])
def test_the_margin_of_feedback_is_that_of_the_mean_rewards(config: Any) -> None:
    objective = build_objective(config)
    chosen, rejected = torch.tensor(0.7), torch.tensor(-0.2)
    both = objective.derived({"rewards/chosen": chosen, "rewards/rejected": rejected})
    assert both == {"rewards/margin": chosen - rejected}
    assert objective.derived({"rewards/chosen": chosen}) == {}


def test_bco_goes_on_where_it_stopped() -> None:
    first, second = (build_objective(BcoConfig()) for _ in range(2))
    for seen in (0.1, 0.7):
        first.update({"rewards/mean": torch.tensor(seen)})
    second.load_state_dict(first.state_dict())
    for objective in (first, second):
        objective.update({"rewards/mean": torch.tensor(0.3)})
    assert second.state_dict() == first.state_dict()


def test_reward_reads_the_last_token_and_keeps_to_the_margin() -> None:
    batch = make_batch(
        [[0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0], [0.0, 1.0]], [[0, 1], [2, 3]], 2, labels=[0.5, 0.5, 0.0, 0.0]
    )
    values = torch.arange(10, dtype=torch.float64).reshape(2, 5, 1).square() / 10
    loss, metrics = loss_of(build_objective(RewardConfig(center=0.1)), batch, Scores(values[..., 0], values_BTC=values))
    first, second = (0.1, 1.6), (3.6, 6.4)  # at columns 1 and 4, then 6 and 8 of all
    expected = sum(
        math.log(1 + math.exp(-(c - r - margin))) + 0.1 * (c + r) ** 2
        for (c, r), margin in ((first, 0.5), (second, 0.0))
    )
    assert loss.item() == pytest.approx(expected)
    assert metrics == pytest.approx({
        "rewards/chosen": 1.85, "rewards/rejected": 4.0, "rewards/margin": -2.15, "rewards/accuracy": 0.0
    })  # fmt: skip


def test_prm_asks_whether_each_step_is_right() -> None:
    batch = make_batch([[0.0, 1.0, -1.0], [0.0, 0.0, 1.0]], [[0, 1]])
    values = torch.zeros(1, 6, 2, dtype=torch.float64)
    values[0, 1] = torch.tensor([0.0, 2.0])  # right, and so it says
    values[0, 2] = torch.tensor([0.0, 3.0])  # wrong, but it says right
    values[0, 5] = torch.tensor([1.0, 0.5])  # right, but it says wrong
    objective = build_objective(PrmConfig())
    loss, metrics = loss_of(objective, batch, Scores(values[..., 0], values_BTC=values))
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(3)) + math.log(1 + math.exp(0.5))
    assert loss.item() == pytest.approx(expected)
    assert objective.count(batch) == 3
    assert metrics["accuracy"] == pytest.approx(1 / 3)
