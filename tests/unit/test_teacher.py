"""Teachers, live and stored, and teachers with another tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from tests.batches import ragged_batch
from tests.families import make_model
from tests.unit.test_alignment import make_tokenizer
from tunesmith.alignment import Alignment
from tunesmith.config import FullConfig, RunConfig, SgdConfig, SingleConfig
from tunesmith.config_objectives import DistillConfig
from tunesmith.engines import build_engine
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.methods import METHODS
from tunesmith.models.probe import isolates_sequences
from tunesmith.objectives.distill import Distill, sorted_distance
from tunesmith.run_check import check
from tunesmith.score_store import ScoreStore
from tunesmith.teacher import StoredTeacher, Teacher, load_teacher, one_a_row, open_teacher
from tunesmith.types import Batch

V = 300


def make_learner(model: Any = None, micro_batch_tokens: int = 10_000) -> Learner:
    """A student in fp64 whose SGD step moves nothing."""
    method = METHODS["full"](FullConfig(), SgdConfig(lr=1e-30), max_grad_norm=None)
    engine = build_engine(SingleConfig(device="cpu"), "fp32")
    return Learner(model or make_model("llama", torch.float64), engine, method, micro_batch_tokens)


def make_teacher(family: str = "qwen3", micro_batch_tokens: int = 10_000, **settings: Any) -> Teacher:
    engine = build_engine(SingleConfig(device="cpu"), "fp32")
    model = engine.place(make_model(family, torch.float64, seed=1)).requires_grad_(False)
    sizes = {"vocabulary": V, "own_vocabulary": V, "isolates": isolates_sequences(model)}
    return Teacher(family, model, engine, micro_batch_tokens, **{**sizes, **settings})


def step(
    batch: Batch, teacher: Any, micro_batch_tokens: int = 10_000, model: Any = None, **config: Any
) -> dict[str, Tensor]:
    """Metrics and gradients of a step."""
    learner = make_learner(model, micro_batch_tokens)
    objective = Distill(DistillConfig(teacher="a", **config))
    (ready,) = objective.prepare(batch, {"teacher": teacher})
    metrics = learner.step(objective, ready, lr=1e-30)
    grads = {name: p.grad for name, p in learner.method.params.items() if p.grad is not None}
    return {**grads, **{name: metrics[name] for name in ("loss", "divergence", "nll", "accuracy")}}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def whole_logits(model: Any, batch: Batch) -> Tensor:
    """Logits that predict each target of a padded batch, [N, V], by the model's own forward."""
    rows, columns = (batch.weights_BT != 0).nonzero(as_tuple=True)
    return model(input_ids=batch.tokens_BT).logits[rows, columns - 1]


