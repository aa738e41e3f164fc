"""A model cut over tensor ranks computes what the whole one does: loss, every gradient, every weight's bits."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.batches import ragged_batch
from tests.equal.test_zeroth_ranks import end, start
from tests.families import FAMILIES, MOE, SMALL, make_model
from tunesmith.engines.tensor_parallel import check_replicated, check_tensor_parallel, tensor_parallel
from tunesmith.engines.tensor_plan import plan_of
from tunesmith.errors import UserError
from tunesmith.models.load import blocks
from tunesmith.models.probe import find_head
from tunesmith.models.score import score
from tunesmith.objectives.terms import choice_accuracy, choice_loss, entropy, smoothed
from tunesmith.types import Wanted

MORE: dict[str, dict[str, Any]] = {
    "granite_swa": {},
    "deepseek_v2": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, **MOE,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256},
}  # fmt: skip
"""Settings over SMALL of architectures whose plans have what those of FAMILIES have not."""

REFUSED = {
    "gpt2": "neither has transformers a plan for GPT2Model",
    "opt": "OPTModel does not compute with a part of its heads",
    "mamba": "neither has transformers a plan for MambaModel",
}
PLANNED = [family for family in FAMILIES if family not in REFUSED]

TARGETS: dict[str, Any] = {
    "llama": "all-linear",
    "phi3": "all-linear",
    "qwen3": ["q_proj", "down_proj"],
    "mixtral": ["k_proj", "o_proj"],
    "deepseek_v2": ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}

WANTED = {
    "likelihood": Wanted(is_likelihood=True),
    "entropy": Wanted(observed={"entropy": entropy}, additive=frozenset({"entropy"})),
    "gathered": Wanted(observed={"entropy": entropy}),
    "smoothed": Wanted(token_loss=smoothed(0.1, 0.01), observed={"entropy": entropy}, is_likelihood=True),
    "choices": Wanted(
        token_loss=choice_loss, observed={"accuracy": choice_accuracy}, among="choices", is_likelihood=True
    ),
}
"""What objectives ask of the logits."""

PAIRS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in [*PLANNED, *MORE]},
    **{f"lora of {family}": {"family": family, "targets": targets} for family, targets in TARGETS.items()},
    "dropout": {"family": "llama", "targets": ["q_proj", "v_proj", "gate_proj"], "dropout": 0.5},
    "saved whole": {"family": "qwen3", "targets": ["v_proj"], "whole": ["q_norm", "lm_head"]},
    "checkpointing": {"family": "mixtral", "checkpointing": True},
    "value head": {"family": "llama", "head": "sequence"},
    **{name: {"family": "llama", "wanted": name} for name in WANTED},
    **{f"{name}, frozen": {"family": "llama", "wanted": name, "targets": ["q_proj"]} for name in WANTED},
    "tied": {"family": "llama", "settings": {"tie_word_embeddings": True}, "wanted": "likelihood"},
    "scaled": {"family": "granite", "settings": {"tie_word_embeddings": False}, "wanted": "likelihood"},
    "capped, odd": {"family": "gemma2", "settings": {"tie_word_embeddings": False, "vocab_size": 386}},
    "uneven": {"family": "llama", "settings": {"vocab_size": 383}},
    "biased": {"family": "phi", "wanted": "likelihood"},
}
"""What two tensor ranks compute."""

QUADS = {
    name: PAIRS[name]
    for name in ("llama", "qwen3", "qwen3_moe", "phi3", "lora of llama", "smoothed", "tied", "capped, odd")
}
"""What two times two ranks compute: each pair has a part of the batch, and weights are cut by both."""


class InFp64(TorchFunctionMode):
    """Norms, routers and others of transformers compute in fp32 whatever they are given: here they do so in fp64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if function is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return function(*args, **kwargs)


def make(case: dict[str, Any]) -> tuple[Any, Any]:
    """(model in fp64, its head). Weights of norms are no ones, LoRA's B is not 0."""
    family = case["family"]
    is_plain = family in FAMILIES and not {"head", "settings"} & case.keys()
    model = make_model(family, torch.float64) if is_plain else make_other(case)
    torch.manual_seed(1)
    if "targets" in case:
        import peft

        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=case["targets"], lora_dropout=case.get("dropout", 0.0),
            modules_to_save=case.get("whole"), init_lora_weights=False, use_dora=case.get("dora", False),
        )  # fmt: skip
        peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)
    head = None if "head" in case else find_head(model.eval())
    if case.get("checkpointing"):
        options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), InFp64())}
        model.gradient_checkpointing_enable(options)
    model.train("checkpointing" in case or "dropout" in case)
    return model, head


