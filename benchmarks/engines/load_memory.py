"""Peak memory of loading, training and saving in each of 1, 2 and 4 processes, as a share of the model's bytes.

    python benchmarks/engines/load_memory.py [--layers 3] [--ranks 1 2 4] [--methods lora full] [--folder /tmp]

The model has the widths of a 7B Llama in bf16 (13.5 GB with --layers 32; 1.7 GB with 3) and random weights, written a
tensor at a time. A peak is a process's resident memory at its highest, mapped pages of files and all, less what it held
with everything imported and the ranks connected. Training is engine fsdp's, of LoRA (rank 16) and of all weights, with
AdamW in bf16: two steps of the same 4 rows of 64 tokens, one row a micro-batch, whatever the number of ranks. Everything
written is deleted.
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

from tunesmith.config import AdamWConfig, FsdpConfig, FullConfig, LoraConfig, ModelConfig, PretrainConfig, SingleConfig
from tunesmith.engines import build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS
from tunesmith.models.conversion import empty_like
from tunesmith.models.load import blocks, load_model
from tunesmith.models.save import save_sharded
from tunesmith.models.sharded import empty_model
from tunesmith.models.tensor_files import TensorWriter
from tunesmith.objectives import build_objective
from tunesmith.types import Batch

TARGET = 0.6
"""Of loading on 2 ranks."""
ROWS, TOKENS, STEPS = 4, 64, 2
METHOD_SECTIONS = {"lora": LoraConfig(rank=16, alpha=32.0), "full": FullConfig()}


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


def rows(vocabulary: int) -> Batch:
    """Of one sequence each, all tokens but the first of it targets."""
    weights = torch.ones(ROWS, TOKENS)
    weights[:, 0] = 0
    number = torch.arange(ROWS)
    return Batch(
        torch.randint(0, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)),
        torch.arange(TOKENS).expand(ROWS, -1), number[:, None].expand(-1, TOKENS), weights, number, number,
    )  # fmt: skip


def train(folder: Path, name: str) -> None:
    """Loads and trains as a run does, in one process on engine single; prints bytes and seconds."""
    import transformers.models.llama  # noqa: F401
    from peft import LoraModel  # noqa: F401

    settings = FsdpConfig(device="cpu") if "RANK" in os.environ else SingleConfig(device="cpu")
    engine, objective = build_engine(settings, "bf16"), build_objective(PretrainConfig())
    before = peak_from_now()
    model, _ = engine.load(ModelConfig(path=str(folder)), torch.bfloat16)
    method = METHODS[name](METHOD_SECTIONS[name], AdamWConfig(lr=1e-5), max_grad_norm=1.0)
    learner = Learner(model, engine, method, TOKENS)
    batch = rows(model.config.vocab_size)
    peak_from_now()
    start = time.perf_counter()
    for _ in range(STEPS):
        learner.step(objective, batch, 1e-5)
    print(json.dumps({name: status("VmHWM") - before, f"{name}_s": time.perf_counter() - start}))


def measure(folder: Path, ranks: int, *more: str) -> dict[str, Any]:
    """What the worst rank found. ranks: 0 means the whole model in one process. more: arguments of a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(max(ranks, 1)):
        told = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks else {}
        environment = os.environ | {name: str(value) for name, value in told.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--one", str(folder), *more]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a rank failed")
    for file in (folder / "saved").glob("*"):
        file.unlink()
    found = [json.loads(text.splitlines()[-1]) for text in said]
    return {name: max(each[name] for each in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="*", choices=METHOD_SECTIONS, default=list(METHOD_SECTIONS))
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--train", choices=METHOD_SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return train(options.one, options.train) if options.train else one_rank(options.one)
    print_machine()
    columns = ["load", "save", *options.methods]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        total = make_checkpoint(Path(folder), options.layers)
        print(f"model: {total / 1e9:.2f} GB")
        print(f"{'ranks':>12}" + "".join(f" {name:>8} {'s':>6}" for name in columns))
        for ranks in [0, *options.ranks]:
            print(f"{ranks or 'one, whole':>12}", end="")
            worst: dict[str, Any] = {}
            for name in columns:
                if name in options.methods:
                    worst |= measure(Path(folder), ranks, "--train", name)
                elif not worst:
                    worst = measure(Path(folder), ranks)
                known = name in worst
                cell = f" {worst[name] / total:8.3f} {worst[f'{name}_s']:6.1f}" if known else f" {'–':>8} {'–':>6}"
                print(cell, end="", flush=True)
            print("  over the target" if ranks == 2 and worst["load"] >= TARGET * total else "")
    return None


if __name__ == "__main__":
    main()
