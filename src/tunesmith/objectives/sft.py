"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tunesmith.objectives.base import Metrics, Objective, mean
from tunesmith.objectives.sequences import sums
from tunesmith.objectives.terms import gated_by_entropy, smoothed
from tunesmith.types import Batch, Scores, TokenTerm, Wanted


class Likelihood(Objective):
    """sum_t w_t loss_t / sum_t w_t + router_loss · (mean load-balancing loss of the sequences, by the weight of their targets).

    loss_t = -log p(token_t), with label smoothing and z-loss where they are set.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        term = self.token_loss()
        self.wanted = Wanted(
            token_loss=term,
            router=config.router_loss > 0,
            embedding_noise=config.neftune_alpha,
            is_likelihood=self.is_likelihood,
        )
        asked = {"logits": term is not None, "router": config.router_loss > 0, "embeddings": config.neftune_alpha > 0}
        self.reads = frozenset(name for name, is_wanted in asked.items() if is_wanted)

    @property
    def is_likelihood(self) -> bool:
        """Whether the weights of the batch are all that the tokens' losses are multiplied by."""
        return True

    def token_loss(self) -> TokenTerm | None:
        """The loss of each token where it needs more than the token's log-probability."""
        config = self.config
        if config.label_smoothing or config.z_loss:
            return smoothed(config.label_smoothing, config.z_loss)
        return None

    def count(self, batch: Batch) -> Tensor:
        return batch.weights_BT.sum()

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        loss_BT = self.of_tokens(scores)
        total = (loss_BT * batch.weights_BT).sum()
        metrics: Metrics = {}
        if scores.token_loss_BT is not None or self.config.router_loss or not self.is_likelihood:
            metrics["nll"] = mean(-scores.logprobs_BT, batch.weights_BT)
        if self.config.router_loss:
            assert scores.balance_N is not None
            weight_N = sums(batch.weights_BT.to(scores.balance_N.dtype), batch)
            total = total + self.config.router_loss * (scores.balance_N * weight_N).sum()
            metrics["balance"] = mean(scores.balance_N, weight_N)
        return total, metrics

    def of_tokens(self, scores: Scores) -> Tensor:
        """The loss of each target, [B, T]."""
        return -scores.logprobs_BT if scores.token_loss_BT is None else scores.token_loss_BT


class Sft(Likelihood):
    """Weighted negative log-likelihood of the answers: - sum_t w_t log p(token_t) / sum_t w_t, in nats per target token.

    `loss: dft` multiplies each token's term by p(token_t), taken as a constant (Wu et al. 2025, arXiv 2508.05629, eq. 9);
    `loss: eaft` by the entropy of the likeliest tokens, see `terms.gated_by_entropy`. Metric nll, where the loss is another:
    the plain negative log-likelihood.
    """

    @property
    def is_likelihood(self) -> bool:
        return bool(self.config.loss != "dft")

    def token_loss(self) -> TokenTerm | None:
        if self.config.loss == "eaft":
            return gated_by_entropy(self.config.eaft_power)
        return super().token_loss()

    def of_tokens(self, scores: Scores) -> Tensor:
        if self.config.loss == "dft":
            return -scores.logprobs_BT * scores.logprobs_BT.detach().exp()
        return super().of_tokens(scores)
