"""Chunks with what saves memory or time around them: streamed weights, a memory budget, compiled blocks."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.equal.test_chunk import SFT, chunked, row_batch
from tests.families import FAMILIES, SMALL
from tests.product.test_product import equal_bits, final_state, losses
from tunesmith.config import AdamWConfig, ChunkConfig, RunConfig, SingleConfig
from tunesmith.engines.single import SingleEngine, own_memory
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.methods import METHODS, Extent
from tunesmith.methods.budget import MARGIN
from tunesmith.methods.shelf import TensorFile
from tunesmith.methods.stream import WINDOW
from tunesmith.models.head import Targets, score_targets
from tunesmith.models.probe import find_head
from tunesmith.plan.activations import Activations, BlockBytes, counting, measure
from tunesmith.run import build, train
from tunesmith.run_folder import read_events


def deep_model(family: str = "llama", blocks: int = 6, **settings: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        **{
            **SMALL,
            **FAMILIES[family],
            "num_hidden_layers": blocks,
            **({"n_layer": blocks} if family == "gpt2" else {}),
        },
        **settings,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def engine(checkpointing: bool) -> SingleEngine:
    return SingleEngine(SingleConfig(device="cpu", activation_checkpointing=checkpointing), "fp32")


def on_device(learner: Learner) -> int:
    """Blocks whose weights have storage."""
    return sum(
        all(p.untyped_storage().nbytes() for p in block.parameters()) for block in learner.method.blocks.values()
    )


@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["activations kept", "activations computed again"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_streamed_weights_do_not_change_a_bit(family: str, checkpointing: bool, offload: str) -> None:
    found = []
    for settings in ({}, {"weights": "stream"}):
        learner = chunked(
            deep_model(family),
            engine=engine(checkpointing),
            num_chunks=5,
            updates_per_chunk=2,
            offload=offload,
            **settings,
        )
        most = []
        for block in learner.method.blocks.values():
            block.register_forward_hook(lambda *_, learner=learner, most=most: most.append(on_device(learner)))
        steps = [learner.step(SFT, row_batch(step), lr=1e-2) for step in range(9)]
        found.append((steps, learner.method.state_dict()))
        if settings:
            active = len(learner.method.stream.held)
            assert active < 6
            assert max(most) <= WINDOW + 3  # at most three of the blocks hold a fifth of the parameters
    assert equal_bits(found[0], found[1])


def test_a_streamed_model_resumes_and_saves_what_it_has_learnt(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def new(**settings: Any) -> Learner:
        return chunked(deep_model(), num_chunks=5, updates_per_chunk=2, **settings)

    whole, first, second = new(), new(weights="stream"), new(weights="stream")
    for step in range(8):
        whole.step(SFT, row_batch(step), lr=1e-2)
    for step in range(3):
        first.step(SFT, row_batch(step), lr=1e-2)
    file = io.BytesIO()
    torch.save(first.method.state_dict(), file)
    file.seek(0)
    second.method.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 8):
        second.step(SFT, row_batch(step), lr=1e-2)
    assert equal_bits(second.method.state_dict(), whole.method.state_dict())
    second.method.save(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert equal_bits(loaded.state_dict(), whole.model.state_dict())
    second.step(SFT, row_batch(8), lr=1e-2)  # saving has not disturbed it
    whole.step(SFT, row_batch(8), lr=1e-2)
    assert equal_bits(second.method.state_dict(), whole.method.state_dict())


def test_a_streamed_model_keeps_no_frozen_copy() -> None:
    learner = chunked(deep_model(), num_chunks=5, weights="stream")
    with pytest.raises(UserError, match=r"method.weights: stream keeps no second copy of the model.*precompute"):
        learner.method.keep_start()


BLOCK = BlockBytes(entering=10, frozen=100, training=150, working=40, passing=30)


def test_the_peak_of_activations_by_hand() -> None:
    held = Activations((BLOCK,) * 4, head=60)
    assert held.peak(0, range(0), False) == 4 * 100 + 60
    assert held.peak(2, range(2, 3), False) == 150 + 100 + 60
    assert held.peak(4, range(4, 5), False) == 60  # the head alone trains: blocks only pass
    assert held.peak(-1, range(0), True) == max(4 * 10 + 60, 3 * 10 + 100 + 40)
    assert held.peak(3, range(3, 4), True) == 150 + 40
    assert Activations((BLOCK,) * 4, head=0).peak(4, range(0), True) == 30


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "mamba"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["activations kept", "activations computed again"])
@pytest.mark.parametrize(("lowest", "training"), [(0, range(1)), (3, range(3, 5)), (5, range(5, 6))])
def test_the_peak_of_activations_is_that_of_a_real_pass(
    family: str, checkpointing: bool, lowest: int, training: range
) -> None:
    model = deep_model(family)
    place = engine(checkpointing)
    place.place(model.requires_grad_(False))
    foreseen = measure(model, head := find_head(model), 2, 100).peak(lowest, training, checkpointing)
    assert not any(p.requires_grad for p in model.parameters())
    model.train()
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2].isdigit()]
    for number in training:
        model.get_submodule(names[number]).requires_grad_(True)
    tokens = torch.arange(200).view(2, 100) % 2
    with counting(torch.device("cpu")) as count:
        hidden = (model.get_decoder() or model)(input_ids=tokens, use_cache=False)[0].flatten(0, 1)
        score_targets(hidden, head, Targets(tokens.flatten()))[0].sum().backward()
        found = count.peak
    gradients = sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
    assert found - gradients <= 1.05 * foreseen
    assert found >= 0.75 * foreseen


class Empty(SingleEngine):
    """Takes the process for empty, so that small budgets mean something."""

    def held_bytes(self) -> int:
        return 0

    def economize(self) -> None:
        pass


def budgeted(memory: int, always: tuple[str, ...] = (), checkpointing: bool = False) -> Any:
    method: Any = METHODS["chunk"](
        ChunkConfig(memory=memory, row_alignment=8, always=always),
        AdamWConfig(lr=1e-2),
        None,
        Extent(1000, rows=4, tokens=100),
    )
    Learner(
        deep_model(), Empty(SingleConfig(device="cpu", activation_checkpointing=checkpointing), "fp32"), method, 400
    )
    return method


def test_chunks_are_as_large_as_the_budget_allows() -> None:
    found = {memory: budgeted(memory) for memory in (2_500_000, 3_000_000, 3_500_000, 40_000_000)}
    sizes = [len(method.chunks) for method in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 1
    for memory, method in found.items():
        assert method.fit.peak_bytes <= memory * (1 - MARGIN["cpu"])
        assert method.resolved()["num_chunks"] == len(method.chunks)
    assert not any(found[40_000_000].fit.checkpointing)


def test_activations_are_computed_again_where_the_budget_asks_for_it() -> None:
    method = budgeted(2_500_000)
    needed = method.fit.checkpointing
    assert any(needed)
    assert not all(needed)
    assert needed == sorted(needed, reverse=True)  # chunks further down keep more
    for number in range(len(method.chunks)):
        method._turn_to((number,))
        assert method.model.is_gradient_checkpointing == needed[number]


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    with pytest.raises(
        UserError, match=r"method.memory: 1 MiB are too little: .* 4 × 100 tokens .* (\d+) MiB would do"
    ) as error:
        budgeted(1_000_000)
    enough = int(str(error.value).split(" MiB would do")[0].rpartition(" ")[2])
    assert budgeted(enough * 2**20).fit.peak_bytes <= enough * 2**20


def test_a_run_keeps_the_chunks_that_its_budget_gave_it(make_config: Callable[..., RunConfig]) -> None:
    """Also where another machine would give it others."""
    config = make_config(
        method={"name": "chunk", "memory": own_memory() + 2**27, "row_alignment": 8}, train={"steps": 4},
        checkpoint={"every_steps": 2, "keep": 9},
    )  # fmt: skip
    result = train(config)
    whole, steps = final_state(result.folder), losses(result.folder)
    for path in (result.folder / "checkpoints").glob("step-4/*"):
        path.unlink()
    (result.folder / "checkpoints/step-4").rmdir()
    train(config, resume=True)
    assert equal_bits(final_state(result.folder), whole)
    assert losses(result.folder) == steps


def test_a_budget_is_refused_for_images(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.methods.budget.is_multimodal", lambda _: True)
    with pytest.raises(UserError, match=r"method.memory: what images, audio and video take is not foreseen"):
        build(make_config(method={"name": "chunk", "memory": "90GiB"}))


def test_compiled_blocks_are_compiled_three_times_for_any_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that stand still, with and without a gradient passing through, and blocks that train."""

    def compile_block(block: nn.Module, **_: Any) -> None:
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager", dynamic=True)

    monkeypatch.setattr(nn.Module, "compile", compile_block)
    found = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        settings = {"num_chunks": 7, "updates_per_chunk": 1, "order": "ascending", "max_grad_norm": 1.0}
        learner = chunked(
            deep_model(blocks=8), engine=SingleEngine(SingleConfig(device="cpu", compile=compiled), "fp32"), **settings
        )
        found[compiled] = [float(learner.step(SFT, row_batch(0), lr=1e-2)["loss"]) for _ in range(14)]
    assert found[True] == pytest.approx(found[False], rel=1e-5)
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


