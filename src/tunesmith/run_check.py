"""What can be known of a configuration without loading weights or data."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tunesmith.config import ModelConfig, RunConfig
from tunesmith.data.prepare import eval_sources, training_sources
from tunesmith.engines import ENGINES, with_engine
from tunesmith.errors import UserError
from tunesmith.methods import METHODS
from tunesmith.models.load import model_source
from tunesmith.objectives import build_objective
from tunesmith.score_store import INDEX
from tunesmith.scorers import SCORERS, Scorer


def check(config: RunConfig) -> None:
    """All that can be known without loading weights. Raises UserError."""
    config = with_engine(config)
    objective, method, engine = (
        build_objective(config.objective),
        METHODS[config.method.name],
        ENGINES[config.engine.name],
    )
    scorer_name = config.method.scorer_in_use if config.method.name == "zeroth" else ""
    scorer = SCORERS[scorer_name] if scorer_name else Scorer
    scorer.check_installed()
    if scorer.holds_weights and (config.engine.name != "single" or config.engine.device not in ("auto", "cpu", "cuda")):
        raise UserError(
            f"method.scorer: {scorer_name} runs on the first device alone; set engine to single and its device to auto or cpu "
            "(CUDA_VISIBLE_DEVICES says which is the first), or method.scorer to batched"
        )
    needs = [
        (config.method.name, method.requires, f"{config.engine.name} engine", engine.provides),
        (config.objective.name, objective.reads, f"{config.engine.name} engine", engine.reads),
    ]
    if scorer.reads is not None:
        needs.append((config.objective.name, objective.reads, f"{scorer_name} scorer", scorer.reads))
    for who, wants, whose, offers in needs:
        if missing := wants - offers:
            raise UserError(f"{who} needs {', '.join(sorted(missing))}, which the {whose} does not offer")
    if objective.no_gradient and "autograd" in method.requires:
        able = ", ".join(name for name, kind in METHODS.items() if "autograd" not in kind.requires)
        raise UserError(
            f"{objective.no_gradient}: has no gradient, which method: {config.method.name} needs; use method: {able}"
        )
    if config.log.tensorboard and not find_spec("tensorboard"):
        raise UserError("log.tensorboard: tensorboard is not installed; pip install 'tunesmith[tensorboard]'")
    if config.optimizer.name == "adamw8bit" and not find_spec("torchao"):
        raise UserError("optimizer: adamw8bit comes from torchao; pip install 'tunesmith[torchao]'")
    template = config.model.chat_template
    if template and template != "chatml" and not Path(template).is_file():
        raise UserError(f"model.chat_template: {template}: no such file; give a Jinja file, or chatml")
    training_sources(config.data)
    eval_sources(config.data)
    model_source(config.model)
    engine.check(config)
    for setting in ("reference_model", "teacher"):
        path = getattr(config.objective, setting, None)
        if path and not (setting == "teacher" and _scores_are_there(config)):
            try:
                model_source(ModelConfig(path=path))
            except UserError as error:
                raise UserError(f"objective.{setting}: {error}") from error


def _scores_are_there(config: RunConfig) -> bool:
    """Whether a file holds what the teacher would say, so that it need not be here."""
    file = getattr(config.objective, "scores_file", None)
    return file is not None and (Path(file).expanduser() / INDEX).is_file()
