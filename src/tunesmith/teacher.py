"""A teacher for distillation: a model beside the student, or what it said about the data before training.

Shapes: B rows, T tokens, N targets, D the teacher's hidden size, V tokens of the vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.alignment import Alignment
from tunesmith.config import ModelConfig, RunConfig
from tunesmith.display import short_bytes
from tunesmith.engines import SingleEngine
from tunesmith.errors import UserError
from tunesmith.helpers import Watch, checkpoint_bytes, stored_scores, weights_key
from tunesmith.learner import Learner
from tunesmith.models.head import CHUNK_ELEMENTS
from tunesmith.models.load import is_multimodal, load_config, load_tokenizer
from tunesmith.models.probe import isolates_sequences
from tunesmith.objectives.distill import coarse_logprobs
from tunesmith.phases import phase
from tunesmith.score_store import INDEX, ScoreStore
from tunesmith.types import Batch


@dataclass(frozen=True)
class Teacher:
    """A model that runs beside the student, without gradient."""

    path: str
    model: Any
    engine: SingleEngine
    micro_batch_tokens: int
    vocabulary: int
    """The student's logits that count: tokens of its tokenizer. Models fill their logits up to a round number."""
    own_vocabulary: int
    """The teacher's logits that count: as many, unless it has other tokens."""
    top_k: int | None = None
    alignment: Alignment | None = None
    """For a teacher with other tokens."""
    isolates: bool = True
    """Whether it keeps packed sequences apart."""

    @torch.no_grad()
    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """What the teacher says about the batch's targets, as token columns on the CPU; see `Distill.prepare`."""
        with phase("reference"):
            return self._columns(batch)

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        row_N, column_N = (batch.weights_BT != 0).nonzero(as_tuple=True)
        asked_M, read = self._read(batch)
        self._check_fits(batch, read)
        parts = [
            self._kept(self.engine.hidden(self.model, part.to(self.engine.device)))
            for part in self.engine.micro_batches(read, self.micro_batch_tokens)
        ]
        rows = self.engine.rows(read)
        here = slice(*(int((read.weights_BT[:row] != 0).sum()) for row in (rows.start, rows.stop)))
        found = {}
        for name in parts[0]:  # ranks share the rows out
            own = torch.cat([part[name] for part in parts])
            found[name] = own.new_zeros(len(asked_M), *own.shape[1:])
            found[name][here] = own
            found[name] = self.engine.sum(found[name])
        if self.alignment:
            found["aligned"] = torch.ones(len(asked_M), dtype=torch.bool)
        columns = {}
        for name, value in found.items():
            columns[name] = torch.zeros(*batch.tokens_BT.shape, *value.shape[1:], dtype=value.dtype)
            columns[name][row_N[asked_M], column_N[asked_M]] = value
        return columns

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] from the hidden states among the columns."""
        return self.engine.head.logits(hidden_ND)[:, : self.own_vocabulary]

    def describe(self) -> str:
        held = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return f"{self.path} · {short_bytes(held)}"

    def _read(self, batch: Batch) -> tuple[Tensor, Batch]:
        """(the targets that the teacher predicts, by their number in the batch; the batch that it reads). Its targets are the
        same, in the same order."""
        number = int((batch.weights_BT != 0).sum())
        if self.alignment is None and (self.isolates or any(batch.media_N)):  # with media, each has a row of its own
            return torch.arange(number), batch
        owner_N = batch.sequence_BT[batch.weights_BT != 0]
        asked, rows = [], []
        for n, (tokens, weights) in enumerate(batch.sequences()):
            mine, at = (owner_N == n).nonzero()[:, 0], weights.nonzero()[:, 0]
            if not len(mine):
                continue
            if self.alignment:
                theirs, begins = self.alignment(tokens.tolist())
                tokens, begins_at = torch.tensor(theirs), torch.tensor(begins)[at]
                predicted = begins_at > 0  # nothing stands before a first token to predict it from
                mine, at = mine[predicted], begins_at[predicted]
            asked.append(mine)
            rows.append((tokens, at))
        if not rows:
            return torch.arange(0), batch
        return torch.cat(asked), one_a_row(rows)

    def _kept(self, hidden_ND: Tensor) -> dict[str, Tensor]:
        """What of some targets goes into the batch, on the CPU."""
        if self.top_k is None:
            return {"teacher_hidden": hidden_ND.cpu()}
        size = min(self.top_k, self.own_vocabulary)
        tokens, logprobs = [], []
        for hidden in hidden_ND.split(max(1, CHUNK_ELEMENTS // self.own_vocabulary)):
            logits_NV = self.logits(hidden)
            tokens.append(logits_NV.topk(size).indices)
            logprobs.append(coarse_logprobs(logits_NV, tokens[-1]).cpu())
        return {"teacher_tokens": torch.cat(tokens).int().cpu(), "teacher_logprobs": torch.cat(logprobs)}

    def _check_fits(self, batch: Batch, read: Batch) -> None:
        """Raises UserError for what the teacher cannot read."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = int(read.positions_BT.max()) + 1
        if positions and longest > positions:
            raise UserError(
                f"objective.teacher: {self.path}: knows {positions} positions, but a sample has {longest} of its tokens; set "
                "data.max_tokens lower"
            )
        if any(batch.media_N) and (self.alignment or not is_multimodal(self.model.config)):
            under = " under divergence: uld" if self.alignment else ""
            raise UserError(
                f"objective.teacher: {self.path}: reads text alone{under}, but there are media in the data; take a teacher "
                "that reads them as the student does, or other data"
            )


