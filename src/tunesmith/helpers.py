"""What an objective needs beside the model: a reference, the model itself without gradient, a teacher.

Each is built from `objective.needs`, once, before training and before a resume loads its state: what is "the model at its
start" is then the model that was loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.cache import cache_folder
from tunesmith.config import ModelConfig, RunConfig
from tunesmith.data.pack import batch_of
from tunesmith.data.prepare import file_content
from tunesmith.display import short_bytes
from tunesmith.engines import SingleEngine
from tunesmith.engines.group import Group
from tunesmith.errors import UserError
from tunesmith.learner import Learner, logprobs_of
from tunesmith.models.load import load_config, load_tokenizer, model_source
from tunesmith.objectives import Objective
from tunesmith.score_store import ScoreStore, StoreWriter
from tunesmith.types import Batch

Watch = Callable[[str, int], None]


class Helper(Protocol):
    """What all helpers can do."""

    def describe(self) -> str:
        """What it is and what it holds, for the run's header."""
        ...


@dataclass(frozen=True)
class Policy:
    """The model as it is now, without gradient."""

    learner: Learner

    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities of the batch's targets, [B, T]."""
        return self.learner.logprobs(batch)

    def describe(self) -> str:
        return ""


@dataclass(frozen=True)
class StartReference:
    """The model as it was before training: an adapter switched off, or a frozen copy of what trains."""

    learner: Learner

    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities of the batch's targets, [B, T]."""
        return self.learner.logprobs(batch, at_start=True)

    def describe(self) -> str:
        held = self.learner.method.start_bytes()
        return f"a frozen copy of what trains · {short_bytes(held)}" if held else "the adapter switched off · no memory"


@dataclass(frozen=True)
class ModelReference:
    """Another model."""

    path: str
    model: Any
    engine: SingleEngine
    micro_batch_tokens: int

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities of the batch's targets, [B, T]. It reads one sequence a row: what the policy can keep apart in
        a row, this model perhaps cannot."""
        apart = replace(batch_of(batch.sequences()), media_N=batch.media_N)
        found_BT = logprobs_of(self.model, self.engine, apart, self.micro_batch_tokens)
        places, read_from = ((x.weights_BT != 0).nonzero(as_tuple=True) for x in (batch, apart))
        # the targets of one sequence stand in the same order in both
        order, order_read = (x.sequence_BT[at].argsort(stable=True) for x, at in ((batch, places), (apart, read_from)))
        logprobs_BT = torch.zeros(batch.tokens_BT.shape, dtype=found_BT.dtype)
        logprobs_BT[places[0][order], places[1][order]] = found_BT[read_from][order_read]
        return logprobs_BT

    def describe(self) -> str:
        held = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return f"{self.path} · {short_bytes(held)}"


@dataclass(frozen=True)
class StoredReference:
    """Log-probabilities that were taken before training."""

    store: ScoreStore
    spared: str
    """What a live reference would cost."""

    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities of the batch's targets, [B, T]."""
        return self.store.columns(batch)["logprobs"]

    def describe(self) -> str:
        return f"precomputed · {short_bytes(self.store.num_bytes())} on disk · spares {self.spared}"


@dataclass(frozen=True)
class Words:
    """The tokenizer, for objectives that read what a model has generated."""

    tokenizer: Any
    end_tokens: tuple[int, ...]
    """Those that end an answer: the tokenizer's, and those that the model's checkpoint names."""

    def texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The text of each, without special tokens."""
        return [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in sequences]

    def describe(self) -> str:
        return ""


def words_of(tokenizer: Any, model: Any) -> Words:
    """A model's tokenizer with all tokens that end its answers."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return Words(tokenizer, tuple(sorted(ends)))


def build_helpers(
    config: RunConfig,
    objective: Objective,
    learner: Learner,
    batches: Iterable[Batch],
    fingerprint: str,
    watch: Watch,
    skip: Set[str] = frozenset(),
) -> dict[str, Any]:
    """The helpers that the objective needs, by name, but for those to skip.

    batches: all that will ever be scored, training and held-out samples once each; fingerprint: of those samples.
    """
    needs = objective.needs - skip
    helpers: dict[str, Any] = {}
    if "policy" in needs:
        helpers["policy"] = Policy(learner)
    if "reference" in needs:
        helpers["reference"] = _reference(config, learner, batches, fingerprint, watch)
    if "tokenizer" in needs:
        helpers["tokenizer"] = words_of(load_tokenizer(config.model), learner.model)
    if "teacher" in needs:
        from tunesmith.teacher import open_teacher

        helpers["teacher"] = open_teacher(config, learner, batches, fingerprint, watch)
    return helpers


