"""The gradient of a weight's rows against the rows of autograd's gradient of the whole weight, mostly in fp64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tests.batches import ragged_batch
from tests.families import FAMILIES, make_model
from tunesmith.config import SingleConfig
from tunesmith.engines import SingleEngine
from tunesmith.models import head as head_module
from tunesmith.models import slices
from tunesmith.models.slices import host_modules, slice_of, train_rows
from tunesmith.types import Batch, Wanted

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
Use = Callable[[Tensor, Tensor], Tensor]
"""(weight, x) → output."""


class Model(nn.Module):
    """One module, as a language model without blocks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.layers = inner, nn.ModuleList()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=0))

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Using(nn.Module):
    """A weight of its own, used as a function says."""

    def __init__(self, use: Use, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape, dtype=dtype)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.weight, x)


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


def conv1d() -> Conv1D:
    module = Conv1D(5, 8).double()
    nn.init.normal_(module.bias)
    return module


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def run(model: nn.Module, x: Tensor, leaf: nn.Parameter) -> list[Tensor | None]:
    """[loss, gradient of x, gradient of the leaf]; the loss weighs each output by another number."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    output = model(x)
    loss = (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)).sum()
    loss.backward()
    return [loss.detach(), x.grad, leaf.grad]


def assert_rows_equal_dense(module: nn.Module, x: Tensor, start: int, stop: int, tolerance: float = 1e-12) -> None:
    dense = Model(copy.deepcopy(module))
    loss, of_x, of_weight = run(dense, x, dense.inner.weight)
    model = Model(module).requires_grad_(False)
    leaf, undo = train_rows(model, module.weight, start, stop)
    found_loss, found_of_x, found = run(model, x, leaf)
    undo()
    assert torch.equal(found_loss, loss)
    assert found.shape == leaf.shape == (stop - start, *module.weight.shape[1:])
    assert (found - of_weight[start:stop]).abs().max() < tolerance
    assert of_weight[start:stop].abs().max() > 1e-3
    assert module.weight.grad is None
    if of_x is not None:
        assert (found_of_x - of_x).abs().max() < tolerance


IDS = torch.tensor([[1, 5, 5, 0], [7, 2, 5, 3]])

USES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(5, 8, **DOUBLE), lambda: numbers(3, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 8, bias=False, **DOUBLE), lambda: numbers(3, 5)),
    "linear, 1 dim": (lambda: nn.Linear(5, 8, **DOUBLE), lambda: numbers(5)),
    "linear, 3 dims": (lambda: nn.Linear(5, 8, **DOUBLE), lambda: numbers(2, 3, 5)),
    "linear, 4 dims": (lambda: nn.Linear(5, 8, bias=False, **DOUBLE), lambda: numbers(2, 3, 2, 5)),
    "linear, x stands still": (lambda: nn.Linear(5, 8, **DOUBLE), lambda: numbers(3, 5).detach()),
    "embedding": (lambda: nn.Embedding(8, 3, **DOUBLE), lambda: IDS),
    "embedding, 0 dims": (lambda: nn.Embedding(1, 3, **DOUBLE), lambda: torch.tensor(0)),
    "embedding, int32": (lambda: nn.Embedding(8, 3, **DOUBLE), lambda: IDS.int()),
    "embedding, padding": (lambda: nn.Embedding(8, 3, padding_idx=5, **DOUBLE), lambda: IDS),
    "embedding, padding from the end": (lambda: nn.Embedding(8, 3, padding_idx=-3, **DOUBLE), lambda: IDS),
    "embedding, scaled": (lambda: Scaled(8, 3, **DOUBLE), lambda: IDS),
    "Conv1D": (conv1d, lambda: numbers(2, 3, 8)),
    "expert by number": (lambda: Using(lambda w, x: experts(w, x, int), 8, 3, 5), lambda: numbers(9, 5)),
    "expert by tensor": (lambda: Using(lambda w, x: experts(w, x, torch.tensor), 8, 3, 5), lambda: numbers(9, 5)),
    "experts by vector": (
        lambda: Using(lambda w, x: torch.einsum("med,md->me", w[CHOSEN], x), 8, 3, 5),
        lambda: numbers(9, 5),
    ),
    "experts by matrix": (
        lambda: Using(lambda w, x: torch.einsum("abed,bd->abe", w[CHOSEN.view(3, 3).int()], x), 8, 3, 5),
        lambda: numbers(3, 5),
    ),
}

CHOSEN = torch.tensor([0, 5, 5, 7, 2, 3, 0, 4, 5])
"""The experts of nine tokens; 1 and 6 have none."""

RANGES = {"all": (0, 8), "first": (0, 3), "last": (5, 8), "middle": (2, 6), "one": (5, 6)}


def experts(weight: Tensor, x: Tensor, index: Callable[[int], Any]) -> Tensor:
    """One expert after the other, as transformers' eager implementation; experts without tokens are left out."""
    output = x.new_zeros(len(x), weight.shape[1])
    for expert in CHOSEN.unique().tolist():
        mine = expert == CHOSEN
        output[mine] = nn.functional.linear(x[mine], weight[index(expert)])
    return output


