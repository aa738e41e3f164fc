"""Tuning by scoring: against autograd, scorer against scorer, and replay against what was replayed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.batches import ragged_batch
from tests.families import FAMILIES, ISOLATING, make_model
from tests.product.test_product import equal_bits, final_state, losses
from tunesmith.config import RunConfig, SftConfig, SgdConfig, SingleConfig, ZerothConfig
from tunesmith.engines import SingleEngine
from tunesmith.engines.checkpoint import checkpoints
from tunesmith.engines.single import find_precision
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.methods import METHODS, Extent, NonFiniteError
from tunesmith.methods.update_log import Update, read_log
from tunesmith.models.low_rank import Probe, is_transposed
from tunesmith.objectives import build_objective
from tunesmith.replay import replay
from tunesmith.run import build, train
from tunesmith.run_folder import read_events

SFT = build_objective(SftConfig())
LR = 1e-3


def learner_of(
    model: Any,
    momentum: float = 0.0,
    seed: int = 0,
    micro_batch_tokens: int = 10**6,
    engine: Any = None,
    **settings: Any,
) -> Learner:
    method = METHODS["zeroth"](
        ZerothConfig(**settings), SgdConfig(lr=LR, momentum=momentum), None, Extent(steps=1000, seed=seed)
    )
    engine = engine or SingleEngine(SingleConfig(device="cpu"), "fp32")
    return Learner(model, engine, method, micro_batch_tokens)


def steps(learner: Learner, number: int, lr: float = LR, pack: bool = False) -> list[float]:
    return [float(learner.step(SFT, ragged_batch(pack), lr)["loss"]) for _ in range(number)]


def whole_weights(learner: Learner) -> dict[str, Tensor]:
    """All parameters with what has gathered, in fp64."""
    found = {name: p.detach().double().clone() for name, p in learner.model.named_parameters()}
    directions: Any = learner.method.directions
    for name, pairs in getattr(getattr(directions, "columns", None), "pairs", {}).items():
        for u, v in pairs:
            change = u.double() @ v.double().T
            found[f"{name}.weight"] += change.T if is_transposed(directions.layers[name]) else change
    return found


def bits_of(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


# --- the estimator


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 8},
        {"noise": "rademacher"},
        {"sides": "one", "eps": 1e-8},
        {"directions": "dense"},
        {"directions": "dense", "noise": "rademacher"},
    ],
    ids=str,
)
def test_the_estimate_is_the_gradient_on_average(settings: dict[str, Any]) -> None:
    """<ĝ, g> / |g|² over many draws is 1 within four standard errors, and ĝ is no multiple of g by accident: E|ĝ|² is large."""
    model = make_model("opt", torch.float64)  # no part of it computes in fp32
    learner = learner_of(model, **{"eps": 1e-7, "refresh_every": 1, "queries": 40, **settings})
    method: Any = learner.method
    batch = ragged_batch(pack=False)
    for p in method.params.values():
        p.requires_grad_(True)
    scores = learner.engine.score(model, batch, SFT.wanted)
    (SFT.loss(scores, batch)[0] / SFT.count(batch)).backward()
    gradient = {name: p.grad for name, p in method.params.items()}
    model.requires_grad_(False)
    norm = sum(float(g.square().sum()) for g in gradient.values())

    found: list[float] = []
    rank = 1 if settings.get("directions") == "dense" else method.config.rank
    for step in range(15):
        method.directions.begin(step, 40)
        losses_K, _ = learner._losses(SFT, batch, method.probes, SFT.count(batch))
        for query, slope in enumerate(method._slopes(losses_K.tolist())):
            along = sum(float((method.directions.direction(name, query) * g).sum()) for name, g in gradient.items())
            assert slope == pytest.approx(along, rel=1e-3, abs=1e-4)  # ReLU has kinks
            found.append(slope / rank * along / norm)
    ratios = torch.tensor(found)
    error = float(ratios.std()) / len(ratios) ** 0.5
    assert error < 0.15
    assert abs(float(ratios.mean()) - 1) < 4 * error


def test_a_step_is_the_slopes_along_their_directions_over_rank_and_queries() -> None:
    learner = learner_of(without_fp32(make_model("llama", torch.float64)), rank=3, queries=2, scorer="in_place")
    before, method = whole_weights(learner), learner.method
    learner.step(SFT, ragged_batch(False), LR)
    method_: Any = method
    after = whole_weights(learner)
    (update,) = method_.updates
    for name in method_.params:
        change = sum(-c / 3 * method_.directions.direction(name, q) for q, c in enumerate(update.coefficients))
        torch.testing.assert_close(after[name] - before[name], change.double(), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("directions", ["low_rank", "dense"])
def test_the_direction_that_was_probed_is_applied_at_every_step(
    directions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LOZO's code draws another U in the step that renews V: here every third step does."""
    learner = learner_of(make_model("qwen3"), directions=directions, refresh_every=3, scorer="in_place", eps=1e-2)
    seen: list[dict[str, Tensor]] = []
    score = SingleEngine.score

    def looking(self: Any, model: Any, *given: Any) -> Any:
        seen.append(whole_weights(learner))
        return score(self, model, *given)

    monkeypatch.setattr(SingleEngine, "score", looking)
    method: Any = learner.method
    for _ in range(7):
        seen.clear()
        before = whole_weights(learner)
        learner.step(SFT, ragged_batch(False), 1e-2)
        after, (up, down) = whole_weights(learner), seen
        probed = torch.cat([(up[name] - down[name]).flatten() for name in method.params])
        applied = torch.cat([(after[name] - before[name]).flatten() for name in method.params])
        cosine = torch.nn.functional.cosine_similarity(probed, applied, 0).abs()
        assert cosine > 0.999


