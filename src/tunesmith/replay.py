"""Any intermediate model of a zeroth-order run, from its log and the base model, without a forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from tunesmith.assemble import model_dtype
from tunesmith.config import SingleConfig
from tunesmith.engines import build_engine
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.manifest import dropped_template, weights_hash
from tunesmith.methods import Extent, build_method
from tunesmith.methods.update_log import differing, read_log
from tunesmith.methods.zeroth import Zeroth
from tunesmith.models.load import load_model, model_source
from tunesmith.objectives import build_objective
from tunesmith.run import save_beside
from tunesmith.run_data import build_renderer
from tunesmith.run_folder import RunFolder, write_folder


def replay(
    folder: Path,
    to_step: int | None,
    output: Path,
    form: Literal["model", "adapter"] = "model",
    console: Console | None = None,
) -> int:
    """Write the model (or a PEFT adapter for the base model) as it was after `to_step` updates (None: all in the log).

    Returns that number. Raises UserError if the run keeps no log, the base model is another one, or the log is shorter.
    """
    console = console or Console(stderr=True)
    if output.exists():
        raise UserError(f"{output}: exists already; choose another folder")
    run = RunFolder(folder)
    config = run.read_config()
    if config.method.name != "zeroth":
        raise UserError(
            f"{folder}: was made by method: {config.method.name}, which keeps no log of updates: only zeroth does"
        )
    header, updates, lost = read_log(run.updates)
    if lost:
        console.print(f"{run.updates}: its last {lost} bytes are no whole record", style="yellow", markup=False)
    number = len(updates) if to_step is None else to_step
    if number > len(updates):
        raise UserError(f"--to-step {number}: the log has {len(updates)} updates")
    source = model_source(config.model)
    if header["base_weights_hash"] != weights_hash(source):
        raise UserError(f"{config.model.path}: these are not the weights from which the log of {folder} leads on")

    config, renderer = build_renderer(config)
    if dropped_template(run.read_manifest()):
        renderer.tokenizer.chat_template = None
    settings = config.method.model_copy(update={"fold": "never"} if form == "adapter" else {})
    objective = build_objective(config.objective)
    torch.manual_seed(header["seed"])  # a value head of its own starts as it did in the run
    model = load_model(config.model, model_dtype(config.model.precision), objective.head, objective.num_labels)
    config = config.model_copy(update={"method": settings})
    method = build_method(config, Extent(steps=0, seed=header["seed"]))
    learner = Learner(model, build_engine(SingleConfig(device=config.engine.device), config.model.precision), method, 1)
    zeroth = learner.method
    assert isinstance(zeroth, Zeroth), "the configuration says so"
    if other := differing(zeroth.identity(), header):
        raise UserError(f"{run.updates}: was written for another run: {', '.join(other)} differ")
    zeroth.replay(updates[:number])

    def write(aside: Path) -> None:
        if form == "adapter":
            zeroth.save_adapter(aside, config.model.path)
        else:
            zeroth.save(aside)
        save_beside(aside, objective, renderer.tokenizer, renderer.processor)

    write_folder(output, write)
    console.print(f"the {form} after {number} updates is in {output}", highlight=False)
    return number
