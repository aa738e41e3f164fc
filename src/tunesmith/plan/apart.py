"""What is foreseen for a run that goes on here, in a process of its own.

Tensors without numbers must leave no trace in a process that trains: libraries keep what they have computed once, such as
torchao the numbers that 8 bits stand for.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.engines.place import VARIABLES
from tunesmith.errors import UserError


class FailedApartError(Exception):
    """The other process has ended without an answer."""


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """What a function of a module says, called in another process, which is no rank and sees no accelerator. Raises its
    UserError, and FailedApartError where it fails otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "asked"), Path(folder, "answer")
        asked.write_bytes(pickle.dumps((function, given)))
        ranks = (*VARIABLES, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        surroundings = {name: value for name, value in os.environ.items() if name not in ranks}
        code = [sys.executable, "-P", "-m", "tunesmith.plan.apart", str(asked), str(answer)]
        ended = subprocess.run(
            code, env={**surroundings, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
        )
        if not answer.exists():
            raise FailedApartError((ended.stderr.strip().splitlines() or ["no reason given"])[-1])
        kind, found = pickle.loads(answer.read_bytes())
    if kind == "error":
        raise UserError(found)
    return found


def main(asked: str, answer: str) -> None:
    """Call in this process what another one asks for. What is asked and what is found are files."""
    warnings.simplefilter("ignore")  # the run itself will give them
    function, given = pickle.loads(Path(asked).read_bytes())
    try:
        found: tuple[str, Any] = "found", function(*given)
    except UserError as error:
        found = "error", str(error)
    aside = Path(answer).with_suffix(".writing")
    aside.write_bytes(pickle.dumps(found))
    aside.replace(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