def _reference(
    config: RunConfig, learner: Learner, batches: Iterable[Batch], fingerprint: str, watch: Watch
) -> StartReference | ModelReference | StoredReference:
    section: Any = config.objective
    other = section.reference_model
    if section.reference == "live":
        if other:
            return _load_reference(config, learner)
        learner.method.keep_start()
        return StartReference(learner)
    model = ModelConfig(path=other) if other else config.model
    facts = {
        "what": "log-probabilities of a reference",
        "model": weights_key(model),
        "precision": config.model.precision,
        "samples": fingerprint,
    }
    scorer: list[ModelReference | Policy] = []

    def logprobs(batch: Batch) -> dict[str, Tensor]:
        if not scorer:  # nothing is loaded where the numbers are in the cache
            scorer.append(_load_reference(config, learner) if other else Policy(learner))
        return {"logprobs": scorer[0].logprobs(batch)[batch.weights_BT != 0].float()}

    store = stored_scores(facts, batches, logprobs, "the reference", watch, learner.engine.group)
    held = checkpoint_bytes(model) if other else learner.method.start_bytes()
    what = f"{other} of" if other else "a frozen copy of"
    return StoredReference(store, f"{what} {short_bytes(held)}" if held else "a forward pass a step")


def weights_key(config: ModelConfig) -> str:
    """What tells a checkpoint from every other: a hash of all its weights, or the hub's commit."""
    source = model_source(config)
    if not Path(source).is_dir():
        return f"{source}@{load_config(config)._commit_hash or config.revision}"
    files = sorted(Path(source).glob("*.safetensors")) or sorted(Path(source).glob("*.bin"))
    return hashlib.blake2b(json.dumps([file_content(str(file)) for file in files]).encode(), digest_size=16).hexdigest()


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of a local checkpoint's weights; 0 where it is not here."""
    return sum(file.stat().st_size for file in Path(model_source(config)).glob("*.safetensors"))


def _load_reference(config: RunConfig, learner: Learner) -> ModelReference:
    """The model that `reference_model` names. Raises UserError, also where its vocabulary is another one."""
    section: Any = config.objective
    path: str = section.reference_model
    model_config = config.model.model_copy(update={"path": path, "revision": None, "chat_template": None})
    try:
        ours, theirs = (load_tokenizer(each).get_vocab() for each in (config.model, model_config))
        engine = learner.engine.another()
        model, _ = engine.load(model_config, learner.model.dtype)
    except UserError as error:
        raise UserError(f"objective.reference_model: {error}") from error
    if ours != theirs:
        raise UserError(
            f"objective.reference_model: {path}: its tokenizer numbers the tokens otherwise than {config.model.path}'s; a "
            "reference must read the same tokens"
        )
    return ModelReference(path, engine.place(model).requires_grad_(False), engine, learner.micro_batch_tokens)


def stored_scores(
    facts: dict[str, Any],
    batches: Iterable[Batch],
    score: Callable[[Batch], dict[str, Tensor]],
    what: str,
    watch: Watch,
    group: Group,
    folder: Path | None = None,
) -> ScoreStore:
    """Numbers about every target of the batches, from the folder (default: the cache, keyed by `facts`), or made now, by all
    ranks of the group together.

    score: batch → name → [targets, …], row by row.
    """
    if folder is None:
        key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
        folder = cache_folder() / "scores" / key
    if not group.agree(not folder.exists()):
        return ScoreStore.open(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
        try:
            writer, done = StoreWriter(aside, facts), 0
            for batch in batches:
                writer.add(batch, score(batch))
                done += len(batch.sample_N)
                watch(what, done)
            writer.close()
            with suppress(OSError):  # another process may have been faster
                aside.replace(folder)
            return ScoreStore.open(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: scores cannot be written: {error}; make room, or set TUNESMITH_CACHE") from error
