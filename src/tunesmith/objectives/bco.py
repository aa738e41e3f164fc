"""BCO: a binary classifier of answers, its threshold a running mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Metrics, mean
from tunesmith.objectives.feedback import FeedbackObjective
from tunesmith.types import Batch, Scores


class Bco(FeedbackObjective):
    """-log σ(r - delta) of a desirable answer, -log σ(delta - r) of another; r = beta · (log p - log p_ref)(answer).

    Jung et al. 2024 (arXiv 2404.04656), eq. 8 and section 3.3. delta is the running mean of all rewards: the mean over the
    steps before this one of each step's mean reward, 0 at the first. So it does not depend on the order of
    micro-batches, and a held-out set is judged by the threshold that training has come to. Metric delta: this threshold.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._steps, self._delta = 0, 0.0

    def thresholds(self, rewards_M: Tensor, here: Tensor, batch: Batch) -> Tensor:
        return torch.full_like(rewards_M, self._delta)

    def of_rewards(self, rewards_M: Tensor, desirable_M: Tensor, threshold_M: Tensor) -> Tensor:
        over_M = rewards_M - threshold_M
        return -logsigmoid(torch.where(desirable_M, over_M, -over_M))

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        total, metrics = super().loss(scores, batch)
        # all rewards are those of both kinds together: (sum, count) of each added up
        metrics["rewards/mean"] = metrics["rewards/chosen"] + metrics["rewards/rejected"]
        return total, metrics | {"delta": mean(torch.full_like(total, self._delta))}

    def update(self, metrics: Mapping[str, Tensor]) -> None:
        """Takes the step's mean reward into the threshold."""
        self._steps += 1
        self._delta += (float(metrics["rewards/mean"]) - self._delta) / self._steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "delta": self._delta}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._steps, self._delta = int(saved["steps"]), float(saved["delta"])