@pytest.mark.parametrize("rows", RANGES)
@pytest.mark.parametrize("use", USES)
def test_the_gradient_of_rows_is_the_rows_of_the_gradient(use: str, rows: str) -> None:
    module, x = USES[use][0](), USES[use][1]()
    start, stop = RANGES[rows] if len(module.weight) == 8 else (0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_rows_equal_dense(module, x, start, stop) if "padding" not in use else assert_padding(module, start, stop)


def assert_padding(module: nn.Module, start: int, stop: int) -> None:
    """The row that pads gets no gradient, whether the slice is that row alone or holds it."""
    dense, model = Model(copy.deepcopy(module)), Model(module).requires_grad_(False)
    loss, _, of_weight = run(dense, IDS, dense.inner.weight)
    leaf, _ = train_rows(model, module.weight, start, stop)
    found_loss, _, found = run(model, IDS, leaf)
    assert torch.equal(found_loss, loss)
    assert torch.equal(found, of_weight[start:stop])
    assert not start <= 5 < stop or not found[5 - start].any()


def test_rows_of_experts_without_tokens_have_a_gradient_of_zero() -> None:
    model = Model(Using(lambda w, x: torch.einsum("med,md->me", w[CHOSEN], x), 8, 3, 5)).requires_grad_(False)
    leaf, _ = train_rows(model, model.inner.weight, 6, 8)
    _, _, found = run(model, numbers(9, 5), leaf)
    assert not found[0].any()
    assert found[1].abs().max() > 0.1


GROUPED: dict[str, tuple[tuple[int, int, int], Use]] = {
    "weight": ((4, 8, 12), lambda w, x: nn.functional.grouped_mm(x, w, offs=ENDS)),
    "weight.transpose": ((4, 12, 8), lambda w, x: nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=ENDS)),
}
ENDS = torch.tensor([3, 3, 7, 10], dtype=torch.int32)
"""Of four experts; the second has no tokens."""


