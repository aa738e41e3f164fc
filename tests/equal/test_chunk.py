"""Training a chunk at a time against full fine-tuning, against itself after a break, and against formulas."""

from __future__ import annotations

import gc
import io
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.batches import ragged_batch
from tests.equal.ranks import on_ranks
from tests.equal.test_accumulation import difference, gradients
from tests.families import FAMILIES, SMALL, make_model
from tests.product.test_product import equal_bits
from tunesmith.config import AdamWConfig, ChunkConfig, FsdpConfig, FullConfig, LionConfig, SftConfig, SgdConfig
from tunesmith.config import SingleConfig as Single
from tunesmith.config_file import config_from_dict, load_config
from tunesmith.engines import SingleEngine
from tunesmith.engines.fsdp import FsdpEngine
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.methods import METHODS, Extent, NonFiniteError
from tunesmith.methods.partition import Span
from tunesmith.methods.trainee import stochastic_bf16
from tunesmith.models.load import blocks
from tunesmith.objectives import build_objective
from tunesmith.types import Batch

ADAMW = AdamWConfig(lr=1e-2)
STILL = SgdConfig(lr=1e-30)
"""Steps that no fp64 weight notices."""
SFT = build_objective(SftConfig())


def learner_of(model: Any, method: Any, engine: SingleEngine | None = None, micro_batch_tokens: int = 10**6) -> Learner:
    return Learner(model, engine or SingleEngine(Single(device="cpu"), "fp32"), method, micro_batch_tokens)


def chunked(
    model: Any,
    optimizer: Any = ADAMW,
    max_grad_norm: float | None = None,
    steps: int = 1000,
    engine: SingleEngine | None = None,
    micro_batch_tokens: int = 10**6,
    seed: int = 0,
    **settings: Any,
) -> Learner:
    config = ChunkConfig(**{"row_alignment": 8, **settings})
    method = METHODS["chunk"](config, optimizer, max_grad_norm, Extent(steps=steps, seed=seed))
    return learner_of(model, method, engine, micro_batch_tokens)


def full(model: Any, optimizer: Any = ADAMW, max_grad_norm: float | None = None) -> Learner:
    return learner_of(model, METHODS["full"](FullConfig(), optimizer, max_grad_norm))


def row_batch(row: int) -> Batch:
    """One sequence of ragged weights; another for each number."""
    return ragged_batch(pack=False, shortest=8).rows(row % 8, row % 8 + 1)


def active_spans(method: Any) -> list[Span]:
    return [trainee.span for trainee in method.trainees]


def elements(method: Any) -> int:
    """Numbers in the active chunk."""
    return sum(leaf.numel() for leaf in method.active().values())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def weights(learner: Learner) -> dict[str, Tensor]:
    return weights_of(learner.model)


def states(learner: Learner) -> dict[str, dict[str, Tensor]]:
    found = learner.method.state_dict()["states"]
    return {key: {name: x.clone() for name, x in state.items()} for key, state in found.items()}


