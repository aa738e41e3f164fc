"""Distillation's terms on plain logits, in fp64, against closed forms and TRL."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.config_objectives import DistillConfig
from tunesmith.objectives.distill import Distill, coarse_logprobs, sorted_distance
from tunesmith.types import Batch, Scores

N, V, D = 7, 11, 5
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


class FakeTeacher:
    """Its hidden states are random, its head is a matrix."""

    def __init__(self, vocabulary: int = V, hidden: Tensor | None = None, head: Tensor | None = None) -> None:
        self.vocabulary = vocabulary
        self.hidden = torch.randn(N, D, dtype=torch.float64) if hidden is None else hidden
        self.head = torch.randn(D, V, dtype=torch.float64) if head is None else head

    def logits(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.head)[:, : self.vocabulary]

    def columns(self, _batch: Batch) -> dict[str, Tensor]:
        return {"teacher_hidden": self.hidden[None]}


def one_row() -> Batch:
    """A row of targets alone."""
    ones = torch.ones(1, N)
    zeros = torch.zeros(1, N, dtype=torch.long)
    return Batch(zeros, torch.arange(N)[None], zeros, ones, torch.tensor([0]), torch.tensor([0]))


def objective(**settings: Any) -> Distill:
    return Distill(DistillConfig(teacher="big", **settings))


def token_loss(
    config: dict[str, Any], student: Tensor, token: Tensor, teacher: Any, columns: dict[str, Tensor] | None = None
) -> Tensor:
    made = objective(**config)
    (batch,) = made.prepare(one_row(), {"teacher": teacher})
    at_targets = {name: column[0] for name, column in batch.token_columns.items()} | (columns or {})
    assert made.wanted.token_loss is not None
    return made.wanted.token_loss(student, token, at_targets)


def by_loops(name: str, student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    """The definitions, token by token and with probabilities."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    m = beta * p + (1 - beta) * q
    terms = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": beta * p * (p / m).log() + (1 - beta) * q * (q / m).log(),
    }
    return terms[name].sum(-1)


@pytest.fixture
def student() -> Tensor:
    return torch.randn(N, V, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def token() -> Tensor:
    return torch.randint(0, V, (N,))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (2.5, 0.3)])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_loss_and_gradient_are_the_definitions(
    name: str, temperature: float, beta: float, share: float, student: Tensor, token: Tensor
) -> None:
    teacher = FakeTeacher()
    config = {"divergence": name, "temperature": temperature, "jsd_beta": beta, "ce_weight": share}
    found = token_loss(config, student, token, teacher)
    nll = -student.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    divergence = by_loops(name, student, teacher.logits(teacher.hidden), temperature, beta)
    expected = (1 - share) * divergence + share * nll
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    weights = torch.rand(N, dtype=torch.float64)
    grads = [torch.autograd.grad((loss * weights).sum(), student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


def test_forward_kls_gradient_is_the_difference_of_probabilities(student: Tensor, token: Tensor) -> None:
    teacher = FakeTeacher()
    temperature = 2.0
    loss = token_loss({"temperature": temperature}, student, token, teacher)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher.logits(teacher.hidden), student.detach()))
    torch.testing.assert_close(grad, (q - p) / temperature, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "trl_beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.1), ("jsd", 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_trl(name: str, trl_beta: float, temperature: float, student: Tensor, token: Tensor) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    teacher = FakeTeacher()
    share = {"jsd_beta": trl_beta} if name == "jsd" else {}
    found = token_loss({"divergence": name, "temperature": temperature, **share}, student, token, teacher).sum()
    expected = trainer.generalized_jsd_loss(
        student[None], teacher.logits(teacher.hidden)[None], beta=trl_beta, temperature=temperature, reduction="sum"
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)  # TRL makes beta's logarithm in fp32 or fp64


@pytest.mark.parametrize("name", [*DIVERGENCES, "uld"])
def test_a_teacher_that_is_the_student_teaches_nothing(name: str, token: Tensor) -> None:
    teacher = FakeTeacher()
    student = teacher.logits(teacher.hidden).clone().requires_grad_()
    aligned = {"aligned": torch.ones(N, dtype=torch.bool)}
    mix = 0.5 if name == "uld" else 0.0  # uld asks for a share of cross-entropy, which alone is left
    loss = token_loss({"divergence": name, "temperature": 1.5, "ce_weight": mix}, student, token, teacher, aligned)
    expected = mix * torch.nn.functional.cross_entropy(student, token, reduction="none")
    (grad,), (expected_grad,) = (torch.autograd.grad(x.sum(), student) for x in (loss, expected))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-14)