def make_other(case: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    family = case["family"]
    settings = {**SMALL, **FAMILIES.get(family, {}), **MORE.get(family, {}), **case.get("settings", {})}
    config = CONFIG_MAPPING[family](**settings)
    config._experts_implementation = "eager"
    kind = AutoModelForSequenceClassification if "head" in case else AutoModelForCausalLM
    return kind.from_config(config).double().eval()


def loss_of(model: Any, head: Any, batch: Any, case: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """(the loss, what else is said of the targets)."""
    if head is None:
        values_BTC = score(model, None, batch, Wanted(values=True)).values_BTC  # type: ignore[arg-type]
        return (values_BTC * batch.weights_BT[..., None]).square().sum(), []
    wanted = WANTED.get(case.get("wanted", ""), Wanted())
    if wanted.among:
        batch = batch.with_columns(tokens={wanted.among: choices(batch.tokens_BT)})
    scores = score(model, head, batch, wanted)
    loss_BT = -scores.logprobs_BT if scores.token_loss_BT is None else scores.token_loss_BT
    with torch.no_grad():
        again = score(model.eval(), head, batch, wanted) if wanted.among else scores
    seen = [scores.logprobs_BT.detach(), *scores.observed.values(), again.logprobs_BT.detach()]
    return (loss_BT * batch.weights_BT).sum(), seen


def choices(tokens_BT: Tensor) -> Tensor:
    """Each token, one of the other half of the vocabulary, and in the first row no third one."""
    found = torch.stack([tokens_BT, (tokens_BT + SMALL["vocab_size"] // 2) % SMALL["vocab_size"], tokens_BT // 2], -1)
    found[0, :, 2] = -1
    return found


def grads_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@cache
def expected(name: str) -> dict[str, Any]:
    """What one process with the whole model finds."""
    model, head = make(PAIRS[name])
    torch.manual_seed(5)
    with InFp64():
        loss, seen = loss_of(model, head, ragged_batch(pack=False), PAIRS[name])
        torch.autograd.backward(loss)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "grads": grads_of(model), "weights": weights, "seen": seen}


# --- what a rank does


def on_two_ranks(case: dict[str, Any], forget: bool = False) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    model, head = make(case)
    partial = tensor_parallel(model, mesh)
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    held = sum(part_of(p).untyped_storage().nbytes() for p in model.parameters())
    torch.manual_seed(5)
    loss, seen = loss_of(model, head, ragged_batch(pack=False), case)
    torch.autograd.backward(loss)
    grads = grads_of(model)
    if not forget:
        sum_partial(grads, partial, mesh)
    check_replicated(grads, mesh)
    whole_grads = {name: whole(grad) for name, grad in grads.items()}
    found = {"loss": loss.detach(), "grads": whole_grads, "weights": weights, "seen": seen}
    return found | {"partial": partial, "held": held}


def count_sums(case: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    model, head = make(case)
    tensor_parallel(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)))
    with CommDebugMode() as forward:
        loss, _ = loss_of(model, head, ragged_batch(pack=False), case)
    with CommDebugMode() as backward:
        torch.autograd.backward(loss)
    return {"counts": [{str(kind): n for kind, n in x.get_comm_counts().items() if n} for x in (forward, backward)]}


def on_four_ranks(case: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model, head = make(case)
    partial = tensor_parallel(model, mesh["tensor"])
    for module in [block for _, block in blocks(model)] + [model]:
        fully_shard(module, mesh=mesh["shard"])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    part = ragged_batch(pack=False).parts(2)[mesh["shard"].get_local_rank()]
    model.inside = lambda work: work()
    register_fsdp_forward_method(model, "inside")
    loss = model.inside(lambda: loss_of(model, head, part, case)[0])
    torch.autograd.backward(loss)
    grads = grads_of(model)
    sum_partial(grads, partial, mesh["tensor"])
    check_replicated(grads, mesh["tensor"])
    total = loss.detach().clone()
    torch.distributed.all_reduce(total, group=mesh["shard"].get_group())
    return {"loss": total, "grads": {name: whole(grad) for name, grad in grads.items()}, "weights": weights}


def sum_partial(grads: dict[str, Tensor], partial: frozenset[str], mesh: Any) -> None:
    for name in sorted(partial & grads.keys()):
        torch.distributed.all_reduce(part_of(grads[name]), group=mesh.get_group())


def whole(x: Any) -> Tensor:
    return x.full_tensor() if is_cut(x) else x


def part_of(x: Any) -> Tensor:
    return x.to_local() if is_cut(x) else x


def is_cut(x: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def all_cases(environment: dict[str, str], file: str, cases: dict[str, tuple[Callable[..., Any], Any]]) -> None:
    """Every case on this rank; leaves what each found, or its error."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, (work, arguments) in cases.items():
        torch.manual_seed(0)
        try:
            with InFp64():
                found[name] = work(*arguments)
        except Exception as error:  # it must not take the other cases with it
            found[name] = {"error": str(error), "trace": traceback.format_exc()[-3000:]}
    torch.save(found, file)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], list[dict[str, Any]]]]:
    """What each of so many ranks found, in all cases: starting processes takes longer than they do."""
    folder = tmp_path_factory.mktemp("ranks")
    cases: dict[int, Any] = {
        2: {name: (on_two_ranks, (case,)) for name, case in PAIRS.items()},
        4: {name: (on_four_ranks, (case,)) for name, case in QUADS.items()},
    }
    cases[2] |= {f"counted {name}": (count_sums, (PAIRS[name],)) for name in ("likelihood", "smoothed")}
    cases[2]["forgotten"] = (on_two_ranks, (PAIRS["qwen3"], True))

    @cache
    def of(world: int) -> list[dict[str, Any]]:
        files = [folder / f"{world}-{rank}.pt" for rank in range(world)]
        assert end(start(world, all_cases, lambda rank: (str(files[rank]), cases[world]))) == [0] * world
        return [torch.load(file, weights_only=False) for file in files]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(folder))
        yield of


def assert_equal(found: dict[str, Any], name: str) -> None:
    assert "error" not in found, found["trace"]
    alone = expected(name)
    assert found["weights"].keys() == alone["weights"].keys()
    assert all(torch.equal(found["weights"][each], weight) for each, weight in alone["weights"].items())
    torch.testing.assert_close(found["loss"], alone["loss"], rtol=1e-12, atol=0)
    if "seen" in found:
        torch.testing.assert_close(found["seen"], alone["seen"], rtol=1e-12, atol=1e-12)
    assert found["grads"].keys() == alone["grads"].keys()
    largest = max(float(grad.abs().max()) for grad in alone["grads"].values())
    for each, grad in alone["grads"].items():
        torch.testing.assert_close(
            found["grads"][each], grad, rtol=1e-10, atol=1e-12 * largest, msg=lambda text, of=each: f"{of}: {text}"
        )


@pytest.mark.parametrize("name", PAIRS)
def test_two_tensor_ranks_find_what_one_process_does(ranks: Any, name: str) -> None:
    for found in ranks(2):
        assert_equal(found[name], name)


@pytest.mark.parametrize("name", QUADS)
def test_tensor_ranks_of_shards_find_what_one_process_does(ranks: Any, name: str) -> None:
    for found in ranks(4):
        assert_equal(found[name], name)


def test_a_rank_holds_half_of_what_is_cut(ranks: Any) -> None:
    weights = expected("llama")["weights"]
    cut = sum(p.nbytes for name, p in weights.items() if name.endswith(("proj.weight", "lm_head.weight")))
    for found in ranks(2):
        assert found["llama"]["held"] == sum(p.nbytes for p in weights.values()) - cut // 2


def test_a_layer_sums_over_ranks_twice_in_each_direction(ranks: Any) -> None:
    """Attention and MLP each once: layers that read one input sum its gradient together. The loss has sums of its own: the
    largest logits; exponentials and targets' logits in one; the gradient of hidden states. Logits are gathered only for a loss
    that reads them all."""
    sums, largest, gathered = (
        f"c10d{name}" for name in ("_functional.all_reduce", ".allreduce_", "_functional.all_gather_into_tensor")
    )
    for found in ranks(2):
        assert found["counted likelihood"]["counts"] == [{sums: 4 + 1, largest: 1}, {sums: 4 + 1}]
        assert found["counted smoothed"]["counts"] == [{sums: 4, gathered: 1}, {sums: 4 + 1}]


def test_partial_gradients_are_named(ranks: Any) -> None:
    layers = [f"model.layers.{layer}.self_attn" for layer in range(2)]
    found = ranks(2)[0]
    assert found["llama"]["partial"] == found["lora of llama"]["partial"] == frozenset()
    assert found["qwen3"]["partial"] == {f"{layer}.{norm}.weight" for layer in layers for norm in ("q_norm", "k_norm")}
    kept = {
        f"{layer}.q_norm.{copy}.weight" for layer in layers for copy in ("original_module", "modules_to_save.default")
    }
    assert found["saved whole"]["partial"] == kept | {f"{layer}.k_norm.weight" for layer in layers}


def test_a_gradient_that_a_plan_forgets_is_found(ranks: Any) -> None:
    for found in ranks(2):
        assert (
            "different gradients of model.layers.0.self_attn.q_norm.weight and 3 others" in found["forgotten"]["error"]
        )


# --- refusals, before weights are loaded


def config_of(family: str, **settings: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**{**SMALL, **FAMILIES.get(family, {}), **MORE.get(family, {}), **settings})


@pytest.mark.parametrize("family", [*PLANNED, *MORE])
def test_a_plan_is_found_by_the_config_alone(family: str) -> None:
    check_tensor_parallel(config_of(family), 2)
    check_tensor_parallel(config_of(family), 1)


@pytest.mark.parametrize("family", REFUSED)
def test_an_architecture_without_a_plan_is_refused(family: str) -> None:
    check_tensor_parallel(config_of(family), 1)
    with pytest.raises(UserError, match=f"engine.tensor_parallel: {REFUSED[family]}.*; set it to 1$"):
        check_tensor_parallel(config_of(family), 2)


SIZES: list[tuple[str, dict[str, Any], int, str]] = [
    ("llama", {}, 4, "4 ranks cannot share out 2 key and value heads evenly; set it to 1 or 2"),
    ("llama", {"num_key_value_heads": 4}, 3, "3 ranks cannot share out 4 attention heads, .*; set it to 1 or 2 or 4"),
    ("llama", {"intermediate_size": 49}, 2, r"2 .* out 49 outputs of layers.\*.mlp.gate_proj, .*; set it to 1"),
    (
        "mixtral",
        {"intermediate_size": 25},
        2,
        r"2 .* 25 outputs of layers.\*.mlp.experts.gate_up_proj, .*; set it to 1",
    ),
    ("phi3", {}, 3, r"3 .* 64 outputs of layers.\*.self_attn.qkv_proj .*; set it to 1 or 2 or 4 or 8 or 16"),
]


@pytest.mark.parametrize(("family", "settings", "degree", "message"), SIZES)
def test_sizes_that_do_not_divide_are_refused(family: str, settings: dict[str, Any], degree: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^engine.tensor_parallel: {message}$"):
        check_tensor_parallel(config_of(family, **settings), degree)


ADAPTERS: list[tuple[dict[str, Any], str]] = [
    (
        {"family": "llama", "targets": ["q_proj"], "dora": True},
        "Dora needs whole rows of the weights.*method.dora: false",
    ),
    ({"family": "mixtral", "targets": "all-linear"}, "ParamWrapper are not supported.*method.targets, not experts"),
    ({"family": "llama", "targets": ["v_proj"], "whole": ["up_proj"]}, "up_proj is a ModulesToSaveWrapper"),
]


@pytest.mark.parametrize(("case", "message"), ADAPTERS)
def test_adapters_that_cannot_be_cut_are_refused(case: dict[str, Any], message: str) -> None:
    model, _ = make(case)
    with pytest.raises(UserError, match=f"^engine.tensor_parallel: .*{message}"):
        plan_of(model.model, model.config, 2)


def test_a_style_that_is_not_known_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"plan for Llama4TextModel cuts .* by 'packed_rowwise', which is not supported"
    ):
        check_tensor_parallel(config_of("llama4_text"), 2)