@pytest.mark.parametrize(
    "extra", [{}, {"state": "keep", "offload": "host"}, {"state": "8bit"}, {"updates_per_chunk": 2}]
)
def test_one_chunk_is_full_fine_tuning_bit_for_bit(extra: dict[str, Any]) -> None:
    optimizer = AdamWConfig(lr=1e-2, weight_decay=0.1)
    reference = full(make_model("llama"), optimizer, max_grad_norm=1.0)
    learner = chunked(make_model("llama"), optimizer, max_grad_norm=1.0, num_chunks=1, **extra)
    clipped = 0
    for step in range(5):
        expected = reference.step(SFT, row_batch(step), lr=1e-2 / (1 + step))
        found = learner.step(SFT, row_batch(step), lr=1e-2 / (1 + step))
        assert {name: float(found.pop(name)) for name in ("chunk", "coverage")} == {"chunk": 0.0, "coverage": 1.0}
        assert equal_bits(found, expected)
        clipped += bool(expected["grad_norm"] > 1.0)
    assert clipped > 0
    assert equal_bits(weights(learner), weights(reference))
    start = dict(make_model("llama").named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in weights(learner).items())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["activations kept", "activations computed again"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gpt2", "gemma3_text", "falcon_h1", "mamba"])
@pytest.mark.filterwarnings("ignore:chunk. a weight")
def test_gradients_of_all_chunks_together_are_the_dense_gradient(family: str, checkpointing: bool) -> None:
    """One frozen batch; each chunk once."""
    batch = ragged_batch(pack=False)
    expected = gradients(family, batch, 10**6)
    loss = expected.pop("loss")
    engine = SingleEngine(Single(device="cpu", activation_checkpointing=checkpointing), "fp32")
    model = make_model(family, torch.float64)
    learner = chunked(model, STILL, engine=engine, num_chunks=5, updates_per_chunk=1)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    visits = {name: torch.zeros(len(p)) for name, p in total.items()}
    seen = 0
    for step in range(5):
        metrics = learner.step(SFT, batch, lr=1e-30)
        assert abs(metrics["loss"] - loss) < 1e-12
        method: Any = learner.method
        for span, leaf in zip(active_spans(method), method.active().values(), strict=True):
            visits[span.name][span.start : span.stop] += 1
            if leaf.grad is not None:
                total[span.name][span.start : span.stop] += leaf.grad
        whole = {span.name for span in active_spans(method) if span.stop - span.start == len(total[span.name])}
        assert {name for name, p in model.named_parameters() if p.grad is not None} <= whole
        assert {name for name, p in model.named_parameters() if p.requires_grad} == whole
        seen += elements(method)
        assert float(metrics["chunk"]) == method.turns.at(step)[0]
        assert float(metrics["coverage"]) == pytest.approx(seen / sum(p.numel() for p in total.values()))
    assert all(bool((count == 1).all()) for count in visits.values())
    assert difference(total, {**{name: torch.zeros_like(p) for name, p in total.items()}, **expected}) < 1e-12


def deep_model(dtype: torch.dtype = torch.float32) -> Any:
    """A llama of four blocks."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](**{**SMALL, "num_hidden_layers": 4})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


class Saved:
    """A tensor that autograd keeps, and how many blocks had run by then."""

    def __init__(self, tensor: Tensor, after: int) -> None:
        self.tensor, self.after = tensor, after


def backward_cost(learner: Learner, batch: Batch) -> tuple[set[int], int]:
    """(after how many blocks what is held when the backward pass begins was saved, operations of that pass)."""
    held: weakref.WeakSet[Saved] = weakref.WeakSet()
    finished = 0

    def pack(x: Tensor) -> Saved:
        saved = Saved(x, finished)
        held.add(saved)
        return saved

    def count(*_: Any) -> None:
        nonlocal finished
        finished += 1

    handles = [block.register_forward_hook(count) for _, block in blocks(learner.model)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        scores = learner.engine.score(learner.model, batch, SFT.wanted)
        loss, _ = SFT.loss(scores, batch)
    gc.collect()
    places = {saved.after for saved in held}
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    for handle in handles:
        handle.remove()
    return places, counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["activations kept", "activations computed again"])
def test_nothing_below_the_lowest_active_block_is_saved_or_goes_backward(checkpointing: bool) -> None:
    """Chunks of layers are the embeddings, four blocks, and the norm with the head, whose gradient the forward pass takes."""
    batch, engine = (
        ragged_batch(pack=True),
        SingleEngine(Single(device="cpu", activation_checkpointing=checkpointing), "fp32"),
    )
    everything, flops = backward_cost(
        learner_of(deep_model(), METHODS["full"](FullConfig(), ADAMW, None), engine), batch
    )
    assert everything == {0, 1, 2, 3, 4}
    costs = [
        backward_cost(chunked(deep_model(), engine=engine, layout="layers", order=(chunk,)), batch)
        for chunk in range(6)
    ]
    assert [places for places, _ in costs] == [{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}, {1, 2, 3, 4}, {2, 3, 4}, {3, 4}, {4}]
    shares = [cost / flops for _, cost in costs]
    assert shares[5] < 0.01
    assert shares[4] <= 0.25
    assert shares[5] < shares[4] < shares[3] < shares[2] < shares[1] <= 1.0


@pytest.mark.parametrize("checkpointing", [False, True], ids=["activations kept", "activations computed again"])
def test_nothing_below_the_lowest_slice_is_saved(checkpointing: bool) -> None:
    batch, lowest = ragged_batch(pack=True), []
    for chunk in range(9):
        engine = SingleEngine(Single(device="cpu", activation_checkpointing=checkpointing), "fp32")
        learner = chunked(deep_model(), engine=engine, num_chunks=9, order=(chunk,))
        names = [span.name for span in active_spans(learner.method)]
        numbers = [n for n, (block, _) in enumerate(blocks(learner.model)) if names[0].startswith(block + ".")]
        lowest.append(numbers[0] if numbers else 0 if "embed" in names[0] else 4)
        assert min(backward_cost(learner, batch)[0]) == lowest[-1]
    assert lowest == sorted(lowest)
    assert set(lowest) == {0, 1, 2, 3, 4}


def test_an_inactive_block_makes_no_gradient_at_all() -> None:
    learner = chunked(deep_model(), layout="layers", order=(4,))
    inputs = []
    for _, block in blocks(learner.model):
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].requires_grad))
    learner.step(SFT, ragged_batch(pack=True), lr=0.0)
    assert inputs == [False] * 4
    assert {name for name, p in learner.model.named_parameters() if p.grad is not None} == {
        name for name, _ in learner.model.named_parameters() if ".layers.3." in name
    }


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_moments_of_a_chunk_do_not_notice_another_ones_turn(offload: str) -> None:
    """A, B, A under a learning rate of 0 against A alone, on A's batches; and against AdamW on the whole model."""
    switching = chunked(make_model("llama"), num_chunks=3, order=(1, 2, 1), updates_per_chunk=2, offload=offload)
    staying = chunked(make_model("llama"), num_chunks=3, order=(1,), updates_per_chunk=2, offload=offload)
    dense = full(make_model("llama"))
    for step in range(6):
        switching.step(SFT, row_batch(step), lr=0.0)
    for step in (0, 1, 4, 5):
        staying.step(SFT, row_batch(step), lr=0.0)
        dense.step(SFT, row_batch(step), lr=0.0)
    expected = states(staying)
    found = states(switching)
    assert expected.keys() < found.keys()
    whole = dense.method.optimizer.parts[0].state
    cut = 0
    for key, state in expected.items():
        assert set(state) == {"exp_avg", "exp_avg_sq", "step"}
        assert float(state["step"]) == 4
        assert equal_bits(found[key], state)
        name, rows = key.removesuffix("]").split("[")
        start, stop = map(int, rows.split(":"))
        moments = whole[dense.method.params[name]]
        cut += stop - start < len(dense.method.params[name])
        for moment in ("exp_avg", "exp_avg_sq"):
            dense_rows = moments[moment][start:stop]
            assert (state[moment] - dense_rows).abs().max() < 1e-5 * dense_rows.abs().max()
    assert cut > 0
    assert equal_bits(weights(switching), weights_of(make_model("llama")))


def test_each_slice_counts_its_own_updates() -> None:
    """The first update of AdamW goes by the learning rate, which tells a count of its own from a count of the run's."""
    learner = chunked(make_model("llama"), num_chunks=3, order=(1, 1, 2), updates_per_chunk=2)
    counts = []
    for step in range(9):
        before = weights(learner)
        learner.step(SFT, row_batch(step), lr=1e-4)
        counts.append({float(state["step"]) for state in states(learner).values()})
        if step == 4:
            for span in active_spans(learner.method):
                moved = weights(learner)[span.name] - before[span.name]
                assert float(moved.abs().max()) == pytest.approx(1e-4, rel=1e-2)
    assert counts == [{1}, {2}, {3}, {4}, {4, 1}, {4, 2}, {5, 2}, {6, 2}, {7, 2}]
    low, high = learner.method.chunks[1][-1], learner.method.chunks[2][0]
    assert (low.name, low.stop) == (high.name, high.start)  # one weight, cut in two
    halves = [states(learner)[f"{span.name}[{span.start}:{span.stop}]"] for span in (low, high)]
    assert [float(state["step"]) for state in halves] == [7, 2]


def test_state_reset_starts_anew() -> None:
    """After A, B, A the state is that of one update on the last batch."""
    learner = chunked(make_model("llama"), num_chunks=2, order=(0, 1, 0), updates_per_chunk=1, state="reset")
    for step in range(3):
        learner.step(SFT, row_batch(step), lr=0.0)
        assert states(learner).keys() == {trainee.span.key for trainee in learner.method.trainees}
    fresh = chunked(make_model("llama"), num_chunks=2, order=(0,), state="reset")
    fresh.step(SFT, row_batch(2), lr=0.0)
    assert equal_bits(states(learner), states(fresh))
    assert {float(state["step"]) for state in states(learner).values()} == {1.0}


def test_8_bit_state_is_close_to_the_kept_one_and_a_quarter_of_its_size() -> None:
    found = {}
    for state in ("keep", "8bit", "reset"):
        learner = chunked(make_model("llama"), num_chunks=3, updates_per_chunk=2, state=state)
        for step in range(18):
            learner.step(SFT, row_batch(step), lr=1e-3)
        found[state] = torch.cat([p.flatten() for p in weights(learner).values()])
        if state == "8bit":
            waiting = {key for key in states(learner) if key not in {t.span.key for t in learner.method.trainees}}
            packed = [states(learner)[key] for key in waiting]
            assert waiting
            assert all(
                {x.dtype for n, x in each.items() if n.endswith("/code")} <= {torch.int8, torch.uint8}
                for each in packed
            )
            assert all(not {"exp_avg", "exp_avg_sq"} & set(each) for each in packed)
    start = torch.cat([p.flatten() for p in make_model("llama").parameters()])
    way = (found["keep"] - start).norm()
    assert (found["8bit"] - found["keep"]).norm() < 0.05 * way
    assert (found["reset"] - found["keep"]).norm() > 0.2 * way  # the control


def constant_slope(learner: Learner) -> Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]:
    """A loss whose gradient is 1 in every number that trains."""
    return lambda _: (sum((leaf.double().sum() for leaf in learner.method.active().values()), torch.tensor(0.0)), {})


