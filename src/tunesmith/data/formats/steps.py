"""Process supervision: {"prompt", "completions": ["…", …], "labels": [true, …]}, steps and whether each is right.

The prompt is text or messages. Of plain text the steps follow on the prompt as it is; steps are joined by an empty line.
"""

from __future__ import annotations

from dataclasses import replace

from tunesmith.data.formats.base import STEP_BREAK, Format, Record, prompt_and_completion, show, text_of
from tunesmith.data.formats.prompt_completion import is_chat
from tunesmith.data.formats.turns import conversation, read_prompt, with_answer
from tunesmith.errors import DataError
from tunesmith.types import Example, Place


class Steps(Format):
    keys = "prompt, completions, labels (true or false for each)"

    @classmethod
    def matches(cls, record: Record) -> bool:
        return cls.fits(record) and isinstance(record["completions"], list) and isinstance(record["labels"], list)

    @classmethod
    def fits(cls, record: Record) -> bool:
        return all(key in record for key in ("prompt", "completions", "labels"))

    def read(self, record: Record, place: Place) -> Example:
        steps = _read_steps(record, place)
        answer = STEP_BREAK.join(step for step, _ in steps)
        prompt = record["prompt"]
        if is_chat(record, prompt, answer):
            messages = with_answer(
                read_prompt(prompt, record, place, ("prompt",)), answer, record, place, ("completions",)
            )
            example = conversation(messages, record, place, ("prompt",))
        else:
            example = prompt_and_completion(text_of(prompt, place, ("prompt",)), answer, place)
        return replace(example, steps=steps)


def _read_steps(record: Record, place: Place) -> tuple[tuple[str, bool], ...]:
    texts, labels = record["completions"], record["labels"]
    for key in ("completions", "labels"):
        if not isinstance(record[key], list):
            raise DataError(
                place, (key,), f"expected a list, found {show(record[key])}", "write one entry for each step"
            )
    if len(texts) != len(labels):
        what = f"{len(labels)} labels for {len(texts)} steps"
        raise DataError(place, ("labels",), what, "give each step of completions a label of its own")
    if not texts:
        raise DataError(place, ("completions",), "no steps", "give at least one, or remove the record")
    for index, label in enumerate(labels):
        if not isinstance(label, bool):
            what = f"expected true or false, found {show(label)}"
            raise DataError(place, ("labels", index), what, "write true for a right step and false for a wrong one")
        if not text_of(texts[index], place, ("completions", index)).strip():
            raise DataError(place, ("completions", index), "an empty step", "remove it and its label")
    return tuple(zip(texts, labels, strict=True))
