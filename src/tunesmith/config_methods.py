"""The configuration's sections on methods: what trains, and how a gradient is had. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tunesmith.config_section import Count, PositiveInt, Section, Size


class FullConfig(Section):
    """Every parameter is trained."""

    default_lr: ClassVar[float] = 2e-5
    name: Literal["full"] = "full"


class FreezeConfig(Section):
    """Some parameters are trained as they are, all others stay."""

    default_lr: ClassVar[float] = 5e-5
    name: Literal["freeze"] = "freeze"
    last_blocks: Count = 0
    """Train the last n transformer blocks."""
    first_blocks: Count = 0
    """Train the first n transformer blocks."""
    patterns: tuple[str, ...] = ()
    """Train parameters whose name matches one of these shell patterns, such as `*.mlp.*` or `lm_head.*`."""

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if not (self.last_blocks or self.first_blocks or self.patterns):
            raise ValueError("nothing would train: set last_blocks, first_blocks or patterns")
        return self


class LoraConfig(Section):
    """Low-rank adapters through PEFT (Hu et al. 2021), with its variants as fields."""

    default_lr: ClassVar[float] = 2e-4
    name: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    """Rank r of the update B·A."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora). Default: 2 × rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names (last parts, such as q_proj) or `all-linear`: every linear layer but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapters and saved with them, such as embed_tokens."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(rank) (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed adapters: direction by LoRA, magnitude on its own (Liu et al. 2024)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa"] = "default"
    """Start of A and B. pissa: principal singular vectors (Meng et al. 2024), saved as an ordinary adapter."""
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """LoRA+ (Hayou et al. 2024): learning rate of B over that of A; the paper advises 16."""

    @model_validator(mode="after")
    def _pissa_alone(self) -> Self:
        if self.init == "pissa" and (self.dora or self.modules_to_save):
            raise ValueError(
                "init: pissa is saved as a difference of A and B alone: it goes with neither dora nor modules_to_save"
            )
        return self


class ChunkConfig(Section):
    """Every parameter is trained, a chunk at a time: the memory of full fine-tuning without its gradients and optimizer state
    (ChunkFT, arXiv 2605.21177; BAdam, HiFT and LISA are settings of it)."""

    default_lr: ClassVar[float] = 5e-5
    name: Literal["chunk"] = "chunk"
    memory: Size | None = None
    """What the run may take at its peak, such as 14GiB: chunks become as large as that allows, and activations are kept or
    computed again as it asks. On a GPU it is what torch allocates there, on the CPU the process's own memory."""
    chunk_bytes: Size | None = None
    """Gradients, master weights and optimizer state of a chunk at most, such as 500MiB."""
    num_chunks: PositiveInt | None = None
    """Number of chunks, of equal bytes. Default, where neither memory nor chunk_bytes says it: 16."""
    layout: Literal["bytes", "layers"] = "bytes"
    """bytes: chunks of equal size, cut inside weights where it falls so; layers: a chunk is a transformer block, or what lies
    before, between or behind them (embeddings, head), as in BAdam, HiFT and LISA."""
    num_active: PositiveInt = 1
    """Chunks that train together, under layout layers."""
    order: Literal["random", "sampled", "ascending", "descending"] | tuple[Count, ...] = "random"
    """random: each cycle visits all chunks, shuffled; sampled: drawn anew each time (LISA); ascending: from the embeddings up;
    descending; or the numbers of chunks, to be repeated."""
    updates_per_chunk: PositiveInt | None = None
    """Updates before the next chunk's turn. Default: so many that the run has eight cycles, at least 1 and at most 100."""
    state: Literal["keep", "reset", "8bit"] = "keep"
    """Optimizer state of a chunk that waits: kept; forgotten (BAdam), which costs nothing; kept in 8 bits a number."""
    offload: Literal["auto", "host", "disk"] = "auto"
    """Where it waits: the host's memory, or a temporary file; auto: host under a GPU, disk where the host itself trains."""
    weights: Literal["resident", "stream"] = "resident"
    """stream: blocks wait there too, and come to the device when their turn is near: for models larger than its memory."""
    rounding: Literal["master", "stochastic"] = "master"
    """How bf16 weights take small updates: an fp32 copy of the active chunk, or rounding at random in proportion."""
    always: tuple[str, ...] = ()
    """Parameters whose name matches one of these shell patterns train in every chunk (LISA: `*embed*` and `lm_head*`)."""
    frozen: tuple[str, ...] = ()
    """Parameters whose name matches never train (BAdam: `*embed*` and `lm_head*`)."""
    row_alignment: PositiveInt = 128
    """Weights are cut at multiples of so many rows."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        given = [name for name in ("memory", "chunk_bytes", "num_chunks") if getattr(self, name) is not None]
        if len(given) > 1 and given != ["memory", "num_chunks"]:
            raise ValueError(f"{' and '.join(given)} say the same twice: give one of them")
        if given and self.layout == "layers":
            raise ValueError(f"{given[0]}: layout layers makes a chunk of each block, whatever its size; leave it out")
        if self.num_active > 1 and self.layout == "bytes":
            raise ValueError(
                "num_active: several blocks can train together, under layout layers; here make larger chunks"
            )
        if self.num_active > 1 and isinstance(self.order, tuple):
            raise ValueError("order: a list names one chunk for each turn: leave num_active at 1")
        if self.memory is not None and self.weights == "stream":
            raise ValueError("memory: what streamed weights take is not counted: give chunk_bytes or num_chunks")
        if self.state == "reset" and self.offload != "auto" and self.weights == "resident":
            raise ValueError("offload: state reset leaves nothing to keep; leave it out, or set state to keep or 8bit")
        return self


class ZerothConfig(Section):
    """Tuning by scoring alone, without a backward pass: the loss at points near the parameters says which way to go (MeZO, LOZO
    and FZOO are settings of it)."""

    default_lr: ClassVar[float] = 1e-6
    adapter_lr: ClassVar[float] = 5e-5
    """Default learning rate where an adapter moves."""
    name: Literal["zeroth"] = "zeroth"
    directions: Literal["low_rank", "dense"] = "low_rank"
    """low_rank: products U Vᵀ in the blocks' linear layers (LOZO), whose states are scored in one pass; dense: every number
    of every parameter on its own (MeZO), one pass a state."""
    rank: PositiveInt = 2
    """Of a low-rank direction."""
    refresh_every: PositiveInt = 50
    """Steps for which a low-rank direction keeps its V (LOZO's nu)."""
    noise: Literal["gaussian", "rademacher"] = "gaussian"
    """What directions are drawn from; rademacher: 1 or -1 (FZOO)."""
    eps: Annotated[float, Field(gt=0)] = 1e-3
    """How far from the parameters the loss is looked at, in units of a direction."""
    queries: PositiveInt = 1
    """Directions a step. Each costs one or two scorings of the batch, and they average."""
    sides: Literal["two", "one"] = "two"
    """two: forward and back along each direction; one: forward alone, against the loss at the parameters (FZOO)."""
    scale: Literal["none", "std"] = "none"
    """std: a step is divided by the standard deviation of the slopes along its directions (FZOO)."""
    targets: tuple[str, ...] = ()
    """What moves. low_rank: linear layers by the last part of their name or a shell pattern; default: all of the blocks.
    dense: shell patterns of parameters; default: all. With an adapter: the linear layers that get one, as under lora."""
    adapter_rank: Count = 0
    """With directions dense: the weights stand still, and A and B of a LoRA adapter of this rank move (MeZO-LoRA); 0: none."""
    adapter_alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapter's update is scaled by adapter_alpha / adapter_rank. Default: 2 × adapter_rank."""
    scorer: Literal["auto", "batched", "in_place", "vllm"] = "auto"
    """How the states of a step are scored. batched: all in one pass, the weights read once and never written; in_place: each
    in turn, put into the weights; vllm: by a vLLM engine on a copy of the weights; auto: batched where directions are of low
    rank."""
    vllm: dict[str, Any] = Field(default={})
    """Arguments of `vllm.LLM` over those chosen here, such as gpu_memory_utilization."""
    fold: Literal["auto", "never"] = "auto"
    """When gathered low-rank updates are put into the weights. auto: when V is renewed, for 16-bit weights less often; never:
    they stay beside them, and each renewal adds columns to every pass."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.scale == "std" and self.queries < 2:
            raise ValueError(
                "scale: std needs several directions to know their spread: set queries to 2 or more (FZOO: 8)"
            )
        if self.directions == "dense" and self.scorer in ("batched", "vllm"):
            raise ValueError(
                f"scorer: {self.scorer} scores states of low rank; with directions: dense, leave it at auto"
            )
        if self.vllm and self.scorer != "vllm":
            raise ValueError("vllm: has an effect with scorer: vllm alone")
        if self.adapter_rank and self.directions == "low_rank":
            raise ValueError(
                "adapter_rank: an adapter's A and B move number by number: set directions to dense, or leave adapter_rank at 0"
            )
        if self.adapter_alpha is not None and not self.adapter_rank:
            raise ValueError("adapter_alpha: scales an adapter, and there is none: set adapter_rank too")
        return self

    @property
    def scorer_in_use(self) -> str:
        """The scorer, resolved."""
        if self.scorer == "auto":
            return "batched" if self.directions == "low_rank" else "in_place"
        return self.scorer


AnyMethod = FullConfig | FreezeConfig | LoraConfig | ChunkConfig | ZerothConfig