class Aside(nn.Module):
    """A part of a model that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))


def test_a_chunk_that_a_batch_does_not_reach_waits() -> None:
    model = deep_model()
    model.aside = Aside()
    learner = chunked(model, num_chunks=5, updates_per_chunk=1, order="ascending", max_grad_norm=1.0)
    learner.method.chunks[-1] = learner.method.chunks[-1][-1:]  # the part aside alone
    metrics = [learner.step(SFT, row_batch(0), lr=1e-2) for _ in range(6)]
    assert float(metrics[4]["grad_norm"]) == 0.0
    assert float(metrics[5]["loss"]) < float(metrics[0]["loss"])


def test_a_budget_counts_what_always_trains() -> None:
    """With the embeddings, every chunk's backward pass goes all the way down."""
    for always, lowest in (((), 0), (("model.embed_tokens*",), -1)):
        method = budgeted(3_000_000, always)
        budget, on = method.budget, method.fit.checkpointing[-1]
        for spans in method.chunks:
            places = {budget._block(span.name) for span in (*spans, *method.always)}
            assert min(places) == -1 or not always
            assert budget.held + budget.activations.peak(min(places), places, on) <= 3_000_000
        top = {budget._block(span.name) for span in method.chunks[-1]}
        assert budget.peak(method.chunks[-1], True) >= budget.activations.peak(
            min(lowest or min(top), min(top)), top, True
        )


