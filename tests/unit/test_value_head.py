"""Reward models: the head's start, what trains, and that transformers and PEFT read the same values from what is saved."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import FAMILIES, make_model
from tunesmith.config import ModelConfig, RunConfig, SingleConfig
from tunesmith.config_file import config_from_dict
from tunesmith.engines import build_engine
from tunesmith.errors import UserError
from tunesmith.inference.generate import load_generator
from tunesmith.methods import Method, build_method
from tunesmith.models.load import (
    HeadKind,
    blocks,
    decoder_name,
    decoder_of,
    head_kind,
    load_model,
    load_tokenizer,
    padding_token,
    value_head,
    value_head_name,
)
from tunesmith.models.probe import find_head, isolates_sequences
from tunesmith.run import train
from tunesmith.types import Batch, Wanted

Folder = Callable[[str], Path]
WITH_SEQUENCE_CLASS = [name for name in FAMILIES if name not in ("granite", "cohere", "falcon_h1", "mamba")]
WITH_TOKEN_CLASS = [name for name in WITH_SEQUENCE_CLASS if name not in ("gemma3_text", "opt", "olmo2")]
KINDS = [("sequence", name) for name in WITH_SEQUENCE_CLASS] + [("token", name) for name in WITH_TOKEN_CLASS]
LENGTHS = (9, 5, 12, 1)
LAST = 3
"""The token id that texts end with: neither padding nor end token."""


def _load(folder: Path, kind: HeadKind = "sequence", num_labels: int = 1, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return load_model(ModelConfig(path=str(folder)), torch.float32, kind, num_labels)


def _sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(4, 300, (length,), generator=generator) for length in LENGTHS]
    for tokens in found:
        tokens[-1] = LAST
    return found


def _padded(pad: int) -> Batch:
    """One sequence a row, padded at the right."""
    shape = len(LENGTHS), max(LENGTHS)
    tokens_BT, columns = torch.full(shape, pad), torch.arange(shape[1]).expand(shape)
    here = columns < torch.tensor(LENGTHS)[:, None]
    tokens_BT[here] = torch.cat(_sequences())
    sequence_BT = torch.where(here, torch.arange(len(LENGTHS))[:, None], -1)
    number = torch.arange(len(LENGTHS))
    return Batch(tokens_BT, columns * here, sequence_BT, torch.zeros(shape), number, number)


def _adapted(model: Any, method_config: dict[str, Any], precision: str = "fp32") -> tuple[Any, Any, Method]:
    """(model, engine, method), ready for a step."""
    config = config_from_dict({"model": "demo", "data": "demo", "output": "unused", "method": method_config})
    engine = build_engine(SingleConfig(device="cpu"), precision)
    method = build_method(config)
    method.adapt(model)
    model = engine.place(model)
    method.bind(model, engine)
    return model, engine, method


def _values(model: Any, engine: Any, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        return engine.score(model, batch, Wanted(values=True)).values_BTC


def _train(model: Any, engine: Any, method: Method, batch: Batch) -> None:
    def loss_fn(micro_batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        here = micro_batch.sequence_BT >= 0
        return (engine.score(model, micro_batch, Wanted(values=True)).values_BTC[here] - 1).square().sum(), {}

    model.train()
    for _ in range(3):
        method.step(loss_fn, [batch], 0.01)


@pytest.mark.parametrize(("kind", "family"), KINDS)
def test_saved_in_full_it_gives_transformers_the_same_values(
    kind: HeadKind, family: str, model_folder: Folder, tmp_path: Path
) -> None:
    import transformers

    model = _load(model_folder(family), kind, 2)
    pad = model.config.pad_token_id
    model, engine, method = _adapted(model, {"name": "full"})
    batch = _padded(pad)
    before = _values(model, engine, batch)
    _train(model, engine, method, batch)
    values_BTC = _values(model, engine, batch)
    assert not torch.allclose(before, values_BTC)
    method.save(tmp_path)

    auto = {
        "sequence": transformers.AutoModelForSequenceClassification,
        "token": transformers.AutoModelForTokenClassification,
    }
    saved = auto[kind].from_pretrained(tmp_path).eval()
    _compare(saved, batch, values_BTC)
    load_tokenizer(ModelConfig(path=str(model_folder(family)))).save_pretrained(tmp_path)
    again = _load(tmp_path, kind, 2, seed=1)  # a checkpoint that has a head keeps it
    torch.testing.assert_close(_values(again, engine, batch), values_BTC, rtol=0, atol=0)


def _compare(theirs: Any, batch: Batch, values_BTC: Tensor) -> None:
    """transformers' own forward on the padded batch and on single rows."""
    with torch.no_grad():
        padded = theirs(input_ids=batch.tokens_BT, attention_mask=(batch.sequence_BT >= 0).long()).logits
        per_token = padded.ndim == 3
        for row, tokens in enumerate(_sequences()):
            ours = values_BTC[row, : len(tokens)] if per_token else values_BTC[row, len(tokens) - 1]
            alone = theirs(input_ids=tokens[None]).logits[0]
            torch.testing.assert_close(alone, ours, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                padded[row, : len(tokens)] if per_token else padded[row], ours, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("kind", "family"), [(k, f) for k, f in KINDS if f in ("llama", "qwen3", "gpt2", "gemma3_text")]
)
def test_an_adapter_is_saved_with_its_head(
    kind: HeadKind, family: str, dora: bool, model_folder: Folder, tmp_path: Path
) -> None:
    import peft
    import transformers

    folder = model_folder(family)
    model = _load(folder, kind, 2)
    batch = _padded(model.config.pad_token_id)
    model, engine, method = _adapted(model, {"name": "lora", "rank": 4, "dora": dora})
    _train(model, engine, method, batch)
    values_BTC = _values(model, engine, batch)
    method.save(tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert facts["task_type"] == {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}[kind]

    auto, auto_peft = {
        "sequence": (transformers.AutoModelForSequenceClassification, peft.AutoPeftModelForSequenceClassification),
        "token": (transformers.AutoModelForTokenClassification, peft.AutoPeftModelForTokenClassification),
    }[kind]
    torch.manual_seed(7)  # their base starts with another head
    base = auto.from_pretrained(folder, num_labels=2)
    _compare(peft.PeftModel.from_pretrained(base, tmp_path).eval(), batch, values_BTC)
    _compare(auto_peft.from_pretrained(tmp_path, num_labels=2).eval(), batch, values_BTC)
    merged = peft.PeftModel.from_pretrained(auto.from_pretrained(folder, num_labels=2), tmp_path).merge_and_unload()
    _compare(merged.eval(), batch, values_BTC)


def test_the_head_starts_from_the_seed(model_folder: Folder) -> None:
    one, same, other = (_load(model_folder("qwen3"), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    language = make_model("qwen3").model.state_dict()
    assert all(torch.equal(p, language[name]) for name, p in one.model.state_dict().items())


@pytest.mark.parametrize(("kind", "family"), KINDS)
def test_the_parts_are_found(kind: HeadKind, family: str, model_folder: Folder) -> None:
    model = _load(model_folder(family), kind, 3)
    head = value_head(model)
    assert isinstance(head, nn.Linear)
    assert head.out_features == 3
    assert head_kind(model) == kind
    assert find_head(model).linear is None
    assert len(blocks(model)) == 2
    assert isolates_sequences(model) == (family != "opt")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_trains(family: str, model_folder: Folder) -> None:
    def trained(method: dict[str, Any]) -> tuple[set[str], str, Any]:
        model, _, bound = _adapted(_load(model_folder(family), "token", 2), method)
        return set(bound.params), value_head_name(model), model

    names, head, model = trained({"name": "full"})
    assert names == {name for name, _ in model.named_parameters()}

    names, head, model = trained({"name": "freeze", "last_blocks": 1})
    last = blocks(model)[-1][0]
    assert all(name.startswith((f"{last}.", f"{head}.")) for name in names)
    assert {f"{head}.{part}" for part, _ in value_head(model).named_parameters()} <= names

    names, head, model = trained({"name": "freeze", "patterns": ["*norm*" if family == "llama" else "*ln_f*"]})
    assert f"{head}.weight" in names

    names, head, model = trained({"name": "lora", "rank": 2})
    rest = {name for name in names if "lora_" not in name}
    assert rest == {f"{head}.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert all(name.startswith(decoder_name(model)) for name in names - rest)
    assert len(names - rest) == 2 * sum(
        type(module).__name__ in ("Linear", "Conv1D") and "lora_" not in name and "modules_to_save" not in name
        for name, module in make_model(family).named_modules()
        if name.startswith(decoder_name(make_model(family)))
    )


def test_under_bf16_weights_the_trained_head_is_fp32(model_folder: Folder) -> None:
    model = load_model(ModelConfig(path=str(model_folder("llama"))), torch.bfloat16, "sequence", 1)
    original = value_head(model).weight
    model, engine, method = _adapted(model, {"name": "lora", "rank": 2}, "bf16")
    assert original.dtype == torch.bfloat16
    trained = method.params["score.modules_to_save.default.weight"]
    assert trained.dtype == torch.float32
    assert value_head(model).weight is trained
    method.keep_start()
    with method.at_start():
        assert value_head(model).weight is original
    batch = _padded(0)
    _train(model, engine, method, batch)
    assert _values(model, engine, batch).dtype == torch.float32


@pytest.mark.parametrize("name", ["<|im_end|>", None])
def test_texts_may_end_with_the_end_token(
    name: str | None,
    make_config: Callable[..., RunConfig],
    data_of_form: Callable[[str], dict[str, Any]],
    model_folder: Folder,
    tmp_path: Path,
) -> None:
    """Where the tokenizer pads with its end token, or not at all, what is saved pads with another special token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    shutil.copytree(model_folder("llama"), tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": name}))
    sections = {"objective": "reward", "data": data_of_form("pairs"), "method": "full", "train": {"steps": 1}}
    folder = train(make_config(model={"path": str(tmp_path / "model")}, **sections)).folder / "model"

    saved, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    assert tokenizer.pad_token_id == saved.config.pad_token_id != tokenizer.eos_token_id
    texts = [text + tokenizer.eos_token for text in ("What follows 3?", "No.", "After 3 comes 4. And so on.")]
    ours = _load(folder)
    with torch.no_grad():
        padded = saved.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        for row, text in enumerate(texts):
            tokens = torch.tensor([tokenizer(text)["input_ids"]])
            assert tokens[0, -1] == tokenizer.eos_token_id
            values_BTC = value_head(ours)(decoder_of(ours)(input_ids=tokens)[0])
            torch.testing.assert_close(padded[row], values_BTC[0, -1], rtol=1e-4, atol=1e-5)


def test_padding_is_the_tokenizer_s_unless_texts_end_with_it(tokenizer: Any) -> None:
    def chosen(**named: str | None) -> str:
        ours = copy.deepcopy(tokenizer)
        for kind, token in named.items():
            setattr(ours, kind, token)
        return ours.convert_ids_to_tokens(padding_token(ours))

    start, end = "<|im_start|>", "<|im_end|>"
    assert chosen() == "<pad>"
    assert chosen(pad_token=start) == start
    assert chosen(pad_token=end, unk_token=start) == start
    assert chosen(pad_token=end, bos_token=start) == start
    assert chosen(pad_token=end, unk_token=end, bos_token=start) == start
    assert chosen(pad_token=end) == chosen(pad_token=None) == "<pad>"


def test_the_padding_token_still_learns(model_folder: Folder) -> None:
    """Where texts end with the token that pads, its embedding is one like any other."""
    assert _load(model_folder("llama")).get_input_embeddings().padding_idx == make_model("llama").model.padding_idx


def test_models_that_see_are_refused(tmp_path: Path) -> None:
    from tests.multimodal import save_model

    with pytest.raises(UserError, match="scores can be learnt by models of text alone"):
        _load(save_model("qwen2_vl", tmp_path))


def test_refusals(model_folder: Folder, tmp_path: Path) -> None:
    for family, kind, name in (
        ("granite", "sequence", "SequenceClassification"),
        ("olmo2", "token", "TokenClassification"),
    ):
        with pytest.raises(UserError, match=f"transformers has no {name} model of the architecture {family}"):
            _load(model_folder(family), kind)
    _load(model_folder("llama"), "sequence", 1).save_pretrained(tmp_path)
    for file in model_folder("llama").glob("token*"):
        shutil.copy(file, tmp_path)
    for kind in ("sequence", "token"):
        with pytest.raises(UserError, match="LlamaForSequenceClassification has 1 outputs, but the objective needs 2"):
            _load(tmp_path, kind, 2)
    with pytest.raises(UserError, match="this model gives scores, not text"):
        load_generator(str(tmp_path))
    with pytest.raises(UserError, match="init: pissa is saved as a difference of A and B alone"):
        _adapted(_load(tmp_path), {"name": "lora", "init": "pissa"})


def test_a_head_that_is_not_over_the_last_token_is_refused(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForSequenceClassification

    forward = LlamaForSequenceClassification.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 2 * output.logits + 1
        return output

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", doubled)
    with pytest.raises(UserError, match="makes its scores by a rule of its own"):
        _load(model_folder("llama"))


def test_an_adapter_with_a_head_does_not_chat(model_folder: Folder, tmp_path: Path) -> None:
    _, _, method = _adapted(_load(model_folder("llama")), {"name": "lora", "rank": 2})
    method.save(tmp_path)
    with pytest.raises(UserError, match="this model gives scores, not text"):
        load_generator(str(tmp_path))
