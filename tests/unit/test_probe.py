"""What the probes find out about architectures that nobody told them about."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES, ISOLATING, make_model
from tunesmith.models.load import blocks
from tunesmith.models.probe import attention_span, find_head, isolates_sequences, shares_prefixes

SHARING = {name for name in FAMILIES if name not in ("falcon_h1", "mamba")}
"""Those in which continuations can share a beginning: all that attend, and OPT too, which is told positions here."""

HEADS = {
    "gemma2": (1.0, 5.0),
    "gemma3_text": (1.0, 5.0),
    "granite": (0.25, None),
    "cohere": (0.25, None),
    "falcon_h1": (0.5, None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_scale_and_cap_of_the_logits(family: str) -> None:
    head = find_head(make_model(family))
    assert head.linear is not None
    assert (head.scale, head.cap) == HEADS.get(family, (1.0, None))


def test_an_unknown_rule_is_noticed() -> None:

    model = make_model("llama")
    forward = model.forward

    def squared(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits**2
        return output

    model.forward = squared
    assert find_head(model).linear is None


@pytest.mark.parametrize("family", FAMILIES)
def test_tells_which_models_keep_packed_sequences_apart(family: str) -> None:
    assert isolates_sequences(make_model(family)) == (family in ISOLATING)


@pytest.mark.parametrize("family", FAMILIES)
def test_isolation_is_what_the_probe_says(family: str) -> None:
    """Change one token of the first sequence: the second one's logits move exactly in those that the probe refuses."""
    model = make_model(family, torch.float64)
    tokens = torch.arange(3, 27)[None]
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    changed = tokens.clone()
    changed[0, 9] = 200
    with torch.no_grad():
        before, after = (
            model(input_ids=t, position_ids=positions, use_cache=False).logits[0, 10:] for t in (tokens, changed)
        )
    moved = float((before - after).abs().max())
    assert (moved < 1e-12) == (family in ISOLATING)


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_blocks(family: str) -> None:
    model = make_model(family)
    found = blocks(model)
    assert len(found) == 2
    assert all(model.get_submodule(name) is block for name, block in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_tells_which_models_let_continuations_share_their_beginning(family: str) -> None:
    assert shares_prefixes(make_model(family)) == (family in SHARING)


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_is_what_the_probe_says(family: str) -> None:
    """Both continuations of one beginning, in one row under a mask, have the logits that each has alone, or not.

    Eight tokens at most: further back the small models with a window do not look.
    """
    model = make_model(family, torch.float64)
    tokens = torch.arange(3, 13)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 4, 5, 6])
    allowed = torch.ones(10, 10, dtype=torch.bool).tril()
    allowed[7:, 4:7] = False
    mask = torch.zeros(1, 1, 10, 10, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    with torch.no_grad():
        try:
            row = model(
                input_ids=tokens[None], position_ids=positions[None], attention_mask=mask, use_cache=False
            ).logits[0]
        except RuntimeError:
            assert family not in SHARING
            return
        first = model(input_ids=tokens[None, :7], use_cache=False).logits[0]
        second = model(input_ids=torch.cat([tokens[:4], tokens[7:]])[None], use_cache=False).logits[0]
    moved = max(float((row[:7] - first).abs().max()), float((row[7:] - second[4:]).abs().max()))
    assert (moved < 1e-12) == (family in SHARING)


def test_models_that_count_columns_or_refuse_the_mask_do_not_share() -> None:
    from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig, MptConfig

    for config in (
        BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2),
        MptConfig(vocab_size=64, d_model=16, n_heads=2, n_layers=1, expansion_ratio=2),
        GPTNeoConfig(
            vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
        ),
    ):
        assert not shares_prefixes(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize(
    ("family", "settings", "span"),
    [
        ("llama", {}, None),
        ("gemma2", {}, 8),
        ("gemma3_text", {}, 8),
        ("mistral", {"sliding_window": 5}, 5),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 5}, None),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, 5),
        ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, None),
        ("llama4_text", {"attention_chunk_size": 6}, 6),
        ("gpt_neo", {"window_size": 7}, 7),
        ("recurrent_gemma", {"attention_window_size": 4}, 4),
    ],
)
def test_finds_how_far_back_a_model_looks(family: str, settings: dict[str, object], span: int | None) -> None:
    from types import SimpleNamespace

    from transformers import CONFIG_MAPPING

    settings = {**FAMILIES.get(family, {}), **settings}
    if family != "gpt_neo":
        settings["num_hidden_layers"] = 2
    assert attention_span(SimpleNamespace(config=CONFIG_MAPPING[family](**settings))) == span
