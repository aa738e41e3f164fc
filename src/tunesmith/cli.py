"""The command line. Every command reads its arguments and calls one function; heavy imports happen inside."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.errors import UserError

if TYPE_CHECKING:
    from tunesmith.config import RunConfig

LAUNCHED = "TUNESMITH_LAUNCHED"
"""Set in ranks that a launcher of ours has started, to which they leave it to tell of an error."""

TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers of libraries that warn of kernels which they lack and nobody asked for."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(config_app, name="config")
data_app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings over the file's.")]


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[run.yaml] [a.b=c]...", help="A configuration, and settings over its own."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    nproc: Annotated[
        str, typer.Option(metavar="N|auto", help="Processes on this host. auto: one for each accelerator.")
    ] = "auto",
    nodes: Annotated[int, typer.Option(min=1, help="Hosts; start the same command on each.")] = 1,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where hosts meet: one of them, and a free port of it.")
    ] = None,
    rendezvous_id: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of this job. Started again under it, it goes on by itself.")
    ] = None,
    rendezvous_timeout: Annotated[int, typer.Option(min=1, help="Seconds that hosts wait for each other.")] = 600,
    max_restarts: Annotated[int, typer.Option(min=0, help="How often all processes start again when one dies.")] = 3,
) -> None:
    """Fine-tune a model: tunesmith train run.yaml method.rank=8."""
    from tunesmith.config_file import load_config
    from tunesmith.launch import Launch
    from tunesmith.run_folder import RunFolder

    words = list(arguments or ())
    file = Path(words.pop(0)) if words and "=" not in words[0] else None
    if resume is not None:
        RunFolder(resume).read_config()
        config = load_config(file or resume / "config.yaml", words).model_copy(update={"output": str(resume)})
    elif file is None:
        raise UserError("give a configuration: tunesmith train run.yaml (or --resume FOLDER)")
    else:
        config = load_config(file, words)
    launch = Launch(nproc, nodes, rendezvous, rendezvous_id, max_restarts, rendezvous_timeout)
    number = launch.processes(config)
    if number:
        same = ["train", *(arguments or ()), *(["--resume", str(resume)] if resume else [])]
        raise typer.Exit(launch.run(number, same, _tell))
    launch.join()
    from tunesmith.run import train as run

    result = run(config, resume=True) if resume else run(config)
    if not result.finished:
        raise typer.Exit(130)  # stopped by a signal: what a shell joins with && must not go on


@app.command()
def chat(
    path: Annotated[str, typer.Argument(help="A run's folder, a model folder, or demo.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
) -> None:
    """Talk to a model in the terminal."""
    from tunesmith.inference.chat import chat as run

    run(path, system, max_new_tokens, temperature)


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="A run's folder, a model folder, or demo.")],
    prompts: Annotated[
        str, typer.Argument(help="A data file; the last answer of each record is left out and generated.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write prompt, answer and expected, as .jsonl.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 16,
) -> None:
    """Answer every record of a file."""
    from tunesmith.inference.files import generate_file

    generate_file(path, prompts, output, max_new_tokens, batch_size)


@app.command()
def plan(
    target: Annotated[
        str, typer.Argument(metavar="run.yaml...|MODEL", help="One or more configurations, or a model to look at.")
    ],
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, a name such as rtx4090, or bytes such as 24GiB. Default: what is here."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of an hour of the device.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Look for what would fit in its place.")] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="FITTED.yaml", help="With --fit: write the first that fits; must not exist.")
    ] = None,
    world: Annotated[int | None, typer.Option(min=1, help="Plan one of so many ranks.")] = None,
    link: Annotated[float, typer.Option(min=1e-3, help="GB/s that a device sends to others of its node.")] = 450.0,
    network: Annotated[float, typer.Option(min=1e-3, help="GB/s that a device sends to other nodes.")] = 50.0,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Devices of a node.")] = 8,
    flops: Annotated[float, typer.Option(min=1e-3, help="TFLOP/s that each of the ranks' devices reaches.")] = 400.0,
) -> None:
    """Memory and time of a run before it starts: no weights are loaded, and no device is needed."""
    from rich.console import Console

    from tunesmith.config_file import load_config
    from tunesmith.plan.devices import find_device

    settings = [given for given in overrides or () if not _is_file(given)]
    files = [target, *(given for given in overrides or () if _is_file(given))]
    if write is not None and not fit:
        raise UserError("--write: writes what --fit finds; give both")
    if write is not None and len(files) > 1:
        raise UserError(f"--write: writes one configuration, but {len(files)} are given; give one")
    if not _is_file(target):
        if len(files) > 1:
            raise UserError(
                f"{target}: give a model alone, or configurations, which end in .yaml; got {files[1]} beside it"
            )
        if fit or world is not None or price is not None:
            raise UserError(f"{target}: --fit, --world and --price are for a configuration, which ends in .yaml")
        from tunesmith.plan.show_survey import print_survey

        print_survey(target, settings, find_device(device), Console())
        return
    for number, file in enumerate(files):
        if len(files) > 1:
            print(f"\n{file}" if number else file, flush=True)
        config = load_config(Path(file), settings)
        if world is None:
            _plan(config, device, price, fit, write)
            continue
        from tunesmith.plan.table import Machine, print_plan

        of_rank = None if device is None else find_device(device)
        print_plan(config, world, Machine(link, network, ranks_per_node, flops), of_rank)


def _is_file(given: str) -> bool:
    """Whether an argument is a configuration file, and neither a model nor a setting."""
    return "=" not in given and Path(given).suffix in (".yaml", ".yml", ".json")


def _plan(config: RunConfig, device: str | None, price: float | None, fit: bool, write: Path | None) -> None:
    """On one device, as the command says."""
    from rich.console import Console

    from tunesmith.plan.devices import find_device, within

    if config.engine.name == "fsdp":
        raise UserError(
            "engine: fsdp shares a model out: say over how many ranks with --world, or set engine to single"
        )
    found = find_device(device)
    found = within(found, config.train.memory or found.memory)
    if fit:
        from tunesmith.plan.show_fit import print_fits

        print_fits(config, found, Console(), write)
    else:
        from tunesmith.plan.forecast import foresee
        from tunesmith.plan.show import print_forecast

        print_forecast(foresee(config, found), Console(), price)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="The folder of a run with method: zeroth.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it; must not exist.")],
    to_step: Annotated[int | None, typer.Option(min=0, help="After so many updates. Default: all in the log.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="A PEFT adapter instead of a whole model.")] = False,
) -> None:
    """Make any intermediate model of a zeroth-order run from its log, without a forward pass."""
    from tunesmith.replay import replay as run

    run(folder, to_step, output, "adapter" if adapter else "model")


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder of the run; a number is added if it is taken.")] = "runs/demo",
) -> None:
    """Fine-tune SmolLM2-135M on a small task and compare its answers before and after."""
    from tunesmith.demo import demo as run

    run(output)


@config_app.command()
def schema() -> None:
    """Print the JSON Schema of run.yaml, for editors to complete from."""
    from tunesmith.config_file import json_schema

    print(json_schema())


@config_app.command()
def show(file: Annotated[Path, typer.Argument(help="A run.yaml.")], overrides: Overrides = None) -> None:
    """Print the resolved configuration."""
    from tunesmith.config_file import dump_config, load_config

    print(dump_config(load_config(file, overrides or ())), end="")


@data_app.command("check")
def data_check(
    file: Annotated[Path, typer.Argument(help="A run.yaml.")],
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option(min=0, help="Show at most so many errors.")] = 50,
    quarantine: Annotated[Path | None, typer.Option(help="Copy bad records into this .jsonl; must not exist.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the lengths' histogram into this .png.")] = None,
) -> None:
    """Read all data, name every bad record, and count what there is. Exits with 1 if anything is wrong."""
    from tunesmith.config_file import load_config
    from tunesmith.inspect.check import check

    if check(load_config(file, overrides or ()), limit, quarantine, png).errors.number:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    file: Annotated[Path, typer.Argument(help="A run.yaml.")],
    overrides: Overrides = None,
    sample: Annotated[int | None, typer.Option(min=0, help="A training sample, counted from 0. Default: 0.")] = None,
    place: Annotated[str | None, typer.Option(metavar="FILE:LINE", help="The samples of a record.")] = None,
    batch: Annotated[int | None, typer.Option(min=0, help="The batch of a step, counted from 0.")] = None,
    packed: Annotated[bool | None, typer.Option(help="Pack the batch's rows or not. Default: data.pack.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page for the browser.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print tokens, text, weights and sequence as JSON.")] = False,
    positions: Annotated[bool, typer.Option(help="Mark every token's position, not every 64th.")] = False,
) -> None:
    """Show the tokens of a sample or batch as the model will get them, coloured by loss weight."""
    from tunesmith.config_file import load_config
    from tunesmith.inspect.show import show

    if sum(choice is not None for choice in (sample, place, batch)) > 1:
        raise UserError("give one of --sample, --place and --batch")
    show(
        load_config(file, overrides or ()), sample=sample, place=place, batch=batch, pack=packed, html=html,
        as_json=as_json, positions=positions,
    )  # fmt: skip


def _tell(text: str) -> None:
    """A line about the run's processes, below what one of them may have drawn and been unable to end."""
    if sys.stderr.isatty():
        text = f"\r\x1b[K\x1b[?25h{text}"
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point: a UserError becomes its message, without a traceback. A launched rank leaves errors to its launcher."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a wait for another rank that takes longer is no news
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")
    for library in TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    is_launched = LAUNCHED in os.environ and "RANK" in os.environ  # of which the launcher itself has the first alone
    if is_launched and os.environ["RANK"] != "0":  # rank 0 gives the same warnings
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    try:
        app()
    except UserError as error:
        from tunesmith.launch import exit_code, report

        report(error)
        if not is_launched:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    except Exception as error:
        from tunesmith.launch import report

        report(error)
        if not is_launched:
            raise
        sys.exit(1)