TINY = 1e-5
"""An update that bf16 weights of 0.01 and more do not notice."""


def test_small_updates_of_bf16_weights_add_up_in_the_master_copy() -> None:
    """SGD with a slope of 1: 32 updates of each chunk, in two turns, to the bit."""
    learner = chunked(
        make_model("llama", torch.bfloat16), SgdConfig(lr=1.0), num_chunks=2, updates_per_chunk=16, order="ascending"
    )
    start = weights(learner)
    for _ in range(64):
        learner.method.step(constant_slope(learner), [row_batch(0)], lr=TINY)
    lost = total = 0
    for name, p in weights(learner).items():
        exact, rounded = start[name].float(), start[name].clone()
        for _ in range(32):
            exact.add_(torch.ones_like(exact), alpha=-TINY)
            rounded.add_(torch.ones_like(rounded), alpha=-TINY)
        assert torch.equal(p, exact.bfloat16()), name
        lost += int((rounded == start[name]).sum())
        total += p.numel()
    assert lost > 0.8 * total  # the control: without a master copy most weights would stand still
    kept = {name: x for state in states(learner).values() for name, x in state.items()}
    assert {name: x.dtype for name, x in kept.items()} == {"master": torch.float32}


@pytest.mark.parametrize("state", ["keep", "8bit"])
def test_the_master_copy_waits_in_full_precision(state: str) -> None:
    learner = chunked(make_model("llama", torch.bfloat16), num_chunks=2, updates_per_chunk=1, state=state)
    learner.method.step(constant_slope(learner), [row_batch(0)], lr=TINY)
    before = {key: each["master"] for key, each in states(learner).items()}
    learner.method.step(constant_slope(learner), [row_batch(0)], lr=TINY)
    assert before.keys() < states(learner).keys()
    for key, master in before.items():
        assert torch.equal(states(learner)[key]["master"], master)
        assert not torch.equal(master, master.bfloat16().float())


