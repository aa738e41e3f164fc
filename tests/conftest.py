"""Everything a test needs, made here: no download, no file from outside the repository."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import make_model, teach, train_tokenizer
from tunesmith.config import RunConfig
from tunesmith.config_file import config_from_dict


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenized samples stay among the test's own files; tests of a session share them, as runs do."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def plain_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM act as in a terminal: a process that a script starts in the background begins with SIGINT ignored."""
    plain = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in plain.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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

    def folder(family: str = "llama", seed: int = 0) -> Path:
        name = f"{family}{seed or ''}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_model(family, seed=seed).save_pretrained(made[name])
            for file in tokenizer_folder.iterdir():
                (made[name] / file.name).write_bytes(file.read_bytes())
        return made[name]

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


@pytest.fixture(scope="session")
def taught_folder(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny model that answers the chats, about half of them with a plain No: what it generates can get better."""
    folder = tmp_path_factory.mktemp("taught")
    model = make_model("llama")
    teach(model, tokenizer, [(question, said) for question, answer in CHATS for said in (answer, "No.")])
    for file in model_folder("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder)
    return folder


def _turns(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


def _records(form: str) -> list[dict[str, Any]]:
    """24 records that every objective of this form can learn in a few steps."""
    if form == "pairs":
        return [
            {
                "prompt": turns["prompt"],
                "chosen": turns["completion"],
                "rejected": [{"role": "assistant", "content": "No." * (1 + n % 4)}],
            }
            for n, turns in enumerate(_turns(*chat) for chat in CHATS)
        ]
    if form == "feedback":
        return [
            _turns(question, answer if n % 3 else "No.") | {"label": bool(n % 3)}
            for n, (question, answer) in enumerate(CHATS)
        ]
    if form == "choices":
        return [
            {"text": question if n % 2 else answer, "label": "odd" if n % 2 else "even"}
            for n, (question, answer) in enumerate(CHATS)
        ]
    if form == "steps":
        return [
            {
                "prompt": question,
                "completions": ["And so on.", "No."] if n % 2 else [answer],
                "labels": [True, False] if n % 2 else [True],
            }
            for n, (question, answer) in enumerate(CHATS)
        ]
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in CHATS
    ]


@pytest.fixture
def data_of_form(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Form of an objective's samples → a data section with a file of 24 such records."""

    def section(form: str) -> dict[str, Any]:
        file = tmp_path / f"{form}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in _records(form)))
        return {"path": str(file)} | ({"labels": ["even", "odd"]} if form == "choices" else {})

    return section


@pytest.fixture
def objective_sections(
    data_of_form: Callable[[str], dict[str, Any]], model_folder: Callable[..., Path], taught_folder: Path
) -> Callable[[str], dict[str, Any]]:
    """Name of an objective → sections of a configuration with which it can run: itself, its data, and the model of one that
    generates."""

    def sections(name: str) -> dict[str, Any]:
        from tunesmith.objectives import OBJECTIVES

        kind = OBJECTIVES[name]
        teacher = {"teacher": str(model_folder("llama", seed=1))} if "teacher" in kind.needs else {}
        generates = "generated" in kind.reads
        model = {"model": {"path": str(taught_folder)}} if generates else {}
        length = {"max_new_tokens": 16} if generates else {}
        return {"objective": {"name": name, **teacher, **length}, "data": data_of_form(kind.form), **model}

    return sections


@pytest.fixture
def make_config(model_folder: Callable[[str], Path], chat_file: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A small run on the CPU in fp32; keyword arguments are sections or settings laid over it."""

    def make(family: str = "llama", **sections: Any) -> RunConfig:
        tree: dict[str, Any] = {
            "model": {"path": str(model_folder(family)), "precision": "fp32"},
            "data": {"path": str(chat_file), "max_tokens": 128, "eval_fraction": 0.2},
            "engine": {"name": "single", "device": "cpu"},
            "optimizer": {"name": "adamw", "lr": 1e-2},
            "train": {"batch_size": 4, "steps": 4, "foresee": False},
            "output": str(tmp_path / "run"),
        }
        for name, value in sections.items():
            tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
        return config_from_dict(tree)

    return make
