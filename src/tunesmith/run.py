"""A run, top to bottom: configuration → parts → learner → loop → artefacts. CLI, Python and tests all call `train`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tunesmith.assemble import Run, assemble
from tunesmith.config import Engine, RunConfig
from tunesmith.config_file import differing_keys, settings_of
from tunesmith.data.dataset import evaluation_batches
from tunesmith.data.media import Processor
from tunesmith.data.prepare import Watch, unwatched
from tunesmith.display import Progress, header, reading
from tunesmith.engines import ENGINES, build_engine, with_engine
from tunesmith.engines.place import place
from tunesmith.errors import UserError
from tunesmith.hooks import Checkpoint, Evaluate, Hook, Log, Ranks
from tunesmith.interrupt import StopRequest
from tunesmith.loop import train as run_loop
from tunesmith.manifest import describe, manifest, other_models, versions, weights_hash
from tunesmith.methods import METHODS, NonFiniteError
from tunesmith.models.load import model_source, padding_token
from tunesmith.objectives import Objective
from tunesmith.plan.choose import choose
from tunesmith.plan.start import DoesNotFitError, foreseen, is_out_of_memory, out_of_memory, rehearse, shown
from tunesmith.report import write_report
from tunesmith.run_check import check
from tunesmith.run_data import open_data
from tunesmith.run_folder import EventLog, RunFolder, aside_of, read_events, write_folder
from tunesmith.schedules import build_schedule

MAY_CHANGE_ON_RESUME = (
    "train.steps", "train.epochs", "train.micro_batch_tokens", "train.memory", "train.foresee", "method.memory",
    "method.scorer", "method.vllm", "engine.", "checkpoint.", "evaluate.", "log.",
)  # fmt: skip

OF_A_RANK = ("engine.device", "output")
"""Settings in which ranks of a run may differ."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    step: int
    finished: bool
    """False if a signal stopped it; it goes on with --resume."""
    eval_losses: dict[int, float]
    """Held-out loss by step."""


