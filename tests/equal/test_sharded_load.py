"""A model that no process holds whole: what is loaded, and what is saved, has the bits of the ordinary way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import multimodal
from tests.equal.test_zeroth_ranks import end, start
from tests.families import FAMILIES, make_model, train_tokenizer
from tunesmith.config import LoraConfig, ModelConfig
from tunesmith.errors import UserError
from tunesmith.methods.lora import Lora
from tunesmith.models.load import blocks, load_model, value_head
from tunesmith.models.probe import find_head, isolates_sequences, shares_prefixes
from tunesmith.models.save import save_adapter, save_sharded
from tunesmith.models.sharded import empty_model, why_whole
from tunesmith.models.sibling import sibling
from tunesmith.models.tensor_files import TensorReader

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
PLAIN = ("llama", "qwen3", "mixtral", "qwen3_moe", "gpt2", "gpt_neox", "phi3", "falcon_h1")
"""Families whose ranks are tried: tied and not, experts that are converted, renamed weights, weights of odd shapes."""
ADAPTED: dict[str, dict[str, Any]] = {
    "plain": {}, "orthogonal": {"init": "orthogonal"}, "whole modules": {"modules_to_save": ("lm_head", "embed_tokens")},
    "embeddings": {"targets": ("q_proj", "embed_tokens")},
}  # fmt: skip


def folder_of(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    folder = path / family
    if not folder.exists():
        make_model(family, dtype).save_pretrained(folder)
        train_tokenizer().save_pretrained(folder)
    return folder


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder))


def load_both(folder: Path, dtype: torch.dtype, *head: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(3)
    expected = load_model(config_of(folder), dtype, *head)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    model, checkpoint = empty_model(config_of(folder), dtype, *head)
    assert torch.equal(torch.get_rng_state(), after)
    return expected, model, checkpoint


def adapt(model: Any, settings: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    lora = Lora(LoraConfig(rank=2, alpha=4, **settings), None, None)
    lora.adapt(model)
    return lora.peft_model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def check_same(model: nn.Module, expected: nn.Module) -> None:
    """Names, ties, types and bits of all parameters and buffers."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (model, expected))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            full = whole(ours[name])
            assert full.dtype == tensor.dtype, name
            assert ours[name].requires_grad == tensor.requires_grad, name
            assert torch.equal(full, tensor), name
    assert len(list(model.parameters())) == len(list(expected.parameters()))


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_saved(folder: Path, expected: Any, reference: Path) -> None:
    """The same tensors and settings as `save_pretrained` writes, which transformers reads back."""
    if not reference.exists():
        expected.save_pretrained(reference)
    ours, theirs = files_of(folder), files_of(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    for file in reference.glob("*.json"):
        if not file.name.endswith(".index.json"):
            assert (folder / file.name).read_text() == file.read_text(), file
    again = type(expected).from_pretrained(folder, dtype=expected.dtype)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), expected.parameters(), strict=True))


# --- one process


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_model_fills_up_to_the_same_bits(family: str, tmp_path: Path) -> None:
    for dtype in DTYPES:
        expected, model, checkpoint = load_both(folder_of(family, tmp_path), dtype)
        assert all(p.is_meta for p in model.parameters())
        checkpoint.fill(model, CPU)
        check_same(model, expected)
        assert model.config.to_dict() == expected.config.to_dict()
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    save_sharded(model, tmp_path / "saved", 0, 1, file_bytes=20_000)
    check_saved(tmp_path / "saved", expected, tmp_path / "reference")
    assert len(list((tmp_path / "saved").glob("model-*-of-*.safetensors"))) > 1


@pytest.mark.parametrize("family", multimodal.FAMILIES)
def test_a_model_with_towers_too(family: str, tmp_path: Path) -> None:
    expected, model, checkpoint = load_both(multimodal.save_model(family, tmp_path / "model"), torch.float32)
    checkpoint.fill(model, CPU)
    check_same(model, expected)
    save_sharded(model, tmp_path / "saved", 0, 1)
    check_saved(tmp_path / "saved", expected, tmp_path / "reference")
    check_sibling(sibling(model), expected)