def test_momentum_is_torchs_and_is_projected_when_v_is_renewed() -> None:
    learner = learner_of(make_model("llama"), momentum=0.9, refresh_every=2)
    method: Any = learner.method
    name = next(iter(method.directions.layers))
    held = 0
    for step in range(4):
        old_v = method.directions.v.get(name)
        learner.step(SFT, ragged_batch(False), LR)
        u, v = method.directions.u[name][0], method.directions.v[name]
        if step == 2:
            held = held @ old_v.T @ v / v.shape[0]
        held = 0.9 * held + method.updates[-1].coefficients[0] / 2 * u
        torch.testing.assert_close(method.directions.momentum[name], held)
        if step in (0, 2):
            torch.testing.assert_close(method.directions.gathered[name], -held)


def test_fzoo_divides_by_the_spread_of_the_slopes() -> None:
    learner = learner_of(
        make_model("llama"), directions="dense", noise="rademacher", sides="one", queries=5, scale="std"
    )
    method: Any = learner.method
    found: list[list[float]] = []
    slopes = method._slopes
    method._slopes = lambda losses: found.append(slopes(losses)) or found[-1]
    learner.step(SFT, ragged_batch(False), LR)
    spread = torch.tensor(found[0], dtype=torch.float64).std()
    expected = [LR / 5 * slope / float(spread) for slope in found[0]]
    assert method.updates[0].coefficients == pytest.approx(expected, rel=1e-12)


# --- scorers


def moved(model: Any, settings: dict[str, Any]) -> Learner:
    """A learner with something gathered in its fifth step, and a probe's directions drawn."""
    learner = learner_of(model, refresh_every=3, queries=2, **settings)
    for step, coefficients in enumerate([(3.0, -1.0), (0.5, 2.0), (1.0, 1.0), (-2.0, 0.3), (0.7, 0.1)]):
        learner.method.replay([Update(step, tuple(1e-2 * c for c in coefficients))])
    learner.method.directions.begin(5, 2)
    return learner


PROBES = [Probe(0, 1e-2), Probe(1, -2e-2), Probe(0, 0.0), Probe(1, 3e-2), Probe(0, -1e-2)]


