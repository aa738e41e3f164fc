"""Distillation: learn a teacher's distribution over the next token.

Both distributions exist for one chunk of targets at a time: a live teacher hands over hidden states, which become logits
where the student's are made; a stored one its likeliest tokens.
Shapes: B rows, T tokens, N targets of a chunk, V tokens that both know, K likeliest tokens of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import log, log1p
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from tunesmith.objectives.base import Metrics, Objective, mean
from tunesmith.types import Batch, Scores, Wanted


class Distill(Objective):
    """Per target token (1 - ce_weight) · D(teacher, student) + ce_weight · cross-entropy, weighted as in `sft`.

    D is a divergence of the two distributions, both softmax(logits / temperature). It is not multiplied by the temperature's
    square (Hinton et al. 2015, section 2, do so): neither do Agarwal et al. 2024 (arXiv 2306.13649).

    top_k: the distributions are first made coarse, to the teacher's K likeliest tokens and one outcome for all others
    together, and then flattened by the temperature. So what is kept of a teacher serves every temperature, and with
    temperature 1 the divergence is at most that of the whole distributions. With K = V it is the same.

    uld: D counts where both tokenizers begin a token at the same character of the same text; other targets have their
    cross-entropy alone, times ce_weight as everywhere. Sorting forgets which token is which: without ce_weight nothing
    says what the probabilities are for.
    """

    needs = frozenset({"teacher"})
    reads = frozenset({"logits"})
    shows = ("divergence", "nll")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.wanted = Wanted(token_loss=self._token_loss, observed={"accuracy": _is_likeliest}, is_likelihood=True)
        self._vocabulary: int | None = None
        self._teacher_logits: Callable[[Tensor], Tensor] | None = None

    def prepare(self, batch: Batch, helpers: Mapping[str, Any]) -> Iterable[Batch]:
        """The batch with what the teacher says about its targets.

        With top_k: teacher_tokens, int [B, T, K], and teacher_logprobs [B, T, K + 1] as `coarse_logprobs` makes them. Else
        teacher_hidden [B, T, D], hidden states for the teacher's head; with uld aligned [B, T] too, bool.
        """
        teacher = helpers["teacher"]
        self._vocabulary = teacher.vocabulary
        self._teacher_logits = None if self.config.top_k else teacher.logits
        yield batch.with_columns(tokens=teacher.columns(batch))

    def count(self, batch: Batch) -> Tensor:
        return batch.weights_BT.sum()

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        assert scores.token_loss_BT is not None
        weights_BT, share = batch.weights_BT, self.config.ce_weight
        metrics = {
            "nll": mean(-scores.logprobs_BT, weights_BT),
            "accuracy": mean(scores.observed["accuracy"], weights_BT),
        }
        if share < 1:  # the divergence is what the loss holds beside the cross-entropy
            divergence_BT = (scores.token_loss_BT.detach() + share * scores.logprobs_BT) / (1 - share)
            metrics["divergence"] = mean(divergence_BT, weights_BT * batch.token_columns.get("aligned", 1))
        return (scores.token_loss_BT * weights_BT).sum(), metrics

    def _token_loss(self, logits_NV: Tensor, token_N: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        share = self.config.ce_weight
        divergence_N = self._divergence(logits_NV[:, : self._vocabulary], columns)
        if not share:
            return divergence_N
        return (1 - share) * divergence_N + share * cross_entropy(logits_NV, token_N, reduction="none")

    def _divergence(self, logits_NV: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """[N] of the student's logits; gradient flows through them alone."""
        temperature = self.config.temperature
        if self.config.top_k:
            student_NV = coarse_logprobs(logits_NV, columns["teacher_tokens"].long())
            teacher_NV = columns["teacher_logprobs"].to(student_NV.dtype)
            return self._of_logprobs(
                (teacher_NV / temperature).log_softmax(-1), (student_NV / temperature).log_softmax(-1)
            )
        assert self._teacher_logits is not None, "prepare comes first"
        if self.config.divergence != "uld":
            teacher_NV = self._teacher_logits(columns["teacher_hidden"]).to(logits_NV.dtype) / temperature
            return self._of_logprobs(teacher_NV.log_softmax(-1), (logits_NV / temperature).log_softmax(-1))
        at = columns["aligned"].nonzero()[:, 0]
        teacher_MU = self._teacher_logits(columns["teacher_hidden"][at]).to(logits_NV.dtype) / temperature
        distance_M = sorted_distance(teacher_MU.softmax(-1), (logits_NV[at] / temperature).softmax(-1))
        return logits_NV.new_zeros(len(logits_NV)).index_put((at,), distance_M)

    def _of_logprobs(self, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        if self.config.divergence == "forward_kl":
            return kl(teacher_NV, student_NV)
        if self.config.divergence == "reverse_kl":
            return kl(student_NV, teacher_NV)
        return generalized_jsd(teacher_NV, student_NV, self.config.jsd_beta)


def kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of two sets of log-probabilities, [N]."""
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)


def generalized_jsd(teacher_NV: Tensor, student_NV: Tensor, beta: float) -> Tensor:
    """beta · KL(teacher ‖ m) + (1 - beta) · KL(student ‖ m), m = beta · teacher + (1 - beta) · student, [N].

    Of log-probabilities; Agarwal et al. 2024 (arXiv 2306.13649), eq. 1. It tends to 0 with beta to 0 or 1; divided by beta it
    tends to the forward KL at 0, divided by 1 - beta to the reverse KL at 1. TRL gives these KLs for a beta of 0 and 1.
    """
    mixture_NV = (teacher_NV + log(beta)).logaddexp(student_NV + log1p(-beta))
    return beta * kl(teacher_NV, mixture_NV) + (1 - beta) * kl(student_NV, mixture_NV)


def sorted_distance(teacher_NU: Tensor, student_NV: Tensor) -> Tensor:
    """Sum over ranks of the distance between sorted probabilities, the shorter row filled up with zeros, [N]; 0 to 2.

    Boizard et al. 2024 (arXiv 2402.12030): a Wasserstein distance between vocabularies of which any two tokens are equally far.
    """
    missing = teacher_NU.shape[-1] - student_NV.shape[-1]
    student_NV, teacher_NU = pad(student_NV, (0, max(missing, 0))), pad(teacher_NU, (0, max(-missing, 0)))
    ranked = (x.sort(-1, descending=True).values for x in (student_NV, teacher_NU))
    return (next(ranked) - next(ranked)).abs().sum(-1)


def coarse_logprobs(logits_NV: Tensor, token_NK: Tensor) -> Tensor:
    """Log-probabilities of K tokens, and last that of all others together, [N, K + 1]; [N, K] where there are no others."""
    logprobs_NV = logits_NV.log_softmax(-1)
    chosen_NK = logprobs_NV.gather(-1, token_NK)
    if token_NK.shape[-1] == logits_NV.shape[-1]:
        return chosen_NK
    others_N1 = logprobs_NV.scatter(-1, token_NK, -float("inf")).logsumexp(-1, keepdim=True)
    return torch.cat([chosen_NK, others_N1], -1)


def _is_likeliest(logits_NV: Tensor, token_N: Tensor, _columns: Mapping[str, Tensor]) -> Tensor:
    """1 where the data's token is the student's likeliest, else 0, [N]."""
    return (logits_NV.argmax(-1) == token_N).to(logits_NV.dtype)