@pytest.mark.parametrize("tapped", [False, True], ids=["as it is", "tapped"])
@pytest.mark.parametrize("rows", [(0, 4), (2, 3), (0, 2), (2, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("use", GROUPED)
def test_grouped_products_give_the_rows_gradient(
    use: str, rows: tuple[int, int], tapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, which is what torch has such products in. torch.nn.functional's function is a plain call of torch's."""
    if tapped:
        monkeypatch.setitem(slices.TAPS, torch._grouped_mm, slices._Watch.grouped)
    shape, function = GROUPED[use]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if tapped else "ignore")
        x = numbers(10, 8, dtype=torch.float32)
        assert_rows_equal_dense(Using(function, *shape, dtype=torch.float32), x, *rows, tolerance=1e-5)


def test_a_grouped_slice_without_any_token_has_a_gradient_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(slices.TAPS, torch._grouped_mm, slices._Watch.grouped)
    for shape, use in GROUPED.values():
        model = Model(Using(use, *shape, dtype=torch.float32)).requires_grad_(False)
        leaf, undo = train_rows(model, model.inner.weight, 1, 2)
        assert not run(model, numbers(10, 8, dtype=torch.float32), leaf)[2].any()
        undo()


def test_grouped_products_have_a_tap() -> None:
    for shape, use in GROUPED.values():
        model = Model(Using(use, *shape, dtype=torch.float32)).requires_grad_(False)
        leaf, undo = train_rows(model, model.inner.weight, 1, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model, numbers(10, 8, dtype=torch.float32), leaf)
        undo()


WITHOUT_TAP: dict[str, Use] = {
    "multiplied first": lambda w, x: (w * 2) @ x,
    "transposed": lambda w, x: x[:5] @ w.T,
    "part of it": lambda w, x: w[2:7] @ x,
    "one number": lambda w, x: w[3, 1] * x,
    "cast": lambda w, x: w.to(torch.float64, copy=True) @ x,
    "padded row twice": lambda w, x: nn.functional.embedding(IDS, w, scale_grad_by_freq=True),
}


@pytest.mark.parametrize("use", WITHOUT_TAP)
def test_a_use_without_a_tap_cuts_the_whole_gradient_and_warns(use: str) -> None:
    with pytest.warns(
        UserWarning, match=r"chunk: a weight \(8, 5\) is used by .*, for which there is no gradient of a"
    ):
        assert_rows_equal_dense(Using(WITHOUT_TAP[use], 8, 5), numbers(5), 2, 6)


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "output of a linear layer changed in place": (
        lambda: Using(lambda w, x: nn.functional.linear(x, w).mul_(2), 8, 5),
        lambda: numbers(3, 5),
    ),
    "output of an embedding changed in place": (  # CTRL
        lambda: Using(lambda w, x: nn.functional.embedding(x, w).mul_(2), 8, 5),
        lambda: IDS,
    ),
    "linear by keywords": (
        lambda: Using(lambda w, x: nn.functional.linear(input=x, weight=w), 8, 5),
        lambda: numbers(3, 5),
    ),
    "row from the end": (
        lambda: Using(lambda w, x: w[-3] @ x, 8, 3, 5),
        lambda: numbers(5),
    ),
    "rows from the end": (
        lambda: Using(lambda w, x: w[torch.tensor([-3, 0])] @ x, 8, 3, 5),
        lambda: numbers(5),
    ),
    "transposed and back": (
        lambda: Using(lambda w, x: w.transpose(-2, -1).transpose(-2, -1) @ x, 8, 3, 5),
        lambda: numbers(5),
    ),
    "in a list": (
        lambda: Using(lambda w, x: torch.cat([w, w * 2]) @ x, 8, 5),
        lambda: numbers(5),
    ),
    "as both factors": (
        lambda: Using(lambda w, x: nn.functional.linear(w, w) @ x, 8, 5),
        lambda: numbers(8),
    ),
}


@pytest.mark.parametrize("use", UNUSUAL)
@pytest.mark.filterwarnings("ignore:chunk. a weight")
def test_unusual_uses_give_the_rows_gradient(use: str) -> None:
    module, x = UNUSUAL[use]
    assert_rows_equal_dense(module(), x(), 2, 6)


def test_biases_added_in_place_to_grouped_products_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does for experts with biases (gpt-oss)."""
    monkeypatch.setitem(slices.TAPS, torch._grouped_mm, slices._Watch.grouped)
    shape, function = GROUPED["weight"]
    module = Using(lambda w, x: function(w, x).add_(1.0), *shape, dtype=torch.float32)
    assert_rows_equal_dense(module, numbers(10, 8, dtype=torch.float32), 1, 3, tolerance=1e-5)


@pytest.mark.parametrize("use", ["linear", "embedding", "experts by vector"])
def test_no_input_at_all_gives_a_gradient_of_zero(use: str) -> None:
    module = USES[use][0]()
    model = Model(module).requires_grad_(False)
    if use == "experts by vector":
        module.use = lambda w, x: w[torch.zeros(0, dtype=torch.long)] @ x[0]
    leaf, _ = train_rows(model, module.weight, 2, 6)
    x = {"linear": torch.zeros(0, 5, **DOUBLE), "embedding": torch.zeros(0, dtype=torch.long)}.get(use, numbers(1, 5))
    model(x).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("use", [use for use in USES if "0 dims" not in use])
def test_gradcheck(use: str) -> None:
    """The leaf shares the weight's memory, so that torch's finite differences move the weight."""
    module, x = USES[use][0](), USES[use][1]()
    if "padding" in use:  # torch too has no gradient there, whatever moves the output
        x = x[x != 5]
    model = Model(module).requires_grad_(False)
    leaf, _ = train_rows(model, module.weight, 2, 6)
    assert torch.autograd.gradcheck(lambda leaf, x: model(x), (leaf, x))


@pytest.mark.parametrize("use", ["linear", "Conv1D", "embedding"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_under_bf16_autocast_it_is_dense_to_bf16_rounding(use: str, weights: torch.dtype) -> None:
    module, x = USES[use][0]().to(weights), USES[use][1]()
    x = x if use == "embedding" else x.detach().to(weights)
    found = []
    for sliced in (False, True):
        model = Model(copy.deepcopy(module)).requires_grad_(not sliced)
        leaf = train_rows(model, model.inner.weight, 2, 6)[0] if sliced else model.inner.weight
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(model, x, leaf))
    (loss, _, dense), (found_loss, _, rows) = found
    assert torch.equal(found_loss, loss)
    assert rows.dtype == dense.dtype == weights
    torch.testing.assert_close(rows, dense[2:6], rtol=2**-7, atol=2**-9 * float(dense.abs().max()))


def test_gradients_of_two_backward_passes_add_up() -> None:
    model = Model(nn.Linear(5, 8, **DOUBLE)).requires_grad_(False)
    leaf, _ = train_rows(model, model.inner.weight, 2, 6)
    first, second, each = numbers(3, 5), numbers(4, 5), []
    for x in (first, second):
        leaf.grad = None
        each.append(run(model, x, leaf)[2])
    leaf.grad = None
    run(model, first, leaf)
    assert torch.equal(run(model, second, leaf)[2], each[0] + each[1])


def test_nothing_is_tapped_without_gradient_and_the_weight_stands_still() -> None:
    model = Model(nn.Linear(5, 8)).requires_grad_(False)
    leaf, _ = train_rows(model, model.inner.weight, 2, 6)
    with torch.no_grad():
        assert not model(torch.ones(5)).requires_grad
    assert model(torch.ones(5)).requires_grad
    assert not model.inner.weight.requires_grad
    assert slice_of(model.inner.weight).leaf is leaf
    assert slice_of(model.inner.bias) is None


def test_the_leaf_is_the_weights_own_memory() -> None:
    model = Model(nn.Linear(5, 8)).requires_grad_(False)
    before = model.inner.weight.clone()
    leaf, _ = train_rows(model, model.inner.weight, 2, 6)
    with torch.no_grad():
        leaf.add_(1.0)
    assert torch.equal(model.inner.weight[2:6], before[2:6] + 1.0)
    assert torch.equal(model.inner.weight[:2], before[:2])
    assert torch.equal(model.inner.weight[6:], before[6:])


class Failing(nn.Module):
    """Raises what it is told to after its weight was used."""

    def __init__(self, error: type[BaseException] | None) -> None:
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.randn(4, 4)), error

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.weight)
        if self.error is not None:
            raise self.error
        return x


@contextmanager
def function_modes_restored() -> Iterator[None]:
    """Whatever is left on torch's stack of modes is gone afterwards."""
    before = len(_get_current_function_mode_stack())
    yield
    while len(_get_current_function_mode_stack()) > before:
        torch._C._pop_torch_function_stack()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_undo_leaves_nothing_behind_also_after_a_forward_that_raised(error: type[BaseException] | None) -> None:
    model = Model(Failing(error)).requires_grad_(False)
    with function_modes_restored():
        _, undo = train_rows(model, model.inner.weight, 1, 3)
        with pytest.raises(error) if error is not None else nullcontext():
            model(torch.ones(4))
        undo()
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
        assert [name for name in hooks for module in model.modules() if getattr(module, name)] == []
        assert vars(model.inner.weight) == {}
        assert _get_current_function_mode_stack() == []


def test_hosts_are_the_modules_around_a_weight_inside_blocks() -> None:
    model = make_model("qwen3")
    layer = model.model.layers[0]
    assert host_modules(model, layer.self_attn.q_proj.weight) == [layer.self_attn]
    assert host_modules(model, layer.mlp.down_proj.weight) == [layer.mlp]
    assert host_modules(model, layer.input_layernorm.weight) == [layer.input_layernorm]
    assert host_modules(model, model.lm_head.weight) == [model.model.embed_tokens, model.lm_head]  # tied
    layer.register_parameter("own", nn.Parameter(torch.ones(4, 4)))
    assert host_modules(model, layer.own) == []
    assert host_modules(model, nn.Parameter(torch.ones(4, 4))) == []


TOKENS = torch.arange(3, 51).view(2, 24)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes; views of what it is given do not count."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, value.numel())
        return result


LARGE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(64, 512), torch.ones(3, 64)),
    "embedding": (lambda: nn.Embedding(512, 64), IDS),
    "Conv1D": (lambda: Conv1D(512, 64), torch.ones(3, 64)),
}


@pytest.mark.parametrize("use", LARGE)
def test_the_gradient_of_the_whole_weight_never_exists(use: str) -> None:
    largest = []
    for sliced in (False, True):
        model, x = Model(LARGE[use][0]()), LARGE[use][1]
        if sliced:
            train_rows(model.requires_grad_(False), model.inner.weight, 2, 10)
        with LargestTensor() as watch:
            model(x).sum().backward()
        largest.append(watch.elements)
    assert largest[0] == 512 * 64  # the control
    assert largest[1] <= 8 * 512


def test_the_gradient_of_the_whole_head_never_exists() -> None:
    model, batch = make_model("llama").requires_grad_(False), ragged_batch(pack=True)
    train_rows(model, model.lm_head.weight, 100, 108)
    engine = SingleEngine(SingleConfig(device="cpu"), "fp32")
    engine.place(model)
    hidden = engine.hidden(model, batch)[:4].detach()
    with LargestTensor() as watch:
        targets = head_module.Targets(torch.arange(4), Wanted(is_likelihood=True))
        head_module.score_targets(hidden, engine.head, targets)[0].sum().backward()
    assert watch.elements == 4 * 384


UNTAPPED = {
    "falcon_h1": {"mamba.conv1d.weight"},
    "mamba": {"mixer.A_log", "mixer.conv1d.weight", "mixer.dt_proj.weight"},
}
"""Weights of blocks whose use has no tap."""


def loss_of(model: Any) -> Tensor:
    logits = model(input_ids=TOKENS, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), TOKENS[:, 1:].flatten())