def without_fp32(model: Any) -> Any:
    """RMS norms of transformers compute in fp32 whatever they are given: here they do so in the type of their input."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = forward.__get__(module)
    return model


FP32_INSIDE = {"gemma2": 1e-6, "gemma3_text": 1e-6, "cohere": 1e-6, "falcon_h1": 1e-6, "mamba": 3e-5}
"""Those that round to fp32 elsewhere too, and how far that leads."""


@pytest.mark.parametrize("fold", ["auto", "never"])
@pytest.mark.parametrize(
    ("family", "pack"),
    [(family, pack) for family in FAMILIES for pack in (False, True) if family in ISOLATING or not pack],
)
def test_batched_states_are_those_put_into_the_weights(family: str, pack: bool, fold: str) -> None:
    model = without_fp32(make_model(family, torch.float64))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    batched = moved(model, {"fold": fold})
    batch = ragged_batch(pack)
    found = batched.method.scorer.score(batch, SFT.wanted, PROBES)
    directions: Any = batched.method.directions
    for probe, scores in zip(PROBES, found, strict=True):
        apart = without_fp32(make_model(family, torch.float64))
        with torch.no_grad():
            for name, p in apart.named_parameters():
                p.copy_(whole_weights(batched)[name])
                if name in batched.method.params:
                    p.add_(directions.direction(name, probe.query).double(), alpha=probe.coefficient)
            engine = SingleEngine(SingleConfig(device="cpu"), "fp32")
            expected = engine.score(engine.place(apart), batch, SFT.wanted).logprobs_BT
        tolerance = FP32_INSIDE.get(family, 1e-12)
        torch.testing.assert_close(scores.logprobs_BT, expected, rtol=tolerance, atol=tolerance)
    if fold == "never":
        assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"scorer": "in_place"}, torch.float32),
        ({"directions": "dense"}, torch.float32),
    ],
    ids=str,
)
def test_scoring_leaves_the_weights_bits(settings: dict[str, Any], dtype: torch.dtype) -> None:
    learner = moved(make_model("llama", dtype), settings)
    before, gathered = bits_of(learner), whole_weights(learner)
    learner.method.scorer.score(ragged_batch(True), SFT.wanted, PROBES)
    assert equal_bits(before, bits_of(learner))
    assert equal_bits(gathered, whole_weights(learner))


def test_the_order_of_states_and_of_rows_does_not_matter() -> None:
    learner = moved(without_fp32(make_model("llama", torch.float64)), {})
    batch = ragged_batch(False)
    found = learner.method.scorer.score(batch, SFT.wanted, PROBES)
    again = learner.method.scorer.score(batch, SFT.wanted, PROBES[::-1])[::-1]
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a.logprobs_BT, b.logprobs_BT, rtol=1e-12, atol=1e-12)
    turned = batch._each(lambda x: x.flip(0) if x.ndim > 1 else x)
    for a, b in zip(found, learner.method.scorer.score(turned, SFT.wanted, PROBES), strict=True):
        torch.testing.assert_close(a.logprobs_BT, b.logprobs_BT.flip(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pack", [False, True])
def test_micro_batches_are_one_batch(pack: bool) -> None:
    whole = learner_of(without_fp32(make_model("llama", torch.float64)), queries=2)
    parts = learner_of(without_fp32(make_model("llama", torch.float64)), queries=2, micro_batch_tokens=64)
    assert len(ragged_batch(pack).split(64 // 4)) > 2
    for a, b in zip(steps(whole, 3, pack=pack), steps(parts, 3, pack=pack), strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    torch.testing.assert_close(whole_weights(whole), whole_weights(parts), rtol=1e-7, atol=1e-9)


def test_a_model_that_mixes_the_tokens_of_states_is_found() -> None:
    model = make_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda _, given: (given[0].flip(0),))
    with pytest.raises(UserError, match=r"set method\.scorer to in_place"):
        learner_of(model)
    learner_of(model, scorer="in_place")


def test_a_layer_that_sees_some_tokens_alone_is_found() -> None:
    model = make_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    inner = layer.forward
    layer.forward = lambda x: inner(x.flatten(0, -2)[:5]).sum() + inner(x)
    with pytest.raises(UserError, match=r"set method\.scorer to in_place"):
        learner_of(model)


def mixes(model: Any) -> None:
    """Let half of the linear layers take each row under the other row's state."""
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, given: (given[0].flip(0),))
        block.mlp.register_forward_hook(lambda _, given, output: output.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_massive_activation_neither_hides_nor_makes_mixed_states(dtype: torch.dtype) -> None:
    """It is far larger than what tells two states apart in all other channels."""

    def massive() -> Any:
        model = make_model("llama", dtype)
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 3] = 1e3
        return model

    learner = learner_of(massive())
    hidden: Any = learner.method.scorer._hidden(torch.arange(1, 9)[None], (Probe(0, 0.0),), learner.method.directions.u)
    assert (hidden.abs().amax(-1) > 100 * hidden.abs().median(-1).values).all()
    model = massive()
    mixes(model)
    with pytest.raises(UserError, match=r"set method\.scorer to in_place"):
        learner_of(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite_are_told(value: float) -> None:
    model = make_model("llama", torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(
        UserError, match=r"model\.precision: LlamaForCausalLM .* not finite in bfloat16; set it to mixed"
    ):
        learner_of(model)


def test_a_number_that_is_no_number_beside_other_states_alone_is_found() -> None:
    model = make_model("llama")

    def spoil(_: Any, given: Any, output: Tensor) -> Tensor:
        return output if torch.equal(given[0][0], given[0][-1]) else output * float("nan")

    model.model.norm.register_forward_hook(spoil)
    with pytest.raises(UserError, match=r"set method\.scorer to in_place"):
        learner_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_kept_apart_in_all_families(family: str, dtype: torch.dtype) -> None:
    """And where the first linear layer reads the rows of the other state, it is found."""
    method: Any = learner_of(make_model(family, dtype)).method
    layer = next(iter(method.directions.layers.values()))
    layer.register_forward_pre_hook(lambda _, given: (given[0].flip(0), *given[1:]))
    with pytest.raises(UserError, match=r"set method\.scorer to in_place"):
        method.scorer.check()


# --- folding


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fold_changes_where_the_update_is_and_not_what_it_is(family: str, dtype: torch.dtype) -> None:
    learner = moved(make_model(family, dtype), {})
    before = whole_weights(learner)
    learner.method.directions.fold()
    assert learner.method.directions.columns.rank() == 0
    torch.testing.assert_close(whole_weights(learner), before, rtol=0, atol=1e-7 if dtype == torch.float32 else 1e-15)


def test_folds_into_bf16_weights_lose_nothing_and_are_right_on_average() -> None:
    """A thousand updates far below a bf16 step each: nearest rounding would leave every weight where it was."""
    model = make_model("llama", torch.bfloat16)
    learner = learner_of(model, refresh_every=1, rank=16)
    method: Any = learner.method
    start = whole_weights(learner)
    exact = {name: p.clone() for name, p in start.items()}
    for step in range(40):
        method.directions.begin(step, 1)
        for name in method.params:
            exact[name] -= 3e-6 / 16 * method.directions.direction(name, 0).double()
        method.replay([Update(step, (3e-6,))])
    method.directions.fold()
    moved = torch.cat([(p - start[n]).flatten() for n, p in whole_weights(learner).items() if n in method.params])
    wanted = torch.cat([(exact[n] - start[n]).flatten() for n in method.params])
    steps_of_bf16 = torch.cat([start[n].abs().flatten() * 2**-8 for n in method.params])
    assert (wanted.abs() < 0.25 * steps_of_bf16).float().mean() > 0.9
    slope = float((moved * wanted).sum() / (wanted * wanted).sum())
    error = float((moved - wanted).square().mean().sqrt() / wanted.square().sum().sqrt())
    assert slope == pytest.approx(1, abs=4 * error)
    assert error < 0.1
    masters = torch.cat(
        [method.directions.masters[n.removesuffix(".weight")].flatten().double() for n in method.params]
    )
    torch.testing.assert_close(masters, torch.cat([exact[n].flatten() for n in method.params]), rtol=0, atol=5e-7)


def test_an_empty_update_leaves_bf16_weights_as_they_are() -> None:
    learner = learner_of(make_model("llama", torch.bfloat16))
    before = bits_of(learner)
    learner.method.replay([Update(0, (0.0,))])
    learner.method.directions.fold()
    assert equal_bits(before, bits_of(learner))


def test_saving_in_the_middle_does_not_change_a_bit(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        learner, other = (learner_of(make_model("llama", dtype), refresh_every=2) for _ in range(2))
        assert steps(learner, 3) == steps(other, 3)
        expected = whole_weights(learner)
        learner.method.save(tmp_path / str(dtype))
        assert steps(learner, 3) == steps(other, 3)
        assert equal_bits(bits_of(learner), bits_of(other))
        from transformers import AutoModelForCausalLM

        saved = AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype), dtype=dtype)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-3
        for name, p in saved.named_parameters():
            torch.testing.assert_close(
                p.double(), expected[name], rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=tolerance
            )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "number"), [(torch.float32, 3), (torch.bfloat16, 1), (torch.bfloat16, 4)], ids=["fp32", "new", "master"]
)
def test_what_is_saved_is_a_fold_that_leaves_no_trace(
    family: str, dtype: torch.dtype, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`number` of updates: bf16 weights have a master aside from the third renewal of V on."""
    from safetensors.torch import load_file

    saved, folded = (learner_of(make_model(family, dtype), refresh_every=1, rank=16) for _ in range(2))
    for learner in (saved, folded):
        learner.method.replay([Update(step, (0.03,)) for step in range(number)])
    directions: Any = saved.method.directions
    assert bool(directions.masters) == (dtype == torch.bfloat16 and number == 4)
    before, whole = bits_of(saved), whole_weights(saved)
    masters = {name: master.clone() for name, master in directions.masters.items()}
    keep = directions._keep

    def no_master(name: str, x: torch.Tensor) -> torch.Tensor:
        return pytest.fail("a master was written") if name in directions.layers else keep(name, x)

    monkeypatch.setattr(directions, "_keep", no_master)
    saved.method.save(tmp_path / "model")
    with pytest.raises(KeyError), directions.folded():
        raise KeyError
    assert equal_bits(before, bits_of(saved))
    assert equal_bits(whole, whole_weights(saved))
    assert equal_bits(masters, directions.masters)
    folded.method.directions.fold()
    found, expected = load_file(tmp_path / "model/model.safetensors"), bits_of(folded)
    assert all(torch.equal(found[name], expected[name]) for name in saved.method.params)
    assert any(not torch.equal(before[name], expected[name]) for name in saved.method.params)


# --- replay


VARIANTS: dict[str, dict[str, Any]] = {
    "low_rank": {"refresh_every": 4},
    "momentum": {"refresh_every": 4, "momentum": 0.9},
    "queries": {"refresh_every": 3, "queries": 3, "noise": "rademacher"},
    "dense": {"directions": "dense"},
    "fzoo": {"directions": "dense", "noise": "rademacher", "sides": "one", "queries": 4, "scale": "std"},
    "bank": {"refresh_every": 2, "fold": "never"},
    "adapter": {"directions": "dense", "adapter_rank": 4, "adapter_alpha": 8.0},
}


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(name, torch.float32) for name in VARIANTS]
    + [(name, torch.bfloat16) for name, settings in VARIANTS.items() if "directions" not in settings]
    + [("adapter", torch.bfloat16)],
)
def test_a_replay_gives_the_same_bits_without_a_forward_pass(variant: str, dtype: torch.dtype) -> None:
    settings = VARIANTS[variant]
    live, replayed = (learner_of(make_model("llama", dtype), **settings) for _ in range(2))
    steps(live, 11)
    buffer = io.BytesIO()
    torch.save(live.method.state_dict(), buffer)
    assert buffer.tell() < 5000
    buffer.seek(0)
    replayed.engine.score = None  # type: ignore[assignment, method-assign]
    replayed.method.load_state_dict(torch.load(buffer))
    assert equal_bits(bits_of(live), bits_of(replayed))
    assert equal_bits(whole_weights(live), whole_weights(replayed))
    del replayed.engine.score
    assert steps(live, 6) == steps(replayed, 6)
    assert equal_bits(whole_weights(live), whole_weights(replayed))


def test_a_replay_that_leads_elsewhere_is_found() -> None:
    learner = learner_of(make_model("llama"))
    updates = [Update(n, (1e-3,)) for n in range(5)]
    with pytest.raises(UserError, match="checksum before update 6"):
        learner.method.replay([*updates, Update(5, (1e-3,), checksum=12345)])


def settings_of_run(method: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "method": {"name": "zeroth", "refresh_every": 4, **(method or {})},
        "optimizer": {"name": "sgd", "lr": 1e-3},
        "train": {"steps": 10},
        "checkpoint": {"every_steps": 4, "every_minutes": 0, "keep": 9},
        **more,
    }


def cut_back(folder: Path, log_updates: int, checkpoint: int) -> None:
    """Leave of a run what a kill would have left: so many updates in the log, and checkpoints up to a step."""
    for path in checkpoints(folder / "checkpoints"):
        if int(path.name[5:]) > checkpoint:
            shutil.rmtree(path)
    shutil.rmtree(folder / "model")
    after = f'"step": {max(log_updates, checkpoint) + 1},'
    events = (folder / "events.jsonl").read_text().splitlines()
    end = next((n for n, line in enumerate(events) if '"event": "step", ' in line and after in line), None)
    (folder / "events.jsonl").write_text("\n".join(events[:end]) + "\n")
    file = folder / "updates.log"
    _, updates, _ = read_log(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - sum(len(update.packed()) for update in updates[log_updates:])] + b"torn")


@pytest.mark.parametrize(("log_updates", "checkpoint"), [(6, 4), (4, 4), (8, 0), (2, 0), (0, 0), (10, 8), (3, 8)])
@pytest.mark.filterwarnings("ignore:.*no whole record")
def test_the_log_alone_brings_a_run_back(
    make_config: Callable[..., RunConfig], log_updates: int, checkpoint: int
) -> None:
    config = make_config(**settings_of_run())
    result = train(config)
    state, found = final_state(result.folder), losses(result.folder)
    model = (result.folder / "model/model.safetensors").read_bytes()
    log = (result.folder / "updates.log").read_bytes()
    cut_back(result.folder, log_updates, checkpoint)
    train(config, resume=True)
    assert equal_bits(state, final_state(result.folder))
    assert (result.folder / "model/model.safetensors").read_bytes() == model
    assert (result.folder / "updates.log").read_bytes() == log
    after = max(log_updates, checkpoint)
    assert losses(result.folder)[:after] == found[:after]
    assert losses(result.folder)[-(10 - after) or 10 :] == found[-(10 - after) or 10 :]


@pytest.mark.parametrize("lost", ["step", "eval"])
@pytest.mark.filterwarnings("ignore:.*no whole record")
def test_an_update_that_no_event_tells_of_is_done_again(make_config: Callable[..., RunConfig], lost: str) -> None:
    """The process died between the log and the event, or in the evaluation that was due."""
    config = make_config(**settings_of_run(evaluate={"every_steps": 3}))
    result = train(config)
    found = [event for event in read_events(result.folder / "events.jsonl") if event["event"] in ("step", "eval")]
    cut_back(result.folder, 6, 4)
    events = (result.folder / "events.jsonl").read_text().splitlines()
    end = next(n for n, line in enumerate(events) if f'"event": "{lost}"' in line and '"step": 6' in line)
    (result.folder / "events.jsonl").write_text("\n".join(events[:end]) + "\n")
    train(config, resume=True)
    again = [event for event in read_events(result.folder / "events.jsonl") if event["event"] in ("step", "eval")]
    assert [(e["event"], e["step"], e["loss"]) for e in again] == [(e["event"], e["step"], e["loss"]) for e in found]


@pytest.mark.filterwarnings("ignore:.*no whole record")
def test_what_an_objective_has_learnt_holds_a_log_back(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]]
) -> None:
    """BCO's running threshold is in checkpoints alone: the run goes on from there, and comes to the same."""
    config = make_config(**objective_sections("bco"), **settings_of_run())
    result = train(config)
    state = final_state(result.folder)
    cut_back(result.folder, 6, 4)
    train(config, resume=True)
    assert equal_bits(state, final_state(result.folder))


def test_a_log_of_another_run_is_refused(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(**settings_of_run())
    result = train(config)
    run = build(make_config(**settings_of_run({"rank": 3})))
    with pytest.raises(UserError, match=r"updates\.log: was written for another run: base_weights_hash, rank differ"):
        run.learner.method.keep_log(result.folder / "updates.log", {"base_weights_hash": "x", "seed": 0}, at_most=99)
    with pytest.raises(UserError, match=r"train\.steps: 8 are to be done, but .* has done 10"):
        train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 8})}), resume=True)


