"""Every objective × every method, and every family × two methods: the loss falls, nothing else moves, resuming is exact.

The tables are iterated: a new row is tested against every other axis without a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equal.test_reference import load_as_users_do
from tests.families import FAMILIES
from tunesmith.config import RunConfig
from tunesmith.engines.checkpoint import load_newest
from tunesmith.errors import UserError
from tunesmith.methods import METHODS
from tunesmith.methods.optim import OPTIMIZERS
from tunesmith.objectives import OBJECTIVES
from tunesmith.run import build, train
from tunesmith.run_folder import read_events

SETTINGS: dict[str, dict[str, Any]] = {
    "freeze": {"last_blocks": 1},
    "lora": {"rank": 4},
    "chunk": {"num_chunks": 2, "row_alignment": 8},
    "zeroth": {"queries": 8, "refresh_every": 2},
}
"""What a method cannot do without, or needs to learn something in a few steps of a tiny model."""

OPTIMIZER: dict[str, dict[str, Any]] = {"zeroth": {"name": "sgd", "lr": 1e-2}}
"""For methods that cannot do with AdamW."""

SLOW = {("distill", "zeroth"): 8.0, ("answer", "zeroth"): 0.3}
"""Learning rate over the method's, where an objective's slopes are small, or large."""

COARSE = {("answer", "zeroth"): {"eps": 1e-2}}
"""Settings of the method for losses that change in jumps."""

STEPS = {"zeroth": 24}
"""For methods that cannot do with 8."""


Sections = Callable[[str], dict[str, Any]]


def method_section(name: str, objective: str = "") -> dict[str, Any]:
    return {"name": name, **SETTINGS.get(name, {}), **COARSE.get((objective, name), {})}


def is_refused(objective: str, method: str) -> bool:
    """The rule: what has no gradient cannot go down it."""
    return bool(OBJECTIVES[objective].no_gradient) and "autograd" in METHODS[method].requires


CELLS = [(objective, method) for objective in OBJECTIVES for method in METHODS if not is_refused(objective, method)]
REFUSED = [(objective, method) for objective in OBJECTIVES for method in METHODS if is_refused(objective, method)]


def optimizer_section(method: str, objective: str = "") -> dict[str, Any]:
    section = OPTIMIZER.get(method, {"name": "adamw", "lr": 1e-2})
    return {**section, "lr": section["lr"] * SLOW.get((objective, method), 1.0)}


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_events(folder / "events.jsonl") if event["event"] == "step"]


def final_state(folder: Path) -> dict[str, Any]:
    found = load_newest(folder / "checkpoints", warn=pytest.fail)
    assert found is not None
    return found[1]


def equal_bits(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize(("objective", "method"), REFUSED)
def test_what_has_no_gradient_is_refused(
    make_config: Callable[..., RunConfig], objective_sections: Sections, objective: str, method: str
) -> None:
    config = make_config(**objective_sections(objective), method=method_section(method))
    with pytest.raises(UserError, match=f"{objective}: has no gradient, which method: {method} needs"):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(("objective", "method"), CELLS)
def test_the_loss_falls_and_nothing_else_moves(
    make_config: Callable[..., RunConfig], objective_sections: Sections, objective: str, method: str
) -> None:
    steps = STEPS.get(method, 8)
    config = make_config(
        **objective_sections(objective), method=method_section(method, objective),
        train={"steps": steps, "batch_size": 24},
        optimizer=optimizer_section(method, objective),
    )  # fmt: skip
    result = train(config)
    found = losses(result.folder)
    assert len(found) == steps
    assert found[-1] < 0.95 * found[0]
    assert result.eval_losses[steps] < result.eval_losses[0]

    run = build(config)
    trained = set(run.learner.method.params)
    before = {name: p.clone() for name, p in run.learner.model.named_parameters()}
    for step in range(3):
        for ready in run.objective.prepare(run.data(step), run.helpers):
            run.learner.step(run.objective, ready, lr=1e-2)
    moved = {name for name, p in run.learner.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= trained
    if not METHODS[method].trains_all:
        assert trained < set(before)


@pytest.mark.parametrize(("objective", "method"), CELLS)
def test_resuming_gives_the_same_bits(
    make_config: Callable[..., RunConfig], objective_sections: Sections, tmp_path: Path, objective: str, method: str
) -> None:
    """Six steps at once, and three, then three more in a new learner: with dropout and a cosine in between."""
    section = method_section(method, objective) | ({"dropout": 0.2} if method == "lora" else {})
    whole = make_config(
        **objective_sections(objective), method=section, train={"steps": 6}, checkpoint={"every_steps": 3, "keep": 9},
        optimizer=optimizer_section(method),
    )  # fmt: skip
    train(whole)
    second = tmp_path / "second"
    second.mkdir()
    for name in ("config.yaml", "manifest.json"):
        (second / name).write_bytes((Path(whole.output) / name).read_bytes())
    (second / "checkpoints").mkdir()
    (Path(whole.output) / "checkpoints/step-3").rename(second / "checkpoints/step-3")
    train(whole.model_copy(update={"output": str(second)}), resume=True)
    assert equal_bits(final_state(Path(whole.output)), final_state(second))
    assert losses(Path(whole.output))[3:] == losses(second)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw8bit"])
def test_every_optimizer_learns_and_resumes(
    make_config: Callable[..., RunConfig], tmp_path: Path, optimizer: str
) -> None:
    section = {"name": optimizer, "lr": {"sgd": 0.5, "lion": 1e-3}.get(optimizer, 1e-2), "weight_decay": 0.01}
    config = make_config(
        method="full", optimizer=section, train={"steps": 6, "batch_size": 24}, checkpoint={"every_steps": 3, "keep": 9}
    )
    result = train(config)
    found = losses(result.folder)
    assert found[-1] < found[0]
    whole = final_state(result.folder)
    for path in (result.folder / "checkpoints").glob("step-6/*"):
        path.unlink()
    (result.folder / "checkpoints/step-6").rmdir()
    train(config, resume=True)
    assert equal_bits(whole, final_state(result.folder))
    assert losses(result.folder) == found


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_saves_and_reloads(make_config: Callable[..., RunConfig], family: str, method: str) -> None:
    config = make_config(
        family, method=method_section(method), train={"steps": 6, "batch_size": 24}, data={"pack": True}
    )
    result = train(config)
    found = losses(result.folder)
    assert found[-1] < found[0]
    run = build(config)
    run.learner.method.load_state_dict(final_state(result.folder))
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = run.learner.model.eval()(input_ids=tokens).logits
        reloaded = load_as_users_do(result.folder / "model")(input_ids=tokens).logits
    torch.testing.assert_close(reloaded, expected, rtol=1e-4, atol=1e-4)
