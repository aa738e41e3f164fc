import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from tunesmith.config import LoraConfig, RunConfig, Section, SetConfig
from tunesmith.config_file import config_from_dict, differing_keys, dump_config, json_schema, load_config
from tunesmith.data.formats import FORMATS
from tunesmith.engines import ENGINES
from tunesmith.errors import UserError
from tunesmith.methods import METHODS
from tunesmith.methods.optim import OPTIMIZERS, STATE_BYTES_PER_ELEMENT
from tunesmith.objectives import OBJECTIVES
from tunesmith.schedules import SCHEDULES

SHORTEST = "model: demo\ndata: demo\noutput: runs/a\n"
"""Three lines, so that whatever a test adds begins on line 4."""

TABLES: dict[str, Any] = {
    "objective": OBJECTIVES,
    "method": METHODS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "engine": ENGINES,
}
NEEDED = {"freeze": {"last_blocks": 1}, "distill": {"teacher": "a"}}
"""Settings without which a choice is refused."""


def members(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [member for part in get_args(annotation) for member in members(part)]


def names(axis: str) -> list[str]:
    """The names that the configuration offers on an axis."""
    return [member.model_fields["name"].default for member in members(RunConfig.model_fields[axis].annotation)]


CHOICES = [(axis, name) for axis in TABLES for name in names(axis)]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> RunConfig:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return load_config("run.yaml", overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value)


def test_the_shortest_config_resolves_to_the_documented_defaults() -> None:
    assert load(SHORTEST).model_dump() == {
        "model": {
            "path": "demo", "revision": None, "precision": "auto", "attention": "auto", "chat_template": None,
            "trust_remote_code": False,
        },
        "data": {
            "path": "demo", "format": "auto", "columns": {}, "names": (), "split": "train", "subset": None, "labels": (),
            "prompt": "", "header": (), "text_unit": "line", "weight": 1.0, "repeat": 1.0, "max_samples": None, "sets": (),
            "mix": "concat", "temperature": None, "eval_path": None, "eval_split": "test", "eval_fraction": 0.05,
            "max_eval_samples": 200,
            "max_tokens": 2048, "truncation": "right", "learn": "assistant", "as_chat": None, "template_variables": {},
            "date": None, "bad_records": "stop", "parse_special_tokens": False, "stream": False,
            "shuffle_window": 10_000, "pack": None, "share_prompt": True,
        },
        "output": "runs/a",
        "objective": {
            "name": "sft", "label_smoothing": 0.0, "z_loss": 0.0, "neftune_alpha": 0.0, "router_loss": 0.0, "loss": "nll",
            "eaft_power": 1.0,
        },
        "method": {
            "name": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear", "modules_to_save": (),
            "rslora": False, "dora": False, "init": "default", "lr_ratio": 1.0,
        },
        "optimizer": {"name": "adamw", "lr": 2e-4, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8},
        "schedule": {"name": "cosine", "warmup_fraction": 0.03, "warmup_steps": None, "final_fraction": 0.0},
        "engine": {"name": "auto", "device": "auto", "activation_checkpointing": False, "compile": False},
        "train": {"epochs": 1.0, "steps": None, "batch_size": 16, "micro_batch_tokens": 4096, "max_grad_norm": 1.0,
            "memory": None, "foresee": True},
        "checkpoint": {
            "every_steps": 0, "every_minutes": 10.0, "keep": 2, "asynchronous": None, "on_failure": "stop",
        },
        "evaluate": {"every_steps": 0},
        "log": {"every_steps": 1, "tensorboard": None},
        "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [
        (["method=lora"], 2e-4),
        (["method=full"], 2e-5),
        (["method=freeze", "method.last_blocks=1"], 5e-5),
        (["method=full", "optimizer=sgd"], 2e-2),
        (["method=lora", "optimizer=adafactor"], 1e-3),
        (["method=lora", "optimizer=lion"], 2e-5),
        (["method=full", "optimizer=muon"], 2e-5),
        (["method=lora", "optimizer=adamw", "optimizer.lr=0.5"], 0.5),
    ],
)
def test_the_learning_rate_follows_from_method_and_optimizer(overrides: list[str], lr: float) -> None:
    assert load(SHORTEST, *overrides).optimizer.lr == lr


