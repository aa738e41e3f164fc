"""Tiny random models that read images or sound, each with a processor, and small pictures to show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.families import train_tokenizer

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}IMAGE"
    "{% elif part.type == 'video' %}VIDEO{% elif part.type == 'audio' %}AUDIO{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML whose placeholders are to be filled in."""
PARTS_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% elif part.type == 'video' %}<video>{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The same for content in parts alone, as Idefics' and SmolVLM's."""


def template(**placeholders: str) -> str:
    text = TURNS
    for kind in ("image", "video", "audio"):
        text = text.replace(kind.upper(), placeholders.get(kind, ""))
    return text


def _tokenizer(tokens: list[str], **named: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    more = {f"token_{n}": token for n, token in enumerate(["<|im_start|>", *tokens])}
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer().backend_tokenizer, pad_token="<pad>", eos_token="<|im_end|>",
        extra_special_tokens=more | named,
    )  # fmt: skip


def _qwen2_vl(kind: str) -> tuple[Any, Any, Any, str]:
    from transformers import CONFIG_MAPPING
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(names)
    start, end, image, video = tokenizer.convert_tokens_to_ids(names)
    grid = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tower = {**grid, "depth": 2, "num_heads": 2, "in_channels": 3}
    if kind == "qwen2_vl":
        tower |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16}
        tower |= {"fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = CONFIG_MAPPING[kind](
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=tower, image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 1024}
    )
    boxed = {n: f"<|vision_start|><|{n}_pad|><|vision_end|>" for n in ("image", "video")}
    videos = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    videos |= {"size": {"shortest_edge": 256, "longest_edge": 1024}, "cap_pixels_per_frame": False}
    parts = {"image_processor": images, "video_processor": videos, "class": "Qwen2VLProcessor"}
    return config, tokenizer, parts, template(**boxed)


def _llava() -> tuple[Any, Any, Any, str]:
    from transformers import LlavaConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer(["<image>"])
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **TOWER, "image_size": 28, "patch_size": 7, "projection_dim": 16},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    settings = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return (
        config,
        tokenizer,
        {"image_processor": images, "class": "LlavaProcessor", **settings},
        template(image="<image>"),
    )


def _gemma3() -> tuple[Any, Any, Any, str]:
    from transformers import Gemma3Config
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer([], **named)
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer), "sliding_window": 16, "query_pre_attn_scalar": 8},
        vision_config={**TOWER, "image_size": 28, "patch_size": 7}, mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids(named["boi_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(named["eoi_token"]),
        image_token_index=tokenizer.convert_tokens_to_ids(named["image_token"]),
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    kind = {"image_processor": images, "class": "Gemma3Processor", "image_seq_length": 4}
    return config, tokenizer, kind, template(image="<start_of_image>")


def _idefics3() -> tuple[Any, Any, Any, str]:
    from transformers import Idefics3Config
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    named = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    named += [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    tokenizer = _tokenizer(named)
    config = Idefics3Config(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={**TOWER, "image_size": 28, "patch_size": 7}, scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return config, tokenizer, {"image_processor": images, "class": "Idefics3Processor", "image_seq_len": 4}, PARTS_ALONE


def _qwen2_audio() -> tuple[Any, Any, Any, str]:
    from transformers import Qwen2AudioConfig, WhisperFeatureExtractor

    tokenizer = _tokenizer(["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        audio_config={
            "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
            "d_model": 16, "max_source_positions": 50,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    listener = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    kind = {"feature_extractor": listener, "class": "Qwen2AudioProcessor"}
    return config, tokenizer, kind, template(audio="<|audio_bos|><|AUDIO|><|audio_eos|>")


FAMILIES: dict[str, Any] = {
    "qwen2_vl": lambda: _qwen2_vl("qwen2_vl"),
    "qwen2_5_vl": lambda: _qwen2_vl("qwen2_5_vl"),
    "llava": _llava,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "qwen2_audio": _qwen2_audio,
}
SEEING = [name for name in FAMILIES if name != "qwen2_audio"]


def save_model(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A tiny random model and all that a checkpoint has beside it."""
    import json

    from transformers import AutoModelForMultimodalLM

    torch.manual_seed(seed)
    config, tokenizer, processor, chat_template = FAMILIES[family]()
    model = AutoModelForMultimodalLM.from_config(config, dtype=dtype)
    for p in model.parameters():
        if p.ndim > 1 and not p.any():  # Gemma 3's projection of what it sees starts at 0
            torch.nn.init.normal_(p, std=0.1)
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        head.data *= 8  # or no frozen head could be sure of anything
    model.save_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    parts = [name for name in ("image_processor", "video_processor", "feature_extractor") if name in processor]
    if len(parts) == 1:  # as most older checkpoints have it
        processor.pop(parts[0]).save_pretrained(folder)
    settings = {n: part if isinstance(part, (dict, int, str)) else part.to_dict() for n, part in processor.items()}
    settings["processor_class"] = settings.pop("class")
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder
