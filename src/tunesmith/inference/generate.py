"""Answers from the result of a run (or any model folder), with the chat template that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from tunesmith.config import ModelConfig
from tunesmith.engines.single import find_device, find_precision
from tunesmith.errors import UserError
from tunesmith.methods.lora import TASKS
from tunesmith.models.load import CLASSES, load_config, load_model, load_tokenizer
from tunesmith.run_folder import RunFolder

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Generator:
    """A model and its tokenizer, ready to answer."""

    model: Any
    tokenizer: Any

    def prompt(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> str:
        """The conversation as the model saw it in training, up to where its answer begins."""
        if not self.tokenizer.chat_template:
            return self.plain_prompt("\n".join(message["content"] for message in messages))
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)

    def plain_prompt(self, text: str) -> str:
        """Text as the model saw it in training without a template: behind the token that its tokenizer begins with."""
        begin = self.tokenizer("", add_special_tokens=True)["input_ids"][:1]
        return text if begin != [self.tokenizer.bos_token_id] else self.tokenizer.bos_token + text

    def answers(self, prompts: Sequence[str], max_new_tokens: int = 256, batch_size: int = 16) -> list[str]:
        """Greedy answers to rendered prompts, in their order; batches of prompts of like length."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, str] = {}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            output, width = self._generate([prompts[index] for index in part], max_new_tokens, do_sample=False)
            texts = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            found.update(zip(part, texts, strict=True))
        return [found[index] for index in range(len(prompts))]

    def stream(self, prompt: str, max_new_tokens: int, temperature: float) -> Iterator[str]:
        """Pieces of one answer as they come. temperature 0: greedy."""
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

        def work() -> None:
            try:
                self._generate([prompt], max_new_tokens, streamer=streamer, **sampling)
            finally:
                streamer.end()  # or the reader would wait forever for an answer that failed

        worker = Thread(target=work, daemon=True)
        worker.start()
        yield from streamer
        worker.join()

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[str], max_new_tokens: int, **options: Any) -> tuple[torch.Tensor, int]:
        encoded = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(self.model.device)
        output = self.model.generate(
            **encoded, max_new_tokens=max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **options
        )
        return output, encoded["input_ids"].shape[1]


def load_generator(path: str, device: str = "auto", precision: str = "auto") -> Generator:
    """From a run's folder, a folder with a model or an adapter, a hub id, or `demo`. Raises UserError."""
    folder, base = Path(path), None
    run = RunFolder(folder)
    if run.config.is_file():
        if not run.has_ended():
            raise UserError(f"{path}: the run has not ended yet; go on with it: tunesmith train --resume {path}")
        folder, base = run.model, run.read_config().model
    place = find_device(device)
    dtype = torch.float32 if find_precision(precision, place, needs_fp32_weights=False) == "fp32" else torch.bfloat16
    config = ModelConfig(path=str(folder) if folder.is_dir() else path)
    adapter_file = folder / "adapter_config.json"
    adapter = json.loads(adapter_file.read_text()) if adapter_file.is_file() else None
    if _gives_scores(config, adapter):
        raise UserError(f"{path}: this model gives scores, not text; give a language model")
    if adapter is not None:
        if base is None:
            base = ModelConfig(path=adapter["base_model_name_or_path"], revision=adapter.get("revision"))
        tokenizer, model = load_tokenizer(config), _with_adapter(base, folder, dtype)
    else:
        tokenizer, model = load_tokenizer(config), load_model(config, dtype)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.update(temperature=None, top_p=None, top_k=None)  # the caller's, not the checkpoint's
    return Generator(model.to(place), tokenizer)


def _gives_scores(config: ModelConfig, adapter: dict[str, Any] | None) -> bool:
    """Whether the model, or what the adapter makes of its base, has a value head in place of a language model's."""
    if adapter is not None:
        return adapter.get("task_type") in [TASKS[kind] for kind in CLASSES]
    return any(name.endswith(tuple(CLASSES.values())) for name in load_config(config).architectures or ())


def _with_adapter(base: ModelConfig, folder: Path, dtype: torch.dtype) -> Any:
    """The base model with the adapter merged into it: one product a layer, as in any server."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base, torch.float32), folder)
    return model.merge_and_unload().to(dtype).eval()
