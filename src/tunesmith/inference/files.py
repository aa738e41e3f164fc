"""Answers to a whole file."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from tunesmith.data.examples import examples_at
from tunesmith.data.template import as_dicts
from tunesmith.errors import UserError
from tunesmith.inference.generate import Generator, load_generator
from tunesmith.run_folder import write_text
from tunesmith.types import Example


def generate_file(path: str, prompts: str, output: Path, max_new_tokens: int, batch_size: int) -> None:
    """Write `{"prompt", "answer", "expected"}` for each record of a data file; `expected` is the answer it holds, or null."""
    if output.exists():
        raise UserError(f"{output}: exists already; choose another file")
    examples = list(examples_at(prompts, "the prompts", "eval"))
    generator = load_generator(path)
    asked = [question(generator, example) for example in examples]
    answers = generator.answers([prompt for prompt, _ in asked], max_new_tokens, batch_size)
    lines = [
        json.dumps({"prompt": prompt, "answer": answer, "expected": expected}, ensure_ascii=False)
        for (prompt, expected), answer in zip(asked, answers, strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "\n".join(lines) + "\n")
    Console(stderr=True).print(f"{len(lines)} answers in {output}", highlight=False)


def question(generator: Generator, example: Example) -> tuple[str, str | None]:
    """(rendered prompt, expected answer or None): a record without its last answer."""
    if example.messages:
        turns = list(example.messages)
        expected = str(turns.pop().content) if turns[-1].role == "assistant" else None
        return generator.prompt(as_dicts(turns), list(example.tools) or None), expected
    given = "".join(piece.text for piece in example.pieces if not piece.learn)
    learnt = "".join(piece.text for piece in example.pieces if piece.learn)
    return (generator.plain_prompt(given), learnt) if given else (generator.plain_prompt(learnt), None)
