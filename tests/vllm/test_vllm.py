"""The vLLM scorer in a real vLLM, on the CPU, against the states put into transformers' weights: `make vllm`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make vllm")

from tests.batches import ragged_batch
from tests.equal.test_zeroth import SFT, learner_of, whole_weights
from tests.families import FAMILIES, SMALL, VOCABULARY
from tunesmith.config_objectives import ClassifyConfig
from tunesmith.models.low_rank import Probe
from tunesmith.objectives import build_objective
from tunesmith.types import Batch, Generation, Wanted

PROBES = [Probe(0, 1e-2), Probe(0, -1e-2), Probe(1, 1e-2), Probe(1, -1e-2)]
BUILDS = {"llama": {}, "qwen2": {}, "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64}}
"""RMSNorm and no biases; biases and grouped queries; LayerNorm and learnt positions."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model_of(folder: Path, family: str) -> Any:
    """A tiny random model, saved and loaded again: vLLM reads it from the folder. Its heads are as narrow as vLLM allows."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    path = folder / family
    if not path.exists():
        torch.manual_seed(0)
        size = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        config = CONFIG_MAPPING[family](**{**SMALL, **FAMILIES.get(family, {}), **size, **BUILDS[family]})
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def learners(folder: Path, family: str, **settings: Any) -> tuple[Any, Any]:
    """The same run under the vLLM scorer and under that which writes the weights."""
    settings = {"queries": 2, "rank": 2, "refresh_every": 2, "eps": 1e-2, **settings}
    small: dict[str, Any] = {
        "max_model_len": 256,
        "kv_cache_memory_bytes": 2**26,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
    }
    by_vllm = learner_of(model_of(folder, family), scorer="vllm", vllm=small, **settings)
    return by_vllm, learner_of(model_of(folder, family), scorer="in_place", **settings)


def choices_batch() -> Batch:
    """Every sequence's last token is one of two or three words."""
    batch = ragged_batch(pack=True)
    weights_BT = torch.zeros_like(batch.weights_BT)
    for n in range(len(batch.sample_N)):
        row, column = (batch.sequence_BT == n).nonzero()[-1]
        weights_BT[row, column] = 1.0
    words = (batch.tokens_BT[..., None] + torch.tensor([0, 5, 9])) % VOCABULARY
    words[::2, ..., 2] = -1
    return replace(batch, weights_BT=weights_BT).with_columns({"choices": words})


def logprobs(learner: Any, batch: Batch, probes: list[Probe], wanted: Any = SFT.wanted) -> list[Any]:
    learner.model.eval()
    return learner.method.scorer.score(batch, wanted, probes)


@pytest.mark.parametrize("family", list(BUILDS))
def test_vllm_says_of_each_state_what_transformers_says_of_it(folder: Path, family: str) -> None:
    by_vllm, by_weights = learners(folder, family)
    batch, few = ragged_batch(pack=family != "opt"), choices_batch() if family != "opt" else None
    classify = build_objective(ClassifyConfig())
    for learner in (by_vllm, by_weights):
        learner.method.directions.begin(0, 2)
    found, expected = (logprobs(learner, batch, PROBES) for learner in (by_vllm, by_weights))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logprobs_BT, b.logprobs_BT, rtol=0, atol=2e-4)
    moved = (expected[0].logprobs_BT - expected[1].logprobs_BT).abs().max()
    assert moved > 1e-2, "or else the states were not told apart"
    if few is not None:
        pairs = zip(
            *(logprobs(learner, few, PROBES, classify.wanted) for learner in (by_vllm, by_weights)), strict=True
        )
        for a, b in pairs:
            torch.testing.assert_close(a.token_loss_BT, b.token_loss_BT, rtol=0, atol=2e-4)
            assert torch.equal(a.observed["accuracy"], b.observed["accuracy"])


def test_every_state_answers_as_it_does_in_transformers(folder: Path) -> None:
    by_vllm, by_weights = learners(folder, "llama")
    for learner in (by_vllm, by_weights):
        learner.method.directions.begin(0, 2)
    wanted = Wanted(generate=Generation(6, (2, 5)))
    probes = [Probe(0, 0.0), Probe(0, 0.1), Probe(1, -0.1)]
    found, expected = (logprobs(learner, choices_batch(), probes, wanted) for learner in (by_vllm, by_weights))
    answers = []
    for a, b in zip(found, expected, strict=True):
        width = b.generated_NG.shape[1]
        assert torch.equal(a.generated_NG[:, :width], b.generated_NG)
        assert (a.generated_NG[:, width:] == -1).all()
        answers.append(a.generated_NG)
    assert not torch.equal(answers[0], answers[1]), "or else the states were not told apart"


def test_a_run_takes_the_same_steps_through_folds_and_a_resume(folder: Path) -> None:
    """V is renewed every second step, and what gathered goes into the weights: vLLM's copy must follow."""
    by_vllm, by_weights = learners(folder, "llama")
    losses: list[list[float]] = [[], []]
    for _ in range(7):
        for learner, of_learner in zip((by_vllm, by_weights), losses, strict=True):
            of_learner.append(float(learner.step(SFT, ragged_batch(True), 1e-2)["loss"]))
    assert by_vllm.method.directions.folds == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert abs(losses[0][0] - losses[0][-1]) > 1e-2, "nothing has moved"
    centre = by_vllm.evaluate(SFT, [ragged_batch(True)], {})["loss"]
    assert float(centre) == pytest.approx(float(by_weights.evaluate(SFT, [ragged_batch(True)], {})["loss"]), abs=1e-4)
    saved = by_vllm.method.state_dict()
    end = whole_weights(by_vllm)
    again, _ = learners(folder, "llama")
    again.method.load_state_dict(saved)
    for name, weight in whole_weights(again).items():
        assert torch.equal(weight, end[name])
    assert float(again.evaluate(SFT, [ragged_batch(True)], {})["loss"]) == pytest.approx(float(centre), abs=1e-5)


def test_a_rewritten_adapter_reads_nothing_old_from_the_cache(folder: Path) -> None:
    """The same prompts under another state: with the salt held still, what is cached of the old state answers."""
    by_vllm, by_weights = learners(folder, "llama")
    size = 200  # more than a block of the cache, which has 128 tokens here
    row = torch.arange(size)[None]
    weights_BT = torch.zeros(1, size).index_fill(1, torch.tensor([size - 1]), 1.0)
    one = torch.zeros(1, dtype=torch.long)
    batch = Batch(row + 3, row, row * 0, weights_BT, one, one)
    batch = batch.with_columns({"choices": torch.tensor([size + 2, 7]).expand(1, size, 2)})
    wanted = build_objective(ClassifyConfig()).wanted

    def ask(learner: Any, step: int) -> Tensor:
        learner.method.directions.begin(step, 2)
        return logprobs(learner, batch, [Probe(0, 0.3)], wanted)[0].token_loss_BT

    scorer = by_vllm.method.scorer
    expected = [ask(by_weights, step) for step in (0, 1)]
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    for step in (0, 1):
        torch.testing.assert_close(ask(by_vllm, step), expected[step], rtol=0, atol=2e-4)
    scorer.written -= 1  # the control: the next rewriting has the salt of the one before
    stale = ask(by_vllm, 0)
    assert (stale - expected[0]).abs().max() > 1e-3, "the cache had nothing to say, so this test shows nothing"
