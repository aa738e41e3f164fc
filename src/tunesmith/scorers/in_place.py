"""One state after the other, each put into the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.errors import UserError
from tunesmith.models.low_rank import Probe
from tunesmith.phases import phase
from tunesmith.scorers.base import Scorer
from tunesmith.types import Batch, Scores, Wanted


class InPlaceScorer(Scorer):
    """Writes each state into the weights, and afterwards the bits that were there: the ground truth of all scorers, and the
    only one for dense directions.

    MeZO's code adds and subtracts instead of keeping a copy, which leaves rounding errors in the weights at each step. The
    copy is that of the weights that move, on the device.
    """

    def check(self) -> None:
        if any(p.element_size() < 4 for p in self.directions.weights().values()):
            raise UserError(
                "method.scorer: in_place puts each state into the weights themselves, and 16 bits would round its step away; "
                "set it to batched, or model.precision to mixed or fp32"
            )

    @torch.no_grad()
    def score(self, batch: Batch, wanted: Wanted, probes: Sequence[Probe]) -> list[Scores]:
        weights = self.directions.weights()
        before = {name: p.detach().clone() for name, p in weights.items()}
        found = []
        try:
            for probe in probes:
                with phase("update"):
                    for name, p in weights.items():
                        if probe.coefficient:
                            direction = self.directions.direction(name, probe.query).to(p.dtype)
                            torch.add(before[name], direction, alpha=probe.coefficient, out=p)
                        else:
                            p.copy_(before[name])
                found.append(self.engine.score(self.model, batch, wanted))
        finally:
            for name, p in weights.items():
                p.copy_(before[name])
        return found