@pytest.mark.parametrize("top_k", [None, 4])
def test_the_loss_is_that_of_whole_logits(top_k: int | None) -> None:
    batch, teacher, student = ragged_batch(pack=False), make_teacher(top_k=top_k), make_model("llama", torch.float64)
    found = step(batch, teacher, model=student, top_k=top_k, ce_weight=0.25, temperature=1.0)
    at = batch.weights_BT != 0
    p, full = (whole_logits(model, batch) for model in (teacher.model, student))
    p, q = p[:, :V].softmax(-1), full[:, :V].softmax(-1)
    if top_k:
        chosen = p.topk(top_k).indices
        p, q = (torch.cat([x.gather(-1, chosen), 1 - x.gather(-1, chosen).sum(-1, keepdim=True)], -1) for x in (p, q))
    divergence = (p * (p / q).log()).sum(-1)
    nll = -full.log_softmax(-1).gather(-1, batch.tokens_BT[at][:, None])[:, 0]
    weights = batch.weights_BT[at].double()
    by_token = {"divergence": divergence, "nll": nll, "loss": 0.75 * divergence + 0.25 * nll}
    expected = {name: (values * weights).sum() / weights.sum() for name, values in by_token.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-8)
    parameters = dict(student.named_parameters())
    for name, grad in zip(parameters, torch.autograd.grad(expected["loss"], list(parameters.values())), strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("top_k", [None, 4])
def test_no_logits_exist_whole(top_k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ragged_batch(pack=False, shortest=10)
    batch = replace(batch, weights_BT=(batch.positions_BT > 0).float())
    at_once = step(batch, make_teacher(top_k=top_k), top_k=top_k)
    for module in ("models.head", "teacher"):
        monkeypatch.setattr(f"tunesmith.{module}.CHUNK_ELEMENTS", 4 * 384)
    monkeypatch.setattr("tunesmith.models.head.TRAINED_CHUNK_ELEMENTS", 4 * 384)
    teacher = make_teacher(top_k=top_k)
    with LargestTensor() as watch:
        in_chunks = step(batch, teacher, top_k=top_k)
    weights_of_head = 384 * 32
    assert watch.elements <= weights_of_head < int((batch.weights_BT != 0).sum()) * V
    assert difference(at_once, in_chunks) < 1e-12


@pytest.mark.parametrize("config", [{}, {"divergence": "jsd", "top_k": 4, "ce_weight": 0.5}], ids=["hidden", "top k"])
@pytest.mark.parametrize("family", ["qwen3", "mamba"])
def test_micro_batches_and_packing_do_not_matter(config: dict[str, Any], family: str) -> None:
    """Mamba would carry packed sequences over into each other: it reads one a row."""
    top_k = config.get("top_k")
    whole = step(ragged_batch(pack=False), make_teacher(family, top_k=top_k), **config)
    assert make_teacher(family).isolates == (family == "qwen3")
    for pack in (False, True):
        teacher = make_teacher(family, micro_batch_tokens=16, top_k=top_k)
        bound = 1e-6 if family == "mamba" else 1e-10  # mamba's own code scans in fp32
        assert difference(whole, step(ragged_batch(pack), teacher, micro_batch_tokens=16, **config)) < bound


@pytest.mark.parametrize("config", [{}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "top_k": 4}])
def test_a_teacher_that_is_the_student_moves_nothing(config: dict[str, Any]) -> None:
    teacher = make_teacher("llama", top_k=config.get("top_k"))
    found = step(ragged_batch(pack=True), teacher, model=make_model("llama", torch.float64, seed=1), **config)
    assert abs(float(found["divergence"])) < 1e-12
    grads = [value for name, value in found.items() if "." in name]
    assert grads
    assert all(float(grad.abs().max()) < 1e-12 for grad in grads)


def test_no_target_at_all() -> None:
    batch = ragged_batch(pack=True)
    batch = replace(batch, weights_BT=torch.zeros_like(batch.weights_BT))
    for teacher in (make_teacher(), make_teacher(isolates=False), make_teacher(top_k=3)):
        assert all(column.shape[:2] == batch.tokens_BT.shape for column in teacher.columns(batch).values())


# Another tokenizer


def text_batch(tokenizer: Any, *texts: str) -> Batch:
    """One text a row; all but the first four tokens are targets."""
    tokens = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    return one_a_row([(ids, torch.arange(4, len(ids))) for ids in tokens])


TEXTS = ("What follows 3? After 3 comes 4.", "What follows 7? After 7 comes 8 é. And so on.")


def test_uld_compares_the_hidden_states_that_stand_at_the_same_character(tokenizer: Any) -> None:
    theirs = make_tokenizer("e+r", "Ġ+c", "Ġc+o", bos="<s>")
    teacher = make_teacher(alignment=Alignment(tokenizer, theirs), own_vocabulary=258, vocabulary=V)
    batch = text_batch(tokenizer, *TEXTS)
    columns = teacher.columns(batch)
    student = make_model("llama", torch.float64)
    expected, seen = torch.zeros_like(batch.weights_BT, dtype=torch.float64), 0
    for row, text in enumerate(TEXTS):
        ids, encoded = tokenizer(text)["input_ids"], theirs(text, add_special_tokens=True)
        p = teacher.model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0, :, :258].softmax(-1)
        q = student(input_ids=torch.tensor([ids])).logits[0, :, :V].softmax(-1)
        before = {k: theirs.decode(encoded["input_ids"][1:k]) for k in range(1, len(encoded["input_ids"]))}
        their_begin = {piece: k for k, piece in before.items() if text.startswith(piece)}
        for n in range(4, len(ids)):
            piece = tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
            k = their_begin.get(piece)
            assert bool(columns["aligned"][row, n]) == (k is not None)
            if k is not None:
                expected[row, n] = sorted_distance(p[k - 1 : k], q[n - 1 : n])[0]
                seen += 1
    assert 5 < seen < int((batch.weights_BT != 0).sum())
    found = step(batch, teacher, model=student, divergence="uld", ce_weight=0.5)
    torch.testing.assert_close(found["divergence"].double(), expected.sum() / seen, rtol=1e-6, atol=1e-8)
    count = batch.weights_BT.sum()
    torch.testing.assert_close(found["loss"], 0.5 * expected.sum() / count + 0.5 * found["nll"], rtol=1e-6, atol=1e-8)