def thirds(weight: Tensor) -> tuple[int, int]:
    return len(weight) // 3, max(len(weight) // 3 + 1, 2 * len(weight) // 3)


@pytest.mark.parametrize("recompute", [False, True], ids=["activations kept", "activations computed again"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_every_weight_of_every_family_equal_dense(family: str, recompute: bool) -> None:
    model = make_model(family, torch.float64).train()
    expected = loss_of(model)
    expected.backward()
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    dense = {name: p.grad for name, p in weights.items()}
    for p in model.requires_grad_(False).parameters():
        p.grad = None
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    untapped = set()
    for name, weight in weights.items():
        assert host_modules(model, weight), name
        start, stop = thirds(weight)
        leaf, undo = train_rows(model, weight, start, stop)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loss = loss_of(model)
            loss.backward()
        undo()
        assert torch.equal(loss, expected), name
        assert (leaf.grad - dense[name][start:stop]).abs().max() < 1e-12, name
        assert weight.grad is None
        if any("no gradient of a part" in str(warning.message) for warning in told):
            untapped.add(".".join(name.split(".")[3:]))
    assert untapped == UNTAPPED.get(family, set())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "mamba"])
def test_rows_of_all_weights_at_once_equal_dense(family: str) -> None:
    model = make_model(family, torch.float64).train()
    loss_of(model).backward()
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    dense = {name: p.grad for name, p in weights.items()}
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hooks = [len(module._forward_hooks) for module in model.modules()]  # transformers' own
    leaves = {name: train_rows(model, weight, *thirds(weight)) for name, weight in weights.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_of(model).backward()
    for name, (leaf, undo) in leaves.items():
        start, stop = thirds(weights[name])
        assert (leaf.grad - dense[name][start:stop]).abs().max() < 1e-12, name
        undo()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


class OwnLinear(nn.Linear):
    """An output layer that is not just torch's: scoring calls the module itself."""


def biased(model: Any) -> Any:
    model.lm_head = nn.Linear(32, 384, **DOUBLE)
    return model


def wrapped(model: Any) -> Any:
    own = OwnLinear(32, 384, bias=False, **DOUBLE)
    own.weight = model.lm_head.weight
    model.lm_head = own
    return model


HEADS: dict[str, Callable[[], Any]] = {
    "no bias": lambda: make_model("llama", torch.float64),
    "bias": lambda: biased(make_model("llama", torch.float64)),
    "wrapped": lambda: wrapped(make_model("llama", torch.float64)),
    "capped": lambda: make_model("gemma2", torch.float64),
    "tied": lambda: make_model("qwen3", torch.float64),
    "scaled": lambda: make_model("granite", torch.float64),
}


def scored(model: Any, likelihood: bool, batch: Batch, factor: float = -0.25) -> Tensor:
    """A loss through the engine's scoring, which takes the head in chunks of 7 targets."""
    engine = SingleEngine(SingleConfig(device="cpu"), "fp32")
    engine.place(model)
    logprobs = engine.score(model, batch, Wanted(is_likelihood=likelihood)).logprobs_BT
    return (logprobs * batch.weights_BT * factor).sum()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "TRAINED_CHUNK_ELEMENTS", 7 * 384)
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 7 * 384)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("likelihood", [False, True], ids=["any loss", "likelihood"])
@pytest.mark.parametrize("beside", ["alone", "with bias", "with a block"])
@pytest.mark.parametrize("head", HEADS)
def test_rows_of_the_head_equal_dense_through_scoring(head: str, beside: str, likelihood: bool) -> None:
    """Alone: nothing below trains, so that the hidden states have no gradient (but for a tied head)."""
    model, batch = HEADS[head](), ragged_batch(pack=True)
    expected = scored(model, likelihood, batch)
    expected.backward()
    dense = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    for p in model.requires_grad_(False).parameters():
        p.grad = None
    trained = {"alone": (), "with bias": ("lm_head.bias",), "with a block": ("model.layers.1.mlp.up_proj.weight",)}
    others = {name: p for name, p in model.named_parameters() if name in trained[beside]}
    for p in others.values():
        p.requires_grad_(True)
    leaf, undo = train_rows(model, model.lm_head.weight, 100, 230)
    loss = scored(model, likelihood, batch)
    loss.backward()
    undo()
    assert abs(loss - expected) < 1e-12
    assert (leaf.grad - dense["lm_head.weight"][100:230]).abs().max() < 1e-12
    for name, p in others.items():
        assert (p.grad - dense[name]).abs().max() < 1e-12
    assert model.lm_head.weight.grad is None


