"""Tokenizer and weights from a local folder, the hub, or the demo model. Errors name the folder and what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.config import ModelConfig
from tunesmith.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HeadKind = Literal["language", "sequence", "token"]
"""What a model says about its input: the next token; numbers about a sequence; numbers about each token."""

CLASSES: dict[HeadKind, str] = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
"""How transformers ends the names of its classes with a value head."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """ChatML for a base model: turns end with <|im_end|> where that is a token, else with the tokenizer's end of text."""
    known = "<|im_end|>" in tokenizer.get_vocab() or tokenizer.eos_token is None
    return CHATML if known else CHATML.replace("<|im_end|>", "{{ eos_token }}")


def model_source(config: ModelConfig, has_weights: bool = True) -> str:
    """The folder or hub id behind `model.path`, checked as far as can be without loading weights. has_weights: whether there
    must be any."""
    if config.path == "demo":
        from tunesmith.models.demo import demo_model_folder

        return str(demo_model_folder())
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{config.path}: no model: it holds no config.json; give the folder that save_pretrained wrote"
            )
        if has_weights and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
            raise UserError(
                f"{config.path}: no weights: it holds no *.safetensors; download or copy the checkpoint again"
            )
        return str(folder.resolve())  # an adapter remembers its base by this path
    looks_like_hub_id = config.path.count("/") <= 1 and not config.path.startswith((".", "/", "~"))
    if folder.exists() or not looks_like_hub_id:
        raise UserError(f"{config.path}: no such model folder (now in {Path.cwd()}); check the path")
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

    source = model_source(config, has_weights=False)
    try:
        return AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the hub and each architecture raise types of their own
        raise UserError(_loading_failed("model", config, error)) from error


