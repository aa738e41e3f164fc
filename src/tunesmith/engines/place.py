"""Which rank of a run this process is: as torchrun says, or Slurm, a Kubernetes training operator or Ray Train; or alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOB = "TUNESMITH_JOB"
"""Names the job where nothing else does, for processes that are started again to go on with what they began."""
FIRST_PORT, NUM_PORTS = 20000, 10000
"""Where rank 0 of a Slurm step listens: below the ports that systems hand out."""


@dataclass(frozen=True)
class Place:
    """A process among those of its run."""

    rank: int = 0
    world: int = 1
    """Processes that were started."""
    local_rank: int = 0
    """Among those of this machine: which of its devices to take."""
    host: str = ""
    """Where rank 0 can be met; empty for a process alone."""
    port: int = 0
    job: str = ""
    """The same for all processes of a job and for all its restarts, and for no other job; empty where nothing tells."""


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """What the environment says of this process. Raises UserError where it says half of it."""
    environment = {**step_variables(environment), **environment}
    job = find_job(environment)
    given = {name: environment[name] for name in VARIABLES if name in environment}
    if not {"RANK", "WORLD_SIZE"} & given.keys():
        return Place(job=job)
    if missing := [name for name in VARIABLES if name not in given]:
        raise UserError(
            f"engine: {', '.join(given)} is set, but {', '.join(missing)} is not; start with torchrun, or set all of "
            f"{', '.join(VARIABLES)}, or none"
        )
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        if not environment.get(name, "0").isdecimal():
            raise UserError(f"engine: {name} is {environment[name]!r}; set it to a number")
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= world:
        raise UserError(f"engine: RANK is {rank}, but WORLD_SIZE {world}; ranks count from 0")
    each = environment.get("PET_NPROC_PER_NODE", "1")
    if "LOCAL_RANK" not in environment and each.isdecimal() and int(each) > 1:
        raise UserError(
            f"this pod is to start {each} processes (PET_NPROC_PER_NODE), which is torchrun's work: start with "
            "torchrun -m tunesmith train"
        )
    local_rank = int(environment.get("LOCAL_RANK", rank))
    return Place(rank, world, local_rank, given["MASTER_ADDR"], int(given["MASTER_PORT"]), job)


def find_job(environment: Mapping[str, str]) -> str:
    """What tells this job from others. torchrun calls a job none unless told."""
    if job := environment.get(JOB, ""):
        return job
    elastic = environment.get("TORCHELASTIC_RUN_ID", "none")
    if elastic != "none":
        return elastic
    if is_slurm_step(environment):  # a step that is queued again has the same number
        return f"slurm-{environment['SLURM_JOB_ID']}.{environment.get('SLURM_STEP_ID', '0')}"
    return ""


def is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process among others. A batch script itself has no SLURM_STEP_NUM_TASKS."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment


def step_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a task of srun that nothing else has told; else nothing."""
    if {"RANK", "WORLD_SIZE"} & environment.keys() or not is_slurm_step(environment):
        return {}
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(hosts)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(FIRST_PORT + (job + step) % NUM_PORTS)),
    }


def first_host(hosts: str) -> str:
    """The first of a list as Slurm writes it: node[07-09,12],login → node07."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[([^\]]*)\]", lambda ranges: re.split("[-,]", ranges[1])[0], first)
