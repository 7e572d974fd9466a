"""Mixtures of experts: linear layers of their own under the names that files have, whichever transformers runs."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .convert import linear_layers

_EXPERT = re.compile(r"(?P<experts>.*\bexperts)\.(?P<number>\d+)\.")


class _Names(NamedTuple):
    """What files call the block that has router and experts, and the layers of an expert."""

    block: str
    gate: str
    up: str
    down: str


_QWEN = _Names("mlp", "gate_proj", "up_proj", "down_proj")
# Model types whose experts transformers 5 has as two tensors of 3 dimensions, which can be told apart.
_SPLITTABLE = {
    "mixtral": _Names("block_sparse_moe", "w1", "w3", "w2"),
    "olmoe": _QWEN,
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
}


def split_expert_name(layer: str) -> tuple[str, int] | None:
    """("model.layers.0.mlp.experts", 3) for a layer of that expert; None for a layer of none."""
    match = _EXPERT.match(layer)
    return None if match is None else (match["experts"], int(match["number"]))


def router_layers(model: nn.Module) -> list[str]:
    """Linear layers beside experts that say which of them a token goes to, or how much of a shared one it takes.

    They have one output for each expert, or one in all.
    """
    routers = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.ModuleList):
            routers += [
                f"{name}.{path}"
                for path, linear in linear_layers(module).items()
                if not path.startswith("experts.") and linear.out_features in (1, len(experts))
            ]
    return routers


def fused_experts(model: nn.Module) -> str | None:
    """The name of a module that has the weights of all its experts in one tensor; None if there is none."""
    modules = model.named_modules()
    return next((name for name, module in modules if "Expert" in type(module).__name__ and [*module._parameters]), None)


def split_experts(model: PreTrainedModel) -> None:
    """Give every expert linear layers of its own, in place, as transformers 4 has them and files have their names.

    transformers 5 has the weights of all experts of a block in one tensor, of which the new layers have views. Where
    its modules are not called as in files, they become so, and saving renames no more. Model types that this cannot be
    done to stay as they are (`fused_experts`).
    """
    names = _SPLITTABLE.get(model.config.model_type)
    if names is None:
        return
    for path, module in [*model.named_modules()]:
        if {*module._parameters} != {"gate_up_proj", "down_proj"}:
            continue
        layer_path, _, found = path.rpartition(".")[0].rpartition(".")
        layer = model.get_submodule(layer_path)
        block = layer.get_submodule(found)
        block.experts = SplitExperts(module, names)
        if found != names.block:
            del layer._modules[found]
            layer.add_module(names.block, block)
            vars(layer)[found] = block  # by which the layer's own code calls it
        vars(model)["_weight_conversions"] = []  # by which transformers 5 would join experts and rename on saving


class SplitExperts(nn.ModuleList):
    """What transformers 5 has as one module, with a module for every expert.

    Args:
        fused: has `gate_up_proj` `[experts, 2·width, hidden_size]` and `down_proj` `[experts, hidden_size, width]`.
        names: of an expert's layers.
    """

    def __init__(self, fused: nn.Module, names: _Names) -> None:
        gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
        activation = fused.get_submodule("act_fn")
        super().__init__(
            _Expert([*both.chunk(2), last], names, activation)
            for both, last in zip(gate_up.detach(), down.detach(), strict=True)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[tokens, hidden_size]` to the same; the others are `[tokens, experts per token]`."""
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, places = torch.where(top_k_index == number)
            if len(tokens):
                output = expert(hidden_states[tokens]) * top_k_weights[tokens, places, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result


class _Expert(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, weights: list[Tensor], names: _Names, activation: nn.Module) -> None:
        super().__init__()
        self._names = names
        self.act_fn = activation
        for name, weight in zip(names[1:], weights, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight)
            self.add_module(name, linear)

    def forward(self, input: Tensor) -> Tensor:
        gate, up, down = (self._modules[name] for name in self._names[1:])
        assert gate is not None and up is not None and down is not None
        return down(self.act_fn(gate(input)) * up(input))
