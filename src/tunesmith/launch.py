"""One command, all devices: how many ranks to start here, where hosts meet, and what becomes of it all. See elastic.py."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING

from tunesmith.cli import LAUNCHED
from tunesmith.engines.place import JOB, Place, is_slurm_step, place, step_variables
from tunesmith.errors import PeerError, UserError

if TYPE_CHECKING:
    from tunesmith.config import RunConfig

STOPPED, MENDABLE, AGAIN = 130, 2, 75
"""Exit codes of a rank: a signal stopped it and it has saved; only the user can mend it; a new start mends it."""
KNOCK_S = 3.0
"""How long to wait for an answer of the host where all meet."""


@dataclass(frozen=True)
class Launch:
    """What the command line says of processes and hosts."""

    nproc: str = "auto"
    nodes: int = 1
    rendezvous: str | None = None
    rendezvous_id: str | None = None
    max_restarts: int = 3
    timeout_s: int = 600
    """How long hosts wait for each other."""

    def processes(self, config: RunConfig) -> int:
        """Ranks to start here: 0 if this process is to train itself, alone or as one of a job. Raises UserError."""
        here, alone = place(), config.engine.name == "single"
        usual = Launch()
        asked = [
            f"--{name}" for name in ("nproc", "nodes", "rendezvous") if getattr(self, name) != getattr(usual, name)
        ]
        if is_slurm_step(os.environ) and step_variables(os.environ) and asked:
            here = Place()  # srun starts a launcher on each host
        if here.world > 1 or "RANK" in os.environ:
            if asked:
                raise UserError(
                    f"{', '.join(asked)}: this process is rank {here.rank} of {here.world} already (RANK, WORLD_SIZE); "
                    "leave it out, or unset these"
                )
            return 0
        number = self._number(alone)
        if self.nodes > 1 and self.rendezvous is None:
            raise UserError(
                f"--nodes {self.nodes} needs --rendezvous HOST:PORT, the same on all hosts: a name or address of one of them, "
                "and a port that is free there"
            )
        if alone and number * self.nodes > 1:
            raise UserError(
                f"engine: single is one process, but {number * self.nodes} are asked for; set engine to auto"
            )
        return number if number * self.nodes > 1 else 0

    def _number(self, alone: bool) -> int:
        if self.nproc != "auto":
            if not self.nproc.isdecimal() or self.nproc == "0":
                raise UserError(f"--nproc {self.nproc}: give auto or a number from 1")
            return int(self.nproc)
        if alone:
            return 1
        import torch

        return max(1, torch.accelerator.device_count())

    def join(self) -> None:
        """Say what torch reads of a process's place, where only srun has said it, and what the job is called."""
        if self.rendezvous_id:
            os.environ[JOB] = self.rendezvous_id
        os.environ.update(step_variables(os.environ))

    def run(self, number: int, arguments: Sequence[str], tell: Callable[[str], None]) -> int:
        """`tunesmith` with these arguments on `number` ranks here and on those of other hosts, to the end; the exit code."""
        from tunesmith.elastic import Job, run_agent

        is_host, host, port = True, "localhost", 0
        if self.rendezvous is not None:
            host, port = parse_endpoint(self.rendezvous)
            is_host = hold_or_find(host, port, self.timeout_s, tell)
        address = own_address(host, port) if self.nodes > 1 else "127.0.0.1"
        for name, value in rank_variables(number, address, os.environ).items():
            os.environ[name] = value
        return run_agent(
            Job(
                self.rendezvous_id or "",
                number,
                self.nodes,
                f"{host}:{port}",
                is_host,
                address,
                self.max_restarts,
                self.timeout_s,
            ),
            (sys.executable, "-m", "tunesmith", *arguments),
            tell,
        )


def rank_variables(number: int, address: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What all ranks of this host are to find in their environment, beside their place; what is set already stays."""
    import psutil
    import torch

    wanted = {
        LAUNCHED: "1",
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // number)),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # a host that comes back would wait for a store that is no longer told
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT",  # SIGINT and SIGTERM are passed on by our own agent
    }
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):  # else gloo takes what the host's name leads to
            wanted["GLOO_SOCKET_IFNAME"] = name
    return {name: value for name, value in wanted.items() if name not in environment}


def parse_endpoint(text: str) -> tuple[str, int]:
    """HOST:PORT; an IPv6 address in brackets."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--rendezvous {text}: give HOST:PORT, such as node1:29400")
    return host.strip("[]"), int(port)


def hold_or_find(host: str, port: int, timeout_s: float, tell: Callable[[str], None]) -> bool:
    """True if `host` is this machine and the hosts are to meet in this process; False once they meet there already.

    Raises UserError if neither is so within the time.
    """
    deadline, told = monotonic() + timeout_s, False
    while True:
        if is_free_here(host, port):
            return True
        trouble = knock(host, port)
        if not trouble:
            return False
        if monotonic() > deadline:
            raise UserError(
                f"--rendezvous {host}:{port}: {trouble}, for {timeout_s:g} s; see that tunesmith runs on {host}, that the name "
                "leads to it from here, and that no firewall closes the port"
            )
        if not told:
            tell(f"waiting for {host}:{port}, up to {timeout_s:g} s: {trouble}")
            told = True
        sleep(1)


def is_free_here(host: str, port: int) -> bool:
    """Whether a server of this process could listen at this address: it is one of this machine's, and the port is free."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not hold it
            probe.bind(address)
    except OSError:
        return False
    return True


def knock(host: str, port: int) -> str:
    """What keeps one from reaching this address; empty if something listens there."""
    try:
        socket.create_connection((host, port), KNOCK_S).close()
    except socket.gaierror:
        return f"no host is known here by the name of {host}"
    except ConnectionRefusedError:
        return "nothing listens there"
    except OSError as error:
        return f"it cannot be reached ({error.strerror or error})"
    return ""


def own_address(host: str, port: int) -> str:
    """By which address the others reach this machine: that of its way to `host`; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        found = str(probe.getsockname()[0])
    is_own_name = found.startswith("127.") or found == "::1"  # which leads to itself; others know the name
    return host if is_own_name else found


def exit_code(error: UserError) -> int:
    """Of a process that ends by it."""
    return AGAIN if isinstance(error, PeerError) else MENDABLE


def report(error: Exception) -> None:
    """Leave the error to the launcher of this rank, ours or torchrun, if there is one."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
