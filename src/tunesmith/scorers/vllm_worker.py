"""The half of the vLLM scorer that lives in vLLM's worker: it makes the states there, from seeds and scalars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from tunesmith.methods.directions import LowRankDirections, layer_sizes
from tunesmith.models.low_rank import Probe


class ZerothWorker:
    """vLLM puts these methods into its worker (`worker_extension_cls`); `LLM.collective_rpc` calls them by name.

    A state is an adapter that never leaves its slot: registered once, then rewritten in place, since kernels and recorded
    graphs hold the slots' addresses.
    """

    model_runner: Any
    device: Any

    def zeroth_open(
        self, sizes: Mapping[str, tuple[int, int]], settings: Mapping[str, Any], num_states: int, rank: int
    ) -> list[str]:
        """Take a slot for each state. `sizes`: (outputs, inputs) of the layers that move. Returns those that vLLM's model has
        no adapter for."""
        self._adapters = self.model_runner.lora_manager._adapter_manager
        places: dict[str, tuple[Any, int]] = {}
        for name, module in self._adapters.modules.items():
            parts = self._adapters.packed_modules.get(name, [name])
            places |= {part: (module, index) for index, part in enumerate(parts)}
        missing = [name for name in sizes if name not in places]
        if missing:
            return missing
        self._places = {name: places[name] for name in sizes}
        self._layers = {name: _sized(size, self.device) for name, size in sizes.items()}
        self._settings = dict(settings)
        self._directions: LowRankDirections | None = None
        self._rank, self._num_states = rank, num_states
        self.zeroth_reopen()
        return []

    def zeroth_reopen(self) -> None:
        """Take the slots, anew after vLLM has forgotten its adapters."""
        self._slots = [self._register(state + 1, self._rank) for state in range(self._num_states)]

    def _register(self, adapter_id: int, rank: int) -> int:
        """A pinned adapter of zeros; returns its slot. Unpinned, it could be put in again from its registered copy."""
        dtype = self.model_runner.lora_manager.lora_config.lora_dtype
        modules = sorted({name.rpartition(".")[2] for name in self._layers})
        helper = PEFTHelper.from_dict({"r": rank, "lora_alpha": rank, "target_modules": modules})
        zeros = {}
        for name, layer in self._layers.items():
            outputs, inputs = layer_sizes(layer)
            zeros[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(rank, inputs, dtype=dtype)
            zeros[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(outputs, rank, dtype=dtype)
        lora = LoRAModel.from_lora_tensors(adapter_id, zeros, helper, device=str(self.device), dtype=dtype)
        self._adapters.remove_adapter(adapter_id)
        self._adapters.add_adapter(lora)
        self._adapters.activate_adapter(adapter_id)
        self._adapters.pin_adapter(adapter_id)
        return self._adapters.lora_index_to_id.index(adapter_id)

    def zeroth_forget(self) -> None:
        """What has gathered is in the weights from now on."""
        if self._directions is not None:
            self._directions.columns.clear()
            self._directions.step = -1

    def zeroth_move(self, step: int, coefficients: Sequence[float]) -> None:
        """Take an update."""
        self._begin(step, len(coefficients))
        assert self._directions is not None
        self._directions.move(coefficients)

    def zeroth_states(self, step: int, queries: int, probes: Sequence[tuple[int, float]]) -> None:
        """Write the states of these probes into the slots."""
        self._begin(step, queries)
        assert self._directions is not None
        assert len(probes) <= len(self._slots), "a state without a slot would not be written"
        columns = self._directions.columns
        with columns.at([Probe(*probe) for probe in probes], self._directions.u):
            for name, (module, part) in self._places.items():
                a_slots, b_slots = module.lora_a_stacked[part], module.lora_b_stacked[part]
                a_CI, b_KOC = columns.as_adapters(name, a_slots.dtype)
                used = a_CI.shape[0]
                for slot, b_OC in zip(self._slots, b_KOC, strict=False):
                    a_slots[slot, 0, :used].copy_(a_CI)
                    a_slots[slot, 0, used:].zero_()
                    b_slots[slot, 0, :, :used].copy_(b_OC)
                    b_slots[slot, 0, :, used:].zero_()

    def _begin(self, step: int, queries: int) -> None:
        """The same directions as the method's, of which it tells step by step; a first one may be later than 0."""
        if self._directions is None:
            self._directions = LowRankDirections(self._layers, **self._settings, bank_rank=None, on_disk=False)
        if (self._directions.step, self._directions.queries) != (step, queries):
            self._directions.begin(step, queries)


def _sized(size: tuple[int, int], device: Any) -> nn.Module:
    """A stand-in for a layer, of whose weight the size and the device alone are asked."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(1, 1, device=device).expand(size), requires_grad=False)
    return layer