ADAPTER = {"directions": "dense", "adapter_rank": 4, "eps": 1e-2}


def test_slopes_of_an_adapter_are_autograds_directional_derivatives() -> None:
    model = make_model("opt", torch.float64)
    learner = learner_of(
        model, directions="dense", adapter_rank=4, adapter_alpha=8.0, eps=1e-6, queries=6, noise="rademacher"
    )
    method: Any = learner.method
    assert all("lora_" in name for name in method.params)
    with torch.no_grad():  # B is 0 at the start, where A has no gradient
        for name, p in method.params.items():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    batch = ragged_batch(pack=False)
    scores = learner.engine.score(model, batch, SFT.wanted)
    (SFT.loss(scores, batch)[0] / SFT.count(batch)).backward()
    before = bits_of(learner)
    method.directions.begin(0, 6)
    with torch.no_grad():
        losses_K, _ = learner._losses(SFT, batch, method.probes, SFT.count(batch))
    for query, slope in enumerate(method._slopes(losses_K.tolist())):
        along = sum(float((method.directions.direction(n, query) * p.grad).sum()) for n, p in method.params.items())
        assert slope == pytest.approx(along, rel=1e-3, abs=1e-4)
    assert equal_bits(before, bits_of(learner))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_adapter_the_model_is_what_it_was(dtype: torch.dtype) -> None:
    learner = learner_of(make_model("llama", dtype), directions="dense", adapter_rank=4, adapter_alpha=8.0)
    batch = ragged_batch(False)
    start, frozen = learner.logprobs(batch), bits_of(learner)
    steps(learner, 3, lr=1e-2)
    assert not torch.equal(learner.logprobs(batch), start)
    assert learner.method.start_bytes() == 0
    assert torch.equal(learner.logprobs(batch, at_start=True), start)
    moved = {name for name, p in bits_of(learner).items() if not torch.equal(p, frozen[name])}
    assert moved == set(learner.method.params)
    assert all(p.dtype == torch.float32 for p in learner.method.params.values())


