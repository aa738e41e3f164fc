"""What the probes find out about architectures that nobody told them about."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES, ISOLATING, make_model
from tunesmith.models.load import blocks
from tunesmith.models.probe import find_head, isolates_sequences

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
