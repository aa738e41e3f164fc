"""The records that cross a border between parts. Shapes: B rows, T tokens in a row, N sequences in the batch.

A batch is packed: sequences lie end to end in rows, and attention never crosses from one to another. A padded batch is
the same record with one sequence a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a record comes from, for error messages."""

    file: str
    line: int
    """1-based line of a text file; 1-based record number elsewhere."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Message:
    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True)
class Piece:
    """A span of plain text that is not rendered by a chat template."""

    text: str
    learn: bool
    """Whether `sft` takes the loss on it."""


@dataclass(frozen=True)
class Example:
    """What every data format is read into: a conversation, or plain text in pieces. Exactly one of the two is not empty."""

    place: Place
    messages: tuple[Message, ...] = ()
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Rows of tokens in which sequences lie end to end."""

    tokens_BT: Tensor
    """int64 token ids; padding holds any valid id."""
    positions_BT: Tensor
    """int64 position inside the sequence: restarts at 0 with each one, and is 0 on padding."""
    sequence_BT: Tensor
    """int64 index of the sequence (0 … N-1), -1 on padding."""
    weights_BT: Tensor
    """float32 loss weight of predicting this token from those before it; 0 on padding and on each sequence's first token."""
    sample_N: Tensor
    """int64 index of the sample in the data set that each sequence comes from."""
    group_N: Tensor
    """int64 id: sequences of one group (a preference pair, say) never part. Ids rise from row to row."""

    def to(self, device: object) -> Batch:
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def num_tokens(self) -> Tensor:
        """Tokens that are not padding; int64 scalar."""
        return (self.sequence_BT >= 0).sum()

    def row_ends(self) -> list[int]:
        """For each row the column after its last token."""
        width = self.sequence_BT.shape[1]
        return [width - int(row.flip(0).long().argmax()) for row in self.sequence_BT >= 0]

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start … stop-1, cut to the longest of them. Sequence ids stay those of the whole batch."""
        used = slice(start, stop), slice(0, max(self.row_ends()[start:stop]))
        return replace(
            self,
            tokens_BT=self.tokens_BT[used],
            positions_BT=self.positions_BT[used],
            sequence_BT=self.sequence_BT[used],
            weights_BT=self.weights_BT[used],
        )

    def split(self, micro_batch_tokens: int) -> list[Batch]:
        """Cut into micro-batches of at most `micro_batch_tokens` (rows × longest row), at row borders that part no group.

        A row, or rows that share a group, that alone exceed the budget form one micro-batch.
        """
        ends = self.row_ends()
        cuts = [row for row in range(1, len(ends)) if not self._one_group_across(row)] + [len(ends)]
        pieces, start = [], 0
        for cut, following in pairwise(cuts):
            if (following - start) * max(ends[start:following]) > micro_batch_tokens:
                pieces.append(self.rows(start, cut))
                start = cut
        return [*pieces, self.rows(start, len(ends))]

    def _one_group_across(self, row: int) -> bool:
        """Whether rows row-1 and row hold sequences of one group."""
        above, below = (self.sequence_BT[r][self.sequence_BT[r] >= 0] for r in (row - 1, row))
        return bool((self.group_N[above.max()] == self.group_N[below]).any())


@dataclass(frozen=True)
class Scores:
    """What a forward pass says about a batch: all that an objective sees of the model."""

    logprobs_BT: Tensor
    """log p(token t | tokens of its sequence before t) in nats where the batch's weight is not 0, else 0."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a part holds through a step on one device. The planner and the run's header add them up."""

    gradients_bytes: int = 0
    optimizer_bytes: int = 0