def test_an_adapter_starts_by_the_seed_alone() -> None:
    def start(seed: int, before: int) -> dict[str, Tensor]:
        model = make_model("llama")
        torch.manual_seed(before)
        learner = learner_of(model, seed=seed, directions="dense", adapter_rank=4, adapter_alpha=8.0)
        return {name: p.detach().clone() for name, p in learner.method.params.items()}

    assert equal_bits(start(0, 1), start(0, 2))
    assert not equal_bits(start(0, 1), start(1, 1))


@pytest.mark.parametrize("form", ["model", "adapter"])
def test_the_log_gives_the_adapter_that_was_moved(
    make_config: Callable[..., RunConfig], tmp_path: Path, form: Any
) -> None:
    from tests.equal.test_reference import load_as_users_do

    config = make_config(**settings_of_run(ADAPTER, optimizer={"name": "sgd", "lr": 1e-2}))
    assert config.method.adapter_alpha == 8.0
    result = train(config)
    replay(result.folder, None, tmp_path / "last", form)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "last" / name).read_bytes() == (result.folder / "model" / name).read_bytes()
    trained = build(config)
    trained.learner.method.replay(read_log(result.folder / "updates.log")[1])
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = trained.learner.model.eval()(input_ids=tokens).logits
        found = load_as_users_do(tmp_path / "last")(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - make_model("llama")(input_ids=tokens).logits).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*no whole record")
