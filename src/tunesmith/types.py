"""The records that cross a border between parts. Shapes: B rows, T tokens in a row, N sequences in the batch.

A batch is packed: sequences lie end to end in rows, and attention never crosses from one to another. A padded batch is
the same record with one sequence a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


PADDING_TOKENS = 8
"""Of a micro-batch that holds nothing: few, and enough for what convolves along a row."""

Form = Literal["answers", "text", "pairs", "feedback", "choices", "steps"]
"""What a sample is: a sequence of which answers are learnt, or all; a preference pair, the chosen sequence first; an answer
marked as desirable or not; a question with one answer of several; a solution whose steps are marked as right or wrong."""


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
    margin: float | None = None
    """Of a preference pair by how much the better answer is better, where the data says so."""
    choices: tuple[str, ...] = ()
    """Classification: the words of all classes; the last answer is the right one of them."""
    steps: tuple[tuple[str, bool], ...] = ()
    """Process supervision: the steps of the last answer, and whether each is right. The answer is these steps joined."""
    columns: tuple[str, ...] = ()
    """Keys of the record, for error messages."""
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

    parent_N: Tensor | None = None
    """int64: the sequence whose first `prefix_N` tokens this one shares; they stand in the row once, as its parent's.
    Itself where it shares none. None: nothing is shared in this batch."""
    prefix_N: Tensor | None = None
    """int64 number of tokens shared with the parent. A sequence's own tokens count their positions on from there."""
    token_columns: Mapping[str, Tensor] = field(default_factory=dict)
    """What an objective asked for about tokens, [B, T, …]: the reference's log-probabilities, a teacher's distribution."""
    sequence_columns: Mapping[str, Tensor] = field(default_factory=dict)
    """What the data or an objective says about sequences, [N, …]. From the data: `label`, float32 (margin of a pair, 1 or 0
    for desirable or not, number of the right class)."""

    def to(self, device: Any) -> Batch:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """All tensors changed."""
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Mapping):
                changed[name] = {key: change(x) for key, x in value.items()}
            elif isinstance(value, tuple):
                changed[name] = tuple({key: change(x) for key, x in media.items()} for media in value)
            else:
                changed[name] = None if value is None else change(value)
        return replace(self, **changed)

    def with_columns(
        self, tokens: Mapping[str, Tensor] | None = None, sequences: Mapping[str, Tensor] | None = None
    ) -> Batch:
        """The batch with further columns."""
        return replace(
            self,
            token_columns={**self.token_columns, **(tokens or {})},
            sequence_columns={**self.sequence_columns, **(sequences or {})},
        )

    def tile(self, copies: int) -> Batch:
        """The batch so many times, copy after copy; each copy's sequences are further ones."""
        import torch  # configurations are read, and this module with them, without it

        if copies == 1:
            return self
        number = len(self.sample_N)

        def again(x: Tensor) -> Tensor:
            return x.repeat(copies, *[1] * (x.ndim - 1))

        def shifted(x: Tensor, by: Any) -> Tensor:
            copy = torch.arange(copies, device=x.device).repeat_interleave(len(x)).view(-1, *[1] * (x.ndim - 1))
            return again(x) + by * copy

        sequence_BT = shifted(self.sequence_BT, number)
        return replace(
            self._each(again),
            sequence_BT=torch.where(again(self.sequence_BT) < 0, -1, sequence_BT),
            group_N=shifted(self.group_N, self.group_N.max() + 1),
            parent_N=None if self.parent_N is None else shifted(self.parent_N, number),
            media_N=self.media_N * copies,
        )

    def num_tokens(self) -> Tensor:
        """Tokens that are not padding; int64 scalar."""
        return (self.sequence_BT >= 0).sum()

    def sequences(self) -> list[tuple[Tensor, Tensor]]:
        """(tokens, weights) of each of the N sequences, whole, also where its beginning stands in its parent's place; empty for
        those that are not in this micro-batch."""
        import torch  # configurations are read, and this module with them, without it

        rows, columns = (self.sequence_BT >= 0).nonzero(as_tuple=True)
        sequence = self.sequence_BT[rows, columns]
        order = sequence.argsort(stable=True)
        sizes = sequence.bincount(minlength=len(self.sample_N)).tolist()
        tokens, weights = (x[rows, columns][order].split(sizes) for x in (self.tokens_BT, self.weights_BT))
        found = list(zip(tokens, weights, strict=True))
        if self.parent_N is None or self.prefix_N is None:
            return found
        for n, (parent, prefix) in enumerate(zip(self.parent_N.tolist(), self.prefix_N.tolist(), strict=True)):
            if prefix and len(found[n][0]):
                of_parent, own = found[parent], found[n]
                found[n] = torch.cat([of_parent[0][:prefix], own[0]]), torch.cat([of_parent[1][:prefix], own[1]])
        return found

    def questions(self) -> list[tuple[Tensor, Tensor]]:
        """(prompt, answer) of each of the N sequences: the tokens before its first stretch of learnt ones, and that stretch.
        Both are empty for sequences that are not in this micro-batch, and for those without a learnt token."""
        found = []
        for tokens, weights in self.sequences():
            learnt = (weights != 0).tolist()
            start = learnt.index(True) if True in learnt else 0
            stop = learnt.index(False, start) if False in learnt[start:] else len(learnt)
            found.append((tokens[:start], tokens[start:stop] if start else tokens[:0]))
        return found

    def row_ends(self) -> list[int]:
        """For each row the column after its last token."""
        width = self.sequence_BT.shape[1]
        ends: list[int] = (width - (self.sequence_BT >= 0).flip(1).long().argmax(1)).tolist()
        return ends

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start … stop-1, cut to the longest of them. Sequence ids stay those of the whole batch."""
        longest = max(replace(self, sequence_BT=self.sequence_BT[start:stop]).row_ends())
        used = slice(start, stop), slice(0, longest)
        here = set(self.sequence_BT[used].unique().tolist()) if self.media_N else set()
        return replace(
            self,
            media_N=tuple(media if n in here else {} for n, media in enumerate(self.media_N)),
            tokens_BT=self.tokens_BT[used],
            positions_BT=self.positions_BT[used],
            sequence_BT=self.sequence_BT[used],
            weights_BT=self.weights_BT[used],
            token_columns={name: column[used] for name, column in self.token_columns.items()},
        )

    def split(self, micro_batch_tokens: int) -> list[Batch]:
        """Cut into micro-batches of at most `micro_batch_tokens` (rows × longest row), at row borders that part no group.

        A row, or rows that share a group, that alone exceed the budget form one micro-batch.
        """
        (borders,) = self.split_borders(micro_batch_tokens)
        return [self.rows(start, stop) for start, stop in pairwise(borders)]

    def split_borders(self, micro_batch_tokens: int, number: int = 1) -> list[list[int]]:
        """For each of `parts` the rows at which `split` cuts it, its first and the one behind its last among them."""
        ends, cuts = self.row_ends(), self._borders()
        found = []
        for first, last in pairwise(_part_borders(ends, cuts, number)):
            borders = [first]
            for cut, following in pairwise(cut for cut in cuts if first < cut <= last):
                if (following - borders[-1]) * max(ends[borders[-1] : following]) > micro_batch_tokens:
                    borders.append(cut)
            found.append([*borders, last])
        return found

    def parts(self, number: int) -> list[Batch]:
        """Cut into at most so many parts of about as many tokens, at row borders that part no group; fewer where there are not
        as many groups."""
        return [self.rows(start, stop) for start, stop in pairwise(self.part_borders(number))]

    def part_borders(self, number: int) -> list[int]:
        """The rows at which `parts` cuts; 0 and the number of rows are the first and the last of them."""
        return _part_borders(self.row_ends(), self._borders(), number)

    def nothing(self) -> Batch:
        """A micro-batch without any of the sequences, a row of padding: for a rank that must run the model beside others."""
        import torch  # configurations are read, and this module with them, without it

        row = self.rows(0, 1)
        used = slice(0, 1), slice(0, PADDING_TOKENS)
        return replace(
            row,
            media_N=tuple({} for _ in row.media_N),
            tokens_BT=row.tokens_BT[used],
            positions_BT=torch.arange(row.tokens_BT[used].shape[1])[None],
            sequence_BT=torch.full_like(row.sequence_BT[used], -1),
            weights_BT=torch.zeros_like(row.weights_BT[used]),
            token_columns={name: column[used] for name, column in row.token_columns.items()},
        )

    def _borders(self) -> list[int]:
        """Rows at which the batch may be cut, its end included: not where the last sequence of one and some of the next are of
        one group."""
        last_B = self.group_N[self.sequence_BT.amax(1)]
        group_BT = self.group_N[self.sequence_BT.clamp(min=0)].where(self.sequence_BT >= 0, -1)
        goes_on = (last_B[:-1, None] == group_BT[1:]).any(1)
        return [*((~goes_on).nonzero()[:, 0] + 1).tolist(), len(last_B)]


def _part_borders(ends: list[int], cuts: list[int], number: int) -> list[int]:
    """See `Batch.part_borders`; ends: of rows, cuts: rows at which the batch may be cut."""
    tokens = [0, *accumulate(ends)]
    goals = [tokens[-1] * n / number for n in range(1, number)]
    chosen = {min((abs(tokens[cut] - goal), cut) for cut in cuts)[1] for goal in goals} | {cuts[-1]}
    return [0, *sorted(chosen)]


TokenTerm = Callable[["Tensor", "Tensor", Mapping[str, "Tensor"]], "Tensor"]
"""A number about each target token, made while its logits exist: (logits [n, V] in at least fp32, the tokens [n], the
batch's token columns at them [n, …]) → [n]. It must not depend on how targets are put together."""


@dataclass(frozen=True)
class Generation:
    """Greedy answers to the prompts of a batch, see `Batch.questions`."""

    max_new_tokens: int
    end_tokens: tuple[int, ...] = ()
    """Any of these ends an answer, and is no part of it."""


@dataclass(frozen=True)
class Wanted:
    """What an objective asks of a forward pass beside the log-probabilities."""

    token_loss: TokenTerm | None = None
    """A loss of its own for each token; its gradient then replaces that of the log-probabilities."""
    observed: Mapping[str, TokenTerm] = field(default_factory=dict)
    """Further numbers about each target, without gradient; made of log-probabilities in place of logits."""
    additive: frozenset[str] = frozenset()
    """Those of `observed` that are sums over the vocabulary, so that ranks who share it out can each make a part."""
    among: str | None = None
    """The token column with the few tokens [n, K] whose logits alone `token_loss` and `observed` read; -1 for none. Without
    gradient nothing else is then multiplied with the output layer, and log-probabilities are those among these tokens."""
    values: bool = False
    """What the model's value head says at every token."""
    router: bool = False
    """How unevenly a mixture of experts spreads its tokens."""
    embedding_noise: float = 0.0
    """NEFTune's alpha: noise on the embeddings while training."""
    generate: Generation | None = None
    """Answers in the model's own words; nothing else is computed then, and there is no gradient."""
    is_likelihood: bool = False
    """Whether the loss weighs the log-probabilities (or token losses) by a multiple of the batch's weights. If so, the
    gradient of a trained head is taken in the forward pass, and its product with the vocabulary done once less."""

    @property
    def reads_logits(self) -> bool:
        """Whether a target's logits are asked for all at once."""
        return self.token_loss is not None or bool(self.observed.keys() - self.additive)


@dataclass(frozen=True)
class Scores:
    """What a forward pass says about a batch: all that an objective sees of the model."""

    logprobs_BT: Tensor
    """log p(token t | tokens of its sequence before t) in nats where the batch's weight is not 0, else 0."""
    token_loss_BT: Tensor | None = None
    """What `Wanted.token_loss` says of each target, else 0."""
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    """For each of `Wanted.observed` what it says of each target, [B, T], else 0."""
    values_BTC: Tensor | None = None
    """Outputs of the value head at every token, C numbers each."""
    balance_N: Tensor | None = None
    """For each sequence the load-balancing loss of a mixture of experts, 1 where experts are used evenly and with k experts
    a token k times that; 0 for sequences that are not here."""
    generated_NG: Tensor | None = None
    """Tokens of each sequence's generated answer, int64; -1 behind its end, and for sequences that are not here."""

    def split(self, parts: int) -> list[Scores]:
        """The scores of each copy of a batch that was tiled."""

        def of(x: Tensor | None) -> Any:
            return [None] * parts if x is None else x.chunk(parts)

        return [
            Scores(*each)
            for each in zip(
                self.logprobs_BT.chunk(parts),
                of(self.token_loss_BT),
                [{name: x.chunk(parts)[n] for name, x in self.observed.items()} for n in range(parts)],
                of(self.values_BTC),
                of(self.balance_N),
                of(self.generated_NG),
                strict=True,
            )
        ]


@dataclass(frozen=True)
class Memory:
    """Bytes that a part holds through a step on one device. The planner and the run's header add them up."""

    gradients_bytes: int = 0
    optimizer_bytes: int = 0
