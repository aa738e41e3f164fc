"""The configuration's sections on objectives: what is minimised. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.config_section import PositiveInt, Section, Share

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class ObjectiveSection(Section):
    """What all objectives share."""

    lr_factor: ClassVar[float] = 1.0
    """Default learning rate under this objective over that of supervised fine-tuning."""


class LikelihoodSection(ObjectiveSection):
    """What objectives on the likelihood of tokens share."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target that is spread over the whole vocabulary (Szegedy et al. 2016)."""
    z_loss: NotNegative = 0.0
    """Weight of the squared log of the softmax's denominator, which keeps logits small (PaLM uses 1e-4)."""
    neftune_alpha: NotNegative = 0.0
    """NEFTune (Jain et al. 2023): uniform noise on the embeddings while training, alpha / sqrt(length × width); often 5."""
    router_loss: NotNegative = 0.0
    """Weight of a mixture of experts' load-balancing loss, taken for each sequence; models come with 0.001 to 0.02."""


class SftConfig(LikelihoodSection):
    """Supervised fine-tuning: loss on the assistant's turns (or on completions)."""

    name: Literal["sft"] = "sft"
    loss: Literal["nll", "dft", "eaft"] = "nll"
    """nll; dft: each token weighed by its own probability (Wu et al. 2025); eaft: by the entropy of the 20 likeliest tokens,
    so that confident predictions are left alone (Diao et al. 2026)."""
    eaft_power: Positive = 1.0
    """With loss: eaft, the power to which the entropy (0 to 1) is raised."""

    @model_validator(mode="after")
    def _one_token_loss(self) -> Self:
        if self.loss != "nll" and (self.label_smoothing or self.z_loss):
            raise ValueError(f"label_smoothing and z_loss go with loss: nll, not with {self.loss}")
        if self.loss != "eaft" and self.eaft_power != 1.0:
            raise ValueError("eaft_power: without loss: eaft it would have no effect")
        return self


class PretrainConfig(LikelihoodSection):
    """Language modelling: loss on all tokens."""

    name: Literal["pretrain"] = "pretrain"


class ReferenceSection(ObjectiveSection):
    """What objectives that compare the model with a reference share."""

    lr_factor: ClassVar[float] = 0.05
    reference: Literal["live", "precompute"] = "live"
    """live: scored beside the model at every step; precompute: the data is scored once before training and the numbers kept in
    a file, so that no reference is held or run while training."""
    reference_model: str | None = None
    """Folder or hub id of another model as the reference. Default: the model as it was before training (with lora the adapter
    is switched off, which costs no memory; else a frozen copy of what trains)."""


PairLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "apo_zero", "apo_down", "discopop",
]  # fmt: skip


def _weighted(value: Any) -> Any:
    """`sigmoid` means `{sigmoid: 1.0}`, and a list gives each of its losses the weight 1."""
    if isinstance(value, str):
        return {value: 1.0}
    return dict.fromkeys(value, 1.0) if isinstance(value, list | tuple) else value


