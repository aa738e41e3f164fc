"""Scoring against torch in fp64, and that no [tokens, vocabulary] tensor is ever made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.batches import ragged_batch
from tests.families import make_model
from tunesmith.models import head as module
from tunesmith.models.head import Head, Targets, score_targets
from tunesmith.models.probe import find_head
from tunesmith.models.score import has_router, score
from tunesmith.objectives.terms import choice_accuracy, choice_loss
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


@pytest.mark.parametrize(("scale", "cap", "bias"), [(1.0, None, False), (0.5, 3.0, True)])
def test_logits_of_a_few_tokens_alone_say_the_same_of_them(scale: float, cap: float | None, bias: bool) -> None:
    head = Head(nn.Linear(D, V, bias=bias, dtype=torch.float64), scale, cap)
    hidden = torch.randn(N, D, dtype=torch.float64)
    choices = torch.stack([torch.randperm(V // 2)[:3] for _ in range(N)])
    choices[::2, 2] = -1  # some have two
    token = choices[torch.arange(N), torch.arange(N) % 2]
    wanted = {"token_loss": choice_loss, "observed": {"accuracy": choice_accuracy}}
    whole = score_targets(hidden, head, Targets(token, Wanted(**wanted), {"choices": choices}))
    unasked = torch.ones(V, dtype=torch.bool).index_fill(0, choices[choices >= 0], False)
    with torch.no_grad():
        head.linear.weight[unasked] = torch.nan  # type: ignore[union-attr, operator]
        few = score_targets(hidden, head, Targets(token, Wanted(**wanted, among="choices"), {"choices": choices}))
    torch.testing.assert_close(few[0], whole[0], rtol=0, atol=1e-12)
    assert torch.equal(few[1][1], whole[1][1])
    assert (few[1][0] >= whole[1][0]).all(), "a share among few is the larger"
    torch.testing.assert_close(few[1][0], -few[0].detach(), rtol=0, atol=1e-12)


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


def test_a_token_loss_carries_the_gradient_and_other_numbers_none() -> None:
    """Both ways through the head: frozen and trained, against autograd on whole logits."""
    torch.manual_seed(0)
    token = torch.randint(0, V, (N,))
    column = torch.rand(N, dtype=torch.float64)

    def term(logits: Tensor, token: Tensor, columns: Any) -> Tensor:
        return columns["scale"] * logits.logsumexp(-1) ** 2 - logits.gather(-1, token[:, None])[:, 0]

    def entropy(logprobs: Tensor, token: Tensor, columns: Any) -> Tensor:
        return -(logprobs.exp() * logprobs).sum(-1)

    for trained in (False, True):
        for is_likelihood in (False, True):
            hidden = torch.randn(N, D, dtype=torch.float64).requires_grad_()
            linear = nn.Linear(D, V, dtype=torch.float64).requires_grad_(trained)
            wanted = Wanted(token_loss=term, observed={"entropy": entropy}, is_likelihood=is_likelihood)
            upstream = torch.rand(N, dtype=torch.float64)
            targets = Targets(token, wanted, {"scale": column}, upstream)
            main, others = score_targets(hidden, Head(linear), targets)
            leaves = [hidden, *(p for p in linear.parameters() if trained)]
            found = torch.autograd.grad((main * upstream).sum(), leaves)
            logits = linear(hidden)
            expected = term(logits, token, {"scale": column})
            torch.testing.assert_close(main, expected)
            logprobs = logits.log_softmax(-1)
            torch.testing.assert_close(others[0], logprobs.gather(-1, token[:, None])[:, 0])
            torch.testing.assert_close(others[1], entropy(logprobs, token, {}))
            assert not others.requires_grad
            for mine, whole in zip(found, torch.autograd.grad((expected * upstream).sum(), leaves), strict=True):
                torch.testing.assert_close(mine, whole)


def test_the_balance_of_experts_is_transformers_own() -> None:
    """One sequence a micro-batch: then transformers' load-balancing loss is that of the sequence."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    for family in ("mixtral", "qwen3_moe"):
        model = make_model(family, torch.float64)
        batch = ragged_batch(pack=True)
        balance = score(model, find_head(model), batch, Wanted(router=True)).balance_N
        assert balance is not None
        for n, (tokens, _) in enumerate(batch.sequences()):
            router = model.model(input_ids=tokens[None], output_router_logits=True).router_logits
            expected = load_balancing_loss_func(
                router, model.config.num_local_experts, model.config.num_experts_per_tok
            )
            assert float(balance[n]) == pytest.approx(float(expected), rel=1e-6)
        (grad,) = torch.autograd.grad(balance.sum(), model.model.embed_tokens.weight)
        assert grad.abs().max() > 0
    assert has_router(make_model("mixtral"))
    assert not has_router(make_model("llama"))


def test_noise_on_embeddings_is_that_of_neftune() -> None:
    """Uniform within alpha / sqrt(length · width), while training alone; other places stay as they are."""
    model, batch = make_model("llama"), ragged_batch(pack=True)
    seen: list[Tensor] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _m, arguments, named: seen.append(arguments[0] if arguments else named["hidden_states"]),
        with_kwargs=True,
    )
    clean = model.get_input_embeddings()(batch.tokens_BT)
    head = find_head(model)
    seen.clear()
    score(model.eval(), head, batch, Wanted(embedding_noise=5.0))
    assert torch.equal(seen.pop(), clean)
    score(model.train(), head, batch, Wanted(embedding_noise=5.0))
    noise = (seen.pop() - clean).detach()
    handle.remove()
    for n, (tokens, _) in enumerate(batch.sequences()):
        mine = noise[batch.sequence_BT == n]
        bound = 5.0 / (len(tokens) * mine.shape[-1]) ** 0.5
        assert mine.abs().max() <= bound * 1.0001
        assert mine.std() == pytest.approx(bound / 3**0.5, rel=0.15)
