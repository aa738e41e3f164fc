"""Generating: batches give what single prompts give; a run's folder is found; files are answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.config import RunConfig
from tunesmith.errors import UserError
from tunesmith.inference.files import generate_file
from tunesmith.inference.generate import load_generator
from tunesmith.run import train

MakeConfig = Callable[..., RunConfig]
PROMPTS = ["What follows 3?", "user", "What follows 11? And so on. And so on."]


def test_batched_greedy_answers_equal_transformers_own_one_by_one(model_folder: Callable[[str], Path]) -> None:
    generator = load_generator(str(model_folder("llama")), "cpu", "fp32")
    expected = []
    for prompt in PROMPTS:
        ids = generator.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        for _ in range(8):
            with torch.no_grad():
                following = generator.model(input_ids=ids).logits[0, -1].argmax()
            if following == generator.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following[None, None]], 1)
        length = len(generator.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        expected.append(generator.tokenizer.decode(ids[0, length:], skip_special_tokens=True))
    assert generator.answers(PROMPTS, max_new_tokens=8, batch_size=2) == expected


def test_streaming_gives_the_same_text(model_folder: Callable[[str], Path]) -> None:
    generator = load_generator(str(model_folder("llama")), "cpu", "fp32")
    assert "".join(generator.stream(PROMPTS[0], 8, temperature=0.0)) == generator.answers(PROMPTS[:1], 8)[0]


def test_a_run_s_file_is_answered_with_its_template(make_config: MakeConfig, chat_file: Path, tmp_path: Path) -> None:
    result = train(make_config(train={"steps": 2}))
    output = tmp_path / "out" / "answers.jsonl"
    generate_file(str(result.folder), str(chat_file), output, max_new_tokens=4, batch_size=8)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 24
    assert lines[3]["prompt"] == "<|im_start|>user\nWhat follows 3?<|im_end|>\n<|im_start|>assistant\n"
    assert lines[3]["expected"] == "After 3 comes 4."
    assert isinstance(lines[3]["answer"], str)


def test_a_run_that_has_not_ended(make_config: MakeConfig) -> None:
    result = train(make_config(train={"steps": 1}))
    for file in (result.folder / "model").iterdir():
        file.unlink()
    (result.folder / "model").rmdir()
    with pytest.raises(UserError, match="the run has not ended yet; go on with it: tunesmith train --resume"):
        load_generator(str(result.folder))


def test_plain_text_begins_as_it_did_in_training(model_folder: Callable[[str], Path]) -> None:
    from tokenizers.processors import TemplateProcessing

    generator = load_generator(str(model_folder("llama")), "cpu", "fp32")
    tokenizer = generator.tokenizer
    assert generator.plain_prompt("Hi") == "Hi"
    tokenizer.bos_token = "<|im_start|>"
    begin = [("<|im_start|>", tokenizer.bos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=begin)
    prompt = generator.plain_prompt("Hi")
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == tokenizer("Hi")["input_ids"]
