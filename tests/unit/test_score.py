"""Scoring against torch in fp64, and that no [tokens, vocabulary] tensor is ever made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families import make_model
from tunesmith.models import head as module
from tunesmith.models.head import Head, Targets, score_targets
from tunesmith.models.probe import find_head
from tunesmith.models.score import score
from tunesmith.types import Batch, Wanted

N, D, V = 23, 8, 40


def token_logprobs(hidden: Tensor, token: Tensor, head: Head, weights: Tensor | None = None) -> Tensor:
    return score_targets(hidden, head, Targets(token, Wanted(is_likelihood=True), weight_N=weights))[0]


def reference(hidden: Tensor, token: Tensor, linear: nn.Linear, head: Head) -> Tensor:
    logits = linear(hidden) * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return torch.distributions.Categorical(logits=logits).log_prob(token)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINED_CHUNK_ELEMENTS", 5 * V)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * V)  # 23 rows in chunks of 5: the last is ragged


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 2.0), (0.5, 3.0)])
@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "wrapped"])
@pytest.mark.parametrize("guess", ["right", "wrong", "none"])
def test_logprobs_and_gradients_equal_torch(
    trained: bool, bias: bool, scale: float, cap: float | None, wrapped: bool, guess: str
) -> None:
    linear = nn.Linear(D, V, bias=bias, dtype=torch.float64).requires_grad_(trained)
    module_of_head = nn.Sequential(linear) if wrapped else linear
    if wrapped:
        module_of_head.weight = linear.weight
    head = Head(module_of_head, scale, cap)
    hidden, token = torch.randn(N, D, dtype=torch.float64), torch.randint(0, V, (N,))
    upstream = torch.randn(N, dtype=torch.float64)

    weights = {"right": upstream * -3, "wrong": torch.ones(N, dtype=torch.float64), "none": None}[guess]
    found, expected = [], []
    for compute, results in (
        (lambda h: token_logprobs(h, token, head, weights), found),
        (lambda h: reference(h, token, linear, head), expected),
    ):
        linear.zero_grad()
        h = hidden.clone().requires_grad_()
        logprobs = compute(h)
        logprobs.backward(upstream)
        results += [logprobs.detach(), h.grad, *(p.grad.clone() for p in linear.parameters() if trained)]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_equals_torchs_linear_cross_entropy() -> None:
    linear = nn.Linear(D, V, bias=False)
    hidden, token = torch.randn(N, D), torch.randint(0, V, (N,))
    expected = nn.functional.linear_cross_entropy(hidden, linear.weight, token, reduction="none")
    torch.testing.assert_close(-token_logprobs(hidden, token, Head(linear)), expected)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_no_tensor_is_tokens_by_vocabulary(trained: bool) -> None:
    tokens, vocabulary = 64, 512
    linear = nn.Linear(D, vocabulary, bias=False).requires_grad_(trained)
    hidden, token = torch.randn(tokens, D, requires_grad=True), torch.randint(0, vocabulary, (tokens,))

    def largest(compute: Any) -> int:
        with LargestTensor() as watch:
            compute().sum().backward()
        return watch.elements

    assert largest(lambda: token_logprobs(hidden, token, Head(linear))) <= vocabulary * D
    assert largest(lambda: reference(hidden, token, linear, Head(linear))) == vocabulary * tokens  # the control


def single_row(tokens: Tensor, weights: Tensor) -> Batch:
    length = len(tokens)
    return Batch(
        tokens[None], torch.arange(length)[None], torch.zeros(1, length, dtype=torch.int64), weights[None],
        torch.tensor([0]), torch.tensor([0]),
    )  # fmt: skip


def test_only_targets_are_scored() -> None:
    model = make_model("llama")
    weights = torch.tensor([0.0, 0, 1, 0.5, 0, 2])
    batch = single_row(torch.tensor([5, 6, 7, 8, 9, 10]), weights)
    logprobs = score(model, find_head(model), batch).logprobs_BT
    expected = (
        model(input_ids=batch.tokens_BT).logits[0, :-1].log_softmax(-1).gather(-1, batch.tokens_BT[0, 1:, None])[:, 0]
    )
    assert (logprobs[0] != 0).tolist() == (weights != 0).tolist()
    torch.testing.assert_close(logprobs[0, weights != 0], expected[weights[1:] != 0])


def test_a_head_of_no_known_rule_takes_the_models_own_logits() -> None:
    model = make_model("llama")
    batch = single_row(torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([0.0, 0, 1, 1, 0, 1]))
    by_rule, by_model = score(model, find_head(model), batch), score(model, Head(None), batch)
    torch.testing.assert_close(by_model.logprobs_BT, by_rule.logprobs_BT)


def test_no_target_at_all_gives_zeros_and_a_gradient_of_zero() -> None:
    model = make_model("llama")
    batch = single_row(torch.tensor([5, 6, 7]), torch.zeros(3))
    logprobs = score(model, find_head(model), batch).logprobs_BT
    logprobs.sum().backward()
    assert not logprobs.any()
    assert not model.lm_head.weight.grad.any()
