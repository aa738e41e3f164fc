"""kill -9 at any instant: the run resumes to the same bits as if it had never died."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.product.test_product import equal_bits, final_state, losses, method_section, optimizer_section
from tunesmith.config import RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.engines.checkpoint import checkpoints
from tunesmith.methods import METHODS
from tunesmith.run import train
from tunesmith.run_folder import RunFolder

STEPS, KILLS = 120, 10


def child(tree: dict[str, Any]) -> None:
    """One life of the run: begins it, or goes on with what the last life left."""
    config = config_from_dict(tree)
    folder = Path(config.output)
    if RunFolder(folder).config.exists():
        train(config, resume=True)
    else:
        train(config)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_ten_random_instants(make_config: Callable[..., RunConfig], tmp_path: Path, method: str) -> None:
    settings = {
        "method": method_section(method),
        "optimizer": optimizer_section(method),
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 1, "keep": 2},
    }
    undisturbed = make_config(**settings)
    train(undisturbed)
    killed = make_config(**settings, output=str(tmp_path / "killed"))

    # a server that has imported everything: each life begins at once, so that a kill falls into the run, not the imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tunesmith.run", "tests.equal.test_kill", "peft", "transformers.models.llama"])
    instants = random.Random(f"{method} 1")
    folder = Path(killed.output) / "checkpoints"
    deaths = 0
    for life in range(KILLS):
        process = context.Process(target=child, args=(killed.model_dump(mode="json"),))
        process.start()
        done = newest(folder)
        if life % 2:  # in the middle of writing a checkpoint
            wait_for(lambda: any(folder.glob(".writing-*")), process)
            time.sleep(instants.random() * 0.004)
        else:  # anywhere, start-up included
            wait_for(lambda done=done: done == 0 or newest(folder) > done, process)  # a log may pass over done + 1
            time.sleep(instants.random() * 0.15)
        process.kill()
        process.join()
        deaths += process.exitcode == -9
    assert deaths == KILLS, "the run was too short to be killed in"
    if not RunFolder(Path(killed.output)).model.is_dir():
        train(killed, resume=True)

    assert equal_bits(final_state(Path(undisturbed.output)), final_state(Path(killed.output)))
    assert losses(Path(killed.output)) == losses(Path(undisturbed.output))
    for file in Path(undisturbed.output, "model").glob("*.safetensors"):
        assert file.read_bytes() == (Path(killed.output) / "model" / file.name).read_bytes()


def newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    found = checkpoints(folder)
    return int(found[-1].name[5:]) if found else 0


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline
