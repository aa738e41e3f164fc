"""LoRA and its variants, through PEFT, whose file format every server and tool reads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.errors import UserError
from tunesmith.methods.base import EngineLike, Method
from tunesmith.models.families import family_of
from tunesmith.models.load import HeadKind, decoder_name, head_kind, value_head_name
from tunesmith.tensors import is_hollow

TASKS: dict[HeadKind, str] = {"language": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
"""PEFT's names for what a model is for. Those of a value head make it train in full and be saved with the adapter."""


class Lora(Method):
    """Low-rank adapters (Hu et al. 2021): y = W x + (alpha / r) B A x with W frozen.

    PEFT puts the adapters into the model in place, so that engine and scoring see an ordinary transformers model.
    PiSSA (Meng et al. 2024) takes the principal part out of W; on saving it is written back as an ordinary adapter of
    twice the rank for the unchanged base: ΔW = BA - B₀A₀ (PEFT's conversion).
    A value head trains in full, in fp32, and is saved with the adapter.
    """

    @classmethod
    def needs_fp32_weights(cls, config: Any) -> bool:
        return False

    @classmethod
    def starts_from_weights(cls, config: Any) -> bool:
        return config.dora or config.init == "pissa"

    def adapt(self, model: Any) -> None:
        import peft

        config = self.config
        last_parts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        if unknown := [name for name in config.modules_to_save if name not in last_parts]:
            raise UserError(
                f"method.modules_to_save: the model has no module {', '.join(unknown)}; it has {_some(last_parts)}"
            )
        excluded = [*family_of(model.config.model_type).lora_excluded, *_of_towers(model, config.targets)]
        peft_config = peft.LoraConfig(
            task_type=TASKS[head_kind(model)],
            revision=getattr(model.config, "_commit_hash", None),
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=config.targets if config.targets == "all-linear" else list(config.targets),
            exclude_modules=excluded or None,
            modules_to_save=self._saved_whole(model) or None,
            use_rslora=config.rslora,
            use_dora=config.dora,
            init_lora_weights=True if config.init == "default" else config.init,
        )
        try:
            self.peft_model = peft.get_peft_model(model, peft_config)
        except ValueError as error:
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            raise UserError(f"method.targets: {error}; linear modules of this model: {_some(linear)}") from error
        for p in self.peft_model.parameters():
            if p.requires_grad and p.dtype == torch.bfloat16:  # PEFT casts adapters to fp32, but not modules_to_save
                p.data = p.data.float()
        self.off_is_start = self._says_nothing()  # while the adapters are in one piece

    def _saved_whole(self, model: Any) -> list[str]:
        """Modules that train in full. Raises UserError where they cannot be saved."""
        names = list(self.config.modules_to_save)
        if head_kind(model) == "language":
            return names
        if self.config.init == "pissa":
            raise UserError(
                "method.init: pissa is saved as a difference of A and B alone, and a value head trains in full beside them; "
                "choose another init"
            )
        return [*names, value_head_name(model)]

    def bind(self, model: nn.Module, engine: EngineLike) -> None:
        super().bind(model, engine)
        if self.config.init == "pissa":
            self.keep_start()  # `save` needs it too

    @torch.no_grad()
    def _says_nothing(self) -> bool:
        """Whether B A = 0 in all adapters, up to rounding: then the model without them is the model at its start."""
        params = dict(self.peft_model.named_parameters())
        if any(is_hollow(p) for p in params.values()):
            return self.config.init != "pissa"  # alone it puts a part of the weights into the adapters
        for name, a in params.items():
            if "lora_A" in name or "lora_embedding_A" in name:
                b = params[name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
                gram_a, gram_b = a.flatten(1).float(), b.flatten(1).float()
                gram_a, gram_b = gram_a @ gram_a.T, gram_b.T @ gram_b
                # |B A|² against |A|² |B|²: rounding leaves an orthogonal start 1e-6, pissa at rank r has at least 1 / r
                if (gram_a * gram_b).sum() > 1e-4 * gram_a.trace() * gram_b.trace():
                    return False
        return True

    def start_bytes(self) -> int:
        return 0 if self.off_is_start else super().start_bytes()

    @contextmanager
    def at_start(self) -> Iterator[None]:
        with self.peft_model.disable_adapter() if self.off_is_start else super().at_start():
            yield

    def lr_multiple(self, name: str) -> float:
        return self.config.lr_ratio if "lora_B" in name or "lora_embedding_B" in name else 1.0

    def save(self, folder: Path) -> None:
        if self.config.init != "pissa":
            self.engine.save_adapter(self.peft_model, folder)
            return
        with tempfile.TemporaryDirectory() as start:
            trained = {name: p.detach().clone() for name, p in self.params.items()}
            assert self.start is not None, "bind keeps it"
            self._copy_in(self.start)
            self.peft_model.peft_config["default"].init_lora_weights = True  # the adapter is saved as an ordinary one
            self.engine.save_adapter(self.peft_model, Path(start))
            self._copy_in(trained)
            self.peft_model.peft_config["default"].init_lora_weights = "pissa"
            self.engine.save_adapter(self.peft_model, folder, path_initial_model_for_weight_conversion=start)

    @torch.no_grad()
    def _copy_in(self, values: dict[str, torch.Tensor]) -> None:
        for name, p in self.params.items():
            p.copy_(values[name])


def _of_towers(model: Any, targets: str | tuple[str, ...]) -> list[str]:
    """Linear layers outside the language model that the targets would take too: those of towers and of what joins them.

    Towers see best as they were trained, on far more images than a fine-tuning has; so `all-linear` means the language
    model. A name that only a tower has, such as `fc1` or `visual.blocks.0.attn.qkv`, means the tower.
    """
    inside = decoder_name(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    own = [f".{name}" for name in linear if name.startswith(inside)]
    towers = [name for name in linear if not name.startswith(inside)]
    if targets == "all-linear":
        return towers
    shared = tuple(f".{target}" for target in targets if any(name.endswith(f".{target}") for name in own))
    return [name for name in towers if f".{name}".endswith(shared)] if shared else []


def _some(names: set[str]) -> str:
    return ", ".join(sorted(name for name in names if name and not name.isdigit())[:20])
