"""What the peers share: cold caches, the peak memory of a process with its children, and the line of results.

This file also runs in environments without tunesmith: it needs only psutil. Run as a program, `measure.py PID` samples
the process PID until its standard input closes and then prints the peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.2


@contextmanager
def cold_caches() -> Iterator[Path]:
    """Give a fresh folder that the Hugging Face libraries, imported from here on, use for every cache; then delete it.

    The libraries' own prints go to standard error, so that standard output holds only the results.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, redirect_stdout(sys.stderr):
        os.environ |= {
            "HF_HOME": name,
            "HF_DATASETS_CACHE": f"{name}/datasets",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        yield Path(name)


class PeakMemory:
    """Peak memory of this process and its children while the `with` block runs, as sums over the processes.

    `rss_bytes` adds up resident sizes: what forked workers share with their parent counts once in each process.
    `pss_bytes` counts shared pages once (on Linux; elsewhere it leaves them out). A process of its own takes the
    samples, so that the measured one has no second thread when it forks.
    """

    rss_bytes = pss_bytes = 0

    def __enter__(self) -> PeakMemory:
        command = [sys.executable, __file__, str(os.getpid())]
        self._sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._sampler.stdout
        self.start_bytes = json.loads(self._sampler.stdout.readline())[0]
        return self

    def __exit__(self, *_: object) -> None:
        self.rss_bytes, self.pss_bytes = json.loads(self._sampler.communicate()[0])


def tree_bytes(root: psutil.Process) -> tuple[int, int]:
    """Resident and proportional bytes of `root` and its descendants, this sampler apart."""
    resident = proportional = 0
    for process in [root, *root.children(recursive=True)]:
        if process.pid != os.getpid():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                memory = process.memory_full_info()
                resident += memory.rss
                proportional += getattr(memory, "pss", memory.uss)
    return resident, proportional


def print_peak(pid: int) -> None:
    """Print a first sample at once and the highest of all when standard input closes, each `[rss, pss]`."""
    root = psutil.Process(pid)
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    rss, pss = tree_bytes(root)
    print(json.dumps([rss, pss]), flush=True)
    while not stop.wait(SAMPLE_SECONDS):
        now_rss, now_pss = tree_bytes(root)
        rss, pss = max(rss, now_rss), max(pss, now_pss)
    print(json.dumps([rss, pss]))


def print_results(seconds: float, tokens: int, rows: int, memory: PeakMemory, **more: object) -> None:
    """Print one line of JSON. `start_bytes` is what the imports had taken before the measured work began."""
    results = {"seconds": round(seconds, 3), "tokens": tokens, "rows": rows, "rss_bytes": memory.rss_bytes}
    results |= {"pss_bytes": memory.pss_bytes, "start_bytes": memory.start_bytes}
    print(json.dumps(results | more), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    print_peak(int(sys.argv[1]))