def test_uld_of_a_teacher_that_is_the_student_is_nothing(tokenizer: Any) -> None:
    teacher = make_teacher("llama", alignment=Alignment(tokenizer, tokenizer), micro_batch_tokens=30)
    batch = text_batch(tokenizer, "What follows 3? After 3 comes 4.", "What follows 7? And so on. After 7 comes 8.")
    assert torch.equal(teacher.columns(batch)["aligned"], batch.weights_BT != 0)
    found = step(batch, teacher, model=make_model("llama", torch.float64, seed=1), divergence="uld", ce_weight=0.5)
    assert abs(float(found["divergence"])) < 1e-12


# From a configuration


@pytest.fixture
def teacher_folder(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., str]:
    """A model of another build, with the tests' tokenizer or another one."""

    def make(name: str = "teacher", tokenizer: Any = None) -> str:
        make_model("qwen3", seed=1).save_pretrained(tmp_path / name)
        if tokenizer:
            tokenizer.save_pretrained(tmp_path / name)
        else:
            for file in tokenizer_folder.iterdir():
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return str(tmp_path / name)

    return make


def opened(config: RunConfig, batches: Any = None, watch: Any = None) -> Any:
    learner = make_learner(make_model("llama"))
    watch = watch or (lambda _name, _number: None)
    return open_teacher(config, learner, [ragged_batch(pack=False)] if batches is None else batches, "data", watch)


def distill(make_config: Callable[..., RunConfig], **settings: Any) -> RunConfig:
    return make_config(objective={"name": "distill", **settings})


def test_a_live_teacher(make_config: Any, teacher_folder: Any, tokenizer: Any) -> None:
    path = teacher_folder()
    teacher = opened(distill(make_config, teacher=path))
    assert isinstance(teacher, Teacher)
    assert teacher.vocabulary == teacher.own_vocabulary == max(tokenizer.get_vocab().values()) + 1 < 384
    assert teacher.describe().startswith(f"{path} · ")
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.columns(ragged_batch(pack=True))["teacher_hidden"].shape[-1] == 32


def test_stored_scores_are_the_live_ones(make_config: Any, teacher_folder: Any, tmp_path: Path) -> None:
    path, file = teacher_folder(), str(tmp_path / "scores")
    counted: list[int] = []
    config = distill(make_config, teacher=path, top_k=5, scores="precompute", scores_file=file)
    stored = opened(config, watch=lambda _name, number: counted.append(number))
    assert isinstance(stored, StoredTeacher)
    assert counted == [8]
    assert "5 likeliest tokens" in stored.describe()
    live = load_teacher(distill(make_config, teacher=path, top_k=5), make_learner(make_model("llama")))
    batch = ragged_batch(pack=True)  # another layout than that which was scored
    expected, found = live.columns(batch), stored.columns(batch)
    assert torch.equal(found["teacher_tokens"], expected["teacher_tokens"])
    torch.testing.assert_close(found["teacher_logprobs"], expected["teacher_logprobs"], rtol=1e-5, atol=1e-5)
    assert found["teacher_logprobs"].shape[-1] == 6

    again = distill(make_config, top_k=5, scores="precompute", scores_file=file, temperature=2.0)
    without_teacher = opened(again, watch=lambda _name, number: counted.append(number))
    assert counted == [8], "the data is not scored again"
    assert torch.equal(without_teacher.columns(batch)["teacher_logprobs"], found["teacher_logprobs"])


def test_scores_that_are_there_need_no_teacher(make_config: Any, teacher_folder: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "scores")
    config = distill(make_config, teacher=teacher_folder(), top_k=5, scores="precompute", scores_file=file)
    stored = opened(config)
    shutil.rmtree(config.objective.teacher)
    check(config)
    batch = ragged_batch(pack=False)
    assert torch.equal(opened(config).columns(batch)["teacher_tokens"], stored.columns(batch)["teacher_tokens"])
    shutil.rmtree(file)
    with pytest.raises(UserError, match=r"^objective\.teacher: .*no such model folder"):
        check(config)


