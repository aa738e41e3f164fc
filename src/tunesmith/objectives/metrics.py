"""Metrics that objectives on answers share, each as `mean` makes it. Shapes: P pairs, N answers of a micro-batch."""

from __future__ import annotations

from torch import Tensor

from tunesmith.objectives.base import Metrics, mean
from tunesmith.types import Batch, Scores


def pair_metrics(chosen_P: Tensor, rejected_P: Tensor) -> Metrics:
    """Of the rewards of pairs; accuracy: how often the chosen answer's is higher."""
    return {
        "rewards/chosen": mean(chosen_P),
        "rewards/rejected": mean(rejected_P),
        "rewards/margin": mean(chosen_P - rejected_P),
        "rewards/accuracy": mean((chosen_P > rejected_P).to(chosen_P.dtype)),
    }


def feedback_metrics(rewards_N: Tensor, logprobs_N: Tensor, desirable_N: Tensor, threshold: Tensor | float) -> Metrics:
    """Of answers of which some are desirable, bool [N]; each kind has its own mean.

    Accuracy: how often the reward lies on the answer's side of the threshold.
    """
    accuracy_N = (rewards_N > threshold) == desirable_N
    return {
        "rewards/chosen": mean(rewards_N, desirable_N),
        "rewards/rejected": mean(rewards_N, ~desirable_N),
        "rewards/accuracy": mean(accuracy_N.to(rewards_N.dtype)),
        "logprobs/chosen": mean(logprobs_N, desirable_N),
        "logprobs/rejected": mean(logprobs_N, ~desirable_N),
    }


def logprob_metrics(chosen_P: Tensor, rejected_P: Tensor) -> Metrics:
    """Log-probabilities of the answers, summed over their tokens, in nats."""
    return {"logprobs/chosen": mean(chosen_P), "logprobs/rejected": mean(rejected_P)}


def entropy_metric(scores: Scores, batch: Batch) -> Metrics:
    """Mean entropy of the next token's distribution over the targets, in nats."""
    return {"entropy": mean(scores.observed["entropy"], batch.weights_BT != 0)}