@dataclass(frozen=True)
class StoredTeacher:
    """The likeliest tokens of a teacher that is not here."""

    store: ScoreStore
    vocabulary: int
    """As `Teacher.vocabulary`."""

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """As `Teacher.columns`. Raises UserError for a sequence that was not among the data then."""
        return self.store.columns(batch)

    def describe(self) -> str:
        facts, size = self.store.facts, short_bytes(self.store.num_bytes())
        spared = short_bytes(facts["weights_bytes"]) if facts["weights_bytes"] else "the teacher"
        return f"its {facts['top_k']} likeliest tokens, precomputed · {size} on disk · spares {spared}"


def open_teacher(
    config: RunConfig, learner: Learner, batches: Iterable[Batch], fingerprint: str, watch: Watch
) -> Teacher | StoredTeacher:
    """The helper that `objective.teacher`, `scores` and `scores_file` ask for.

    batches, fingerprint: as in `build_helpers`. Scores that are there already need no teacher: neither is it loaded, nor
    need it exist where `scores_file` holds them.
    """
    section: Any = config.objective
    if section.scores == "live":
        return load_teacher(config, learner)
    folder = Path(section.scores_file).expanduser() if section.scores_file else None
    vocabulary = load_tokenizer(config.model).get_vocab()
    is_there = folder is not None and (folder / INDEX).is_file()
    if folder is not None and not learner.engine.group.agree(not is_there):
        store = ScoreStore.open(folder)
        _check_store(store, config, vocabulary)
        store.check_holds(batches)  # now, and not in the middle of the run
        return StoredTeacher(store, store.facts["vocabulary"])
    if section.teacher is None:
        raise UserError(
            f"objective.scores_file: {folder}: holds no scores yet, and there is no teacher to make them; set "
            "objective.teacher, or copy the folder here"
        )
    facts = _facts(config, learner, vocabulary) | {"samples": fingerprint}
    teacher: list[Teacher] = []

    def likeliest(batch: Batch) -> dict[str, Tensor]:
        if not teacher:  # nothing is loaded where the numbers are in the cache
            teacher.append(load_teacher(config, learner))
        return {name: column[batch.weights_BT != 0] for name, column in teacher[0].columns(batch).items()}

    store = stored_scores(facts, batches, likeliest, "the teacher", watch, learner.engine.group, folder)
    teacher.clear()
    gc.collect()
    if learner.engine.device.type == "cuda":
        torch.cuda.empty_cache()
    return StoredTeacher(store, store.facts["vocabulary"])


def load_teacher(config: RunConfig, learner: Learner) -> Teacher:
    """The model itself, on the student's device. Raises UserError where the two do not fit together."""
    section: Any = config.objective
    told_apart = section.divergence == "uld"
    model_config = _model_config(config)
    ours = load_tokenizer(config.model)
    engine = learner.engine.another()
    try:
        theirs = load_tokenizer(model_config)
        model, probed = engine.load(model_config, _dtype(learner))
    except UserError as error:
        raise _of_teacher(error) from error
    if not told_apart:
        _check_same_tokens(ours.get_vocab(), theirs.get_vocab(), config)
    isolates = isolates_sequences(probed)
    model = engine.place(model).requires_grad_(False)
    if engine.head.linear is None:
        raise UserError(
            f"objective.teacher: {section.teacher}: {type(model).__name__} makes its logits by a rule of its own; take a "
            "teacher whose output layer is linear"
        )
    sizes = (_rows(learner.model), _rows(model))
    common = min(num_tokens(ours.get_vocab()), *sizes)
    return Teacher(
        section.teacher, model, engine, learner.micro_batch_tokens,
        vocabulary=min(num_tokens(ours.get_vocab()), sizes[0]) if told_apart else common,
        own_vocabulary=min(num_tokens(theirs.get_vocab()), sizes[1]) if told_apart else common,
        top_k=section.top_k,
        alignment=Alignment(ours, theirs) if told_apart else None,
        isolates=isolates,
    )  # fmt: skip