class DpoConfig(ReferenceSection):
    """Direct preference optimisation (Rafailov et al. 2023) and its family: learn pairs against a reference."""

    name: Literal["dpo"] = "dpo"
    loss: Annotated[dict[PairLoss, Positive], BeforeValidator(_weighted)] = Field(
        default={"sigmoid": 1.0}, min_length=1
    )
    """Which loss on a pair, or several with their weights, such as `{sigmoid: 0.8, bco_pair: 0.2}` (MPO)."""
    beta: Positive = 0.1
    """How strongly the model is held at the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that may be the wrong way round: conservative DPO; robust and exo_pair need it above 0."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Which divergence from the reference the reward stands for (Wang et al. 2024)."""
    alpha_divergence: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Alpha of f_divergence: alpha. Near 0 it is reverse_kl, at 1 forward_kl."""
    ld_alpha: Share = 1.0
    """LD-DPO (Liu et al. 2024): weight of the tokens by which the longer answer exceeds the shorter one; 1: none of it."""
    sft_weight: NotNegative = 0.0
    """Weight of the chosen answer's mean negative log-likelihood, added to the loss (RPO, MPO)."""
    discopop_tau: Positive = 0.05
    """Temperature of discopop's blend."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        smoothed = {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot"}
        needing = [name for name in ("robust", "exo_pair") if name in self.loss]
        if needing and not self.label_smoothing:
            raise ValueError(f"label_smoothing: {needing[0]} needs it above 0, such as 0.1")
        if self.label_smoothing and not smoothed & set(self.loss):
            raise ValueError(
                f"label_smoothing: no effect on {', '.join(self.loss)}; it is for {', '.join(sorted(smoothed))}"
            )
        if self.alpha_divergence != 0.5 and self.f_divergence != "alpha":
            raise ValueError("alpha_divergence: without f_divergence: alpha it would have no effect")
        if self.discopop_tau != 0.05 and "discopop" not in self.loss:
            raise ValueError("discopop_tau: without loss: discopop it would have no effect")
        of_ratios = {"nca_pair", "bco_pair", "sppo_hard", "aot", "apo_zero", "apo_down"} & set(self.loss)
        if self.f_divergence != "reverse_kl" and of_ratios:
            raise ValueError(f"f_divergence: {', '.join(sorted(of_ratios))} is defined for reverse_kl alone")
        return self


class OrpoConfig(ObjectiveSection):
    """ORPO (Hong et al. 2024): supervised fine-tuning and an odds ratio of pairs in one, without a reference."""

    lr_factor: ClassVar[float] = 0.1
    name: Literal["orpo"] = "orpo"
    beta: Positive = 0.1
    """Weight of the odds ratio (lambda in the paper)."""


class SimpoConfig(ObjectiveSection):
    """SimPO (Meng et al. 2024): mean log-probabilities as rewards and a margin between them, without a reference."""

    lr_factor: ClassVar[float] = 0.05
    name: Literal["simpo"] = "simpo"
    beta: Positive = 2.0
    """Scale of the rewards."""
    gamma: NotNegative = 1.0
    """Margin that the chosen reward is to have over the rejected one."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that may be the wrong way round."""
    sft_weight: NotNegative = 0.0
    """Weight of the chosen answer's mean negative log-likelihood, added to the loss."""


