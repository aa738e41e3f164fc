"""What the check knows of each template: its family's tokenizer, its end-of-turn tokens, the variables it cannot do without.

Ends are written down here from each template's source, so that the check does not take the tool's own word for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Known:
    """Facts about one template."""

    tokenizer: str
    """Folder of the family's tokenizer."""
    ends: tuple[str, ...] = ()
    """What ends an answer; empty: nothing does."""
    more_special: tuple[str, ...] = ()
    """Control tokens that the pattern below does not find in the source."""
    variables: dict[str, Any] = field(default_factory=dict)


CONTROL_TOKENS = r"<\|[^|<>\s'\"{}+~]{1,40}\|>|<｜[^｜<>\s'\"{}]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|</?s>"
"""Found in a template's source, these become special tokens where its family's tokenizer does not have them."""

S, IM, EOT = ("</s>",), ("<|im_end|>",), ("<|eot_id|>",)
EOS = ("<｜end▁of▁sentence｜>",)

TEMPLATES: dict[str, Known] = {
    "alpaca": Known("llama2", S),
    "amberchat": Known("llama2"),
    "chatml": Known("qwen3", IM),
    "chatqa": Known("llama3"),
    "falcon-instruct": Known("qwen3"),
    "gemma-it": Known("gemma", ("<end_of_turn>",), ("<start_of_turn>", "<end_of_turn>")),
    "granite-3.0-instruct": Known("qwen3", ("<|end_of_text|>",)),
    "llama-2-chat": Known("llama2", S),
    "llama-3-instruct": Known("llama3", EOT),
    "mistral-instruct": Known("llama2", S),
    "openchat-3.5": Known("llama2", ("<|end_of_turn|>",)),
    "phi-3-small": Known("gpt35turbo", ("<|end|>",), ("<|user|>", "<|assistant|>", "<|system|>")),
    "phi-3": Known("llama2", ("<|end|>",), ("<|user|>", "<|assistant|>", "<|system|>")),
    "qwen2.5-instruct": Known("qwen3", IM),
    "saiga": Known("llama2", S),
    "solar-instruct": Known("llama2"),
    "vicuna": Known("llama2", S),
    "zephyr": Known("llama2", S),
    "Apriel-1.6-15b-Thinker-fixed": Known("mistral_nemo", ("<|end|>",), variables={"training_prompt": True}),
    "ByteDance-Seed-OSS": Known("qwen3", ("<seed:eos>",), ("<seed:bos>", "<seed:eos>", "<seed:pad>")),
    "CohereForAI-c4ai-command-r-plus-tool_use": Known("qwen3", ("<|END_OF_TURN_TOKEN|>",)),
    "GLM-4.6": Known("qwen3", (), ("[gMASK]", "<sop>")),
    "GigaChat3-10B-A1.8B": Known("qwen3", ("<|message_sep|>",)),
    "HuggingFaceTB-SmolLM3-3B": Known("llama3_1", IM),
    "Kimi-K2-Thinking": Known("qwen3", IM),
    "LFM2-8B-A1B": Known("qwen3", IM),
    "LFM2.5-Instruct": Known("qwen3", IM),
    "MiniMax-M1": Known(
        "qwen3", ("<end_of_sentence>",), ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")
    ),
    "MiniMax-M3": Known("qwen3", ("[e~[",), ("]~!b[", "]~b]", "[e~[")),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Known("mistral_nemo", IM),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": Known("llama3", IM),
    "Qwen-QwQ-32B": Known("qwen3", IM),
    "Qwen-Qwen3-0.6B": Known("qwen3", IM),
    "Qwen3.5-4B": Known("qwen3", IM),
    "Spark2.5": Known("qwen3", EOS),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": Known("llama3_1", EOS),
    "deepseek-ai-DeepSeek-V3.1": Known("deepseek_v3", EOS),
    "deepseek-ai-DeepSeek-V4-Flash-0731": Known("deepseek_v3", EOS),
    "fireworks-ai-llama-3-firefunction-v2": Known("llama3", EOT, variables={"functions": "[]", "datetime": "now"}),
    "google-gemma-4-31B-it-interleaved": Known("gemma3", ("<turn|>",), ('<|"|>',)),
    "ibm-granite-granite-3.3-2B-Instruct": Known("qwen3", ("<|end_of_text|>",)),
    "ibm-granite-granite-4.1": Known("qwen3", ("<|end_of_text|>",)),
    "llama-cpp-deepseek-r1": Known("deepseek_v3", EOS),
    "meetkai-functionary-medium-v3.1": Known("llama3_1", ("<|eot_id|>", "<|eom_id|>")),
    "meta-llama-Llama-3.1-8B-Instruct": Known("llama3_1", EOT),
    "meta-llama-Llama-3.3-70B-Instruct": Known("llama3_1", EOT),
    "mistralai-Ministral-3-14B-Reasoning-2512": Known(
        "mistral_nemo", S, ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]", "[ARGS]")
    ),
    "moonshotai-Kimi-K2": Known("qwen3", IM),
    "openai-gpt-oss-120b": Known("gptoss", ("<|return|>", "<|call|>")),
    "poolside-Laguna-S-2.1": Known("qwen3", ("</assistant>",), ("〈|EOS|〉",)),
    "poolside-Laguna-XS.2": Known("qwen3", ("</assistant>",), ("〈|EOS|〉",)),
    "unsloth-Apriel-1.5": Known("mistral_nemo", S),
    "upstage-Solar-Open-100B": Known("qwen3", ("<|end|>", "<|calls|>")),
}
"""By file name. Of a family without a tokenizer, Qwen3's stands in, with the template's control tokens added."""

LOADED_WITHOUT_LAYOUT = set(list(TEMPLATES)[:18])
"""chujiezheng/chat_templates are meant to be loaded without line ends and indentation."""