@pytest.mark.parametrize("adapted", ADAPTED)
def test_adapters_start_with_the_bits_they_have_beside_weights(adapted: str, tmp_path: Path) -> None:
    expected, model, checkpoint = load_both(folder_of("qwen3", tmp_path), torch.bfloat16)
    reference = adapt(expected, ADAPTED[adapted])
    with checkpoint.standing_in(model):
        peft_model = adapt(model, ADAPTED[adapted])
    assert all(p.is_meta != ("lora_" in name) for name, p in model.named_parameters())
    checkpoint.fill(model, CPU)
    check_same(model, expected)
    save_adapter(peft_model, tmp_path / "ours", 0)
    reference.save_pretrained(tmp_path / "theirs")
    for name, tensor in files_of(tmp_path / "theirs").items():
        assert torch.equal(files_of(tmp_path / "ours")[name], tensor)
    assert files_of(tmp_path / "ours").keys() == files_of(tmp_path / "theirs").keys()


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_a_value_head_starts_with_the_same_draw_and_is_read_again(kind: str, tmp_path: Path) -> None:
    expected, model, checkpoint = load_both(folder_of("llama", tmp_path), torch.float32, kind, 2)
    assert not value_head(model).weight.is_meta
    checkpoint.fill(model, CPU)
    check_same(model, expected)
    assert model.config.pad_token_id == expected.config.pad_token_id
    save_sharded(model, tmp_path / "saved", 0, 1)
    train_tokenizer().save_pretrained(tmp_path / "saved")
    expected, model, checkpoint = load_both(tmp_path / "saved", torch.bfloat16, kind, 2)
    assert value_head(model).weight.is_meta
    checkpoint.fill(model, CPU)
    check_same(model, expected)