class CpoConfig(ObjectiveSection):
    """CPO (Xu et al. 2024): pairs under a uniform reference, and the likelihood of the chosen answer."""

    lr_factor: ClassVar[float] = 0.05
    name: Literal["cpo"] = "cpo"
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Which loss on the difference of the two log-probabilities."""
    beta: Positive = 0.1
    """Scale of that difference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that may be the wrong way round."""
    sft_weight: NotNegative = 1.0
    """Weight of the chosen answer's mean negative log-likelihood."""

    @model_validator(mode="after")
    def _smoothing_has_an_effect(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing: no effect on loss: {self.loss}; it is for sigmoid")
        return self


class KtoConfig(ReferenceSection):
    """KTO (Ethayarajh et al. 2024): answers marked as desirable or not, no pairs needed."""

    name: Literal["kto"] = "kto"
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto; or apo_zero_unpaired (D'Oosterlinck et al. 2024), which needs no KL estimate."""
    beta: Positive = 0.1
    """How strongly the model is held at the reference."""
    desirable_weight: Positive = 1.0
    """Weight of desirable answers; with many more of one kind, weigh the rarer one up."""
    undesirable_weight: Positive = 1.0
    """Weight of undesirable answers."""

    @model_validator(mode="after")
    def _kl_is_live(self) -> Self:
        if self.loss == "kto" and self.reference == "precompute":
            raise ValueError(
                "reference: kto scores answers mismatched within each batch too, which nobody knows beforehand; use live, "
                "or loss: apo_zero_unpaired"
            )
        return self


class BcoConfig(ReferenceSection):
    """BCO (Jung et al. 2024): a binary classifier of answers marked as desirable or not, its threshold a running mean."""

    name: Literal["bco"] = "bco"
    beta: Positive = 0.1
    """How strongly the model is held at the reference."""


class RewardConfig(ObjectiveSection):
    """Reward model: a number for each answer, so that chosen ones get more (Bradley-Terry). Margins are used where given."""

    lr_factor: ClassVar[float] = 0.5
    name: Literal["reward"] = "reward"
    center: NotNegative = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them around 0 (Eisenstein et al. 2023); often 0.01."""


class PrmConfig(ObjectiveSection):
    """Process reward model: whether each step of a solution is right."""

    lr_factor: ClassVar[float] = 0.5
    name: Literal["prm"] = "prm"


class ClassifyConfig(ObjectiveSection):
    """Classification by verbalizer: cross-entropy over the label words at the one position where they differ."""

    name: Literal["classify"] = "classify"
    loss: Literal["cross_entropy", "accuracy"] = "cross_entropy"
    """cross_entropy; or accuracy: the share of texts whose right word is not the likeliest, which has no gradient and is for
    method: zeroth."""


class AnswerConfig(ObjectiveSection):
    """Answers that the model generates, compared with the data's: 1 - F1 or exact match. No gradient: for method: zeroth."""

    name: Literal["answer"] = "answer"
    metric: Literal["f1", "exact_match"] = "f1"
    """What an answer is worth, as SQuAD defines it: f1 of its words, or exact_match; lower case, without punctuation and
    articles."""
    max_new_tokens: PositiveInt = 32
    """An answer is cut off after so many tokens. Each is a pass of the model: give no more than the data's answers have."""


class DistillConfig(ObjectiveSection):
    """Distillation: learn a teacher's distribution over the next token."""

    name: Literal["distill"] = "distill"
    teacher: str | None = None
    """Folder or hub id of the teacher."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "uld"] = "forward_kl"
    """forward_kl covers all that the teacher may say, reverse_kl keeps to its likeliest words, jsd lies between; uld compares
    sorted probabilities where both tokenizers begin a token, for a teacher with another vocabulary."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With jsd, the teacher's share of the mixture (Agarwal et al. 2024, eq. 1)."""
    temperature: Positive = 1.0
    """Both distributions are flattened by it."""
    ce_weight: Share = 0.0
    """Share of the ordinary cross-entropy in the loss; the divergence has the rest."""
    top_k: PositiveInt | None = None
    """Only the teacher's k likeliest tokens, and one more for all the others together."""
    scores: Literal["live", "precompute"] = "live"
    """live: the teacher runs beside the student; precompute: it runs once before training, and its top_k are kept in a file."""
    scores_file: str | None = None
    """Folder for those top_k. One that holds them needs no teacher: they can be made on a larger machine."""

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Self:
        if self.scores == "precompute" and self.top_k is None:
            raise ValueError("top_k: scores: precompute keeps the teacher's likeliest tokens; set how many, such as 64")
        if self.scores_file and self.scores != "precompute":
            raise ValueError("scores_file: it has an effect with scores: precompute alone")
        if self.teacher is None and self.scores_file is None:
            raise ValueError("missing: give teacher (a model), or scores: precompute and scores_file")
        if self.divergence == "uld" and (self.top_k or self.scores == "precompute"):
            raise ValueError("top_k and scores: uld sorts whole distributions of a live teacher; leave them out")
        if self.divergence == "uld" and not 0 < self.ce_weight < 1:
            raise ValueError("ce_weight: uld does not say which token is which: set it between 0 and 1, such as 0.5")
        return self


AnyObjective = (
    SftConfig | PretrainConfig | DpoConfig | OrpoConfig | SimpoConfig | CpoConfig | KtoConfig | BcoConfig | RewardConfig
    | PrmConfig | ClassifyConfig | AnswerConfig | DistillConfig
)  # fmt: skip