def test_bf16_weights_with_a_master_copy_follow_fp32_ones() -> None:
    learner = chunked(make_model("llama", torch.bfloat16), num_chunks=2, updates_per_chunk=4, order="ascending")
    model = make_model("llama", torch.bfloat16).float()
    reference = chunked(model, num_chunks=2, updates_per_chunk=4, order="ascending")
    start = weights(reference)
    for step in range(16):
        for each in (learner, reference):
            each.step(SFT, row_batch(step // 4), lr=1e-4)
    masters = {key: state["master"] for key, state in states(learner).items()}
    moved = apart = 0.0
    for chunk in learner.method.chunks:
        for span in chunk:
            rows, key = slice(span.start, span.stop), f"{span.name}[{span.start}:{span.stop}]"
            exact = weights(reference)[span.name][rows]
            assert torch.equal(weights(learner)[span.name][rows], masters[key].bfloat16())
            apart += float((masters[key] - exact).square().sum())
            moved += float((exact - start[span.name][rows]).square().sum())
    assert apart < 0.3**2 * moved  # gradients are bf16's


def test_stochastic_rounding_of_training_is_right_on_average() -> None:
    learner = chunked(
        make_model("llama", torch.bfloat16),
        SgdConfig(lr=1.0),
        num_chunks=2,
        updates_per_chunk=16,
        rounding="stochastic",
    )
    start = weights(learner)
    for step in range(64):
        learner.engine.seed(0, step)
        learner.method.step(constant_slope(learner), [row_batch(0)], lr=TINY)
    way = torch.cat([(p.float() - start[name].float()).flatten() for name, p in weights(learner).items()])
    assert abs(way.mean() + 32 * TINY) < 4 * way.std() / math.sqrt(len(way))
    assert way.mean() < -20 * TINY
    assert all("master" not in state for state in states(learner).values())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("low", [1.0, -1.0, 0.0078125, 3.0e38, -1e-30, 0.0, 1.1754943508222875e-38, 9.1835e-41])
def test_stochastic_rounding_gives_one_of_two_neighbours_in_proportion(low: float, share: float) -> None:
    neighbours = torch.tensor([low]).bfloat16()
    after = (neighbours.view(torch.int16) + 1).view(torch.bfloat16)
    below, above = neighbours.double().item(), after.double().item()
    number = torch.tensor(below + share * (above - below)).float()
    found = stochastic_bf16(number.expand(100_000).contiguous())
    assert found.dtype == torch.bfloat16
    assert set(found.double().unique().tolist()) <= {below, above}
    true_share = (number.double().item() - below) / (above - below)
    chosen = (found.double() == above).double().mean().item()
    assert abs(chosen - true_share) <= 5 * math.sqrt(true_share * (1 - true_share) / 100_000) + 2**-16
    if share == 0:
        assert chosen == 0


def test_stochastic_rounding_keeps_what_bf16_can_say() -> None:
    x = torch.randn(10_000).bfloat16()
    x[:4] = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0]).bfloat16()
    assert torch.equal(stochastic_bf16(x.float()).view(torch.int16), x.view(torch.int16))
    assert stochastic_bf16(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_four_micro_batches_are_one_batch(pack: bool) -> None:
    batch, found = ragged_batch(pack, shortest=10), []
    width = batch.tokens_BT.shape[1]
    for rows in (8, 2):
        model = make_model("llama", torch.float64)
        learner = chunked(
            model, SgdConfig(lr=0.1), 1.0, micro_batch_tokens=rows * width, num_chunks=3, updates_per_chunk=1
        )
        metrics = [learner.step(SFT, batch, lr=0.1) for _ in range(4)]
        found.append({**weights(learner), **{f"loss {n}": m["loss"] for n, m in enumerate(metrics)}})
    assert len(batch.split(2 * width)) == 4
    assert difference(*found) < 1e-9
    assert difference(found[0], {**weights_of(make_model("llama", torch.float64)), **{
        f"loss {n}": found[0][f"loss {n}"] for n in range(4)
    }}) > 1e-3  # fmt: skip


class Watching(SingleEngine):
    """Notes the gradients that a step ends with."""

    def reduce(self, grads: Mapping[str, Tensor]) -> None:
        self.grads = {name: grad.clone() for name, grad in grads.items()}


def test_bf16_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    batch = ragged_batch(pack=False, shortest=10)
    width = batch.tokens_BT.shape[1]
    pieces = batch.split(2 * width)
    assert len(pieces) == 4

    def grads(micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        engine = Watching(Single(device="cpu"), "bf16")
        learner = chunked(make_model("llama", torch.bfloat16), engine=engine, num_chunks=3, order=(1,))

        def loss_fn(piece: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            loss, _ = SFT.loss(engine.score(learner.model, piece, SFT.wanted), piece)
            return loss / 64, {}

        learner.method.step(loss_fn, micro_batches, lr=0.0)
        return engine.grads

    single = [grads([piece]) for piece in pieces]
    together = grads(pieces)
    unlike_bf16 = 0
    for name, total in together.items():
        assert {grad[name].dtype for grad in single} == {torch.bfloat16}
        assert total.dtype == torch.float32
        expected = torch.zeros_like(total)
        for grad in single:
            expected += grad[name].float()
        assert torch.equal(total, expected), name
        unlike_bf16 += int((total != total.bfloat16().float()).sum())
    assert unlike_bf16 > 0.1 * sum(total.numel() for total in together.values())


def test_layers_are_the_embeddings_each_block_and_the_head() -> None:
    model = deep_model()
    learner = chunked(model, layout="layers")
    names = [[span.name for span in chunk] for chunk in learner.method.chunks]
    assert names[0] == ["model.embed_tokens.weight"]
    for n in range(4):
        assert names[n + 1] == [name for name, _ in model.named_parameters() if f".layers.{n}." in name]
    assert names[5] == ["model.norm.weight", "lm_head.weight"]
    assert all(
        span.start == 0 and span.stop == len(learner.method.params[span.name])
        for c in learner.method.chunks
        for span in c
    )
    assert len(chunked(make_model("qwen3"), layout="layers").method.chunks) == 4  # tied: embeddings, blocks, norm


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_chunk_for_each_block(family: str) -> None:
    model = make_model(family)
    learner = chunked(model, layout="layers", frozen=("*embed*",) if family != "gpt2" else ("*wte*",))
    chunks = [[span.name for span in chunk] for chunk in learner.method.chunks]
    for block, _ in blocks(model):
        inside = [name for name, _ in model.named_parameters() if name.startswith(block + ".")]
        assert inside in chunks


def train_and_watch(learner: Learner, steps: int = 6, lr: float = 1e-2) -> tuple[list[float], list[set[str]]]:
    """(losses, the names that moved) of steps on one batch. Rows that are not active do not move."""
    batch, losses, moved = ragged_batch(pack=True), [], []
    for _ in range(steps):
        before = weights(learner)
        losses.append(float(learner.step(SFT, batch, lr)["loss"]))
        rows = {name: torch.zeros(len(p), dtype=torch.bool) for name, p in before.items()}
        for span in active_spans(learner.method):
            rows[span.name][span.start : span.stop] = True
        moved.append(set())
        for name, p in weights(learner).items():
            assert torch.equal(p[~rows[name]], before[name][~rows[name]]), name
            if not torch.equal(p, before[name]):
                moved[-1].add(name)
        assert moved[-1] == {span.name for span in active_spans(learner.method)}
    return losses, moved


def test_lisa_is_a_setting() -> None:
    """Embeddings and head at every update; two blocks drawn anew each time."""
    model = deep_model()
    learner = chunked(
        model, layout="layers", order="sampled", num_active=2, updates_per_chunk=1, state="reset",
        always=("*embed*", "lm_head*"), steps=6,
    )  # fmt: skip
    losses, moved = train_and_watch(learner)
    assert losses[-1] < 0.9 * losses[0]
    assert all({"model.embed_tokens.weight", "lm_head.weight"} <= names for names in moved)
    assert len({frozenset(names) for names in moved}) > 2
    for names in moved:
        groups = {".".join(name.split(".")[:3]) for name in names} - {"model.embed_tokens.weight", "lm_head.weight"}
        assert len(groups) == 2
    assert {
        float(state["step"]) for key, state in states(learner).items() if "layers" not in key and "norm" not in key
    } == {6.0}
    assert {float(state["step"]) for key, state in states(learner).items() if "layers" in key} == {1.0}


def test_badam_is_a_setting() -> None:
    model = deep_model()
    learner = chunked(
        model,
        layout="layers",
        state="reset",
        updates_per_chunk=2,
        frozen=("*embed*", "lm_head*", "model.norm*"),
        steps=8,
    )
    losses, moved = train_and_watch(learner, steps=8)
    assert losses[-1] < losses[0]
    assert moved[::2] == moved[1::2]
    assert {name for names in moved for name in names} == {n for n, _ in model.named_parameters() if ".layers." in n}
    assert all(len({name.split(".")[2] for name in names}) == 1 for names in moved)
    assert "model.embed_tokens.weight" not in learner.method.params


def test_hift_is_a_setting() -> None:
    model = deep_model()
    learner = chunked(model, layout="layers", updates_per_chunk=1, order="ascending", steps=6)
    losses, moved = train_and_watch(learner)
    assert losses[-1] < 0.9 * losses[0]
    assert {name for names in moved for name in names} == {name for name, _ in model.named_parameters()}
    assert sum(len(names) for names in moved) == len(list(model.parameters()))


def test_frozen_and_always_take_a_tied_head_by_either_name() -> None:
    for pattern in ("lm_head*", "*embed*"):
        learner = chunked(make_model("qwen3"), num_chunks=2, frozen=(pattern,))
        assert "model.embed_tokens.weight" not in learner.method.params
        learner = chunked(make_model("qwen3"), num_chunks=2, always=(pattern,))
        assert [trainee.span.name for trainee in learner.method.trainees if trainee.span in learner.method.always] == [
            "model.embed_tokens.weight"
        ]


def test_a_scalar_parameter_can_train_always() -> None:
    model = make_model("llama")
    model.register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
    learner = chunked(model, num_chunks=2, always=("temperature",))
    assert [trainee.span for trainee in learner.method.trainees if trainee.span in learner.method.always] == [
        Span("temperature", 0, 1)
    ]


def test_a_scalar_parameter_trains_in_its_chunk() -> None:
    model = make_model("llama")
    model.model.norm.register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
    model.model.norm.register_forward_hook(lambda norm, _, output: output * norm.temperature)
    learner = chunked(model, num_chunks=2, updates_per_chunk=1)
    for step in range(4):
        learner.step(SFT, row_batch(step), lr=1e-2)
    assert float(model.model.norm.temperature) != 1.0
    assert float(states(learner)["model.norm.temperature[0:1]"]["step"]) == 2


SGD = SgdConfig(lr=1e-2, momentum=0.9)
BF16 = {"dtype": torch.bfloat16}
BREAKS: dict[str, dict[str, Any]] = {
    "kept on the host": {"offload": "host"},
    "kept on disk": {"offload": "disk"},
    "reset": {"state": "reset"},
    "8 bits on the host": {"state": "8bit", "offload": "host"},
    "8 bits on disk": {"state": "8bit", "offload": "disk"},
    "sgd with momentum": {"optimizer": SGD},
    "sgd with momentum in 8 bits": {"optimizer": SGD, "state": "8bit"},
    "sgd without state": {"optimizer": SgdConfig(lr=1e-2)},
    "lion": {"optimizer": LionConfig(lr=1e-3)},
    "bf16 with a master copy": {**BF16},
    "bf16 with a master copy, 8 bits": {**BF16, "state": "8bit"},
    "bf16 with a master copy, reset": {**BF16, "state": "reset"},
    "bf16 with a master copy, sgd without state": {**BF16, "optimizer": SgdConfig(lr=1e-2)},
    "bf16, stochastic": {**BF16, "rounding": "stochastic"},
    "always": {"always": ("*norm*", "lm_head*")},
    "always, reset": {"always": ("*norm*", "lm_head*"), "state": "reset"},
    "layers": {"layout": "layers", "num_chunks": None, "frozen": ("*embed*",)},
    "sampled, two layers at a time": {"layout": "layers", "num_chunks": None, "order": "sampled", "num_active": 2},
}


def saved_state(learner: Learner) -> dict[str, Any]:
    """What a checkpoint holds; whether a slice without state is named in it does not matter."""
    saved = learner.method.state_dict()
    return {**saved, "states": {key: state for key, state in saved["states"].items() if state}}


@pytest.mark.parametrize("setting", BREAKS)
def test_a_break_at_any_time_does_not_change_a_bit(setting: str) -> None:
    """Eight updates at once, and with a new learner from the saved state in between: before, in, and at the end of a turn."""
    settings = {"num_chunks": 3, "updates_per_chunk": 2, **BREAKS[setting]}
    dtype = settings.pop("dtype", torch.float32)

    def new() -> Learner:
        return chunked(make_model("llama", dtype), max_grad_norm=1.0, **settings)

    def train(learner: Learner, steps: Sequence[int]) -> list[float]:
        losses = []
        for step in steps:
            learner.engine.seed(0, step)
            losses.append(float(learner.step(SFT, row_batch(step), lr=1e-2 if "lion" not in setting else 1e-3)["loss"]))
        return losses

    whole, saved, losses = new(), {}, []
    for step in range(8):
        if step in (0, 3, 4):
            file = io.BytesIO()
            torch.save(whole.method.state_dict(), file)
            saved[step] = file.getvalue()
        losses += train(whole, [step])
    for at, content in saved.items():
        resumed = new()
        train(resumed, range(5, 5 + at // 2))  # what a learner has done before it is given the state does not matter
        resumed.method.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
        assert train(resumed, range(at, 8)) == losses[at:]
        assert equal_bits(saved_state(resumed), saved_state(whole))
        assert equal_bits(weights(resumed), weights(whole))


def test_a_state_of_other_chunks_is_refused() -> None:
    saved = chunked(make_model("llama"), num_chunks=3).method.state_dict()
    for settings in (
        {"num_chunks": 4},
        {"num_chunks": 3, "row_alignment": 16},
        {"num_chunks": 3, "frozen": ("lm_head*",)},
    ):
        with pytest.raises(
            UserError, match="the checkpoint was made with other chunks, whose optimizer states do not fit"
        ):
            chunked(make_model("llama"), **settings).method.load_state_dict(saved)
    chunked(make_model("llama"), num_chunks=3, order="descending").method.load_state_dict(saved)


def test_a_gradient_that_is_not_finite_changes_nothing_and_counts_for_nothing() -> None:
    learner, reference = (chunked(make_model("llama"), num_chunks=2, updates_per_chunk=1) for _ in range(2))
    for step in range(4):
        if step == 2:
            before = weights(learner)
            with pytest.raises(NonFiniteError, match="loss is nan"):
                learner.method.step(
                    lambda _: (constant_slope(learner)(row_batch(0))[0] * float("nan"), {}), [row_batch(0)], 1.0
                )
            assert equal_bits(weights(learner), before)
        for each in (learner, reference):
            each.step(SFT, row_batch(step), lr=1e-2)
    assert equal_bits(weights(learner), weights(reference))
    assert equal_bits(states(learner), states(reference))


def test_the_model_at_the_start_is_there_in_every_turn() -> None:
    """What preference objectives compare with; looking there and back changes nothing."""
    learner, reference = (chunked(make_model("llama"), num_chunks=3, updates_per_chunk=1) for _ in range(2))
    learner.method.keep_start()
    batch = ragged_batch(pack=True)
    start = learner.logprobs(batch)
    for step in range(4):
        for each in (learner, reference):
            each.step(SFT, row_batch(step), lr=1e-2)
        assert torch.equal(learner.logprobs(batch, at_start=True), start)
    assert not torch.equal(learner.logprobs(batch), start)
    assert equal_bits(weights(learner), weights(reference))


def held_bytes(learner: Learner) -> tuple[int, int]:
    """(gradients, state and master copies) of what is active, after a step that kept its gradients."""
    method: Any = learner.method
    state = [x for t in method.trainees for x in t.state().values() if x.ndim]
    return sum(leaf.numel() * leaf.element_size() for leaf in method.active().values()), sum(x.nbytes for x in state)


@pytest.mark.parametrize("optimizer", [ADAMW, SGD, SgdConfig(lr=1e-2), LionConfig(lr=1e-3)], ids=lambda o: o.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_declared_bytes_are_those_of_the_largest_chunk(optimizer: Any, dtype: torch.dtype) -> None:
    learner = chunked(make_model("llama", dtype), optimizer, num_chunks=4, always=("*norm*",), updates_per_chunk=1)
    held = []
    for step in range(4):
        learner.step(SFT, row_batch(step), lr=1e-3)
        held.append(held_bytes(learner))
    declared = learner.method.memory({})
    assert (declared.gradients_bytes, declared.optimizer_bytes) == max(held, key=sum)


def refuse(match: str, model: Any = None, steps: int = 1000, **settings: Any) -> None:
    with pytest.raises(UserError, match=match):
        chunked(model or make_model("llama"), steps=steps, **settings)


def test_a_quantized_model_is_refused() -> None:
    model = make_model("llama")
    model.is_quantized = True
    refuse("method: a quantized model cannot be trained in full: use method: lora", model)
    model = make_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    refuse("method: a quantized model cannot be trained in full: use method: lora", model)


def test_settings_that_do_not_fit_the_model_or_the_run_are_refused() -> None:
    refuse(
        r"method: 6 chunks need 6 updates for a turn each, but the run has 5: raise train.steps", steps=5, num_chunks=6
    )
    refuse(
        r"method: 4 chunks need 2 updates for a turn each, but the run has 1", steps=1, layout="layers", num_active=2
    )
    chunked(make_model("llama"), steps=2, layout="layers", num_active=2)
    refuse(r"method.num_active: 5, but there are 4 chunks", layout="layers", num_active=5)
    refuse(r"method.order: name chunks by numbers from 0 to 2; got \[0, 3\]", num_chunks=3, order=(0, 3))
    refuse(r"method.order: name chunks by numbers from 0 to 2; got \[\]", num_chunks=3, order=())
    refuse(
        r"method.num_chunks: the .* parameters give \d+ chunks at most when cut into 9999; ask",
        num_chunks=9999,
        steps=10**5,
    )
    refuse(
        r"method.chunk_bytes: 0.0 MiB are too little for model.embed_tokens.weight \[384, 32\]: 128 rows",
        chunk_bytes=9999,
        row_alignment=128,
    )
    refuse(
        r"method.frozen: 'nothing\*' matches no parameter; names look like model.embed_tokens.weight, ",
        frozen=("nothing*",),
    )
    refuse(r"method.always: 'nothing\*' matches no parameter", always=("nothing*",))
    refuse(r"method: nothing is left for chunks; train less of it always, or freeze less", frozen=("*",))
    refuse(r"method: nothing is left for chunks", always=("*",))


def test_chunks_that_would_not_get_a_turn_are_told() -> None:
    with pytest.warns(
        UserWarning, match=r"with 3 updates a turn, 2 of 4 chunks will not have trained when the run ends after 5 "
    ):
        chunked(make_model("llama"), steps=5, num_chunks=4, updates_per_chunk=3)


def test_the_default_turns_make_eight_cycles_or_at_least_reach_every_chunk() -> None:
    for steps, updates in ((4, 1), (33, 1), (99, 3), (3200, 100), (9999, 100)):
        learner = chunked(make_model("llama"), steps=steps, num_chunks=4)
        assert learner.method.turns.updates_per_chunk == updates
        assert learner.method.turns.seen(steps) == {0, 1, 2, 3}
    assert len(chunked(make_model("llama")).method.chunks) == 16


def test_chunk_bytes_hold_gradient_master_copy_and_state() -> None:
    for dtype, per_number in ((torch.float32, 12), (torch.bfloat16, 14)):
        learner = chunked(make_model("llama", dtype), chunk_bytes=100_000)
        sizes = [
            sum((span.stop - span.start) * math.prod(learner.method.params[span.name].shape[1:]) for span in chunk)
            for chunk in learner.method.chunks
        ]
        assert sum(sizes) == sum(p.numel() for p in learner.model.parameters())
        assert max(sizes) * per_number <= 100_000
        assert len(sizes) <= 1.2 * sum(sizes) * per_number / 100_000 + 1


BAD: dict[str, tuple[str, str]] = {
    "two sizes": (
        "method: {name: chunk, num_chunks: 4, chunk_bytes: 5MiB}",
        "chunk_bytes and num_chunks say the same twice",
    ),
    "no size": ("method: {name: chunk, memory: lots}", "'lots' is no number of bytes: write it as 800MiB or 14GiB"),
    "no unit": ("method: {name: chunk, chunk_bytes: 5 XB}", "'5 XB' is no number of bytes"),
    "size of a layer": (
        "method: {name: chunk, layout: layers, num_chunks: 4}",
        "num_chunks: layout layers makes a chunk of each",
    ),
    "nothing to keep": (
        "method: {name: chunk, state: reset, offload: disk}",
        "offload: state reset leaves nothing to keep",
    ),
    "adafactor": ("method: chunk\noptimizer: adafactor", "optimizer: adafactor looks at whole matrices"),
    "muon": ("method: chunk\noptimizer: {name: muon}", "optimizer: muon looks at whole matrices"),
    "negative": (
        "method: {name: chunk, order: [0, -1]}",
        "method.order: input should be 'random', 'sampled', 'ascending' or",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_by_the_configuration(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    file = tmp_path / "run.yaml"
    file.write_text(f"model: m\ndata: d\n{text}\n")
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert message in str(caught.value)
    place = f"{file}: " if case in ("adafactor", "muon") else f"{file}:3: "  # a line where one setting alone is wrong
    assert str(caught.value).startswith(place)


def test_sizes_are_read_with_their_units() -> None:
    def size(text: Any) -> int:
        tree = {"model": "m", "data": "d", "output": "o", "method": {"name": "chunk", "chunk_bytes": text}}
        return config_from_dict(tree).method.chunk_bytes

    assert [size(text) for text in (7, "7", "7B", "1.5KiB", "2 mb", "3GiB")] == [7, 7, 7, 1536, 2_000_000, 3 * 2**30]


class Counted(FsdpEngine):
    """Counts what it sums over ranks, each of which holds the whole model."""

    def __init__(self) -> None:
        super().__init__(FsdpConfig(device="cpu", replicate=2), "fp32")
        self.reduced: list[int] = []

    def reduce(self, grads: Mapping[str, Tensor]) -> None:
        super().reduce(grads)
        self.reduced.append(sum(grad.numel() for grad in grads.values()))


def two_rank_settings() -> dict[str, Any]:
    return {"max_grad_norm": 1.0, "num_chunks": 3, "updates_per_chunk": 2, "offload": "host", "micro_batch_tokens": 30}


def one_of_two_ranks() -> dict[str, Any]:
    engine = Counted()
    learner = chunked(make_model("llama", torch.float64), engine=engine, **two_rank_settings())
    active, metrics = [], []
    for _ in range(8):
        metrics.append({name: x.double() for name, x in learner.step(SFT, ragged_batch(pack=False), lr=1e-2).items()})
        active.append(elements(learner.method))
    return {"weights": weights(learner), "metrics": metrics, "active": active, "reduced": engine.reduced}


def test_two_ranks_are_one_and_exchange_only_the_active_chunk(tmp_path: Path) -> None:
    ranks = on_ranks(2, one_of_two_ranks, tmp_path)
    learner = chunked(make_model("llama", torch.float64), **two_rank_settings())
    metrics = [learner.step(SFT, ragged_batch(pack=False), lr=1e-2) for _ in range(8)]
    for rank in ranks:
        assert difference(rank["weights"], weights(learner)) < 1e-9
        for mine, theirs in zip(metrics, rank["metrics"], strict=True):
            assert difference({name: x.double() for name, x in mine.items()}, theirs) < 1e-9
        assert rank["reduced"] == rank["active"]
    assert equal_bits(ranks[0]["weights"], ranks[1]["weights"])
    assert max(ranks[0]["reduced"]) < 0.5 * sum(p.numel() for p in learner.model.parameters())
    assert difference(weights(learner), weights_of(make_model("llama", torch.float64))) > 1e-2