def is_multimodal(architecture: PreTrainedConfig) -> bool:
    """Whether the model reads images, audio or video beside text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    return type(architecture) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def load_model(
    config: ModelConfig, dtype: torch.dtype, head: HeadKind = "language", num_labels: int = 0
) -> PreTrainedModel:
    """The model with its weights in `dtype`, on the CPU, to evaluate; with its vision and audio towers if it has any.

    head: language, or a value head of `num_labels` outputs. A checkpoint that has such a head keeps it; over a language
    model it starts at random, from torch's seed. Raises UserError.
    """
    model, _ = from_checkpoint(config, dtype, head, num_labels)
    if head != "language":
        check_values(config, model)
        know_padding(config, model)
    return model


def from_checkpoint(
    config: ModelConfig, dtype: torch.dtype, head: HeadKind, num_labels: int, **placement: Any
) -> tuple[PreTrainedModel, set[str]]:
    """As `load_model`, before its value head is looked at: (model, names of a head's weights that the checkpoint lacks).

    placement: transformers' word on where the weights go, `device_map`. Raises UserError.
    """
    from torch import nn

    source = model_source(config)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    architecture = load_config(config)
    kind = _model_class(config, architecture, head)
    if head != "language":
        _set_num_labels(config, architecture, head, num_labels)
    try:
        model, info = kind.from_pretrained(
            source, config=architecture, dtype=dtype, output_loading_info=True, **attention, **options, **placement
        )
    except Exception as error:  # safetensors, transformers and the hub each raise types of their own
        raise UserError(_loading_failed("model", config, error)) from error
    may_be_new = () if head == "language" else tuple(f"{value_head_name(model)}.{part}" for part in ("weight", "bias"))
    if missing := sorted(set(info["missing_keys"]).difference(may_be_new)):
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
    return model.eval(), set(info["missing_keys"])


def shape_of_model(
    config: ModelConfig, dtype: torch.dtype, head: HeadKind = "language", num_labels: int = 0
) -> PreTrainedModel:
    """The model on the meta device, made of its config.json alone. Raises UserError."""
    import torch

    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    architecture = load_config(config)
    kind = _model_class(config, architecture, head)
    if head != "language":
        _set_num_labels(config, architecture, head, num_labels)
    try:
        with torch.device("meta"):
            model = kind.from_config(architecture, dtype=dtype, trust_remote_code=config.trust_remote_code, **attention)
    except Exception as error:  # each architecture raises types of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{config.path}: the model cannot be built of its config.json alone: {reason}") from error
    return model.eval()


def know_padding(config: ModelConfig, model: PreTrainedModel) -> None:
    """Tell a model with a value head which token fills up batches.

    Not before it is loaded: read then, it would tell the embeddings to give that token no gradient.
    """
    model.config.get_text_config().pad_token_id = padding_token(load_tokenizer(config))


def _model_class(config: ModelConfig, architecture: PreTrainedConfig, head: HeadKind) -> Any:
    """transformers' loader for this architecture with this head. Raises UserError where there is none."""
    import transformers
    from transformers.models.auto import modeling_auto

    if head == "language":
        return (
            transformers.AutoModelForMultimodalLM if is_multimodal(architecture) else transformers.AutoModelForCausalLM
        )
    if is_multimodal(architecture):
        raise UserError(
            f"{config.path}: {architecture.model_type} reads images, audio or video; scores can be learnt by models of text "
            "alone: take the language model as a checkpoint of its own"
        )
    tables = {
        "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "token": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    }
    name = f"AutoModel{CLASSES[head]}"
    own_code = getattr(architecture, "auto_map", None) or {}
    if type(architecture) not in tables[head] and not (config.trust_remote_code and name in own_code):
        raise UserError(
            f"{config.path}: transformers has no {CLASSES[head].removeprefix('For')} model of the architecture "
            f"{architecture.model_type}, so it cannot learn to give scores; choose a model of another architecture"
        )
    return getattr(transformers, name)


def _set_num_labels(config: ModelConfig, architecture: PreTrainedConfig, head: HeadKind, num_labels: int) -> None:
    """Raises UserError if the checkpoint has a head with another number of outputs."""
    assert num_labels > 0, "a value head has outputs"
    names = [name for name in architecture.architectures or () if name.endswith(tuple(CLASSES.values()))]
    if names and architecture.num_labels != num_labels:
        raise UserError(
            f"{config.path}: this {names[0]} has {architecture.num_labels} outputs, but the objective needs {num_labels}; "
            "start from the language model that it was made of"
        )
    if architecture.num_labels != num_labels:
        architecture.num_labels = num_labels


def check_values(config: ModelConfig, model: PreTrainedModel) -> None:
    """Raises UserError if the model's own forward does not give its value head's outputs at the last token, or at each."""
    import torch

    pad, rows = model.config.get_text_config().pad_token_id, model.get_input_embeddings().weight.shape[0]
    tokens = torch.tensor([[token for token in range(min(rows, 9)) if token != pad]])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        values = value_head(model)(decoder_of(model)(input_ids=tokens, use_cache=False)[0])
    if head_kind(model) == "sequence":
        values = values[:, -1]
    if expected.shape != values.shape or not torch.allclose(values, expected, rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{config.path}: {type(model).__name__} makes its scores by a rule of its own, not by one linear layer over the "
            "last token's hidden state; choose a model of another architecture"
        )


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up batches of a model with a value head: the tokenizer's own, or where that ends texts too, another
    special token.

    transformers reads a sequence's score at its last token that is not this one: so no text may end with it.
    """
    special = [n for n, token in tokenizer.added_tokens_decoder.items() if token.special]
    named = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special, tokenizer.eos_token_id]
    token = next((n for n in named if n is not None and n != tokenizer.eos_token_id), tokenizer.eos_token_id)
    if token is None:
        raise UserError("model.path: the tokenizer has neither a padding token nor an end token; give it one of them")
    return token


def head_kind(model: torch.nn.Module) -> HeadKind:
    """What the loaded model says about its input."""
    name = type(model).__name__
    return next((kind for kind, ending in CLASSES.items() if name.endswith(ending)), "language")


def decoder_of(model: Any) -> torch.nn.Module:
    """The language model without its head: token ids → hidden states [B, T, D], its first output."""
    return model.get_decoder()


def value_head(model: Any) -> torch.nn.Module:
    """The module that maps hidden states [..., D] to values [..., C]: the model's one child with weights beside the decoder.

    Its `weight` is the one in use, also where PEFT keeps the original beside a trained copy. Raises UserError.
    """
    return getattr(model, value_head_name(model))


def value_head_name(model: Any) -> str:
    """Its name: `score` in most architectures, `classifier` in some. Raises UserError if there is no such module."""
    decoder = decoder_of(model)
    found = [
        name
        for name, child in model.named_children()
        if not any(module is decoder for module in child.modules()) and any(True for _ in child.parameters())
    ]
    if len(found) != 1:
        raise UserError(
            f"{type(model).__name__}: no single value head beside the model itself, but {', '.join(found) or 'nothing'}; "
            "choose a model of another architecture"
        )
    return found[0]


def _loading_failed(what: str, config: ModelConfig, error: Exception) -> str:
    if isinstance(error, ValueError) and (files := _own_code(config)):
        return (
            f"{config.path}: transformers does not know this architecture, whose code comes with the checkpoint "
            f"({', '.join(files)}): read it, and set model.trust_remote_code to true; it then runs here with your rights"
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if Path(config.path).expanduser().is_dir() or config.path == "demo":
        return f"{config.path}: the {what} cannot be loaded: {reason}"
    return f"{config.path}: neither a local folder nor a {what} that the hub gives: {reason}"


def _own_code(config: ModelConfig) -> list[str]:
    """Files of a checkpoint in a folder that make its model, where transformers cannot and they have not been allowed."""
    from transformers import CONFIG_MAPPING

    file = Path(config.path).expanduser() / "config.json"
    if config.trust_remote_code or not file.is_file():
        return []
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or settings.get("model_type") in CONFIG_MAPPING:
        return []
    given = settings.get("auto_map")
    names = list(given.values()) if isinstance(given, dict) else []
    flat = [name for each in names for name in (each if isinstance(each, list) else [each]) if isinstance(name, str)]
    return sorted({f"{name.split('--')[-1].split('.')[0]}.py" for name in flat})


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
    decoder = decoder_of(model)
    name = next(name for name, module in model.named_modules() if module is decoder)
    return f"{name}." if name else ""
