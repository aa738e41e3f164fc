"""The records that cross a border between parts. Shapes: B rows, T tokens in a row, N sequences in the batch.

A batch is packed: sequences lie end to end in rows, and attention never crosses from one to another. A padded batch is
the same record with one sequence a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a record comes from, for error messages."""

    file: str
    line: int
    """1-based line of a file with a record a line; 1-based record number elsewhere (.json, .parquet, .arrow, hub)."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Media:
    """An image, audio or video inside a message."""

    kind: Literal["image", "audio", "video"]
    source: str | bytes
    """Path of a local file, or the encoded file itself."""


@dataclass(frozen=True)
class Insert:
    """What a processor writes into a text in place of a placeholder for media."""

    start: int
    stop: int
    """Characters of the placeholder."""
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call of a function by the assistant."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str | tuple[str | Media, ...] = ""
    """Text, or text and media in order."""
    reasoning: str = ""
    """What the assistant thought before `content`."""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    """Of the tool that speaks, for the role tool."""
    call_id: str | None = None
    """The call that a tool's message answers."""
    weight: float | None = None
    """Loss weight of this turn; None: as `data.learn` says."""


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
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call, in OpenAI's form."""
    rejected: Example | None = None
    """Of a preference pair the worse one, prompt included; this example is the better one."""
    desirable: bool | None = None
    """Unpaired feedback on the last answer (KTO)."""
    answer: str | None = None
    """What a verifier compares a generated answer with."""
    choices: tuple[str, ...] = ()
    """Classification: the words of all classes; the last answer is the right one of them."""
    folder: str = ""
    """Where relative paths of media start."""


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
    media_N: tuple[Mapping[str, Tensor], ...] = ()
    """What the model reads of each sequence beside its tokens: a processor's tensors. Empty if no sequence has any; if one
    has, each sequence has a row of its own."""

    def to(self, device: Any) -> Batch:
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "media_N"}
        return replace(
            self,
            **{name: column.to(device, non_blocking=True) for name, column in columns.items()},
            media_N=tuple({k: x.to(device, non_blocking=True) for k, x in media.items()} for media in self.media_N),
        )

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
        here = set(self.sequence_BT[used].unique().tolist()) if self.media_N else set()
        return replace(
            self,
            media_N=tuple(media if n in here else {} for n, media in enumerate(self.media_N)),
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
