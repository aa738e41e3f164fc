"""What each objective's form asks of the data, and what is said where the data has not got it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tunesmith.errors import DataError, UserError
from tunesmith.types import Example, Place

if TYPE_CHECKING:
    from tunesmith.config import DataConfig
    from tunesmith.data.samples import Samples
    from tunesmith.types import Form

LONGEST_NAME = 40
"""A longer column name is no name."""

LOOKED_FOR: dict[str, tuple[str, str]] = {
    "pairs": ("no preference pair", "chosen and rejected (with prompt, instruction or conversations)"),
    "feedback": (
        "no answer marked as desirable or not",
        "label or kto_tag (with prompt and completion, or messages), or chosen and rejected",
    ),
    "choices": ("no classes to choose from", "label (with text), or query, choices and gold"),
    "steps": ("no steps marked as right or wrong", "completions and labels (with prompt)"),
}
"""Form → what is missing, and the keys that it is read from."""


def check_form(form: Form, example: Example) -> None:
    """Raises DataError where an example lacks what the form is about."""
    if form not in LOOKED_FOR:
        return
    found = {
        "pairs": example.rejected is not None,
        "feedback": example.rejected is not None or example.desirable is not None,
        "choices": bool(example.choices),
        "steps": bool(example.steps),
    }
    if found[form]:
        return
    missing, keys = LOOKED_FOR[form]
    if form == "choices" and "label" in example.columns:
        raise DataError(
            example.place, (), f"{missing}: the words of the classes are not known",
            "set data.labels to all of them, in the order of the labels, such as [negative, positive]",
        )  # fmt: skip
    columns = ", ".join(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…" for name in example.columns)
    what = f"{missing}: looked for {keys}" + (f", found {columns}" if columns else "")
    raise DataError(example.place, (), what, f"name the columns in data.columns, or use objective: {_fitting(example)}")


def _fitting(example: Example) -> str:
    """An objective that learns from such an example."""
    if example.rejected is not None:
        return "dpo"
    if example.desirable is not None:
        return "kto"
    if example.steps:
        return "prm"
    return "classify" if example.choices else "sft"


def check_labels(samples: Samples, form: Form, config: DataConfig) -> None:
    """Raises UserError where all samples say the same, so that there is nothing to tell apart."""
    if form == "steps":
        signs = {float(sign) for part in samples.parts for sign in np.unique(np.sign(part.weights)) if sign}
        if len(signs) == 1 and (error := one_label(form, signs.pop(), 0, config)):
            raise error
        return
    labels = samples.labels()
    if not len(labels) or (labels != labels[0]).any() or (form == "choices" and not _all_choose_one_token(samples)):
        return
    if error := one_label(form, float(labels[0]), len(labels), config):
        raise error


def one_label(form: Form, label: float, number: int, config: DataConfig) -> UserError | None:
    """What is wrong with data of which all samples have the same label; None where nothing is."""
    if form == "feedback":
        found, other = ("desirable", "undesirable") if label else ("undesirable", "desirable")
        return UserError(
            f"{config.shown()}: all {number} answers to train on are marked as {found}: add some that are {other}, or use "
            "another objective"
        )
    if form == "steps":
        found, other = ("right", "wrong") if label > 0 else ("wrong", "right")
        return UserError(
            f"{config.shown()}: all steps to train on are marked as {found}: add some that are {other}, or use sft"
        )
    if form == "choices":
        words = next((part.labels for part in config.all_sets() if part.labels), ())
        named = words[int(label)] if words else f"{int(label)}"
        return UserError(
            f"{config.shown()}: all {number} records to train on have the class {named}: add records of the others (data that "
            "is sorted by class? then raise data.max_samples)"
        )
    return None


def _all_choose_one_token(samples: Samples) -> bool:
    """Whether the right word begins with the same token everywhere: of multiple choice each record has words of its own."""
    targets = [
        part.tokens[part.offsets[1:] - 1][chosen] for part, chosen in zip(samples.parts, samples.chosen, strict=True)
    ]
    return len(np.unique(np.concatenate(targets))) == 1


def nothing_to_learn(place: Place) -> DataError:
    """An example without an answer."""
    return DataError(
        place,
        (),
        "nothing to learn from: no answer in it",
        "give an assistant turn or completion that is not empty, or remove the record",
    )


def equal_answers(place: Place) -> DataError:
    """A preference pair that prefers nothing."""
    return DataError(
        place,
        (),
        "chosen and rejected are equal: neither is better",
        "give two different answers, or remove the record",
    )