@pytest.mark.usefixtures("small_chunks")
def test_a_wrong_guess_of_the_losses_weights_makes_the_chunks_again() -> None:
    model, batch = make_model("llama", torch.float64).requires_grad_(False), ragged_batch(pack=True)
    model.lm_head.weight.requires_grad_(True)
    found = []
    for sliced in (False, True):
        model.lm_head.weight.requires_grad_(not sliced)
        leaf = train_rows(model, model.lm_head.weight, 100, 230)[0] if sliced else model.lm_head.weight
        engine = SingleEngine(SingleConfig(device="cpu"), "fp32")
        engine.place(model)
        logprobs = engine.score(model, batch, Wanted(is_likelihood=True)).logprobs_BT
        (logprobs**2).sum().backward()
        found.append(leaf.grad)
    assert (found[1] - found[0][100:230]).abs().max() < 1e-12


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_rows_of_a_block_equal_dense_under_a_frozen_head(family: str) -> None:
    model, batch = make_model(family, torch.float64), ragged_batch(pack=True)
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    scored(model, True, batch).backward()
    dense, weight.grad = weight.grad, None
    weight.requires_grad_(False)
    leaf, _ = train_rows(model, weight, 5, 20)
    scored(model, True, batch).backward()
    assert (leaf.grad - dense[5:20]).abs().max() < 1e-12


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("likelihood", [False, True], ids=["any loss", "likelihood"])
def test_a_micro_batch_without_targets_gives_the_head_a_gradient_of_zero(likelihood: bool) -> None:
    model, batch = make_model("llama", torch.float64).requires_grad_(False), ragged_batch(pack=True)
    leaf, _ = train_rows(model, model.lm_head.weight, 100, 230)
    batch.weights_BT.zero_()
    scored(model, likelihood, batch).backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_the_head_under_bf16_autocast_is_dense_to_bf16_rounding() -> None:
    model, batch = make_model("llama").requires_grad_(False), ragged_batch(pack=True)
    engine = SingleEngine(SingleConfig(device="cpu"), "mixed")
    engine.place(model)
    found = []
    for sliced in (False, True):
        model.lm_head.weight.requires_grad_(not sliced)
        leaf = train_rows(model, model.lm_head.weight, 100, 230)[0] if sliced else model.lm_head.weight
        (engine.score(model, batch, Wanted(is_likelihood=True)).logprobs_BT * batch.weights_BT).sum().backward()
        found.append(leaf.grad)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0][100:230], rtol=2**-7, atol=2**-9 * float(found[0].abs().max()))


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    return model


def test_a_compiled_linear_layer_gives_the_rows_gradient() -> None:
    linear, x = nn.Linear(5, 8, **DOUBLE), numbers(3, 5)
    dense, model = Model(copy.deepcopy(linear)), Model(linear).requires_grad_(False)
    loss, of_x, of_weight = run(dense, x, dense.inner.weight)
    leaf, _ = train_rows(model, linear.weight, 2, 6)
    found_loss, found_of_x, found = run(compiled(model), x, leaf)
    assert torch.equal(found_loss, loss)
    assert (found - of_weight[2:6]).abs().max() < 1e-12
    assert (found_of_x - of_x).abs().max() < 1e-12
