import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.families import FAMILIES, SMALL
from tunesmith.errors import UserError
from tunesmith.models.load import load_config
from tunesmith.plan import kept
from tunesmith.plan.devices import Device, Rates
from tunesmith.plan.forecast import foresee
from tunesmith.plan.rows import full_rows
from tunesmith.plan.show_survey import print_survey
from tunesmith.plan.survey import LENGTHS, WAYS, config_of, lengths, look

WIDE = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48, "num_hidden_layers": 4}
DEVICE = Device("small", "cpu", 460 * 2**20, Rates(1, 1, 10, 5, (0.5, 1.0)))


@pytest.fixture
def config_alone(tmp_path: Path) -> Callable[..., str]:
    """A folder with a model's config.json and nothing else."""

    def folder(family: str = "llama", **settings: object) -> str:
        from transformers import CONFIG_MAPPING

        CONFIG_MAPPING[family](**{**SMALL, **FAMILIES.get(family, {}), **settings}).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return folder


def test_a_table_of_methods_and_lengths(config_alone: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, console = config_alone(**WIDE), Console(record=True, width=100, file=io.StringIO())
    cells = print_survey(model, (), DEVICE, console)
    assert [(cell.way, cell.tokens) for cell in cells] == [(way, 256) for way in WAYS]
    needed = {cell.way: cell.forecast.needed for cell in cells if cell.forecast is not None}
    assert needed.keys() == WAYS.keys()
    assert needed["full"] > needed["full, checkpointing"] > needed["chunk, checkpointing"]
    assert needed["chunk"] < needed["full"]
    text = console.export_text()
    assert all(f"\n{way} " in text for way in WAYS)
    assert text.count("tokens/s") == len(WAYS)
    monkeypatch.setattr(kept, "trace", lambda *given: pytest.fail("made again"))
    assert [cell.forecast for cell in cells] == [look(model, way, 256, (), DEVICE).forecast for way in WAYS]


def test_lengths_are_those_that_the_model_knows(config_alone: Callable[..., str]) -> None:
    assert lengths(config_alone(max_position_embeddings=8192), ()) == [512, 2048, 8192]
    assert lengths(config_alone(max_position_embeddings=2**17), ()) == list(LENGTHS)
    assert lengths(config_alone(max_position_embeddings=100), ()) == [100]


def test_rows_without_data_are_full(config_alone: Callable[..., str]) -> None:
    config = config_of(config_alone(), "full", 128, ())
    data = full_rows(config)
    assert data.samples.lengths().tolist() == [[128], [128]]
    traced = foresee(config, DEVICE, data).traced
    assert (traced.rows, traced.width, traced.tokens) == (1, 128, 128)
    longer = config_of(config_alone(), "full", 256, ())
    assert foresee(longer, DEVICE, full_rows(longer)).needed > foresee(config, DEVICE, data).needed


def test_settings_are_taken(config_alone: Callable[..., str]) -> None:
    cell = look(config_alone(), "full", 128, ["optimizer=sgd"], DEVICE)
    usual = look(config_alone(), "full", 128, (), DEVICE)
    assert cell.forecast is not None
    assert usual.forecast is not None
    assert "optimizer state" in usual.forecast.parts
    assert "optimizer state" not in cell.forecast.parts
    with pytest.raises(UserError, match=r"sede: unknown; did you mean seed\?"):
        lengths(config_alone(), ["sede=1"])


def test_models_that_cannot_be_built(config_alone: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be built of its config\.json alone"):
        lengths(config_alone(hidden_act="nonsense"), ())
    with pytest.raises(UserError, match=r"no model: it holds no config\.json"):
        lengths(str(tmp_path), ())
    with pytest.raises(UserError, match="no such model folder"):
        lengths("./nowhere", ())


def test_a_model_with_code_of_its_own_says_what_it_needs(config_alone: Callable[..., str]) -> None:
    folder = config_alone()
    file = Path(folder) / "config.json"
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "own", "auto_map": own}))
    said = r"configuration_own\.py, modeling_own\.py\): read it, and set model\.trust_remote_code to true"
    with pytest.raises(UserError, match=said):
        lengths(folder, ())
    (Path(folder) / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    allowed = config_of(folder, "full", 128, ["model.trust_remote_code=true"])
    assert load_config(allowed.model).model_type == "own"
