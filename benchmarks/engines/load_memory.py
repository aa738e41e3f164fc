"""Peak memory of loading and saving in each of 1, 2 and 4 processes, as a share of the model's bytes.

    python benchmarks/engines/load_memory.py [--layers 3] [--ranks 1 2 4] [--folder /tmp]

The model has the widths of a 7B Llama in bf16 (13.5 GB with --layers 32; 1.7 GB with 3) and random weights, written a
tensor at a time. A peak is a process's resident memory at its highest, mapped pages of files and all, less what it held
with everything imported and the ranks connected. Everything written is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import print_machine

from tunesmith.config import ModelConfig
from tunesmith.models.conversion import empty_like
from tunesmith.models.load import blocks, load_model
from tunesmith.models.save import save_sharded
from tunesmith.models.sharded import empty_model
from tunesmith.models.tensor_files import TensorWriter

TARGET = 0.6


def make_checkpoint(folder: Path, layers: int) -> int:
    """Its bytes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16")  # the defaults are those of the 7B model
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, state_dict={})
    like = {name: empty_like(p) for name, p in model.state_dict().items()}
    with TensorWriter(folder / "model.safetensors", like) as writer:
        for name, p in like.items():
            writer.write(name, torch.empty(p.shape, dtype=p.dtype).normal_(std=0.02))
    return sum(p.numel() * p.element_size() for p in like.values())


def peak_from_now() -> int:
    """Forget the highest resident memory so far; returns the present one in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def one_rank(folder: Path) -> None:
    """Loads whole if there is no group of ranks to load with; prints bytes and seconds."""
    import torch.distributed as dist
    import transformers.models.llama  # noqa: F401
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    config = ModelConfig(path=str(folder))
    if "RANK" not in os.environ:
        before, start = peak_from_now(), time.perf_counter()
        for p in load_model(config, torch.bfloat16).parameters():
            p.sum()  # until they are used they are only mapped
        found |= {"load": status("VmHWM") - before, "load_s": time.perf_counter() - start}
        print(json.dumps(found))
        return
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (world,))
    dist.barrier()
    before, start = peak_from_now(), time.perf_counter()
    model, checkpoint = empty_model(config, torch.bfloat16)
    for _, block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    checkpoint.fill(model, torch.device("cpu"))
    found |= {"load": status("VmHWM") - before, "load_s": time.perf_counter() - start}
    dist.barrier()
    before, start = peak_from_now() - status("VmRSS") + before, time.perf_counter()
    save_sharded(model, folder / "saved", rank, world)
    found |= {"save": status("VmHWM") - before, "save_s": time.perf_counter() - start}
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(found))


def measure(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """ranks: 0 means the whole model in one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(max(ranks, 1)):
        told = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks else {}
        environment = os.environ | {name: str(value) for name, value in told.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--one", str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a rank failed")
    for file in (folder / "saved").glob("*"):
        file.unlink()
    return [json.loads(text.splitlines()[-1]) for text in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one_rank(options.one)
    print_machine()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        total = make_checkpoint(Path(folder), options.layers)
        print(f"model: {total / 1e9:.2f} GB\n{'ranks':>12} {'load':>8} {'save':>8} {'load s':>8} {'save s':>8}")
        for ranks in [0, *options.ranks]:
            found = measure(Path(folder), ranks)
            worst = {name: max(each[name] for each in found) for name in found[0]}
            save = f"{worst['save'] / total:8.3f}" if "save" in worst else f"{'–':>8}"
            save_s = f"{worst['save_s']:8.1f}" if "save_s" in worst else f"{'–':>8}"
            name = f"{ranks}" if ranks else "load_model"
            print(f"{name:>12} {worst['load'] / total:8.3f} {save} {worst['load_s']:8.1f} {save_s}", flush=True)
            if ranks == 2 and worst["load"] >= TARGET * total:
                print(f"over the target of {TARGET}")
    return None


if __name__ == "__main__":
    main()
