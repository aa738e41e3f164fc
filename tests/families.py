"""Tiny random models of different build, and a tokenizer trained on the spot."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 384

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, **MOE},
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 5.0, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {"num_key_value_heads": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "lm_head_multiplier": 0.5,
    },
    "mamba": {"state_size": 8},
}  # fmt: skip
"""Settings over SMALL, by transformers' model_type."""

ISOLATING = {name for name in FAMILIES if name not in ("opt", "falcon_h1", "mamba")}
"""Those that keep packed sequences apart by their positions. OPT counts positions itself; the others are state-space."""


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny random causal language model without dropout, in evaluation mode."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**SMALL, **FAMILIES[family]})
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # torch has no grouped product in fp64
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer() -> Any:
    """Byte-level BPE on a few sentences, with ChatML's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What follows 3? After 3 comes 4. And so on. user assistant system"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML,
    )  # fmt: skip


def teach(model: Any, tokenizer: Any, chats: list[tuple[str, str]], steps: int = 80) -> None:
    """Train the model on all answers at once."""
    rows = []
    for question, answer in chats:
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        rows.append(
            [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer + tokenizer.eos_token)]
        )
    tokens = torch.zeros(len(rows), max(len(prompt + answer) for prompt, answer in rows), dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for row, (prompt, answer) in enumerate(rows):
        tokens[row, : len(prompt + answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt + answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