def test_other_defaults_that_follow_from_others() -> None:
    assert load(SHORTEST, "objective=pretrain").data.truncation == "split"
    assert load(SHORTEST, "objective=pretrain", "data.truncation=drop").data.truncation == "drop"
    assert load(SHORTEST, "data.max_tokens=1000").train.micro_batch_tokens == 4096
    assert load(SHORTEST, "data.max_tokens=5000").train.micro_batch_tokens == 10000
    assert load(SHORTEST, "train.micro_batch_tokens=7").train.micro_batch_tokens == 7
    assert load(SHORTEST, "method=lora", "method.rank=4").method.alpha == 8.0
    assert load(SHORTEST, "method=lora", "method.rank=4", "method.alpha=1").method.alpha == 1.0


def test_short_and_long_forms_are_the_same() -> None:
    long = "model:\n  path: demo\ndata:\n  path: demo\noutput: runs/a\nmethod:\n  name: full\nengine:\n  name: single\n"
    assert load(SHORTEST + "method: full\nengine: single\n") == load(long)


def test_an_override_replaces_the_short_form() -> None:
    assert load(SHORTEST + "method: lora\n", "method=full").method.name == "full"
    assert load(SHORTEST + "method: {name: lora, rank: 8}\n", "method=full").method.name == "full"
    assert load(SHORTEST, "model=other").model.path == "other"


def test_an_override_below_the_short_form_grows_it() -> None:
    method = load(SHORTEST + "method: lora\n", "method.rank=4").method
    assert (method.name, method.rank) == ("lora", 4)
    model = load(SHORTEST, "model.precision=fp32").model
    assert (model.path, model.precision) == ("demo", "fp32")
    method = load(SHORTEST, "method=lora", "method.rank=4", "method.targets=[q_proj, v_proj]").method
    assert (method.rank, method.targets) == (4, ("q_proj", "v_proj"))


def test_later_overrides_win_and_values_are_yaml() -> None:
    config = load(SHORTEST + "seed: 1\n", "seed=2", "seed=3", "train.max_grad_norm=null", "output=a=b")
    assert (config.seed, config.train.max_grad_norm, config.output) == (3, None, "a=b")


