"""The configuration's section on data: which, and how a record becomes tokens. Imports no torch."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tunesmith.config_section import PathSection, PositiveInt, Share

FormatName = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text",
    "preference", "unpaired", "steps", "prompt_answer", "classification",
]  # fmt: skip


class SetConfig(PathSection):
    """One data set: where it lies, what form its records have, and its share in a mixture."""

    path: str
    """File, folder or glob (.json .jsonl .csv .tsv .txt, each also .gz or .zst, .parquet .arrow), a URL (s3:// gs:// hf://),
    `hub:owner/name`, LLaMA-Factory's dataset_info.json, or `demo` (sentences to strict JSON, generated from a seed)."""
    format: FormatName = "auto"
    """Form of the records; auto finds it from the first one."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Odd names: the form's key → the file's column, such as `{instruction: question, output: reply}`."""
    names: tuple[str, ...] = ()
    """Which entries of a dataset_info.json."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Configuration of a hub data set."""
    labels: tuple[str, ...] = ()
    """Classification: the word for each class, in the order of the labels 0, 1, …; by default the label itself."""
    prompt: str = ""
    """Classification: the question, with columns in braces, such as `Review: {text} Sentiment:`."""
    header: tuple[str, ...] = ()
    """Column names of a .csv or .tsv file that does not begin with them."""
    text_unit: Literal["line", "paragraph", "file"] = "line"
    """What is one document in a .txt file."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of this set where `data.mix` is interleave."""
    repeat: Annotated[float, Field(gt=0)] = 1.0
    """How often each sample is seen in an epoch where `data.mix` is concat; 2.5 shows half of them a third time."""
    max_samples: PositiveInt | None = None
    """Only the first so many records."""


class DataConfig(SetConfig):
    """Which data, and how a record becomes tokens."""

    path: str = ""
    """File, folder or glob (.json .jsonl .csv .tsv .txt, each also .gz or .zst, .parquet .arrow), a URL (s3:// gs:// hf://),
    `hub:owner/name`, LLaMA-Factory's dataset_info.json, or `demo` (sentences to strict JSON, generated from a seed)."""
    sets: tuple[SetConfig, ...] = ()
    """Several data sets in place of `path`, each with settings of its own."""
    mix: Literal["concat", "interleave"] = "concat"
    """concat: every sample of every set once an epoch (or `repeat` times); interleave: sets drawn by `weight`, in an epoch
    as many samples as all sets hold."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """With interleave, shares by size^(1/temperature) × weight: 1 is by size, large evens out. Default: by weight alone."""
    eval_path: str | None = None
    """Held-out file of the same form. Without it, `eval_fraction` of the samples is held out."""
    eval_split: str = "test"
    """Split of a hub data set that `eval_path` names."""
    eval_fraction: Share = 0.05
    """Share of the samples held out, chosen by content hash, so that a sample keeps its side when the data grows."""
    max_eval_samples: PositiveInt = 200
    """At most so many held-out samples are scored; the rest of the held-out share stays unused."""
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    """Longest sequence, and length of a packed row."""
    truncation: Literal["auto", "error", "drop", "left", "right", "split"] = "auto"
    """What happens to a longer sample: stop, drop it, cut its left or right end, split it. auto: right, pretrain split."""
    learn: Literal["assistant", "last", "each", "all"] = "assistant"
    """What of a conversation carries loss: the assistant's turns; its last one; each of them in a sample of its own that ends
    there (for templates that drop earlier reasoning); or everything. A message's own weight wins."""
    as_chat: bool | None = None
    """true: prompts and completions that are plain strings become turns of a conversation; false: conversations become
    plain text. Default: as the form says (text and pairs of strings are plain, all else is a conversation)."""
    template_variables: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, such as `{enable_thinking: false}`."""
    date: datetime.date | None = None
    """Day (2026-01-31) that a chat template shows which prints today's. Default: the day on which the run begins."""
    bad_records: Literal["stop", "skip"] = "stop"
    """What a record that cannot be used does: stop the run before it begins, or be left out, counted and shown."""
    parse_special_tokens: bool = False
    """Read special tokens that stand in the data's own text, such as <|im_end|>, as control tokens. For text that was
    rendered by a chat template before; else such text stays text."""
    stream: bool = False
    """Tokenize while training, in windows of `shuffle_window` records: for data larger than the disk, or to start at once."""
    shuffle_window: PositiveInt = 10_000
    """With stream: records that are shuffled among each other."""
    pack: bool | None = None
    """Several sequences in one row, attention kept apart. Speed only: the update is the same either way.
    Default: on accelerators, and under zeroth; else, on a CPU, attention over the longer row costs more than padding would."""
    share_prompt: bool = True
    """With preference pairs: what both begin with goes through the model once, where the model allows it. Speed only."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.path) == bool(self.sets):
            raise ValueError("give either path or sets" if self.path else "missing: give path (or sets)")
        fields = {name: type(self).model_fields[name] for name in SetConfig.model_fields}
        beside = [name for name, f in fields.items() if getattr(self, name) != f.get_default(call_default_factory=True)]
        if self.sets and beside:
            raise ValueError(f"{', '.join(beside)}: beside sets it would have no effect; write it into each set")
        if self.stream and (self.temperature or any(part.repeat != 1 for part in self.all_sets())):
            raise ValueError("stream: repeat and temperature need the sizes of the sets, which a stream does not know")
        return self

    def shown(self) -> str:
        """The data in a few words."""
        return " + ".join(part.path + "".join(f" {name}" for name in part.names) for part in self.all_sets())

    def all_sets(self) -> tuple[SetConfig, ...]:
        """The data sets, whether written as one path or as several sets."""
        fields = {name: getattr(self, name) for name in SetConfig.model_fields}
        return self.sets or (SetConfig.model_construct(**fields),)
