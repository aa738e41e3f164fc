"""Everything a test needs, made here: no download, no file from outside the repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import make_model, train_tokenizer
from tunesmith.config import RunConfig
from tunesmith.config_file import config_from_dict


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenized samples stay among the test's own files; tests of a session share them, as runs do."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE tokenizer with ChatML, as a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[[str], Path]:
    """family → folder of a tiny random model with the tokenizer, made once."""
    made: dict[str, Path] = {}

    def folder(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_model(family).save_pretrained(made[family])
            for file in tokenizer_folder.iterdir():
                (made[family] / file.name).write_bytes(file.read_bytes())
        return made[family]

    return folder


CHATS = [(f"What follows {n}?", f"After {n} comes {n + 1}." + " And so on." * (n % 3)) for n in range(24)]


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """24 short conversations of ragged length."""
    file = tmp_path / "chats.jsonl"
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in CHATS
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def make_config(model_folder: Callable[[str], Path], chat_file: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A small run on the CPU in fp32; keyword arguments are sections or settings laid over it."""

    def make(family: str = "llama", **sections: Any) -> RunConfig:
        tree: dict[str, Any] = {
            "model": {"path": str(model_folder(family)), "precision": "fp32"},
            "data": {"path": str(chat_file), "max_tokens": 128, "eval_fraction": 0.2},
            "engine": {"name": "single", "device": "cpu"},
            "optimizer": {"name": "adamw", "lr": 1e-2},
            "train": {"batch_size": 4, "steps": 4},
            "output": str(tmp_path / "run"),
        }
        for name, value in sections.items():
            tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
        return config_from_dict(tree)

    return make