def test_a_config_is_frozen() -> None:
    config = load(SHORTEST)
    for section, name in ((config, "seed"), (config.model, "path"), (config.method, "rank")):
        with pytest.raises(ValidationError, match="Instance is frozen"):
            setattr(section, name, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("metod: lora", "run.yaml:4: metod: unknown; did you mean method?"),
        (
            "zzzzzz: 1",
            "run.yaml:4: zzzzzz: unknown; known: model, data, output, objective, method, optimizer, schedule, engine, "
            "train, checkpoint, evaluate, log, seed",
        ),
        ("method: {name: lora, rnk: 4}", "run.yaml:4: method.rnk: unknown; did you mean rank?"),
        ("method: {name: full, rank: 4}", "run.yaml:4: method.rank: unknown; known: name"),
        ("engine: {devise: cpu}", "run.yaml:4: engine.devise: unknown; did you mean device?"),
        ("train:\n  stepz: 3", "run.yaml:5: train.stepz: unknown; did you mean steps?"),
        (
            "seed: many",
            "run.yaml:4: seed: input should be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        (
            "train:\n  batch_size: 1.5",
            "run.yaml:5: train.batch_size: input should be a valid integer, got a number with a fractional part, got 1.5",
        ),
        (
            "log: {tensorboard: maybe}",
            "run.yaml:4: log.tensorboard: input should be a valid boolean, unable to interpret input, got 'maybe'",
        ),
        ("train: {batch_size: 0}", "run.yaml:4: train.batch_size: input should be greater than 0, got 0"),
        (
            "method: {name: lora, dropout: 1}",
            "run.yaml:4: method.dropout: input should be less than 1, got 1",
        ),
        (
            "optimizer: {name: adamw, lr: .nan}",
            "run.yaml:4: optimizer.lr: input should be a finite number, got nan",
        ),
        (
            "optimizer: {name: adamw, betas: [0.9, 2]}",
            "run.yaml:4: optimizer.betas.1: input should be less than or equal to 1, got 2",
        ),
        (
            "method: {name: lora, init: zeros}",
            "run.yaml:4: method.init: input should be 'default', 'gaussian', 'orthogonal' or 'pissa', got 'zeros'",
        ),
        ("method: loar", "run.yaml:4: method: unknown name 'loar'; did you mean lora?"),
        ("method:\n  name: loar\n  rank: 4", "run.yaml:4: method: unknown name 'loar'; did you mean lora?"),
        (
            "objective: zzz",
            "run.yaml:4: objective: unknown name 'zzz'; known: "
            "sft, pretrain, dpo, orpo, simpo, cpo, kto, bco, reward, prm, classify, answer, distill",
        ),
        (
            "optimizer: {name: 5}",
            "run.yaml:4: optimizer: unknown name '5'; known: adamw, adamw8bit, sgd, adafactor, muon, lion",
        ),
        (
            "objective: {name: dpo, alpha_divergence: 0.3}",
            "run.yaml:4: objective: alpha_divergence: without f_divergence: alpha it would have no effect",
        ),
        (
            "objective: {name: dpo, discopop_tau: 0.1}",
            "run.yaml:4: objective: discopop_tau: without loss: discopop it would have no effect",
        ),
        (
            "objective: {name: dpo, loss: robust}",
            "run.yaml:4: objective: label_smoothing: robust needs it above 0, such as 0.1",
        ),
        (
            "objective: {name: distill, teacher: a, divergence: uld}",
            "run.yaml:4: objective: ce_weight: uld does not say which token is which: set it between 0 and 1, such as 0.5",
        ),
        ("schedule: cosinus", "run.yaml:4: schedule: unknown name 'cosinus'; did you mean cosine?"),
        ("engine: horovod", "run.yaml:4: engine: unknown name 'horovod'; known: auto, single, replicas, fsdp"),
        (
            "method: freeze",
            "run.yaml:4: method: nothing would train: set last_blocks, first_blocks or patterns",
        ),
        (
            "method: {name: freeze, last_blocks: 0}",
            "run.yaml:4: method: nothing would train: set last_blocks, first_blocks or patterns",
        ),
        ("model: other", "run.yaml:4: model: given twice, first at run.yaml:1; remove one"),
        ("train:\n  steps: 1\n  steps: 2", "run.yaml:6: train.steps: given twice, first at run.yaml:5; remove one"),
        (
            "a: b: c",
            "run.yaml:4: not valid YAML: mapping values are not allowed here; check indentation and quotes",
        ),
        (
            "\ttrain: 1",
            "run.yaml:4: not valid YAML: found character '\\t' that cannot start any token; "
            "check indentation and quotes",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(line: str, message: str) -> None:
    assert refusal(SHORTEST + line + "\n") == message


def test_what_is_missing_is_named() -> None:
    assert refusal("model: demo\n") == "run.yaml: data: missing; add it"
    assert refusal("model: {precision: fp32}\ndata: demo\noutput: a\n") == "run.yaml:1: model.path: missing; add it"


@pytest.mark.parametrize("form", ["method:\n  rank: 4\n", "method: {rank: 4}\n"])
def test_a_choice_without_its_name_is_the_default_one(form: str) -> None:
    Path("run.yaml").write_text(SHORTEST + form)
    assert load_config("run.yaml").method == LoraConfig(rank=4, alpha=8.0)
    Path("run.yaml").write_text(SHORTEST)
    assert load_config("run.yaml", ["method.rank=4"]).method == LoraConfig(rank=4, alpha=8.0)


def test_several_mistakes_each_have_a_line() -> None:
    text = SHORTEST + "method:\n  name: lora\n  rank: 0\n  dropout: 2\ntrain:\n  batch_size: x\n  stepz: 3\nsed: 1\n"
    assert refusal(text, "log.every_steps=0").splitlines() == [
        "run.yaml:6: method.rank: input should be greater than 0, got 0",
        "run.yaml:7: method.dropout: input should be less than 1, got 2",
        "run.yaml:9: train.batch_size: input should be a valid integer, unable to parse string as an integer, got 'x'",
        "run.yaml:10: train.stepz: unknown; did you mean steps?",
        "override log.every_steps=0: log.every_steps: input should be greater than 0, got 0",
        "run.yaml:11: sed: unknown; did you mean seed?",
    ]


@pytest.mark.parametrize("targets", ["5", "q_proj", "[q_proj, 5]"])
def test_one_mistake_has_one_line_even_where_two_types_are_possible(targets: str) -> None:
    lines = refusal(SHORTEST + f"method: {{name: lora, targets: {targets}}}\n").splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("run.yaml:4: method.targets")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank", "'method.rank': an override is written a.b=value, such as method.rank=8"),
        ("=4", "'=4': an override is written a.b=value, such as method.rank=8"),
        ("train..steps=1", "'train..steps=1': an override is written a.b=value, such as method.rank=8"),
        ("method.rank=[", "'method.rank=[': the value is not valid YAML; quote it"),
        ("method=loar", "override method=loar: method: unknown name 'loar'; did you mean lora?"),
        ("sed=1", "override sed=1: sed: unknown; did you mean seed?"),
        ("train.steps=0", "override train.steps=0: train.steps: input should be greater than 0, got 0"),
        ("data.format=csv", "override data.format=csv: data.format: input should be 'auto', 'messages', 'sharegpt', "
         "'alpaca', 'prompt_completion', 'text', 'preference', 'unpaired', 'steps', "
         "'prompt_answer' or 'classification', got 'csv'"),
        ("methd.rank=4", "override methd.rank=4: methd: unknown; did you mean method?"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_override_is_named_with_the_override(override: str, message: str) -> None:
    assert refusal(SHORTEST, override) == message


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    for path in ("nowhere.yaml", str(tmp_path)):
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert str(caught.value) == (
            f"{path}: no such file; write a run.yaml with model, data and output (see examples/)"
        )


def test_a_file_that_is_not_utf_8() -> None:
    Path("run.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(UserError) as caught:
        load_config("run.yaml")
    assert str(caught.value) == "run.yaml: not UTF-8 text (byte 7); save it as UTF-8"


@pytest.mark.parametrize("text", ["", "# nothing\n", "- model\n", "model\n"])
def test_a_file_without_keys(text: str) -> None:
    assert refusal(text).startswith("run.yaml:1: expected keys such as model, data and output, found ")


def test_anchors_and_merge_keys_work() -> None:
    config = load(SHORTEST + "method: &base {name: lora, rank: 4}\nseed: &n 7\ntrain: {steps: *n}\n")
    assert (config.method.rank, config.train.steps) == (4, 7)


def test_from_python_the_name_stands_for_the_file() -> None:
    with pytest.raises(UserError) as caught:
        config_from_dict({"model": "demo", "data": "demo", "metod": "lora"}, "sweep 3")
    assert str(caught.value) == "sweep 3: metod: unknown; did you mean method?"
    with pytest.raises(UserError) as caught:
        config_from_dict({"model": "demo", "data": "demo"}, "sweep 3")
    assert str(caught.value) == "sweep 3: output: missing; add it"


def test_a_run_is_named_after_its_file() -> None:
    Path("poems.yaml").write_text("model: demo\ndata: demo\n")
    assert load_config("poems.yaml").output == "runs/poems"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}", "run.yaml:2: data: missing: give path (or sets)"),
        ("{path: a, sets: [b]}", "run.yaml:2: data: give either path or sets"),
        (
            "{sets: [a], format: text}",
            "run.yaml:2: data: format: beside sets it would have no effect; write it into each set",
        ),
        (
            "{path: a, stream: true, repeat: 2}",
            "run.yaml:2: data: stream: repeat and temperature need the sizes of the sets, which a stream does not know",
        ),
        ("{sets: [a, {path: b, formt: text}]}", "run.yaml:2: data.sets.1.formt: unknown; did you mean format?"),
        ("{sets: [a, {format: text}]}", "run.yaml:2: data.sets.1.path: missing; add it"),
        (
            "{path: a, date: tomorrow}",
            "run.yaml:2: data.date: input should be a valid date or datetime, input is too short, got 'tomorrow'",
        ),
        (
            "{path: a, truncation: split}\nobjective: dpo",
            "run.yaml: data.truncation: split tears answers from their prompts, which dpo needs together; use right, left or "
            "drop",
        ),
        (
            "{path: a, stream: true}",
            "run.yaml: data.stream: nobody knows how long an epoch of a stream is: set train.steps",
        ),
    ],
)
def test_what_goes_together(data: str, message: str) -> None:
    assert refusal(f"model: demo\ndata: {data}\n") == message


def test_data_sets_are_one_path_or_several() -> None:
    one = config_from_dict({"model": "demo", "output": "a", "data": {"path": "x", "format": "text", "weight": 2}}).data
    assert one.all_sets() == (SetConfig(path="x", format="text", weight=2),)
    several = config_from_dict(
        {"model": "demo", "output": "a", "data": {"sets": ["x", {"path": "y", "names": ["n"]}]}}
    ).data
    assert several.all_sets() == (SetConfig(path="x"), SetConfig(path="y", names=("n",)))
    assert (one.shown(), several.shown()) == ("x", "x + y n")


@pytest.mark.parametrize(("axis", "name"), CHOICES)
def test_every_choice_is_valid_with_its_defaults_and_survives_the_round_trip(axis: str, name: str) -> None:
    tree = {"model": "demo", "data": "demo", "output": "a", axis: {"name": name, **NEEDED.get(name, {})}}
    config = config_from_dict(tree)
    assert getattr(config, axis).name == name
    assert load(dump_config(config)) == config


def test_the_round_trip_keeps_strings_that_look_like_something_else() -> None:
    method = {"name": "lora", "targets": ["null", "1e-3", "a: b"], "modules_to_save": ["yes"]}
    tree = {"model": "1.0", "data": "größer 🙂.jsonl", "output": "007", "method": method, "optimizer": "lion"}
    config = config_from_dict(tree)
    assert (config.model.path, config.output, config.method.targets) == ("1.0", "007", ("null", "1e-3", "a: b"))
    assert load(dump_config(config)) == config


def test_differing_keys() -> None:
    old = load(SHORTEST, "method=freeze", "method.last_blocks=1")
    assert differing_keys(old, load(dump_config(old))) == []
    assert differing_keys(old, load(SHORTEST, "method=full", "seed=3", "data.eval_path=x.jsonl")) == [
        "data.eval_path: was None, is x.jsonl",
        "method.name: was freeze, is full",
        "method.last_blocks: was 1, is (absent)",
        "method.first_blocks: was 0, is (absent)",
        "method.patterns: was [], is (absent)",
        "optimizer.lr: was 5e-05, is 2e-05",
        "seed: was 0, is 3",
    ]


@pytest.mark.parametrize("axis", TABLES)
def test_the_table_of_an_axis_holds_what_the_config_offers(axis: str) -> None:
    assert list(TABLES[axis]) == [name for name in names(axis) if name != "auto"]  # which picks one of them


def test_the_other_tables_hold_what_the_config_offers() -> None:
    data = members(RunConfig.model_fields["data"].annotation)[0]
    assert {"auto", *FORMATS} == set(get_args(data.model_fields["format"].annotation))
    assert list(STATE_BYTES_PER_ELEMENT) == names("optimizer")


def without_description(schema: dict[str, Any]) -> list[str]:
    """Settings, in all sections of a schema, that have no help text; the `name` of a choice needs none."""
    found = []
    for title, section in {"run.yaml": schema, **schema.get("$defs", {})}.items():
        for part in (section, *section.get("anyOf", ())):
            for name, field in part.get("properties", {}).items():
                is_section = "$ref" in json.dumps(field)
                if name != "name" and not is_section and not field.get("description"):
                    found.append(f"{title}.{name}")
    return found


def test_every_setting_has_a_help_text() -> None:
    assert without_description(json.loads(json_schema())) == []


def test_a_setting_without_help_text_would_be_found() -> None:
    class Inner(Section):
        bare: int = 0
        told: int = 0
        """Told."""

    class Outer(Section):
        inner: Inner = Inner()
        bare: int = 0

    assert without_description(Outer.model_json_schema()) == ["run.yaml.bare", "Inner.bare"]


def test_the_json_schema_offers_short_and_long_forms() -> None:
    schema = json.loads(json_schema())
    assert list(schema["properties"]) == list(RunConfig.model_fields)
    assert schema["required"] == ["model", "data"]
    assert schema["additionalProperties"] is False
    for axis in TABLES:
        short, long = schema["properties"][axis]["anyOf"]
        assert short == {"enum": names(axis)}
        references = [long["$ref"]] if "$ref" in long else [member["$ref"] for member in long["oneOf"]]
        sections = [schema["$defs"][reference.rpartition("/")[2]] for reference in references]
        assert [section["properties"]["name"]["const"] for section in sections] == names(axis)
    for section in ("ModelConfig", "DataConfig"):
        short, long = schema["$defs"][section]["anyOf"]
        assert short == {"type": "string"}
        assert long.get("required", []) == (["path"] if section == "ModelConfig" else [])


@pytest.mark.parametrize("other", ["dora: true", "modules_to_save: [lm_head]"])
def test_pissa_goes_alone(other: str) -> None:
    assert refusal(SHORTEST + f"method: {{init: pissa, {other}}}\n") == (
        "run.yaml:4: method: init: pissa is saved as a difference of A and B alone: it goes with neither dora nor "
        "modules_to_save"
    )


def test_mistakes_in_a_choice_without_its_name_have_their_place() -> None:
    assert refusal(SHORTEST + "method: {rnak: 8}\n") == "run.yaml:4: method.rnak: unknown; did you mean rank?"
    assert (
        refusal(SHORTEST, "method.rank=0")
        == "override method.rank=0: method.rank: input should be greater than 0, got 0"
    )


def test_several_data_sets_survive_the_round_trip() -> None:
    Path("run.yaml").write_text(
        "model: demo\ndata: {sets: [a, {path: b, weight: 2}], mix: interleave, date: 2026-01-31}\n"
    )
    config = load_config("run.yaml")
    Path("again.yaml").write_text(dump_config(config))
    assert load_config("again.yaml") == config