def test_logits_that_belong_to_no_token_are_cut_off(student: Tensor, token: Tensor) -> None:
    """Models of one tokenizer fill their logits up to different round numbers."""
    teacher = FakeTeacher(vocabulary=8)
    found = token_loss({}, student, token, teacher)
    expected = by_loops("forward_kl", student[:, :8], teacher.logits(teacher.hidden), 1.0, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def top_k_columns(teacher: FakeTeacher, k: int) -> dict[str, Tensor]:
    logits = teacher.logits(teacher.hidden)
    tokens = logits.topk(k).indices
    return {"teacher_tokens": tokens.int(), "teacher_logprobs": coarse_logprobs(logits, tokens)}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_the_divergence_of_coarse_distributions(
    name: str, temperature: float, student: Tensor, token: Tensor
) -> None:
    teacher = FakeTeacher()
    found = token_loss(
        {"divergence": name, "temperature": temperature, "top_k": 3}, student, token, teacher, top_k_columns(teacher, 3)
    )
    logits = teacher.logits(teacher.hidden)
    coarse = []
    for full in (student, logits):
        chosen = full.softmax(-1).gather(-1, logits.topk(3).indices)
        coarse.append(torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1).log())
    expected = by_loops(name, *coarse, temperature, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    grads = [torch.autograd.grad(loss.sum(), student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_grows_to_the_whole_divergence(name: str, student: Tensor, token: Tensor) -> None:
    teacher = FakeTeacher()
    losses = [
        token_loss({"divergence": name, "top_k": k}, student, token, teacher, top_k_columns(teacher, k)).detach()
        for k in range(1, V + 1)
    ]
    whole = token_loss({"divergence": name}, student, token, teacher).detach()
    for fewer, more in pairwise(losses):
        assert (fewer <= more + 1e-12).all()
    assert (losses[0] < whole).all()
    torch.testing.assert_close(losses[-1], whole, rtol=1e-11, atol=1e-12)


def test_top_k_of_all_tokens_has_a_finite_gradient(student: Tensor, token: Tensor) -> None:
    teacher = FakeTeacher()
    grads = [
        torch.autograd.grad(token_loss({"temperature": 2.0, **top}, student, token, teacher, columns).sum(), student)[0]
        for top, columns in (({"top_k": V}, top_k_columns(teacher, V)), ({}, {}))
    ]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


def test_sorted_distance_by_hand() -> None:
    teacher = torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)
    student = torch.tensor([[0.5, 0.0, 0.25, 0.25]], dtype=torch.float64)
    # ranks: |0.6 - 0.5| + |0.3 - 0.25| + |0.1 - 0.25| + |0 - 0|
    for pair in ((teacher, student), (student, teacher)):
        torch.testing.assert_close(sorted_distance(*pair), torch.tensor([0.3], dtype=torch.float64))


def test_uld_counts_at_aligned_targets_alone(student: Tensor, token: Tensor) -> None:
    teacher = FakeTeacher(
        vocabulary=20, head=torch.randn(D, 20, dtype=torch.float64)
    )  # of more tokens than the student
    aligned = torch.tensor([True, False, True, True, False, False, True])
    found = token_loss({"divergence": "uld", "ce_weight": 0.4}, student, token, teacher, {"aligned": aligned})
    nll = -student.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    p, q = (logits.softmax(-1) for logits in (teacher.logits(teacher.hidden), student))
    distance = sorted_distance(p, q) * aligned
    torch.testing.assert_close(found, 0.6 * distance + 0.4 * nll, rtol=1e-12, atol=1e-13)
    grads = [torch.autograd.grad(x.sum(), student)[0] for x in (found, 0.6 * distance + 0.4 * nll)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_loss_and_metrics(share: float) -> None:
    made = objective(ce_weight=share)
    batch = one_row()
    weights = torch.tensor([[0.0, 1, 2, 0.5, 0, 1, 1]])
    batch = Batch(**{**vars(batch), "weights_BT": weights})
    divergence, logprobs = torch.rand(1, N) * (weights > 0), -torch.rand(1, N) * (weights > 0)
    hits = torch.tensor([[0.0, 1, 0, 1, 0, 0, 0]])
    scores = Scores(logprobs, token_loss_BT=(1 - share) * divergence - share * logprobs, observed={"accuracy": hits})
    loss, metrics = made.loss(scores, batch)
    expected = ((1 - share) * divergence - share * logprobs) * weights
    torch.testing.assert_close(loss, expected.sum())
    assert float(made.count(batch)) == 5.5
    quotients = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert quotients["accuracy"] == pytest.approx(1.5 / 5.5)
    assert quotients["nll"] == pytest.approx(float(-(logprobs * weights).sum() / 5.5))
    if share < 1:
        assert quotients["divergence"] == pytest.approx(float((divergence * weights).sum() / 5.5))
    else:
        assert "divergence" not in quotients