def test_stored_scores_in_the_cache(make_config: Any, teacher_folder: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    config = distill(make_config, teacher=teacher_folder(), top_k=5, scores="precompute")
    made: list[int] = []
    for _ in range(2):
        opened(config, watch=lambda _name, number: made.append(number))
    assert made == [8]
    opened(distill(make_config, teacher=config.objective.teacher, top_k=6, scores="precompute"))
    assert len(list((tmp_path / "cache" / "scores").iterdir())) == 2


def test_scores_of_other_settings_are_refused(make_config: Any, teacher_folder: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "scores")
    path = teacher_folder()
    opened(distill(make_config, teacher=path, top_k=5, scores="precompute", scores_file=file))

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=match):
            opened(distill(make_config, **{"top_k": 5, "scores": "precompute", "scores_file": file, **settings}))

    refused("holds the 5 likeliest tokens; set objective.top_k", top_k=4)
    make_model("qwen3", seed=2).save_pretrained(path)
    refused("was made by other weights than objective.teacher", teacher=path)
    refused("holds no scores yet, and there is no teacher", scores_file=str(tmp_path / "none"))
    make_tokenizer().save_pretrained(tmp_path / "student")
    make_model("llama").save_pretrained(tmp_path / "student")
    config = distill(make_config, top_k=5, scores="precompute", scores_file=file)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path / "student")})})
    with pytest.raises(UserError, match="was made for other tokens"):
        opened(config)
    store = ScoreStore.open(Path(file))
    missing = replace(ragged_batch(pack=False), tokens_BT=ragged_batch(pack=False).tokens_BT + 1)
    with pytest.raises(UserError, match="holds nothing about a sample"):
        store.columns(missing)


def test_other_tokens_are_refused_but_under_uld(make_config: Any, teacher_folder: Any, tokenizer: Any) -> None:
    path = teacher_folder(tokenizer=make_tokenizer("a+b", bos="<s>"))
    with pytest.raises(UserError, match=r"its tokens are not those of .* set objective.divergence to uld"):
        opened(distill(make_config, teacher=path))
    teacher = opened(distill(make_config, teacher=path, divergence="uld", ce_weight=0.5))
    assert teacher.own_vocabulary == 258
    assert teacher.vocabulary == max(tokenizer.get_vocab().values()) + 1
    assert teacher.columns(text_batch(tokenizer, *TEXTS))["aligned"].any()


def test_a_teacher_may_know_more_tokens(
    make_config: Any, teacher_folder: Any, tokenizer_folder: Path, tokenizer: Any
) -> None:
    more = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    more.add_tokens(["<think>"])
    teacher = opened(distill(make_config, teacher=teacher_folder(tokenizer=more)))
    assert teacher.own_vocabulary == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize("scores", [{}, {"scores": "precompute", "top_k": 3}], ids=["live", "precompute"])
def test_a_teacher_that_is_no_model(make_config: Any, tmp_path: Path, scores: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^objective.teacher: .*no such model folder.*check the path"):
        opened(distill(make_config, teacher=str(tmp_path / "nothing"), **scores))


def test_a_teacher_with_too_few_positions() -> None:
    teacher = make_teacher()
    teacher.model.config.max_position_embeddings = 8
    with pytest.raises(UserError, match="knows 8 positions, but a sample has"):
        teacher.columns(ragged_batch(pack=False))


@pytest.mark.parametrize(
    ("alignment", "match"), [(None, "reads text alone, but"), ("same", "reads text alone under divergence")]
)
def test_media_that_the_teacher_cannot_read(alignment: str | None, match: str, tokenizer: Any) -> None:
    teacher = make_teacher(alignment=alignment and Alignment(tokenizer, tokenizer))
    batch = ragged_batch(pack=False)
    media = ({"pixel_values": torch.zeros(1)}, *[{}] * (len(batch.sample_N) - 1))
    with pytest.raises(UserError, match=match):
        teacher.columns(replace(batch, media_N=media))


def test_mixed_precision_keeps_the_teacher_in_bf16(make_config: Any, teacher_folder: Any) -> None:
    config, batch, losses = distill(make_config, teacher=teacher_folder()), ragged_batch(pack=True), []
    for precision, dtype in (("fp32", torch.float32), ("mixed", torch.bfloat16)):
        method = METHODS["full"](FullConfig(), SgdConfig(lr=1e-30), max_grad_norm=None)
        learner = Learner(make_model("llama"), build_engine(SingleConfig(device="cpu"), precision), method, 10_000)
        teacher = load_teacher(config, learner)
        assert {p.dtype for p in teacher.model.parameters()} == {dtype}
        objective = Distill(config.objective)
        (ready,) = objective.prepare(batch, {"teacher": teacher})
        losses.append(float(learner.step(objective, ready, lr=1e-30)["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