def train(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Result:
    """Train, and leave a folder that transformers, PEFT and vLLM load. Raises UserError for all that the user can mend.

    A run that this very job has begun before its processes were started again is gone on with, resume or not.
    """
    config, asked = with_engine(config), config.engine
    writes = ENGINES[config.engine.name].group_kind.rank_here() == 0
    console = console or Console(stderr=True, quiet=not writes)
    folder = RunFolder(Path(config.output).expanduser())
    job = place().job
    resume = resume or folder.was_begun_by(job)
    if resume:
        config = _same_as_before(folder, config)
    elif writes:
        folder.check_free(job)
    check(config)
    why = ""
    if asked.name == "auto" and config.engine.name == "fsdp" and config.train.foresee:
        config, why = choose(config)
    with _remedies_told(console):
        with reading(console) as watch:
            run = build(config, watch, foresee=True)
        group = run.learner.engine.group
        shared = _what_ranks_share(run) | {"resume": resume} if group.world > 1 else {}
        with group.joined(shared):
            group.check_shared(folder.path)
            return _lead(run, folder, resume, console, asked, why) if writes else _follow(run, folder, resume, console)


def _lead(run: Run, folder: RunFolder, resume: bool, console: Console, engine: Engine, why: str) -> Result:
    """The run on the only rank, or on that which writes its folder. engine: as it was asked for, since a run may go on with
    another number of ranks. why: the engine that it has."""
    saved = _restore(run, folder, console) if resume else 0
    facts = describe(run) + ([("shared out", why)] if why else []) + (shown(run.forecast) if run.forecast else [])
    header(console, f"tunesmith → {folder.path}", facts)
    folder.write_manifest(manifest(run, facts))
    folder.claim(run.config.model_copy(update={"engine": engine}))

    config, learner = run.config, run.learner
    start = _keep_log(run, folder, saved)
    learner.engine.group.hand_over(lambda: _packed(run, start), lambda state: None)
    events = EventLog(folder.events, folder.path / "tensorboard" if _wants_tensorboard(config) else None)
    events.write("resume" if resume else "start", step=start, steps=run.steps)
    progress = Progress(console, run.steps, start, run.objective.shows)
    log = Log(events, progress, config.log.every_steps)
    evaluate, ranks = _evaluation(run, log), Ranks(log)
    checkpoint = Checkpoint(folder, log, config.checkpoint, run.objective, saved=saved)
    with progress, StopRequest() as stop, _memory_told(run):
        _rehearse(run)
        if run.measured:
            events.write("memory", step=start, **run.measured)
        log.pause()
        try:
            step = _steps(run, start, evaluate, [ranks, log, evaluate, checkpoint], stop)
        except NonFiniteError as error:
            checkpoint.settle(lenient=True)
            raise UserError(_diverged(error, run, checkpoint.saved)) from error
        checkpoint.save(step, learner, is_last=True, lenient=step == run.steps)
        if step == run.steps:
            evaluate.measure(step, learner)
            ranks(step, {}, learner)
            write_folder(folder.model, lambda aside: _save_model(run, aside))
            events.write("end", step=step)
    events.close()
    write_report(folder)
    if step < run.steps:
        console.print(f"stopped after step {step} and saved; go on with: tunesmith train --resume {folder.path}")
    return Result(folder.path, step, step == run.steps, evaluate.losses)


def _follow(run: Run, folder: RunFolder, resume: bool, console: Console) -> Result:
    """The run on another rank, which leaves the writing to rank 0. It starts with what that has, or with its own part of it."""
    config, learner, group = run.config, run.learner, run.learner.engine.group
    begun = [_restore(run, folder, console) if resume and group.reads_checkpoints else 0]
    group.hand_over(lambda: b"", lambda state: begun.append(_unpack(run, state)))
    evaluate, start = _evaluation(run, None), begun[-1]
    checkpoint = Checkpoint(folder, None, config.checkpoint, run.objective, saved=start)
    with StopRequest() as stop, _memory_told(run):
        _rehearse(run)
        try:
            step = _steps(run, start, evaluate, [evaluate, *[checkpoint] * group.reads_checkpoints], stop)
        except NonFiniteError as error:
            checkpoint.settle(lenient=True)
            raise UserError(f"step {error.step + 1}: {error}; rank 0 tells where") from error
        if group.reads_checkpoints:
            checkpoint.save(step, learner, is_last=True, lenient=step == run.steps)
        if step == run.steps:
            evaluate.measure(step, learner)
            if group.reads_checkpoints:
                learner.method.save(aside_of(folder.model))
    return Result(folder.path, step, step == run.steps, evaluate.losses)


def _rehearse(run: Run) -> None:
    """The largest batch goes first, unless nothing is to be foreseen."""
    if run.config.train.foresee:
        rehearse(run)
        run.learner.engine.group.meet()


@contextmanager
def _remedies_told(console: Console) -> Iterator[None]:
    """Inside, a run that does not fit ends with what would, after a line that says that this is looked for."""
    try:
        yield
    except DoesNotFitError as error:
        console.print(f"{str(error).splitlines()[0]}\nlooking for what would fit", style="yellow", markup=False)
        raise error.with_remedies() from error


@contextmanager
def _memory_told(run: Run) -> Iterator[None]:
    """Inside, an allocation that fails becomes an error with what was held and what would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, run) from error


def _evaluation(run: Run, log: Log | None) -> Evaluate:
    config = run.config
    held_out = evaluation_batches(run.held_out, config.train.batch_size, config.data.max_tokens, run.pack, run.share)
    return Evaluate(run.objective, run.helpers, held_out, log, config.evaluate.every_steps)


def _steps(run: Run, start: int, evaluate: Evaluate, hooks: list[Hook], stop: StopRequest) -> int:
    """The loop, and before it the held-out loss of the model at its start; returns the steps done."""
    config, learner = run.config, run.learner
    assert config.optimizer.lr is not None, "RunConfig fills it"
    if start == 0:
        evaluate.measure(0, learner)
    return run_loop(
        learner, run.objective, run.helpers, run.data, build_schedule(config.schedule, config.optimizer.lr, run.steps),
        steps=run.steps, start=start, seed=config.seed, hooks=hooks, stop=learner.engine.group.heed(stop),
    )  # fmt: skip


def _what_ranks_share(run: Run) -> dict[str, Any]:
    """What must be the same on all ranks: settings, weights, data and versions. Devices may differ, and only one writes."""
    settings = {name: value for name, value in settings_of(run.config).items() if name not in OF_A_RANK}
    return {
        **settings,
        "weights_hash": weights_hash(model_source(run.config.model)),
        "data_fingerprint": run.samples.fingerprint(),
        "held_out_fingerprint": run.held_out.fingerprint(),
        **versions(),
    }


def _packed(run: Run, step: int) -> bytes:
    """All that training has changed so far, for other ranks."""
    stream = io.BytesIO()
    torch.save({**run.learner.method.state_dict(), "objective": run.objective.state_dict(), "step": step}, stream)
    return stream.getvalue()


def _unpack(run: Run, packed: bytes) -> int:
    """The inverse; returns the step."""
    state = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    step = state.pop("step")
    run.objective.load_state_dict(state.pop("objective"))
    run.learner.method.load_state_dict(state)
    return step


def _same_as_before(folder: RunFolder, config: RunConfig) -> RunConfig:
    """`config` for going on with the run in `folder`. Raises UserError that lists the settings that must not differ."""
    before = folder.read_config()
    if config.model.precision == "auto":
        config = _with(config, "model", precision=before.model.precision)
    if config.data.date is None:
        config = _with(config, "data", date=before.data.date)
    if config.method.name == before.method.name:
        found_out = {name: getattr(before.method, name, None) for name in ("num_chunks", "updates_per_chunk")}
        unsaid = {name: value for name, value in found_out.items() if value and getattr(config.method, name) is None}
        config = _with(config, "method", **unsaid)
    before = before.model_copy(update={"output": config.output})
    refused = [line for line in differing_keys(before, config) if not line.startswith(MAY_CHANGE_ON_RESUME)]
    if refused:
        raise UserError(
            f"{folder.path}: this run was made with other settings:\n  " + "\n  ".join(refused) + "\n"
            "put them back, or start a new run in another output folder"
        )
    return config


def _with(config: RunConfig, section: str, **settings: Any) -> RunConfig:
    """The configuration with settings of one section replaced."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=settings)})


def build(config: RunConfig, watch: Watch = unwatched, foresee: bool = False) -> Run:
    """Make the parts: data first, since its mistakes are commoner and cheaper to find than weights are to load. foresee: what
    the run will take, if the configuration lets it; raises DoesNotFitError before it loads what is too large."""
    config = with_engine(config)
    needs_fp32 = METHODS[config.method.name].needs_fp32_weights(config.method)
    engine = build_engine(config.engine, config.model.precision, needs_fp32)
    config = _with(config, "model", precision=engine.precision)
    with engine.group.telling():
        with engine.group.one_first():
            data = open_data(config, watch)
        forecast = foreseen(data, engine) if foresee else None
        if config.train.memory is not None:
            engine.economize()
        return replace(assemble(data, engine, watch), forecast=forecast)


def _restore(run: Run, folder: RunFolder, console: Console) -> int:
    """Load the newest whole checkpoint; returns its step, or 0 if the run died before its first one."""
    before = folder.read_manifest()
    for what, key, now in (
        (run.config.data.shown(), "data_fingerprint", run.samples.fingerprint()),
        (run.config.data.eval_path or run.config.data.shown(), "held_out_fingerprint", run.held_out.fingerprint()),
        (run.config.model.path, "base_weights_hash", weights_hash(model_source(run.config.model))),
        *((path, f"{setting}_hash", found) for setting, (path, found) in other_models(run.config).items() if found),
    ):
        if before.get(key) not in (None, now):
            raise UserError(f"{what}: has changed since {folder.path} was begun; put it back, or start anew")
    learner = run.learner
    found = learner.engine.load_checkpoint(
        folder.checkpoints, lambda text: console.print(text, style="yellow", markup=False), learner.method.room
    )
    if found is None:
        return 0
    step, state = found
    if step > run.steps:
        raise UserError(f"train.steps: {run.steps} are to be done, but {folder.path} has done {step}; ask for more")
    run.objective.load_state_dict(state.pop("objective", {}))
    learner.method.load_state_dict(state)
    return step


def _keep_log(run: Run, folder: RunFolder, start: int) -> int:
    """Let the method keep its log, if it keeps one; returns the updates done, which a log knows later than a checkpoint."""
    written = folder.read_manifest()
    about = {name: written[name] for name in ("base_weights_hash", "seed")}
    has_learnt = bool(run.objective.state_dict())  # and that is in checkpoints alone
    at_most = _told(folder, run.config) if folder.updates.exists() and not has_learnt else start
    found = run.learner.method.keep_log(folder.updates, about, at_most)
    if found is not None and found > run.steps:
        raise UserError(f"train.steps: {run.steps} are to be done, but {folder.path} has done {found}; ask for more")
    return start if found is None else found


def _told(folder: RunFolder, config: RunConfig) -> int:
    """The last step of which events.jsonl has all that there is to tell; a process may die between a step and its event."""
    events = read_events(folder.events)
    step, evaluated = ({event["step"] for event in events if event["event"] == kind} | {0} for kind in ("step", "eval"))
    last = max(step)
    reach = last + config.log.every_steps - 1  # up to here no step event was due
    if every := config.evaluate.every_steps:
        due = next((n for n in range(last, reach + 1) if n and n % every == 0 and n not in evaluated), reach + 1)
        return min(reach, due - 1)
    return reach


def _save_model(run: Run, folder: Path) -> None:
    run.learner.method.save(folder)
    save_beside(folder, run.objective, run.tokenizer, run.samples.processor)


def save_beside(folder: Path, objective: Objective, tokenizer: Any, processor: Processor | None) -> None:
    """Write what turns text and media into what the model reads."""
    if processor is not None:
        processor.save(folder)
    if objective.head != "language":  # transformers finds a text's end by the padding behind it
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_token(tokenizer))
    tokenizer.save_pretrained(folder)


def _wants_tensorboard(config: RunConfig) -> bool:
    return bool(find_spec("tensorboard")) if config.log.tensorboard is None else config.log.tensorboard


def _diverged(error: NonFiniteError, run: Run, saved: int) -> str:
    samples, indices = run.data.at(error.step)
    places = ", ".join(str(samples.place(index)) for index in indices[:8])
    kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint had been due yet"
    return (
        f"step {error.step + 1}: {error}; the parameters were not changed by it, and {kept}. Samples of this step: {places}. "
        f"In a new run, lower optimizer.lr (now {run.config.optimizer.lr:g}) or lengthen schedule.warmup_fraction; and look at "
        "those samples"
    )