def one_a_row(rows: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """A padded batch of (tokens, numbers of those that are targets), one sequence a row."""
    shape = len(rows), max(len(tokens) for tokens, _ in rows)
    tokens_BT, positions_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    sequence_BT, weights_BT = torch.full(shape, -1), torch.zeros(shape)
    for row, (tokens, at) in enumerate(rows):
        here = row, slice(0, len(tokens))
        tokens_BT[here], positions_BT[here], sequence_BT[here] = tokens, torch.arange(len(tokens)), row
        weights_BT[row, at] = 1.0
    numbers = torch.arange(len(rows))
    return Batch(tokens_BT, positions_BT, sequence_BT, weights_BT, sample_N=numbers, group_N=numbers)


def _model_config(config: RunConfig) -> ModelConfig:
    section: Any = config.objective
    return config.model.model_copy(update={"path": section.teacher, "revision": None, "chat_template": None})


def _dtype(learner: Learner) -> torch.dtype:
    """Of the teacher's weights: what the student computes in. They do not train: mixed precision keeps no fp32 of them."""
    return torch.bfloat16 if learner.engine.precision in ("bf16", "mixed") else learner.model.dtype


def _of_teacher(error: UserError) -> UserError:
    return UserError("objective.teacher: " + str(error).replace("model.path", "objective.teacher"))


def _facts(config: RunConfig, learner: Learner, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """What the numbers depend on beside the samples."""
    section: Any = config.objective
    model_config = _model_config(config)
    try:
        size = load_config(model_config).get_text_config().vocab_size
    except UserError as error:
        raise _of_teacher(error) from error
    return {
        "what": "likeliest tokens of a teacher",
        "model": weights_key(model_config),
        "weights_bytes": checkpoint_bytes(model_config),
        "precision": str(_dtype(learner)),
        "top_k": section.top_k,
        "tokens": tokens_hash(vocabulary),
        "vocabulary": min(num_tokens(vocabulary), _rows(learner.model), size),
    }


def _check_store(store: ScoreStore, config: RunConfig, vocabulary: Mapping[str, int]) -> None:
    """Raises UserError for scores that are no teacher's, or made for other settings."""
    section: Any = config.objective
    facts, where = store.facts, f"objective.scores_file: {store.folder}"
    if "top_k" not in facts:
        raise UserError(f"{where}: holds {facts.get('what')}, not a teacher's likeliest tokens; give another folder")
    if facts["top_k"] != section.top_k:
        raise UserError(
            f"{where}: holds the {facts['top_k']} likeliest tokens; set objective.top_k to that, not {section.top_k}"
        )
    if facts["tokens"] != tokens_hash(vocabulary):
        raise UserError(
            f"{where}: was made for other tokens than {config.model.path} has; make it anew with that model's tokenizer"
        )
    if section.teacher and Path(section.teacher).expanduser().is_dir():
        made_by, now = facts["model"], weights_key(_model_config(config))
        if made_by != now:
            raise UserError(
                f"{where}: was made by other weights than objective.teacher's; remove the folder, or that setting"
            )


def _check_same_tokens(ours: Mapping[str, int], theirs: Mapping[str, int], config: RunConfig) -> None:
    """Raises UserError unless the teacher has all of the student's tokens, by the same numbers. It may have more."""
    section: Any = config.objective
    other = [token for token, number in ours.items() if theirs.get(token) != number]
    if other:
        first = min(other, key=lambda token: ours[token])
        raise UserError(
            f"objective.teacher: {section.teacher}: its tokens are not those of {config.model.path}: {len(other)} have another "
            f"number or are missing, such as {first!r}; set objective.divergence to uld, or take a teacher of the same family"
        )


def tokens_hash(vocabulary: Mapping[str, int]) -> str:
    """Of all tokens and their numbers."""
    return hashlib.blake2b(json.dumps(sorted(vocabulary.items())).encode(), digest_size=16).hexdigest()


def num_tokens(vocabulary: Mapping[str, int]) -> int:
    """Logits that belong to a token."""
    return max(vocabulary.values()) + 1


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
