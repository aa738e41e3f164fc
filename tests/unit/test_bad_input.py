"""What a user can get wrong, through `train`: one sentence that names the place, and a folder as it was before."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.config import RunConfig
from tunesmith.errors import UserError
from tunesmith.run import Result, train
from tunesmith.run_folder import RunFolder

MakeConfig = Callable[..., RunConfig]

LLAMA_LINEARS = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


def run(config: RunConfig, resume: bool = False) -> Result:
    return train(config, resume=resume, console=Console(file=io.StringIO()))


def contents(path: Path) -> Any:
    """All that lies in a folder; the text of a file; None where nothing is."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    return path.read_bytes() if path.exists() else None


def refusal(config: RunConfig, resume: bool = False) -> str:
    """The message, after a look that the refusal left the output as it was."""
    before = contents(Path(config.output))
    with pytest.raises(UserError) as caught:
        run(config, resume)
    assert contents(Path(config.output)) == before
    return str(caught.value)


@pytest.fixture
def model(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- the model


def test_a_model_folder_that_is_missing(make_config: MakeConfig, tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        assert refusal(make_config(model={"path": path})) == (
            f"{path}: no such model folder (now in {Path.cwd()}); check the path"
        )


def test_a_folder_without_config(make_config: MakeConfig, model: Path) -> None:
    (model / "config.json").unlink()
    assert refusal(make_config(model={"path": str(model)})) == (
        f"{model}: no model: it holds no config.json; give the folder that save_pretrained wrote"
    )


def test_a_folder_without_weights(make_config: MakeConfig, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert refusal(make_config(model={"path": str(model)})) == (
        f"{model}: no weights: it holds no *.safetensors; download or copy the checkpoint again"
    )


@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_corrupt_weights(keep: int, make_config: MakeConfig, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert refusal(make_config(model={"path": str(model)})).startswith(f"{model}: the model cannot be loaded: ")


def test_tokenizer_files_that_are_missing_or_corrupt(make_config: MakeConfig, model: Path) -> None:
    config = make_config(model={"path": str(model)})
    (model / "tokenizer.json").write_text("{")
    assert refusal(config).startswith(f"{model}: the tokenizer cannot be loaded: ")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    message = refusal(config)
    assert message.startswith(f"{model}: the tokenizer cannot be loaded: ")
    assert not message.rstrip().endswith(":")  # cut where the reason begins


def test_a_config_that_is_no_json(make_config: MakeConfig, model: Path) -> None:
    (model / "config.json").write_text("{")
    assert refusal(make_config(model={"path": str(model)})).startswith(f"{model}: the ")


def test_an_unknown_architecture(make_config: MakeConfig, model: Path) -> None:
    change_json(model / "config.json", model_type="nonsense")
    message = refusal(make_config(model={"path": str(model)}))
    assert message.startswith(f"{model}: the model cannot be loaded: ")
    assert "nonsense" in message


def test_a_checkpoint_that_lacks_weights(make_config: MakeConfig, model: Path) -> None:
    file = model / "model.safetensors"
    lost = "model.layers.1.mlp.up_proj.weight"
    weights = {name: tensor for name, tensor in load_file(file).items() if name != lost}
    save_file(weights, file, metadata={"format": "pt"})
    assert refusal(make_config(model={"path": str(model)})) == (
        f"{model}: the checkpoint lacks 1 weights of LlamaForCausalLM, such as {lost}; "
        "they would start at random: it is incomplete, or of another architecture"
    )


def test_weights_of_another_shape(make_config: MakeConfig, model: Path) -> None:
    change_json(model / "config.json", intermediate_size=40)
    assert refusal(make_config(model={"path": str(model)})).startswith(f"{model}: the model cannot be loaded: ")


def test_a_vocabulary_smaller_than_the_tokenizer_s(make_config: MakeConfig, model: Path) -> None:
    shape = AutoConfig.from_pretrained(model)
    shape.vocab_size = 100
    AutoModelForCausalLM.from_config(shape).save_pretrained(model)
    assert refusal(make_config(model={"path": str(model)})).startswith(f"{model}: ")


def test_samples_longer_than_the_positions_that_the_model_has(make_config: MakeConfig, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"text": f"zq{n} " * 300}) + "\n" for n in range(4)))
    config = make_config("gpt2", data={"path": str(file), "max_tokens": 1024, "eval_fraction": 0.0})
    message = refusal(config)
    assert "data.max_tokens" in message
    assert "256" in message


# ---- the data


def test_chat_data_with_a_model_without_chat_template(make_config: MakeConfig, model: Path, chat_file: Path) -> None:
    (model / "chat_template.jinja").unlink()
    """ChatML stands in for it, and the run says so; the model that it saves has it."""
    result = run(make_config(model={"path": str(model)}, train={"steps": 1}))
    report = (result.folder / "report.md").read_text()
    assert "24 conversations rendered as ChatML: the tokenizer has no chat template" in report
    assert "<|im_start|>" in (result.folder / "model" / "chat_template.jinja").read_text()


def test_plain_text_with_a_model_without_chat_template(make_config: MakeConfig, model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    (tmp_path / "a.txt").write_text("What follows 3?\nAfter 3 comes 4.\n")
    result = run(make_config(model={"path": str(model)}, data={"path": str(tmp_path / "a.txt")}, train={"steps": 1}))
    assert not (result.folder / "model" / "chat_template.jinja").exists()


def test_a_chat_template_that_is_missing_or_no_jinja(make_config: MakeConfig, tmp_path: Path, chat_file: Path) -> None:
    file = tmp_path / "template.jinja"
    config = make_config(model={"chat_template": str(file)})
    assert refusal(config) == f"model.chat_template: {file}: no such file; give a Jinja file, or chatml"
    file.write_text("{% for message in messages %}")
    assert refusal(config).startswith(f"{chat_file}:1:1: the model's chat template refuses this conversation: ")


def test_a_data_file_that_is_missing(make_config: MakeConfig, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.jsonl")
    assert refusal(make_config(data={"path": missing})) == (
        f"{missing}: no such data file; check data.path (now in {Path.cwd()})"
    )
    message = refusal(make_config(data={"eval_path": missing}))
    assert message.startswith(f"{missing}: no such data file")
    assert "data.path" not in message


def test_a_bad_record_in_the_middle(make_config: MakeConfig, chat_file: Path) -> None:
    lines = chat_file.read_text().splitlines()
    chat_file.write_text("\n".join([*lines[:3], "{", *lines[3:]]))
    assert refusal(make_config()) == (
        f"{chat_file}:4:2: not JSON: Expecting property name enclosed in double quotes: one object per line is expected"
    )


def test_data_of_which_nothing_is_left(make_config: MakeConfig, chat_file: Path) -> None:
    assert refusal(make_config(data={"eval_fraction": 1.0})) == (
        "data.eval_fraction: 1.0 leaves nothing of the data to train on"
    )
    assert refusal(make_config(data={"max_tokens": 8})) == (
        f"{chat_file}: nothing to learn from in 24 records: 24 dropped, since their prompt alone fills data.max_tokens: 8; "
        "raise data.max_tokens, or set data.truncation: left"
    )


# ---- the output


def test_an_output_that_holds_a_run(make_config: MakeConfig) -> None:
    config = make_config(train={"steps": 1})
    run(config)
    assert refusal(config) == (
        f"{config.output}: already holds a run; go on with it: tunesmith train --resume {config.output}, "
        "or choose another output"
    )


def test_an_output_that_is_not_empty_or_no_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "folder" / "notes.txt"
    folder.mkdir()
    file.write_text("mine")
    for path in (folder, file):
        assert refusal(make_config(output=str(path))) == f"{path}: exists and is no empty folder; choose another output"


def test_an_output_below_a_file(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" / "run"
    assert refusal(make_config(output=str(path))).startswith(f"{path}: ")


# ---- device and method


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_here(device: str, make_config: MakeConfig) -> None:
    message = refusal(make_config(engine={"device": device}))
    assert message.startswith(f"engine.device: {device!r} is not here: ")
    assert message.endswith("; try auto or cpu")


@pytest.mark.parametrize(("first", "last"), [(0, 3), (3, 0), (3, 1)])
def test_more_blocks_than_there_are(first: int, last: int, make_config: MakeConfig) -> None:
    method = {"name": "freeze", "first_blocks": first, "last_blocks": last}
    assert refusal(make_config(method=method)) == (
        f"method: the model has 2 blocks, fewer than first_blocks {first} or last_blocks {last}"
    )


def test_a_pattern_that_matches_nothing(make_config: MakeConfig) -> None:
    method = {"name": "freeze", "last_blocks": 1, "patterns": ["lm_head.*", "*.nothing"]}
    assert refusal(make_config(method=method)) == (
        "method.patterns: '*.nothing' matches no parameter; names look like model.embed_tokens.weight, "
        "model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight"
    )


@pytest.mark.parametrize("target", ["nothing", "input_layernorm"])
def test_a_lora_target_that_cannot_be_had(target: str, make_config: MakeConfig) -> None:
    message = refusal(make_config(method={"name": "lora", "targets": [target]}))
    assert message.startswith("method.targets: Target module")
    assert message.endswith(f"; linear modules of this model: {LLAMA_LINEARS}")


def test_a_module_to_save_that_is_not_there(make_config: MakeConfig) -> None:
    message = refusal(make_config(method={"name": "lora", "modules_to_save": ["nothing"]}))
    assert message.startswith("method.modules_to_save: ")
    assert "the model has no module nothing; it has " in message


# ---- resuming


@pytest.fixture
def begun(make_config: MakeConfig) -> RunConfig:
    """A run of two steps that has ended."""
    config = make_config(train={"steps": 2})
    run(config)
    return config


def test_resuming_with_other_settings_lists_them(begun: RunConfig, make_config: MakeConfig) -> None:
    changed = make_config(seed=3, data={"max_tokens": 64}, train={"steps": 9, "batch_size": 2}, schedule="linear")
    expected = (
        f"{begun.output}: this run was made with other settings:\n"
        "  data.max_tokens: was 128, is 64\n"
        "  schedule.name: was cosine, is linear\n"
        "  train.batch_size: was 4, is 2\n"
        "  seed: was 0, is 3\n"
        "put them back, or start a new run in another output folder"
    )
    assert refusal(changed, resume=True) == expected


def test_resuming_with_settings_that_may_change(begun: RunConfig, make_config: MakeConfig) -> None:
    changed = make_config(
        train={"steps": 3}, log={"every_steps": 3}, evaluate={"every_steps": 1}, checkpoint={"keep": 5}
    )  # fmt: skip
    result = run(changed, resume=True)
    assert (result.folder, result.step, result.finished) == (Path(begun.output), 3, True)
    assert RunFolder(result.folder).read_config() == changed


def test_a_precision_that_was_measured_is_kept(begun: RunConfig, make_config: MakeConfig) -> None:
    run(make_config(train={"steps": 3}, model={"precision": "auto"}), resume=True)
    assert RunFolder(Path(begun.output)).read_config().model.precision == "fp32"


@pytest.mark.parametrize(
    ("change", "line"),
    [({"seed": 5}, "seed: was 0, is 5"), ({"method": "full"}, "method.name: was lora, is full")],
)
def test_train_itself_refuses_other_settings(
    change: dict[str, Any], line: str, begun: RunConfig, make_config: MakeConfig
) -> None:
    message = refusal(make_config(train={"steps": 4}, **change), resume=True)
    assert message.startswith(f"{begun.output}: this run was made with other settings:\n")
    assert f"  {line}\n" in message


def test_resuming_for_fewer_steps_than_are_done(begun: RunConfig) -> None:
    fewer = begun.model_copy(update={"train": begun.train.model_copy(update={"steps": 1})})
    assert "train.steps" in refusal(fewer, resume=True)


def test_resuming_where_there_is_no_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    expected = f"{config.output}: holds no run (no config.yaml); give the output folder of a run"
    assert refusal(config, resume=True) == expected


def test_resuming_with_other_data(begun: RunConfig, chat_file: Path) -> None:
    longer = begun.model_copy(update={"train": begun.train.model_copy(update={"steps": 3})})
    text = chat_file.read_text()
    chat_file.write_text(text.replace("And so on", "And so forth"))
    assert refusal(longer, resume=True) == (
        f"{chat_file}: has changed since {begun.output} was begun; put it back, or start anew"
    )
    chat_file.write_text(text)
    assert run(longer, resume=True).step == 3


def test_resuming_with_another_held_out_file(make_config: MakeConfig, chat_file: Path, tmp_path: Path) -> None:
    """Losses before and after would not be comparable."""
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(chat_file.read_text())
    config = make_config(data={"eval_path": str(held_out)}, train={"steps": 1})
    run(config)
    held_out.write_text(chat_file.read_text().replace("And so on", "And so forth"))
    assert refusal(config, resume=True) == (
        f"{held_out}: has changed since {config.output} was begun; put it back, or start anew"
    )
