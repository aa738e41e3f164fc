"""`make demo`: fine-tune a real model on a small task, and count its right answers before and after."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console

from tunesmith.config_file import load_config
from tunesmith.data.demo import demo_answer_correct
from tunesmith.data.examples import examples_at
from tunesmith.data.sources import DEMO_SAMPLES
from tunesmith.inference.files import question
from tunesmith.inference.generate import Generator, load_generator
from tunesmith.run import train

NUM_SHOWN = 3
MAX_NEW_TOKENS = 48
"""Answers have 27 tokens on average and 34 at most."""


def demo(output: str) -> None:
    """Train after demo.yaml, then print three answers side by side and, last, the accuracy on held-out sentences."""
    console = Console()
    with as_file(files("tunesmith") / "demo.yaml") as file:
        console.print(file.read_text(), highlight=False, markup=False, soft_wrap=True)
        config = load_config(file, [f"output={_free(output)}"])
    before = _answers(load_generator("demo", config.engine.device))
    result = train(config)
    after = _answers(load_generator(str(result.folder), config.engine.device))

    examples = list(examples_at("demo", split="eval"))
    for example, old, new in list(zip(examples, before, after, strict=True))[:NUM_SHOWN]:
        asked, expected = example.messages[-2].content, example.messages[-1].content
        for name, text in (
            ("sentence", asked),
            ("before", " ".join(old.split())),
            ("after", new),
            ("expected", expected),
        ):
            console.print(f"{name:>9}: {text}", highlight=False, markup=False, soft_wrap=True)
        console.print()
    console.print(f"talk to it: tunesmith chat {result.folder}; its report: {result.folder}/report.md", highlight=False)
    right = [
        sum(
            demo_answer_correct(answer, str(e.messages[-1].content))
            for answer, e in zip(answers, examples, strict=True)
        )
        for answers in (before, after)
    ]
    shares = [count / len(examples) for count in right]
    console.print(
        f"accuracy before {shares[0]:.3f} after {shares[1]:.3f} on {DEMO_SAMPLES['eval']} held-out sentences",
        highlight=False,
    )


def _answers(generator: Generator) -> list[str]:
    prompts = [question(generator, example)[0] for example in examples_at("demo", split="eval")]
    return generator.answers(prompts, MAX_NEW_TOKENS, batch_size=50)


def _free(output: str) -> str:
    """The folder, or with a number behind it if it is taken."""
    name, number = output, 1
    while Path(name).exists():
        number += 1
        name = f"{output}-{number}"
    return name
