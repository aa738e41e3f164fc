"""References: what they say, what they hold, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import make_model
from tunesmith.cache import cache_folder
from tunesmith.config import ModelConfig, RunConfig
from tunesmith.errors import UserError
from tunesmith.helpers import ModelReference, StartReference, StoredReference, weights_key
from tunesmith.run import Run, build, train
from tunesmith.run_check import check
from tunesmith.run_folder import RunFolder

Make = Callable[..., RunConfig]
Pairs = Callable[[str], dict[str, Any]]


def take_steps(run: Run, number: int = 3) -> None:
    for step in range(number):
        for ready in run.objective.prepare(run.data(step), run.helpers):
            run.learner.step(run.objective, ready, lr=1e-2)


@pytest.mark.parametrize(
    "method", ["full", "lora", {"name": "freeze", "last_blocks": 1}, {"name": "lora", "init": "pissa"}]
)
@pytest.mark.parametrize("reference", ["live", "precompute"])
def test_the_reference_is_the_model_before_training(
    make_config: Make, data_of_form: Pairs, method: Any, reference: str
) -> None:
    run = build(
        make_config(data=data_of_form("pairs"), objective={"name": "dpo", "reference": reference}, method=method)
    )
    batch = run.data(0)
    before = run.learner.logprobs(batch)
    take_steps(run)
    after = run.learner.logprobs(batch)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(run.helpers["reference"].logprobs(batch), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run.learner.logprobs(batch), after, rtol=0, atol=0)


def test_what_a_reference_holds(make_config: Make, data_of_form: Pairs) -> None:
    def reference(method: str, **objective: Any) -> Any:
        sections = {"data": data_of_form("pairs"), "objective": {"name": "dpo", **objective}, "method": method}
        run = build(make_config(**sections))
        return run, run.helpers["reference"]

    run, of_adapter = reference("lora")
    assert isinstance(of_adapter, StartReference)
    assert of_adapter.describe() == "the adapter switched off · no memory"
    assert run.learner.method.start is None
    run, copied = reference("full")
    held = sum(p.numel() * p.element_size() for p in run.learner.method.params.values())
    assert sum(p.numel() * p.element_size() for p in run.learner.method.start.values()) == held
    assert copied.describe() == f"a frozen copy of what trains · {held / 1024:.3g} KiB"
    run, stored = reference("full", reference="precompute")
    assert isinstance(stored, StoredReference)
    assert run.learner.method.start is None
    assert f"spares a frozen copy of {held / 1024:.3g} KiB" in stored.describe()


def test_precomputed_scores_are_made_once_and_follow_the_data(make_config: Make, data_of_form: Pairs) -> None:
    shutil.rmtree(cache_folder() / "scores", ignore_errors=True)

    def stores(**sections: Any) -> set[str]:
        objective = {"name": "dpo", "reference": "precompute"}
        build(make_config(objective=objective, **sections))
        return {path.name for path in (cache_folder() / "scores").iterdir()}

    data = data_of_form("pairs")
    first = stores(data=data)
    assert len(first) == 1
    assert stores(data=data, method="full") == first
    assert len(stores(data=data | {"max_tokens": 20})) == 2


def test_a_run_with_a_precomputed_reference_ends_as_with_a_live_one(
    make_config: Make, data_of_form: Pairs, tmp_path: Path
) -> None:
    found = {}
    for reference in ("live", "precompute"):
        config = make_config(
            data=data_of_form("pairs"),
            objective={"name": "dpo", "reference": reference},
            output=str(tmp_path / reference),
        )
        found[reference] = train(config).eval_losses
        header = dict(RunFolder(tmp_path / reference).read_manifest()["header"])
        assert header["reference"].startswith({"live": "the adapter", "precompute": "precomputed"}[reference])
    assert found["live"] == pytest.approx(found["precompute"], abs=1e-5)
    assert found["live"][0] == pytest.approx(0.6931472, abs=1e-6)


def test_another_model_is_the_reference(
    make_config: Make, data_of_form: Pairs, model_folder: Callable[..., Path]
) -> None:
    other = str(model_folder("llama", seed=1))
    scores = []
    for reference in ("live", "precompute"):
        objective = {"name": "dpo", "reference": reference, "reference_model": other}
        run = build(make_config(data=data_of_form("pairs"), objective=objective))
        assert isinstance(run.helpers["reference"], ModelReference if reference == "live" else StoredReference)
        scores.append(run.helpers["reference"].logprobs(run.data(0)))
        assert (scores[-1] - run.learner.logprobs(run.data(0))).abs().max() > 0.1
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_a_reference_that_cannot_be_is_refused(
    make_config: Make, data_of_form: Pairs, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def with_reference(path: Path | str, **more: Any) -> RunConfig:
        return make_config(data=data_of_form("pairs"), objective={"name": "dpo", "reference_model": str(path), **more})

    with pytest.raises(UserError, match=r"objective\.reference_model: .*no such model folder"):
        check(with_reference(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"objective\.reference_model: .*no model: it holds no config\.json"):
        check(with_reference(tmp_path / "empty"))
    other = tmp_path / "other"
    make_model("llama").save_pretrained(other)
    for file in model_folder().glob("*"):
        if not (other / file.name).exists():
            (other / file.name).write_bytes(file.read_bytes())
    vocabulary = (other / "tokenizer.json").read_text().replace('"<|im_end|>"', '"<|finish|>"')
    (other / "tokenizer.json").write_text(vocabulary)
    with pytest.raises(UserError, match="numbers the tokens otherwise"):
        build(with_reference(other))


def test_what_needs_all_data_beforehand_is_refused_for_a_stream(make_config: Make, data_of_form: Pairs) -> None:
    with pytest.raises(UserError, match="precompute needs all data before training, not a stream"):
        make_config(data=data_of_form("pairs") | {"stream": True}, objective={"name": "dpo", "reference": "precompute"})


def test_checkpoints_that_differ_in_the_middle_have_different_keys(tmp_path: Path) -> None:
    keys = []
    for number, middle in enumerate((b"a", b"b", b"a")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(2 << 20) + middle + bytes(2 << 20))
        keys.append(weights_key(ModelConfig(path=str(folder))))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    "layout", [{"pack": True, "share": False}, {"pack": True, "share": True}, {"pack": False, "share": True}]
)
def test_another_model_reads_one_sequence_a_row(
    make_config: Make, data_of_form: Pairs, model_folder: Callable[..., Path], layout: dict[str, bool]
) -> None:
    """OPT counts positions itself: it cannot keep packed sequences apart, nor share a prompt."""
    other = str(model_folder("opt"))
    run = build(make_config(data=data_of_form("pairs"), objective={"name": "dpo", "reference_model": other}))
    apart, laid_out = replace(run.data, pack=False, share=False)(0), replace(run.data, **layout)(0)
    sums = []
    for batch in (apart, laid_out):
        found = run.helpers["reference"].logprobs(batch)
        pairs = {(int(batch.sample_N[n]), tuple(t.tolist())): n for n, (t, _) in enumerate(batch.sequences())}
        sums.append({key: float(found[batch.sequence_BT == n].sum()) for key, n in pairs.items()})
    assert sums[0] == pytest.approx(sums[1], abs=1e-4)


def test_a_run_does_not_go_on_against_another_reference(
    make_config: Make, data_of_form: Pairs, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder("llama", seed=1), other)
    config = make_config(
        data=data_of_form("pairs"),
        objective={"name": "dpo", "reference_model": str(other)},
        checkpoint={"every_steps": 2},
    )
    train(config)
    make_model("llama", seed=2).save_pretrained(other)
    with pytest.raises(UserError, match=r"other: has changed since .* was begun"):
        train(config, resume=True)