def test_tied_weights_that_a_checkpoint_has_twice(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = folder_of("qwen3", tmp_path)
    tensors = files_of(folder)
    for other in (tensors["model.embed_tokens.weight"].clone(), torch.randn(384, 32)):
        save_file({**tensors, "lm_head.weight": other}, folder / "model.safetensors", {"format": "pt"})
        expected, model, checkpoint = load_both(folder, torch.float32)
        checkpoint.fill(model, CPU)
        check_same(model, expected)
    del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": other}, folder / "model.safetensors", {"format": "pt"})
    # not `load_both`: transformers draws a start for the first of the names here, and throws it away
    expected = load_model(config_of(folder), torch.float32)
    model, checkpoint = empty_model(config_of(folder), torch.float32)
    checkpoint.fill(model, CPU)
    check_same(model, expected)
    assert torch.equal(model.get_input_embeddings().weight, other)


def test_adapters_that_are_made_of_weights_say_so() -> None:
    found = {name: Lora.starts_from_weights(LoraConfig(**settings)) for name, settings in STARTS.items()}
    assert found == {"default": False, "dora": True, "pissa": True}


STARTS: dict[str, dict[str, Any]] = {"default": {}, "dora": {"dora": True}, "pissa": {"init": "pissa"}}


def test_what_has_to_be_loaded_whole_says_why(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    assert why_whole(config_of(folder)) == ""
    settings = json.loads((folder / "config.json").read_text())
    quantized = tmp_path / "quantized"
    shutil.copytree(folder, quantized)
    (quantized / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "fp8"}}))
    assert why_whole(config_of(quantized)) == "its weights are unpacked on loading"
    torch.save(files_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in why_whole(config_of(folder))


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = folder_of("llama", tmp_path)
    tensors = files_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of LlamaForCausalLM, such as model.layers.1.mlp.up_proj"):
        empty_model(config_of(folder), torch.float32)


def test_parts_of_a_file_are_read_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr("tunesmith.models.tensor_files.PIECE_BYTES", 100)
    monkeypatch.setattr("tunesmith.models.tensor_files.WINDOW_BYTES", 250)
    tensors = {"a": torch.randn(17, 5, 3), "b": torch.tensor(2.0), "c": torch.randn(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    reader = TensorReader([tmp_path / "x.safetensors"])
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name, torch.float32), tensor)
    part = torch.empty(6, 5, 2)
    reader.read("a", [[(1, 3), (10, 14)], [(0, 5)], [(0, 1), (2, 3)]], part, torch.float32)
    assert torch.equal(part, tensors["a"][[1, 2, 10, 11, 12, 13]][:, :, [0, 2]])


# --- what a small model of the same build says


def answers(model: Any) -> tuple[Any, ...]:
    head = find_head(model)
    return isolates_sequences(model), shares_prefixes(model), head.linear is None, head.scale, head.cap


def check_sibling(small: Any, model: Any) -> None:
    assert type(small) is type(model)
    assert answers(small) == answers(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sibling_gives_the_models_answers(family: str) -> None:
    model = make_model(family)
    before = torch.get_rng_state()
    check_sibling(sibling(model), model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sibling_keeps_every_kind_of_block_and_is_narrow() -> None:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        num_hidden_layers=26, sliding_window=8, final_logit_softcapping=5.0, vocab_size=4000, hidden_size=512
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    small = sibling(model)
    kinds = [block.self_attn.is_sliding for _, block in blocks(small)]
    assert kinds == [True] * 5 + [False]
    assert sum(p.numel() for p in small.parameters()) < 4e6
    assert answers(small) == (True, True, False, 1.0, 5.0)


# --- two ranks


def on_rank(environment: dict[str, str], path: str) -> None:
    import os

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    cases: dict[str, Callable[[Path, Any, int], None]] = {
        **{f"fsdp {name}": lambda p, m, r, n=name: fsdp_case(p, m, r, n) for name in PLAIN},
        **{f"lora {name}": lambda p, m, r, n=name: lora_case(p, m, r, n) for name in ADAPTED},
        "head": head_case, "tensor parallel": tensor_case, "full disk": full_disk_case,
    }  # fmt: skip
    for name, case in cases.items():
        print(name, flush=True)
        case(Path(path), mesh, dist.get_rank())
        dist.barrier()
    dist.destroy_process_group()


def shard(model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for _, block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def fsdp_case(path: Path, mesh: Any, rank: int, family: str) -> None:
    expected, model, checkpoint = load_both(path / family, torch.bfloat16)
    shard(model, mesh)
    checkpoint.fill(model, CPU)
    check_same(model, expected)
    held = sum(p.to_local().numel() for p in model.parameters())
    assert held < 0.6 * sum(p.numel() for p in expected.parameters())
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)
    save_sharded(model, path / f"saved-{family}", rank, 2, file_bytes=20_000)
    if rank == 0:
        check_saved(path / f"saved-{family}", expected, path / f"reference-{family}")


def lora_case(path: Path, mesh: Any, rank: int, adapted: str) -> None:
    expected, model, checkpoint = load_both(path / "qwen3", torch.float32)
    reference = adapt(expected, ADAPTED[adapted])
    with checkpoint.standing_in(model):
        peft_model = adapt(model, ADAPTED[adapted])
    shard(model, mesh)
    checkpoint.fill(model, CPU)
    check_same(model, expected)
    save_adapter(peft_model, path / f"adapter {adapted}", rank)
    if rank == 0:
        reference.save_pretrained(path / f"expected {adapted}")
        ours, theirs = (files_of(path / f"{name} {adapted}") for name in ("adapter", "expected"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def head_case(path: Path, mesh: Any, rank: int) -> None:
    expected, model, checkpoint = load_both(path / "llama", torch.float32, "sequence", 1)
    adapt(expected, {})
    with checkpoint.standing_in(model):
        adapt(model, {})
    shard(model, mesh)
    checkpoint.fill(model, CPU)
    check_same(model, expected)


def tensor_case(path: Path, mesh: Any, rank: int) -> None:
    """Rows, columns, and both: tensor parallel inside FSDP on a mesh of one by two and of two by one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for sizes in ((1, 2), (2, 1)):
        both = init_device_mesh("cpu", sizes, mesh_dim_names=("shard", "tensor"))
        expected, model, checkpoint = load_both(path / "llama", torch.bfloat16)
        plan = {
            "self_attn.q_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        for _, block in blocks(model):
            parallelize_module(block, both["tensor"], plan)
        shard(model, both["shard"])
        checkpoint.fill(model, CPU)
        check_same(model, expected)
        save_sharded(model, path / f"saved-tensor-{sizes[0]}", rank, 2)
        if rank == 0:
            check_saved(path / f"saved-tensor-{sizes[0]}", expected, path / "reference-llama")


def full_disk_case(path: Path, mesh: Any, rank: int) -> None:
    from tunesmith.models import save

    class Full(save.TensorWriter):
        def write(self, name: str, tensor: torch.Tensor) -> None:
            raise OSError(28, "No space left on device")

    _, model, checkpoint = load_both(path / "llama", torch.bfloat16)
    shard(model, mesh)
    checkpoint.fill(model, CPU)
    if rank == 1:
        save.TensorWriter = Full  # type: ignore[misc]
    with pytest.raises(UserError, match="cannot be saved: rank 1: No space left on device; free some space"):
        save_sharded(model, path / "saved-nowhere", rank, 2, file_bytes=20_000)


def test_two_ranks_load_their_parts_and_save_the_whole(tmp_path: Path) -> None:
    for family in {*PLAIN, "qwen3", "llama"}:
        folder_of(family, tmp_path)
    assert end(
        start(2, on_rank, lambda _: (str(tmp_path),)),
    ) == [0, 0]
