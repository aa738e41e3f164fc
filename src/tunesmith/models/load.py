"""Tokenizer and weights from a local folder, the hub, or the demo model. Errors name the folder and what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import ModelConfig
from tunesmith.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """ChatML for a base model: turns end with <|im_end|> where that is a token, else with the tokenizer's end of text."""
    known = "<|im_end|>" in tokenizer.get_vocab() or tokenizer.eos_token is None
    return CHATML if known else CHATML.replace("<|im_end|>", "{{ eos_token }}")


def model_source(config: ModelConfig) -> str:
    """The folder or hub id behind `model.path`, checked as far as can be without loading weights."""
    if config.path == "demo":
        from tunesmith.models.demo import demo_model_folder

        return str(demo_model_folder())
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{config.path}: no model: it holds no config.json; give the folder that save_pretrained wrote"
            )
        if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
            raise UserError(
                f"{config.path}: no weights: it holds no *.safetensors; download or copy the checkpoint again"
            )
        return str(folder.resolve())  # an adapter remembers its base by this path
    looks_like_hub_id = config.path.count("/") <= 1 and not config.path.startswith((".", "/", "~"))
    if folder.exists() or not looks_like_hub_id:
        raise UserError(f"{config.path}: no such model folder (now in {Path.cwd()}); check model.path")
    return config.path


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `model.chat_template` in place of its own if given."""
    from transformers import AutoTokenizer

    own = (Path(config.path) / "tokenizer_config.json").is_file()  # beside an adapter there is no model
    source = config.path if own else model_source(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_loading_failed("tokenizer", config, error)) from error
    if config.chat_template == "chatml":
        tokenizer.chat_template = CHATML
    elif config.chat_template:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise UserError(
                f"model.chat_template: {config.chat_template}: {reason}; give a Jinja file, or chatml"
            ) from error
    return tokenizer


def load_config(config: ModelConfig) -> PreTrainedConfig:
    """The architecture's own settings."""
    from transformers import AutoConfig

    source = model_source(config)
    try:
        return AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the hub and each architecture raise types of their own
        raise UserError(_loading_failed("model", config, error)) from error


def is_multimodal(architecture: PreTrainedConfig) -> bool:
    """Whether the model reads images, audio or video beside text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    return type(architecture) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def load_model(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The language model, with its vision and audio towers if it has any, its weights in `dtype`, on the CPU, to evaluate."""
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    source = model_source(config)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    architecture = load_config(config)
    kind = AutoModelForMultimodalLM if is_multimodal(architecture) else AutoModelForCausalLM
    try:
        model, info = kind.from_pretrained(
            source, config=architecture, dtype=dtype, output_loading_info=True, **attention, **options
        )
    except Exception as error:  # safetensors, transformers and the hub each raise types of their own
        raise UserError(_loading_failed("model", config, error)) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{config.path}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; "
            "they would start at random: it is incomplete, or of another architecture"
        )
    if type(model).forward is nn.Module.forward:  # Qwen2.5-Omni's thinker, talker and voice
        raise UserError(
            f"{config.path}: {type(model).__name__} is several models in one, without a forward pass of the whole; save the "
            "one that reads and writes text (the thinker) as a checkpoint of its own"
        )
    if getattr(model, "is_quantized", False):
        raise UserError(f"{config.path}: quantized weights cannot be trained yet; use the unquantized checkpoint")
    return model.eval()


def _loading_failed(what: str, config: ModelConfig, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if Path(config.path).expanduser().is_dir() or config.path == "demo":
        return f"{config.path}: the {what} cannot be loaded: {reason}"
    return f"{config.path}: neither a local folder nor a {what} that the hub gives: {reason}"


def blocks(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """The repeated transformer blocks of the language model (not of a vision or audio tower), by name.

    They are the outermost list of modules that has as many as the config has layers.
    """
    from torch import nn

    count, inside = model.config.get_text_config().num_hidden_layers, decoder_name(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(inside)
    ]
    decoder_lists = [(name, module) for name, module in lists if len(module) == count]
    if not decoder_lists:
        raise UserError(f"{type(model).__name__}: no list of {count} blocks found in the model")
    name, found = min(decoder_lists, key=lambda pair: pair[0].count("."))
    return [(f"{name}.{index}", block) for index, block in enumerate(found)]


def decoder_name(model: PreTrainedModel) -> str:
    """Name of the module that is the language model, with a dot behind it; empty if that is the whole model."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    return f"{name}." if name else ""
