"""A run on two hosts, as two network namespaces joined by a virtual link: make two-hosts.

    python tests/hosts/two_hosts.py [run.yaml] [a.b=c]... [--kill] [--cut-s 12] [--alone runs/demo]

In the middle a rank is killed (--kill), the link is cut for some seconds (--cut-s), or both. At the end the weights are
compared with those of the same run in one process, which is made, or lies in the folder --alone. Needs root and iproute2
(apt-get install iproute2); says why and exits with 0 where it cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
HOSTS = ("tunesmith-a", "tunesmith-b")
ADDRESSES = ("10.83.0.1", "10.83.0.2")
PORT = 29400


def why_not() -> str:
    """What keeps this machine from it; empty if nothing does."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if shutil.which("ip") is None:
        return "needs the command ip (apt-get install iproute2)"
    made = subprocess.run(["ip", "netns", "add", HOSTS[0]], capture_output=True, text=True)
    if made.returncode:
        return f"this machine allows no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", HOSTS[0]], check=True)
    return ""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def connect() -> None:
    """Two hosts, each with a loopback and one end of a link."""
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", "ts-a", "netns", HOSTS[0], "type", "veth", "peer", "name", "ts-b", "netns", HOSTS[1])
    for host, address, end in zip(HOSTS, ADDRESSES, ("ts-a", "ts-b"), strict=True):
        ip("-n", host, "address", "add", f"{address}/24", "dev", end)
        for link in ("lo", end):
            ip("-n", host, "link", "set", link, "up")


def disconnect() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)


def start(host: str, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "tunesmith", "train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment)


def wait_for(
    what: str, condition: Callable[[], Any], processes: Sequence[subprocess.Popen[bytes]], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline or all(process.poll() is not None for process in processes):
            raise SystemExit(f"{what}: did not come")
        time.sleep(0.2)
    print(what, flush=True)


def small_run(folder: Path) -> Path:
    """A run.yaml of a tiny model."""
    import json

    from tests.families import make_model, train_tokenizer

    train_tokenizer().save_pretrained(folder / "model")
    make_model("llama").save_pretrained(folder / "model")
    turns = [(f"What follows {n}?", f"After {n} comes {n + 1}.") for n in range(24)]
    records = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))
    (folder / "run.yaml").write_text(
        f"model: {{path: {folder / 'model'}, precision: fp32}}\ndata: {{path: {folder / 'chats.jsonl'}, max_tokens: 64}}\n"
        "method: {name: lora, rank: 4}\nengine: {device: cpu}\ntrain: {steps: 600, batch_size: 4}\n"
        "checkpoint: {every_steps: 50}\n"
    )
    return folder / "run.yaml"


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    from tunesmith.run_folder import read_events

    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", help="run.yaml and settings over its own")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/two-hosts")
    parser.add_argument("--kill", action="store_true", help="kill -9 the rank of the second host in the middle")
    parser.add_argument("--cut-s", type=float, default=0.0, help="how long the link is down; 0: it is not cut")
    parser.add_argument("--alone", type=Path, help="the same run in one process, if it is there already")
    parser.add_argument("--timeout-s", type=float, default=600.0)
    options = parser.parse_args()
    if reason := why_not():
        print(f"two-hosts: skipped: {reason}")
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    run = options.folder / "run"
    words = options.words or [str(small_run(options.folder))]
    arguments = [*words, f"output={run}", "--nproc", "1", "--nodes", "2", "--rendezvous", f"{ADDRESSES[0]}:{PORT}"]
    logs = [options.folder / f"{host}.log" for host in HOSTS]
    disconnect()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        connect()
        for host, log in zip(HOSTS, logs, strict=True):
            processes.append(start(host, arguments, log))
        wait_for("both hosts train", lambda: events(run, "step"), processes, options.timeout_s)
        if options.kill:
            starts = lines_of(run, "start", "resume")
            ranks = psutil.Process(processes[1].pid).children(recursive=True)
            rank = next(process for process in ranks if "tunesmith" in process.cmdline())
            rank.kill()
            print(f"the rank of {HOSTS[1]} is killed", flush=True)
            wait_for(
                "both hosts train again",
                lambda: lines_of(run, "start", "resume") > starts,
                processes,
                options.timeout_s,
            )
        if options.cut_s:
            ip("-n", HOSTS[1], "link", "set", "ts-b", "down")
            print(f"the link is cut, for {options.cut_s:g} s", flush=True)
            time.sleep(options.cut_s)
            before = lines_of(run)
            ip("-n", HOSTS[1], "link", "set", "ts-b", "up")
            print("the link is up again", flush=True)
            wait_for("both hosts train again", lambda: lines_of(run) > before, processes, options.timeout_s)
        wait_for("the run is complete", lambda: events(run, "end"), processes, options.timeout_s)
        codes = [process.wait(options.timeout_s) for process in processes]
        print(f"exit codes {codes}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
        disconnect()
        for host, log in zip(HOSTS, logs, strict=True):
            print(f"--- {host}\n{log.read_text() if log.exists() else ''}")
    if any(codes):
        raise SystemExit(1)
    alone = options.alone or options.folder / "alone"
    if options.alone is None:
        subprocess.run(
            [sys.executable, "-m", "tunesmith", "train", *words, f"output={alone}", "--nproc", "1"], check=True
        )
    relative, largest = differences(run / "model", alone / "model")
    print(
        f"weights against those of one process: {relative:.1e} of their norm, or of what an adapter adds to them; the largest "
        f"difference of a number {largest:.1e}"
    )
    if max(relative, largest) > 1e-5:
        raise SystemExit("more than 1e-5: in bf16 that is to be expected, compare with model.precision=fp32")


def weights_of(folder: Path) -> dict[str, Any]:
    """Of a saved model its weights; of a LoRA adapter what it adds to those of its base, alpha / r · B A."""
    from safetensors.torch import load_file

    saved = {name: x.double() for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    if not (folder / "adapter_config.json").exists():
        return saved
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    return {
        name: scale * saved[name.replace("lora_A", "lora_B")] @ x for name, x in saved.items() if "lora_A" in name
    } | {name: x for name, x in saved.items() if "lora_" not in name}


def differences(one: Path, other: Path) -> tuple[float, float]:
    """Of the weights of two saved models: norm of the difference over their norm, and the largest one."""
    import torch

    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(x - theirs[name]).flatten() for name, x in ours.items()])
    whole = torch.cat([x.flatten() for x in theirs.values()])
    return float(apart.norm() / whole.norm()), float(apart.abs().max())


def lines_of(folder: Path, *kinds: str) -> int:
    """How many lines the log of events has, or how many of some kinds."""
    file = folder / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return len([line for line in lines if not kinds or any(f'"event": "{kind}"' in line for kind in kinds)])


if __name__ == "__main__":
    main()
