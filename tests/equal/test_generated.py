"""Generated answers: all states at once against one prompt at a time under weights that hold the state; and what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.batches import ragged_batch
from tests.equal.test_zeroth import learner_of, moved, whole_weights, without_fp32
from tests.families import ISOLATING, VOCABULARY, make_model
from tunesmith.config import RunConfig
from tunesmith.errors import UserError
from tunesmith.methods import METHODS
from tunesmith.methods.zeroth import Zeroth
from tunesmith.models.low_rank import Probe
from tunesmith.objectives.answer import exact_match, f1
from tunesmith.run import build, train
from tunesmith.run_folder import read_events
from tunesmith.types import Batch, Generation, Wanted

PROBES = [Probe(0, 0.3), Probe(1, -0.3), Probe(0, 0.0), Probe(1, 0.3), Probe(0, -0.3)]
WANTED = Wanted(generate=Generation(max_new_tokens=9, end_tokens=tuple(range(0, VOCABULARY, 8))))


def questions(pack: bool) -> Batch:
    """Prompts of 1 to 7 tokens; a sequence that is no longer than its prompt has no answer to learn, and is not asked."""
    batch = ragged_batch(pack)
    prompt_BT = 1 + 3 * batch.sequence_BT % 7
    batch = replace(batch, weights_BT=((batch.positions_BT >= prompt_BT) & (batch.sequence_BT >= 0)).float())
    lengths = [len(prompt) for prompt, _ in batch.questions()]
    assert len(set(lengths)) > 4
    assert 0 in lengths
    return batch


def one_at_a_time(model: Any, batch: Batch) -> list[list[int]]:
    """The likeliest token, again and again, of one prompt without padding and without a cache."""
    assert WANTED.generate is not None
    found = []
    for prompt, _ in batch.questions():
        tokens, new = prompt[None], list[int]()
        while len(prompt) and len(new) < WANTED.generate.max_new_tokens:
            logits_V = model(input_ids=tokens, use_cache=False).logits[0, -1]
            best, second = logits_V.topk(2).values.tolist()
            assert best - second > 1e-6, "a tie"
            token = int(logits_V.argmax())
            if token in WANTED.generate.end_tokens:
                break
            new.append(token)
            tokens = torch.cat([tokens, torch.tensor([[token]])], 1)
        found.append(new)
    return found


def said(generated_NG: Tensor | None) -> list[list[int]]:
    assert generated_NG is not None
    answers = [row[row >= 0].tolist() for row in generated_NG]
    # nothing follows behind an end
    assert all((row[len(answer) :] == -1).all() for row, answer in zip(generated_NG, answers, strict=True))
    return answers


@pytest.mark.parametrize("scorer", ["batched", "in_place"])
@pytest.mark.parametrize(
    ("family", "pack"),
    [
        (f, pack)
        for f in ("llama", "gpt2", "opt", "gemma3_text")
        for pack in (False, True)
        if f in ISOLATING or not pack
    ],
)
@torch.no_grad()
def test_answers_of_all_states_are_those_of_the_states_put_into_the_weights(
    family: str, pack: bool, scorer: str
) -> None:
    learner = moved(without_fp32(make_model(family, torch.float64)), {"scorer": scorer})
    directions: Any = learner.method.directions
    whole = questions(pack)
    micro_batches = whole.split(whole.tokens_BT.shape[1] * 3)
    assert len(micro_batches) > 1
    apart = without_fp32(make_model(family, torch.float64))
    lengths = set()
    for batch in micro_batches:
        found = [said(scores.generated_NG) for scores in learner.method.scorer.score(batch, WANTED, PROBES)]
        for probe, answers in zip(PROBES, found, strict=True):
            for name, p in apart.named_parameters():
                p.copy_(whole_weights(learner)[name])
                if name in learner.method.params:
                    p.add_(directions.direction(name, probe.query).double(), alpha=probe.coefficient)
            assert answers == one_at_a_time(apart, batch)
            lengths |= set(map(len, answers))
        assert len({str(answers) for answers in found}) == len(PROBES), "states that all say the same show nothing"
    assert len(lengths) > 3, "rows end at different steps"


@torch.no_grad()
def test_a_model_whose_own_settings_would_change_its_answers_is_greedy() -> None:
    batch, model = questions(False), without_fp32(make_model("llama", torch.float64))
    learner = learner_of(model)
    before = said(learner.engine.score(model, batch, WANTED).generated_NG)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    own = model.generation_config
    assert said(learner.engine.score(model, batch, WANTED).generated_NG) == before == one_at_a_time(model, batch)
    assert model.generation_config is own


def test_a_question_is_what_stands_before_the_first_answer() -> None:
    batch = Batch(
        tokens_BT=torch.tensor([[5, 6, 7, 8, 9, 10, 20, 21, 22], [30, 31, 32, 40, 41, 42, 0, 0, 0]]),
        positions_BT=torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2], [0, 1, 2, 0, 1, 2, 0, 0, 0]]),
        sequence_BT=torch.tensor([[0, 0, 0, 0, 0, 0, 2, 2, 2], [1, 1, 1, 3, 3, 3, -1, -1, -1]]),
        weights_BT=torch.tensor([[0, 0, 1, 0.5, 0, 1, 0, 0, 1], [0, 0, 0, 0, 2, 2, 0, 0, 0]]),
        sample_N=torch.arange(4),
        group_N=torch.arange(4),
    )
    assert [(p.tolist(), a.tolist()) for p, a in batch.questions()] == [
        ([5, 6], [7, 8]), ([], []), ([20, 21], [22]), ([40], [41, 42]),
    ]  # fmt: skip
    second = batch.split(1)[1]
    assert [(p.tolist(), a.tolist()) for p, a in second.questions()] == [([], [])] * 3 + [([40], [41, 42])]


@pytest.mark.parametrize(
    ("given", "right", "f1_", "exact"),
    [
        ("The Denver Broncos!", "denver broncos", 1.0, 1.0),
        ("broncos denver", "Denver Broncos", 1.0, 0.0),
        ("Denver", "Denver Broncos", 2 / 3, 0.0),
        ("the Carolina Panthers", "Denver Broncos", 0.0, 0.0),
        ("a b c d", "b d e", 2 * (2 / 3) * (2 / 3) / (4 / 3), 0.0),  # "a" is an article
        ("no no no", "no", 0.5, 0.0),
        ("no no", "no no maybe no", 2 / 3, 0.0),
        ("U.S.A.", "usa", 1.0, 1.0),
        ("theatre", "atre", 0.0, 0.0),
        ("  After 3\ncomes 4.", "after 3 comes 4", 1.0, 1.0),
        ("", "", 1.0, 1.0),
        ("the", "", 1.0, 1.0),
        ("", "yes", 0.0, 0.0),
    ],
)
def test_f1_and_exact_match_are_squads(given: str, right: str, f1_: float, exact: float) -> None:
    assert f1(given, right) == pytest.approx(f1_)
    assert exact_match(given, right) == exact
    assert f1(right, given) == f1(given, right)


# --- refusals

ABLE = [name for name, kind in METHODS.items() if "autograd" not in kind.requires]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ABLE])
@pytest.mark.parametrize("objective", ["answer", "classify"])
def test_a_method_that_needs_a_gradient_is_refused_before_loading(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch, objective: str, method: str,
) -> None:  # fmt: skip
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("must not come so far")

    monkeypatch.setattr("tunesmith.run.build", load)
    sections = objective_sections(objective)
    what = "objective: answer"
    if objective == "classify":
        sections["objective"]["loss"], what = "accuracy", r"objective\.loss: accuracy"
    section = {"name": method, **({"last_blocks": 1} if method == "freeze" else {})}
    with pytest.raises(UserError, match=f"^{what}: has no gradient, which method: {method} needs; use method: zeroth$"):
        train(make_config(**sections, method=section))


def test_an_answer_that_the_model_has_no_positions_for_is_refused(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]]
) -> None:
    for number, message in (
        (250, r"and generated answers \(objective\.max_new_tokens\) up to 250 more, but .* set data\.max_tokens to 6"),
        (256, r"objective\.max_new_tokens: 256 are asked for, but the model knows 256 positions"),
    ):
        sections = objective_sections("answer")
        sections["objective"]["max_new_tokens"] = number
        with pytest.raises(UserError, match=message):
            build(make_config(**sections, method="zeroth", optimizer={"name": "sgd"}))


# --- what is learnt

LEARNS: dict[str, tuple[dict[str, Any], int]] = {
    "f1": ({"name": "answer", "max_new_tokens": 16}, 8),
    "accuracy": ({"name": "classify", "loss": "accuracy"}, 10),
}
"""By metric: the objective, and steps in which it shows."""


def before_and_after(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]], metric: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics over all the data, at the start and at the end of a run."""
    objective, number = LEARNS[metric]
    sections = objective_sections(objective["name"])
    sections["data"]["eval_path"] = sections["data"]["path"]
    config = make_config(
        **{**sections, "objective": objective}, train={"steps": number, "batch_size": 24},
        method={"name": "zeroth", "queries": 8, "refresh_every": 2, "eps": 1e-2},
        optimizer={"name": "sgd", "lr": 3e-3}, schedule={"name": "constant", "warmup_fraction": 0},
    )  # fmt: skip
    events = read_events(train(config).folder / "events.jsonl")
    start, end = (event for event in events if event["event"] == "eval")
    return start, end


@pytest.mark.parametrize("metric", LEARNS)
def test_a_metric_without_gradient_gets_better(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]], metric: str
) -> None:
    start, end = before_and_after(make_config, objective_sections, metric)
    assert start[metric] < 0.4
    assert end[metric] > 0.7
    assert end["loss"] == pytest.approx(1 - end[metric])


@pytest.mark.parametrize("metric", LEARNS)
def test_slopes_of_random_sign_teach_nothing(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch, metric: str,
) -> None:  # fmt: skip
    """The control: steps as long as those that learn lead at most to answers of either kind, in equal parts."""
    slopes, random = Zeroth._slopes, Random(0)
    monkeypatch.setattr(
        Zeroth, "_slopes", lambda self, losses: [x * random.choice((1, -1)) for x in slopes(self, losses)]
    )
    _, end = before_and_after(make_config, objective_sections, metric)
    assert end[metric] < 0.6