def test_checkpointing_that_is_asked_for_stays_under_a_budget() -> None:
    method = budgeted(40_000_000, checkpointing=True)
    assert method.model.is_gradient_checkpointing
    assert method.fit.checkpointing == [True]
    plain = budgeted(40_000_000)
    assert method.budget.activations == plain.budget.activations
    assert method.fit.peak_bytes < plain.fit.peak_bytes


def test_a_frozen_copy_beyond_the_budget_is_refused() -> None:
    method = budgeted(2_500_000)
    with pytest.raises(UserError, match=r"method.memory: the frozen copy of the model .*reference to precompute"):
        method.keep_start()
    budgeted(40_000_000).keep_start()


def test_more_steps_after_a_resume_keep_the_turns(make_config: Callable[..., RunConfig]) -> None:
    def config(steps: int) -> RunConfig:
        return make_config(method={"name": "chunk", "num_chunks": 2, "row_alignment": 8}, train={"steps": steps})

    result = train(config(4))
    assert train(config(80), resume=True).step == 80
    chunks = [event["chunk"] for event in read_events(result.folder / "events.jsonl") if event["event"] == "step"]
    assert len(chunks) == 80
    turns = [len(list(run)) for _, run in groupby(chunks)]
    assert max(turns) <= 2  # one update a turn, and two where a cycle begins with the chunk that ended the last one


@pytest.mark.parametrize(
    ("method", "sections", "said"),
    [
        ({"order": [0, 1], "num_active": 2, "layout": "layers"}, {}, "order: a list names one chunk for each turn"),
        ({"num_active": 2, "num_chunks": 4}, {}, "num_active: several blocks can train together, under layout layers"),
        ({"memory": "9GiB", "weights": "stream"}, {}, "memory: what streamed weights take is not counted"),
        ({"weights": "stream"}, {"engine": {"compile": True}}, "engine.compile: streamed weights come and go"),
        ({}, {"optimizer": "adamw8bit"}, "optimizer: chunk keeps 8-bit states itself"),
        ({"state": "reset", "offload": "host"}, {}, "offload: state reset leaves nothing to keep"),
    ],
)
def test_settings_that_do_not_go_together(
    make_config: Callable[..., RunConfig], method: dict[str, Any], sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make_config(method={"name": "chunk", **method}, **sections)


def test_streamed_weights_wait_where_they_are_told_also_without_states(make_config: Callable[..., RunConfig]) -> None:
    make_config(method={"name": "chunk", "weights": "stream", "state": "reset", "offload": "host"})


def test_chunks_that_an_order_leaves_out_are_told() -> None:
    with pytest.warns(UserWarning, match="3 of 4 chunks will not have trained"):
        chunked(deep_model(), num_chunks=4, order=(0,))


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    file = TensorFile()

    class Full:
        def seek(self, _: int) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "file", Full())
    with pytest.raises(
        UserError, match=r"what waits for its turn cannot be written: No space left on device; make room"
    ):
        file.keep("a", torch.ones(10))
