"""MeZO and LOZO as a loop over the weights, the way their own programs do it: perturb in place, run, perturb back, run,
restore, update. Sequences are padded, each option of an example is a sequence of its own, and logits are made at all positions.

Written here from the papers' algorithms. The one difference from LOZO's program is that the step which renews V applies the U
that it probed, which theirs does not. LOZO takes its numbers from where ours come from, so that both walk the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.methods.directions import U, V
from tunesmith.methods.noise import key_of, noise
from tunesmith.types import Batch


class Options:
    """A batch of choices as padded rows, a row for each option of each example."""

    def __init__(self, batch: Batch) -> None:
        rows, self.labels = [], []
        for (tokens, weights), choices in zip(batch.sequences(), _choices(batch), strict=True):
            place = int(weights.nonzero()[0])
            self.labels.append(int((choices == tokens[place]).nonzero()[0]))
            rows += [torch.cat([tokens[:place], choice[None]]) for choice in choices]
        self.count = len(rows) // len(self.labels)
        width = -(-max(map(len, rows)) // 8) * 8  # a multiple of 8, as their collator pads
        self.ends = torch.tensor([len(row) for row in rows])
        self.ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        self.mask = torch.arange(width)[None] < self.ends[:, None]
        self.target = torch.tensor(self.labels)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        device = model.device
        logits = model(
            input_ids=self.ids.to(device), attention_mask=self.mask.to(device).long(), use_cache=False
        ).logits
        logprobs = logits.float().log_softmax(-1)
        last = self.ids[torch.arange(len(self.ids)), self.ends - 1].to(device)
        of_option = logprobs[torch.arange(len(self.ids)), self.ends - 2].gather(1, last[:, None])[:, 0]
        scores = of_option.view(-1, self.count)
        return float(torch.nn.functional.cross_entropy(scores, self.target.to(device)))


def _choices(batch: Batch) -> list[Tensor]:
    rows, columns = (batch.weights_BT != 0).nonzero(as_tuple=True)
    order = batch.sequence_BT[rows, columns].argsort()
    found = batch.token_columns["choices"][rows, columns][order]
    return [row[row >= 0] for row in found]


class MezoLoop:
    """MeZO (Malladi et al. 2023, algorithm 1)."""

    def __init__(self, model: Any, eps: float) -> None:
        self.model, self.eps = model, eps
        self.parameters = list(model.parameters())
        self.updates = 0

    def _perturb(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for p in self.parameters:
            z = torch.normal(mean=0.0, std=1.0, size=p.shape, device=p.device, dtype=p.dtype)
            p.data = p.data + scale * z

    @torch.no_grad()
    def step(self, batch: Batch, lr: float) -> float:
        options, seed = Options(batch), self.updates
        self._perturb(seed, self.eps)
        up = options.loss(self.model)
        self._perturb(seed, -2 * self.eps)
        down = options.loss(self.model)
        self._perturb(seed, self.eps)
        self._perturb(seed, -lr * (up - down) / (2 * self.eps))
        self.updates += 1
        return (up + down) / 2


class LozoLoop:
    """LOZO (Chen et al. 2024, algorithm 1), over the same linear layers as ours."""

    def __init__(
        self, model: Any, layers: dict[str, Any], eps: float, rank: int, refresh_every: int, seed: int
    ) -> None:
        self.model, self.eps, self.rank, self.refresh_every, self.seed = model, eps, rank, refresh_every, seed
        self.weights = [layer.weight for layer in layers.values()]
        self.v: list[Tensor] = []
        self.updates = 0

    def _perturb(self, scale: float) -> None:
        for index, (p, v) in enumerate(zip(self.weights, self.v, strict=True)):
            u = noise("gaussian", key_of(self.seed, U, self.updates, 0, index), (p.shape[0], self.rank), p.device)
            p.data = p.data + scale * (u @ v.T).to(p.dtype)

    @torch.no_grad()
    def step(self, batch: Batch, lr: float) -> float:
        if self.updates % self.refresh_every == 0:
            block = self.updates // self.refresh_every
            self.v = [
                noise("gaussian", key_of(self.seed, V, block, index), (p.shape[1], self.rank), p.device)
                for index, p in enumerate(self.weights)
            ]
        options = Options(batch)
        self._perturb(self.eps)
        up = options.loss(self.model)
        self._perturb(-2 * self.eps)
        down = options.loss(self.model)
        self._perturb(self.eps)
        self._perturb(-lr / self.rank * (up - down) / (2 * self.eps))
        self.updates += 1
        return (up + down) / 2