def test_the_log_alone_brings_an_adapter_back(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(**settings_of_run(ADAPTER))
    result = train(config)
    adapter = (result.folder / "model/adapter_model.safetensors").read_bytes()
    cut_back(result.folder, 6, 4)
    train(config, resume=True)
    assert (result.folder / "model/adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("method", [{}, {"directions": "dense"}])
def test_the_log_gives_any_model_of_the_run(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: dict[str, Any]
) -> None:
    result = train(make_config(**settings_of_run(method)))
    assert replay(result.folder, None, tmp_path / "last") == 10
    last = (tmp_path / "last/model.safetensors").read_bytes()
    assert last == (result.folder / "model/model.safetensors").read_bytes()
    replay(result.folder, 6, tmp_path / "six")
    run = build(make_config(**settings_of_run(method)))
    run.learner.method.replay(read_log(result.folder / "updates.log")[1][:6])
    run.learner.method.save(tmp_path / "expected")
    assert (tmp_path / "six/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()


def test_the_log_gives_a_reward_model_with_its_random_head(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    result = train(make_config(**objective_sections("reward"), **settings_of_run()))
    replay(result.folder, None, tmp_path / "last")
    for name in ("model.safetensors", "tokenizer_config.json"):
        assert (tmp_path / "last" / name).read_bytes() == (result.folder / "model" / name).read_bytes()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_template(folder: Path, copy: Path) -> Path:
    """A checkpoint whose tokenizer has no chat template."""
    from transformers import AutoTokenizer

    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(copy).chat_template is None
    return copy


@pytest.mark.parametrize("data", ["text", "chats"])
@pytest.mark.parametrize("has_template", [True, False])
def test_a_replay_writes_all_files_of_the_run(
    make_config: Callable[..., RunConfig], tmp_path: Path, has_template: bool, data: str
) -> None:
    """A chat template of ours is saved if conversations were learnt, and else left out; one's own always stays."""
    sections: dict[str, Any] = {}
    if not has_template:
        sections["model"] = {"path": str(without_template(Path(make_config().model.path), tmp_path / "base"))}
    if data == "text":
        sections["data"] = {"path": str(tmp_path / "text.jsonl")}
        records = [json.dumps({"text": f"After {n} comes {n + 1}."}) + "\n" for n in range(24)]
        (tmp_path / "text.jsonl").write_text("".join(records))
    result = train(make_config(**settings_of_run(train={"steps": 2}), **sections))
    found = files_of(result.folder / "model")
    assert ("chat_template.jinja" in found) == (has_template or data == "chats")
    (tmp_path / ("text.jsonl" if data == "text" else "chats.jsonl")).unlink()  # a replay reads no data
    replay(result.folder, None, tmp_path / "last")
    assert files_of(tmp_path / "last") == found


def test_a_replay_writes_the_processor(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from tests.multimodal import save_model

    base = save_model("qwen2_vl", tmp_path / "base")
    result = train(make_config(**settings_of_run(train={"steps": 2}), model={"path": str(base)}))
    found = files_of(result.folder / "model")
    assert "processor_config.json" in found or "preprocessor_config.json" in found
    replay(result.folder, None, tmp_path / "last")
    assert files_of(tmp_path / "last") == found


def test_no_update_at_all_is_the_base_model(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = train(make_config(**settings_of_run()))
    replay(result.folder, 0, tmp_path / "none")
    base, none = (load_file(Path(path) / "model.safetensors") for path in (make_config().model.path, tmp_path / "none"))
    assert equal_bits(base, none)


def test_equal_slopes_make_no_step_under_std() -> None:
    learner = learner_of(make_model("llama"), sides="one", queries=3, scale="std")
    method: Any = learner.method
    assert method._spread([0.5, 0.5, 0.5]) == float("inf")
    method._slopes = lambda losses: [0.5, 0.5, 0.5 + 1e-9]
    before = whole_weights(learner)
    steps(learner, 1)
    assert equal_bits(before, whole_weights(learner))


def test_events_that_are_told_less_often_hold_no_evaluation_back(make_config: Callable[..., RunConfig]) -> None:
    from tunesmith.run import _told
    from tunesmith.run_folder import EventLog, RunFolder

    config = make_config(**settings_of_run(evaluate={"every_steps": 5}, log={"every_steps": 10}))
    folder = RunFolder(Path(config.output))
    folder.path.mkdir()
    events = EventLog(folder.events)
    assert _told(folder, config) == 4  # the evaluation at 5 is missing
    events.write("eval", step=5, loss=1.0)
    assert _told(folder, config) == 9
    events.write("step", step=10, loss=1.0)
    assert _told(folder, config) == 9  # and that at 10
    events.write("eval", step=10, loss=1.0)
    assert _told(folder, config) == 14


def test_the_log_gives_an_adapter(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    result = train(make_config(**settings_of_run(optimizer={"name": "sgd", "lr": 1e-2})))
    replay(result.folder, None, tmp_path / "adapter", "adapter")
    tokens = torch.arange(3, 30)[None]
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(input_ids=tokens).logits
    whole = AutoModelForCausalLM.from_pretrained(result.folder / "model").eval()(input_ids=tokens).logits
    base = AutoModelForCausalLM.from_pretrained(make_config().model.path).eval()
    torch.testing.assert_close(adapted, whole, rtol=1e-4, atol=1e-4)
    assert (base(input_ids=tokens).logits - whole).abs().max() > 0.05
    assert replay(result.folder, 0, tmp_path / "nothing", "adapter") == 0


def test_what_cannot_be_replayed_is_told(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    result = train(make_config(**settings_of_run()))
    for arguments, message in (
        ((result.folder, 11, tmp_path / "x"), "--to-step 11: the log has 10 updates"),
        ((result.folder, 3, result.folder), "exists already"),
        ((tmp_path / "nowhere", 3, tmp_path / "x"), "holds no run"),
    ):
        with pytest.raises(UserError, match=message):
            replay(*arguments)
    weights = Path(make_config().model.path) / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(UserError, match="these are not the weights"):
            replay(result.folder, 3, tmp_path / "x")
    finally:
        weights.write_bytes(before)
    lora = train(make_config(method="lora", output=str(tmp_path / "lora")))
    with pytest.raises(UserError, match="method: lora, which keeps no log"):
        replay(lora.folder, 1, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- what users meet


@pytest.mark.parametrize("dtype", [torch.float32])
def test_losses_that_are_equal_to_the_last_bit_are_told(dtype: torch.dtype) -> None:
    learner = learner_of(make_model("llama", dtype), eps=1e-12)
    with pytest.warns(UserWarning, match=r"method.eps: at step 1 the loss is the same on all sides.*now 1e-12"):
        steps(learner, 2)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    learner = learner_of(make_model("llama"))
    steps(learner, 2)
    before = whole_weights(learner)
    learner.method._slopes = lambda losses: pytest.fail("must not come so far")
    with torch.no_grad():
        learner.model.model.norm.weight.fill_(float("nan"))
        before["model.norm.weight"].fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        steps(learner, 1)
    assert len(learner.method.updates) == 2
    torch.testing.assert_close(whole_weights(learner), before, equal_nan=True, rtol=0, atol=0)


REFUSED = {
    "adamw": ({"optimizer": {"name": "adamw"}}, "wants a gradient of each number"),
    "decay": ({"optimizer": {"name": "sgd", "weight_decay": 0.1}}, "weight_decay: zeroth moves"),
    "neftune": ({"objective": {"name": "sft", "neftune_alpha": 5}}, "neftune_alpha: noise is off"),
    "compile": ({"engine": {"compile": True}}, "engine.compile"),
    "std": ({"method": {"name": "zeroth", "scale": "std"}}, "queries to 2"),
    "dense": ({"method": {"name": "zeroth", "directions": "dense", "scorer": "batched"}}, "scorer: batched"),
    "dense vllm": ({"method": {"name": "zeroth", "directions": "dense", "scorer": "vllm"}}, "scorer: vllm scores"),
    "vllm's arguments": ({"method": {"name": "zeroth", "vllm": {"seed": 1}}}, "with scorer: vllm alone"),
    "adapter": ({"method": {"name": "zeroth", "adapter_rank": 4}}, "adapter_rank: .* set directions to dense"),
    "alpha": ({"method": {"name": "zeroth", "directions": "dense", "adapter_alpha": 4}}, "set adapter_rank too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_go_together(make_config: Callable[..., RunConfig], case: str) -> None:
    sections, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        make_config(**{**settings_of_run(), **sections})


def test_vllm_is_asked_for_before_anything_loads(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings_of_run(), "method": {"name": "zeroth", "scorer": "vllm"}}
    monkeypatch.setattr("tunesmith.scorers.vllm.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"method\.scorer: vllm is not installed; pip install vllm"):
        train(make_config(**settings))
    monkeypatch.setattr("tunesmith.scorers.vllm.find_spec", lambda name: object())
    with pytest.raises(UserError, match="sft needs logits, which the vllm scorer does not offer"):
        train(make_config(**{**settings, "objective": {"name": "sft", "label_smoothing": 0.1}}))


def test_without_another_word_the_optimizer_is_sgd_at_its_own_rate() -> None:
    from tunesmith.config_file import config_from_dict

    config = config_from_dict({"model": "demo", "data": "demo", "method": "zeroth", "output": "x"})
    assert config.optimizer == SgdConfig(lr=1e-6)


def test_dense_directions_need_32_bits() -> None:
    with pytest.raises(UserError, match=r"model\.precision: dense directions"):
        learner_of(make_model("llama", torch.bfloat16), directions="dense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_put_into_the_weights_need_32_bits(dtype: torch.dtype) -> None:
    with pytest.raises(
        UserError, match=r"method\.scorer: in_place .* to batched, or model\.precision to mixed or fp32"
    ):
        learner_of(make_model("llama", dtype), scorer="in_place")


def test_precision_auto_holds_in_32_bits_what_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.engines.single._bf16_is_faster", lambda device: True)
    expected = {
        "mixed": [{"scorer": "in_place"}, {"directions": "dense"}],
        "bf16": [{}, {"scorer": "vllm"}, {"directions": "dense", "adapter_rank": 4}],
    }
    for precision, cases in expected.items():
        for settings in cases:
            needs = METHODS["zeroth"].needs_fp32_weights(ZerothConfig(**settings))
            assert find_precision("auto", torch.device("cpu"), needs) == precision


@pytest.mark.parametrize("scorer", ["in_place", "vllm"])
def test_a_replay_asks_no_scorer(make_config: Callable[..., RunConfig], tmp_path: Path, scorer: str) -> None:
    """Of a bf16 run, whose states in_place would refuse to score; and where vLLM may not be installed."""
    result = train(make_config(**settings_of_run(), model={"precision": "bf16"}))
    config = result.folder / "config.yaml"
    text = config.read_text()
    assert "scorer: auto" in text
    config.write_text(text.replace("scorer: auto", f"scorer: {scorer}"))
    replay(result.folder, None, tmp_path / "last")
    last = (tmp_path / "last/model.safetensors").read_bytes()
    assert last == (result.folder / "model/model.safetensors").read_bytes()


def test_targets_choose_layers_and_unknown_ones_are_told() -> None:
    learner = learner_of(make_model("llama"), targets=("q_proj", "*.0.mlp.*"))
    assert len(learner.method.params) == 5
    with pytest.raises(UserError, match=r"method.targets: no linear layer .* down_proj, gate_proj"):
        learner_of(make_model("llama"), targets=("query",))


def test_declared_bytes_are_those_that_are_held() -> None:
    learner = learner_of(make_model("llama"), momentum=0.9)
    steps(learner, 2)
    directions: Any = learner.method.directions
    held = [*directions.gathered.values(), *directions.v.values(), *directions.momentum.values()]
    assert learner.method.memory({}).optimizer_bytes == sum(x.numel() * 4 for x in held)


def test_a_wrong_estimator_does_not_learn() -> None:
    """The control: where the applied U is another than the probed one, as in LOZO's code at a refresh, nothing is learnt."""

    def fall(broken: bool) -> float:
        learner = learner_of(make_model("llama"), refresh_every=1, queries=4)
        method: Any = learner.method
        if broken:
            move = method.directions.move

            def otherwise(coefficients: Sequence[float]) -> None:
                method.directions.begin(len(method.updates) + 10**6, len(coefficients))
                move(coefficients)

            method.directions.move = otherwise
        found = steps(learner, 60, lr=2e-3)
        return found[0] - sum(found[-5:]) / 5

    assert fall(broken=False) > 0.3
    assert fall(broken=True) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_as_adapters_are_the_states_that_are_applied(dtype: torch.dtype) -> None:
    """B A of each state against U_acc Vᵀ + c U_q Vᵀ: in 16 bits to the 16 bits that two columns hold, and not to eight."""
    learner = learner_of(make_model("llama", dtype), queries=2, rank=3)
    steps(learner, 3)
    directions: Any = learner.method.directions
    directions.begin(3, 2)
    probes = [Probe(0, 1e-3), Probe(1, -1e-3), Probe(1, 0.0)]
    columns, name = directions.columns, next(iter(directions.layers))
    with columns.at(probes, directions.u):
        a, b = columns.as_adapters(name, dtype)
    u, v = columns.of(name)
    for probe, of_state in zip(probes, b, strict=True):
        expected = (u.double() + probe.coefficient * directions.u[name][probe.query].double()) @ v.double().T
        found = of_state.double() @ a.double()
        error = (found - expected).abs().max() / (expected.abs().max() + 1e-30)
        assert error < 1e-4
