"""Models of true size of which there is a configuration and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.families import train_tokenizer

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000,
    },
    "llama-1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64,
    },
    "llama-8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama-70b": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def write_model(folder: Path, name: str) -> Path:
    """The folder of a model of this shape: its configuration and a tokenizer."""
    made = folder / name
    if not made.exists():
        train_tokenizer().save_pretrained(made)
        (made / "config.json").write_text(json.dumps(SHAPES[name]))
    return made


def write_text(folder: Path, tokens: int, form: str = "text") -> Path:
    """Records of which each has more tokens than these."""
    file = folder / f"{form}-{tokens}.jsonl"
    words = "Afterwards 3 comes 4 and so on. " * (tokens // 6)
    record: dict[str, Any] = {"text": words}
    if form == "pairs":
        record = {"prompt": "Go on.", "chosen": words, "rejected": f"No. {words}"}
    file.write_text((json.dumps(record) + "\n") * 8)
    return file
