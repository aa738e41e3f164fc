"""All states in one forward pass of the model that is here.

Shapes: T tokens, I channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.methods.directions import LowRankDirections, device_of, layer_sizes
from tunesmith.models.load import decoder_of
from tunesmith.models.low_rank import Probe
from tunesmith.scorers.base import Scorer
from tunesmith.tensors import is_hollow
from tunesmith.types import Batch, Scores, Wanted


class BatchedScorer(Scorer):
    """Low-rank states side by side: the base weights are read once for all of them (`models/low_rank.py`)."""

    directions: LowRankDirections

    @torch.no_grad()
    def check(self) -> None:
        """Two rows of tokens must give the same beside each other under two states, and each beside itself under its own:
        experts that are modules of their own, say, are given tokens of all states without order.

        Each token is held against the gap between its own two states, in the middle channel: a massive activation is as large
        as all others together, under any state.
        """
        if is_hollow(next(self.model.parameters())):  # nothing to compare
            return
        u = {
            name: torch.full((1, layer_sizes(layer)[0], self.directions.rank), 0.01, device=device_of(layer))
            for name, layer in self.directions.layers.items()
        }
        tokens = torch.arange(16, device=self.model.device).view(2, 8) % 7 + 1
        probes = (Probe(0, 1.0), Probe(0, -1.0))
        self.directions.begin(0, 1)
        together = self._hidden(tokens, probes, u)
        for row in range(2):
            alike = tokens[[row, row]]  # of the same shape as together, so that the same kernels round alike
            own, other = (self._hidden(alike, (probe, probe), u)[0] for probe in (probes[row], probes[1 - row]))
            if not own.isfinite().all():
                dtype = str(own.dtype).removeprefix("torch.")
                raise UserError(
                    f"model.precision: {type(self.model).__name__} gives hidden states that are not finite in {dtype}; set it "
                    "to mixed or fp32, or take other weights if these are broken"
                )
            rounding = 2 * torch.finfo(own.dtype).eps * _middle(own)
            if not (_middle(together[row] - own) <= 0.1 * _middle(own - other) + rounding).all():  # NaN fails too
                raise UserError(
                    f"method.scorer: {type(self.model).__name__} does not keep the tokens of several states apart; set "
                    "method.scorer to in_place"
                )

    def _hidden(self, tokens: Tensor, probes: Sequence[Probe], u: Mapping[str, Tensor]) -> Tensor:
        with self.directions.columns.at(probes, u):
            return decoder_of(self.model)(input_ids=tokens, use_cache=False)[0]

    def copies(self, num_probes: int) -> int:
        return num_probes

    @torch.no_grad()
    def score(self, batch: Batch, wanted: Wanted, probes: Sequence[Probe]) -> list[Scores]:
        with self.directions.columns.at(probes, self.directions.u):
            together = self.engine.score(self.model, batch.tile(len(probes)), wanted)
        return together.split(len(probes))


def _middle(x_TI: Tensor) -> Tensor:
    """Of each token, the median magnitude over its channels."""
    return x_TI.float().abs().median(-1).values
