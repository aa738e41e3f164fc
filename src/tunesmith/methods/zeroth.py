"""Tuning by scoring alone: no backward pass, no activations kept, no optimizer state of the weights' size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunesmith.config_methods import LoraConfig
from tunesmith.display import short_number
from tunesmith.errors import UserError
from tunesmith.methods.base import EngineLike, LossFn, Method, Metrics, NonFiniteError, Shapes, matching
from tunesmith.methods.directions import DenseDirections, Directions, LowRankDirections, crc_of
from tunesmith.methods.division import Division, Table, check_equal, fingerprint, mean, table_of
from tunesmith.methods.lora import Lora
from tunesmith.methods.update_log import Update, UpdateLog, differing, parse_updates, read_log
from tunesmith.models.families import family_of
from tunesmith.models.load import blocks, head_kind, value_head, value_head_name
from tunesmith.models.low_rank import Probe, linear_layers
from tunesmith.phases import phase
from tunesmith.types import Batch, Memory, Scores, Wanted

CHECK_EVERY = 100
"""Updates between two checksums in the log."""
FLUSH_EVERY = 50
"""Updates between two writes that survive the machine's death."""
BANK_OF_16_BITS = 32
"""Columns that gather before a fold into weights of 16 bits, which goes over a copy aside."""


class Zeroth(Method):
    """Zeroth-order tuning as an inference workload (arXiv 2605.28760), with MeZO (2305.17333), LOZO (2410.07698) and FZOO
    (2506.09034) as settings.

    A step scores one batch at K points near the parameters, θ ± ε z_q for each of Q random directions z_q. The slope
    c_q = (L(θ + ε z_q) - L(θ - ε z_q)) / 2ε is the gradient along z_q, so Σ_q c_q z_q / Q is the gradient on average; of a
    direction U Vᵀ of rank r, 1/r of that (E[V Vᵀ] = r I; LOZO's code leaves 1/r to the learning rate).
    What is applied are the numbers in the log alone: replaying it makes the same weights without a forward pass.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"probes"})

    @classmethod
    def needs_fp32_weights(cls, config: Any) -> bool:
        return config.scorer_in_use == "in_place" and not config.adapter_rank

    def adapt(self, model: Any) -> None:
        self.adapter: Lora | None = None
        if not self.config.adapter_rank:
            model.requires_grad_(False)
            return
        config = LoraConfig(
            rank=self.config.adapter_rank, alpha=self.config.adapter_alpha, targets=self.config.targets or "all-linear"
        )
        self.adapter = Lora(config, self.optimizer_config, None, self.extent)
        with torch.random.fork_rng():
            torch.manual_seed(self.extent.seed)  # whatever was drawn before: a replay starts from the same A
            self.adapter.adapt(model)

    def bind(self, model: nn.Module, engine: EngineLike) -> None:
        from tunesmith.scorers import SCORERS, Scorer

        self.engine, self.model = engine, model
        seed = self.extent.seed
        decay = self.optimizer_config.momentum
        self.directions: Directions
        if self.config.directions == "low_rank":
            layers = self._layers(model)
            is_wide = all(layer.weight.element_size() >= 4 for layer in layers.values())  # type: ignore[operator]
            bank = self.config.rank if is_wide else max(BANK_OF_16_BITS, self.config.rank)
            if getattr(model, "is_quantized", False) or self.config.fold == "never":
                bank = None
            self.directions = LowRankDirections(
                layers, rank=self.config.rank, refresh_every=self.config.refresh_every, kind=self.config.noise, seed=seed,
                momentum=decay, bank_rank=bank, on_disk=not engine.is_apart,
            )  # fmt: skip
        elif self.adapter is not None:
            self.adapter.bind(model, engine)
            self.directions = DenseDirections(self.adapter.params, kind=self.config.noise, seed=seed, momentum=decay)
        else:
            chosen = matching(model, self.config.targets, "method.targets") if self.config.targets else None
            moving = {n: p for n, p in model.named_parameters() if chosen is None or id(p) in chosen}
            if any(p.element_size() < 4 for p in moving.values()):
                raise UserError(
                    "model.precision: dense directions move the weights themselves, and 16 bits would round the steps away; "
                    "set it to mixed or fp32"
                )
            self.directions = DenseDirections(moving, kind=self.config.noise, seed=seed, momentum=decay)
        self.params = self.directions.weights()
        self.adapter_start = crc_of(self.params.values()) if self.adapter is not None else 0
        kind = SCORERS[self.config.scorer_in_use] if self.extent.steps else Scorer  # a replay never scores
        self.scorer = kind(model, engine, self.directions, self.config, self.num_states, self.extent)
        self.scorer.check()
        self.updates: list[Update] = []
        self.log: UpdateLog | None = None
        self.told = self.compared = False

    def _layers(self, model: Any) -> dict[str, nn.Module]:
        """The linear layers of the blocks, or those that targets name; and a value head, which may start at random."""
        inside = [pair for name, block in blocks(model) for pair in linear_layers(block, name)]
        excluded = family_of(model.config.model_type).lora_excluded
        layers: dict[str, nn.Module] = {}
        seen: set[int] = set()
        for name, layer in inside:  # blocks may share a layer: it moves once
            if name.rpartition(".")[2] not in excluded and id(layer.weight) not in seen:
                layers[name] = layer
                seen.add(id(layer.weight))
        if self.config.targets:
            layers = {
                name: layer
                for name, layer in layers.items()
                if any(
                    fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern for pattern in self.config.targets
                )
            }
        if not layers:
            known = sorted({name.rpartition(".")[2] for name, _ in inside})
            raise UserError(f"method.targets: no linear layer of a block is called so; there are {', '.join(known)}")
        if head_kind(model) != "language":
            layers[value_head_name(model)] = value_head(model)
        return layers

    @property
    def division(self) -> Division:
        """How the ranks share the next step."""
        return Division(self.engine.group.ranks, self.config.queries)

    def micro_batches(self, batch: Batch, tokens: int) -> list[Batch]:
        parts = self.division.samples_of(self.engine.group.rank, batch)
        if self.scorer.holds_weights:  # and sees to its own memory
            return parts
        budget = tokens // self.scorer.copies(len(self.probes))
        return [micro_batch for part in parts for micro_batch in part.split(budget)]

    @property
    def probes(self) -> list[Probe]:
        """The states of a step that this rank scores. With one side, each rank scores the middle too: where the queries are
        parted, its own slopes are then against its own rounding, and no rank's death takes the middle with it."""
        eps, queries = self.config.eps, self.division.queries_of(self.engine.group.rank)
        if self.config.sides == "one":
            return [Probe(0, 0.0), *(Probe(q, eps) for q in queries)]
        return [Probe(q, sign * eps) for q in queries for sign in (1, -1)]

    @property
    def num_states(self) -> int:
        """States of a step, over all ranks."""
        return self.config.queries + 1 if self.config.sides == "one" else 2 * self.config.queries

    @torch.no_grad()
    def step(self, loss_fn: LossFn, micro_batches: Sequence[Batch], lr: float) -> Metrics:
        was_training = self.model.training
        self.model.eval()  # dropout would drown the difference between two states
        number = len(self.updates)
        checksum = self.directions.checksum() if number and number % CHECK_EVERY == 0 else 0
        self.directions.begin(number, self.config.queries)
        found = (loss_fn(micro_batch, self.probes) for micro_batch in micro_batches)
        table = table_of(self.total({"losses": losses_K, **more} for losses_K, more in found))
        self.model.train(was_training)
        slopes, metrics = self._gathered(table, number)
        scale = lr / len(slopes) / (self._spread(list(slopes.values())) if self.config.scale == "std" else 1.0)
        self._apply(Update(number, tuple(scale * slopes.get(q, 0.0) for q in range(self.config.queries)), checksum))
        return metrics

    @torch.no_grad()
    def rehearse(self, loss_fn: LossFn, micro_batches: Sequence[Batch]) -> None:
        self.directions.begin(len(self.updates), self.config.queries)  # as the next step will
        self.model.eval()
        with self.beside_state():
            for micro_batch in micro_batches:
                loss_fn(micro_batch, self.probes)
        self.model.train()

    def unlike_steps(self) -> Iterator[None]:
        self.directions.fill(self.extent.steps)
        self.directions.begin(0, self.config.queries)
        with phase("update"):
            self.directions.move((0.0,) * self.config.queries)
        yield

    def states(self) -> list[Tensor]:
        own = {id(p) for p in self.params.values()}
        return [x for x in self.directions.state() if id(x) not in own]

    def score(self, batch: Batch, wanted: Wanted) -> Scores:
        if self.scorer.holds_weights:
            return self.scorer.score(batch, wanted, [Probe(0, 0.0)])[0]
        return super().score(batch, wanted)

    def _gathered(self, table: Table, number: int) -> tuple[dict[int, float], Metrics]:
        """From what this rank has found and what the others say: the slope of each query that was scored, and the metrics."""
        group, division = self.engine.group, self.division
        said: dict[str, Any] = {"table": table}
        if len(group.ranks) > 1 and group.check_every and (number % group.check_every == 0 or not self.compared):
            said["state"] = fingerprint(self.directions.state())
            self.compared = True
        answers = group.gather(said)
        check_equal({rank: answer["state"] for rank, answer in answers.items() if "state" in answer}, number)
        slopes: dict[int, float] = {}
        rows: dict[str, list[Any]] = {}
        for queries, found in division.put_together({rank: answer["table"] for rank, answer in answers.items()}):
            losses = found["losses"]
            if bad := [loss for loss in losses if not math.isfinite(loss)]:
                raise NonFiniteError(f"a probe's loss is {bad[0]}")
            again = 1 if slopes and self.config.sides == "one" else 0  # the middle, which counts once
            for name, value in found.items():
                if name != "share":
                    rows.setdefault(name, []).extend(value[again:])
            slopes |= zip(queries, self._slopes(losses), strict=True)
        self._tell_if_equal(slopes)
        metrics = {name: torch.tensor(mean(value), dtype=torch.float64) for name, value in rows.items()}
        metrics["loss"] = metrics.pop("losses")
        metrics["slope"] = torch.tensor(mean(abs(slope) for slope in slopes.values()))
        return slopes, metrics

    def _slopes(self, losses: list[float]) -> list[float]:
        """Of each query: the loss's change along its direction."""
        eps = self.config.eps
        if self.config.sides == "one":
            return [(loss - losses[0]) / eps for loss in losses[1:]]
        return [(up - down) / (2 * eps) for up, down in zip(losses[::2], losses[1::2], strict=True)]

    def _tell_if_equal(self, slopes: Mapping[int, float]) -> None:
        if not any(slopes.values()) and not self.told:
            self.told = True
            warnings.warn(
                f"method.eps: at step {len(self.updates) + 1} the loss is the same on all sides to the last bit, so nothing is "
                f"learnt from it; if that goes on, raise method.eps (now {self.config.eps:g}) or train.batch_size, or hold the "
                "model in a wider type (model.precision)",
                stacklevel=2,
            )

    @staticmethod
    def _spread(slopes: list[float]) -> float:
        """Standard deviation over the queries (FZOO, eq. 6, whose losses are eps times these); inf if all are equal."""
        mean = sum(slopes) / len(slopes)
        spread = (sum((slope - mean) ** 2 for slope in slopes) / max(1, len(slopes) - 1)) ** 0.5
        largest = max(map(abs, slopes))
        return spread if spread > 1e-3 * largest else float("inf")  # slopes that are equal but for rounding: no step

    def _apply(self, update: Update) -> None:
        """Write the update down, then take it; `directions` stand at its step."""
        self.updates.append(update)
        if self.log is not None:
            self.log.append(update)
            if len(self.updates) % FLUSH_EVERY == 0:
                self.log.flush()
        with phase("update"):
            self.directions.move(update.coefficients)
        self.scorer.follow(update)

    def replay(self, updates: Sequence[Update]) -> None:
        """Take updates that were found before, with no log open yet. Raises UserError where they lead elsewhere."""
        for update in updates:
            assert update.step == len(self.updates), "a replay goes on where the updates end"
            if update.checksum and update.checksum != self.directions.checksum():
                raise UserError(
                    f"the log does not lead to what it led to when it was written (checksum before update {update.step + 1}): "
                    "it was made with another version or on another kind of machine"
                )
            self.directions.begin(update.step, len(update.coefficients))
            self._apply(update)

    def keep_log(self, file: Path, about: Mapping[str, Any], at_most: int) -> int:
        header = {**about, **self.identity()}
        if file.exists():
            before, known, lost = read_log(file)
            if other := differing(header, before):
                raise UserError(
                    f"{file}: was written for another run: {', '.join(other)} differ; put back what the run was begun with, or "
                    "start a new one"
                )
            if lost:
                warnings.warn(
                    f"{file}: its last {lost} bytes are no whole record; the run goes on from update {len(known)}",
                    stacklevel=2,
                )
            both = min(len(known), len(self.updates))
            if known[:both] != self.updates[:both]:
                raise UserError(
                    f"{file}: does not agree with the checkpoint; move it away to go on from the checkpoint"
                )
            self.replay(known[both : max(both, at_most)])
        self.log = UpdateLog(file, header, self.updates)
        return len(self.updates)

    def identity(self) -> dict[str, Any]:
        """What a log's updates depend on, beside base weights and seed."""
        config = self.config
        kind = {"directions": config.directions, "noise": config.noise, "momentum": self.optimizer_config.momentum}
        if config.directions == "low_rank":
            kind |= {"rank": config.rank, "refresh_every": config.refresh_every}
        if self.adapter is not None:
            kind |= {"adapter_alpha": config.adapter_alpha, "adapter_start": self.adapter_start}
        shapes = [[name, list(p.shape), str(p.dtype).removeprefix("torch.")] for name, p in self.params.items()]
        return {"version": 1, **kind, "weights": shapes}

    def describe(self) -> str:
        config, number = self.config, self.num_states
        if config.directions == "dense":
            what = f"{config.noise} directions over {short_number(sum(p.numel() for p in self.params.values()))} parameters"
            if self.adapter is not None:
                what += f" of an adapter of rank {config.adapter_rank}"
        else:
            size, turn = config.rank, config.refresh_every
            what = f"directions of rank {size} in {len(self.params)} linear layers, turned every {turn} steps"
        return f"{number} probes a step at eps {config.eps:g}; {what}"

    def memory(self, shapes: Shapes) -> Memory:
        return Memory(0, self.directions.state_bytes())

    def state_dict(self) -> dict[str, Any]:
        packed = b"".join(update.packed() for update in self.updates)
        return {"updates": torch.frombuffer(bytearray(packed), dtype=torch.uint8) if packed else torch.empty(0)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        assert not self.updates, "updates are taken from the base model on"
        updates, _ = parse_updates(bytes(saved["updates"].byte().numpy()))
        self.replay(updates)

    def start_bytes(self) -> int:
        return super().start_bytes() if self.adapter is None else self.adapter.start_bytes()

    @contextmanager
    def at_start(self) -> Iterator[None]:
        if self.adapter is not None:
            with self.adapter.at_start():
                yield
            return
        with self.directions.off(), super().at_start():
            yield

    def save(self, folder: Path) -> None:
        if self.adapter is not None:
            self.adapter.save(folder)
            return
        with self.directions.folded():
            super().save(folder)

    def save_adapter(self, folder: Path, base: str) -> None:
        """Write what has gathered as a PEFT adapter of the base model; needs `fold: never`, so that all of it is there.

        Its rank is that of a direction times the renewals of V. An adapter that the method itself moves is written as it is.
        """
        import peft

        if self.adapter is not None:
            self.adapter.save(folder)
            return
        directions = self.directions
        if not isinstance(directions, LowRankDirections):
            raise UserError("--adapter: dense directions have no low rank; write the whole model")
        if directions.bank_rank is not None:
            raise UserError(
                "--adapter: what has been folded into the weights cannot be told from them; replay with fold: never"
            )
        if head_kind(self.model) != "language":
            raise UserError(
                "--adapter: a value head moves too, which the adapter would not hold; write the whole model"
            )
        rank = directions.columns.rank()
        gathered = {name: directions.columns.of(name) for name in directions.layers if rank}
        config = peft.LoraConfig(
            r=max(1, rank), lora_alpha=max(1, rank), target_modules=list(directions.layers), task_type="CAUSAL_LM"
        )
        with directions.columns.off():
            adapted: Any = peft.get_peft_model(self.model, config)
            adapted.peft_config["default"].base_model_name_or_path = base
            for name, (u, v) in gathered.items():
                layer = adapted.base_model.model.get_submodule(name)
                layer.lora_A["default"].weight.data = v.T.contiguous()
                layer.lora_B["default"].weight.data = u.contiguous()
            adapted.save_pretrained(folder)
