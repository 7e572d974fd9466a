"""Layer allocation: how each layer is stored, so that the model loses least at a number of bits per weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import LayerConfig, NMConfig
from ..errors import NMError
from ..nn.convert import dense_weight, linear_layers
from .architectures import decoder_blocks, output_layer_name
from .block_inputs import BlockInputs
from .budget import Choice, allocate
from .candidates import candidate_errors, candidates, packed_bytes, sampled_rows
from .sensitivity import output_fisher
from .statistics import InputStatistics, StatisticsCollector
from .summary import AllocatedLayer, Allocation

ALLOCATED = ("pattern", "outliers", "weight_dtype")  # the fields of LayerConfig that allocation chooses
GRAM_WINDOWS = 16
FISHER_WINDOWS = 4
CHUNK = 4096  # rows of a large layer at a time


@torch.no_grad()
def allocate_layers(
    model: PreTrainedModel, windows: Tensor, config: NMConfig, progress: bool = True
) -> tuple[NMConfig, Allocation]:
    """Choose pattern, outliers and value type of every layer, unless an override sets one of them, for `target_bits`.

    Two passes over some of the windows with the dense model: gradients, for how much the loss depends on each output,
    and Gram matrices, on which every candidate's error is measured; their product is what a candidate costs.

    Args:
        model: dense, in eval mode, on the device to compute on.
        windows: int64 `[samples, length]`.
        config: as `resolve_names` returns it, with `target_bits`.

    Returns:
        The configuration with an override for each layer chosen, and what was chosen.

    Raises:
        NMError: the smallest candidates take more.
    """
    assert config.target_bits is not None
    shapes = {name: dense_weight(module).shape for name, module in linear_layers(model).items()}
    layers = {name: layer for name in shapes if (layer := config.layer(name)) is not None}
    weights = sum(shapes[name].numel() for name in layers)
    options = {name: _options(model, name, layer, config) for name, layer in layers.items()}
    smallest = sum(min(packed_bytes(shapes[name], option) for option in options[name]) for name in layers)
    if 8 * smallest > config.target_bits * weights:
        raise NMError(
            f"target_bits is {config.target_bits:g}; the smallest that the layers can take is "
            f"{8 * smallest / weights:.3f} bits per weight."
        )
    costs = _measure(model, windows, config, [name for name in layers if len(options[name]) > 1], progress)
    choices = {name: [_choice(shapes[name], option, costs.get(name)) for option in options[name]] for name in layers}
    chosen = allocate(choices, int(config.target_bits * weights / 8))
    assert chosen is not None
    allocated = [
        AllocatedLayer(
            name=name,
            **_settings(choice.layer),
            bits_per_weight=8 * choice.nbytes / shapes[name].numel(),
            sensitivity=costs[name].sensitivity if name in costs else None,
            relative_error=choice.relative_error if name in costs else None,
        )
        for name, choice in chosen.items()
    ]
    overrides = {name: _settings(chosen[name].layer) for name in costs}
    bits = 8 * sum(choice.nbytes for choice in chosen.values()) / weights
    return replace(config, overrides={**config.overrides, **overrides}), Allocation(config.target_bits, bits, allocated)


@dataclass(frozen=True)
class _Costs:
    sensitivity: float
    relative_errors: dict[tuple[Any, ...], float]  # by the values of ALLOCATED


def _choice(shape: torch.Size, layer: LayerConfig, costs: _Costs | None) -> Choice:
    """Without costs there is nothing to choose."""
    error = 0.0 if costs is None else costs.relative_errors[_key(layer)]
    return Choice(layer, packed_bytes(shape, layer), error, 0.0 if costs is None else error * costs.sensitivity)


def _options(model: PreTrainedModel, name: str, layer: LayerConfig, config: NMConfig) -> list[LayerConfig]:
    """What may be chosen for a layer: only what it is where an override sets one of ALLOCATED."""
    for pattern, override in config.overrides.items():
        if fnmatchcase(name, pattern) and not override.keys().isdisjoint(ALLOCATED):
            return [layer]
    chosen = [config.layer(name, _settings(option)) for option in candidates(layer)]
    options = [option for option in chosen if option is not None]
    if config.share_embedding and name == output_layer_name(model):
        return [option for option in options if option.pattern.is_dense and option.outliers is None]
    return options


def _settings(layer: LayerConfig) -> dict[str, Any]:
    """The fields of ALLOCATED, as an override has them."""
    outliers = None if layer.outliers is None else str(layer.outliers)
    return {"pattern": str(layer.pattern), "outliers": outliers, "weight_dtype": layer.weight_dtype}


def _key(layer: LayerConfig) -> tuple[Any, ...]:
    return tuple(_settings(layer).values())


def _measure(
    model: PreTrainedModel, windows: Tensor, config: NMConfig, names: list[str], progress: bool
) -> dict[str, _Costs]:
    """What every candidate of the layers called `names` costs."""
    if not names:
        return {}
    blocks_name, blocks = decoder_blocks(model)
    linears = {name: module for name, module in linear_layers(model).items() if name in names}
    outside = {name: module for name, module in linears.items() if not name.startswith(f"{blocks_name}.")}
    costs: dict[str, _Costs] = {}
    inputs = BlockInputs(model, blocks, windows[:FISHER_WINDOWS], batch_size=1)
    fisher = output_fisher(inputs, linears, config.seed, progress)
    inputs = BlockInputs(model, blocks, windows[:GRAM_WINDOWS])
    with tqdm(total=len(blocks) + bool(outside), desc="Allocating", unit="block", disable=not progress) as bar:

        def measure(group: dict[str, nn.Module], run: Callable[[], None]) -> None:
            with StatisticsCollector(group, True, len(inputs.batches), config.seed) as collector:
                run()
            for name, statistics in collector.statistics().items():
                layer = config.layer(name)
                assert layer is not None
                costs[name] = _layer_costs(group[name], statistics, fisher[name], layer)
            bar.update()

        for index in range(len(blocks)):
            prefix = f"{blocks_name}.{index}."
            group = {name: module for name, module in linears.items() if name.startswith(prefix)}
            measure(group, partial(inputs.advance, index))
        if outside:
            measure(outside, inputs.run_surroundings)
    return costs


def _layer_costs(module: nn.Module, statistics: InputStatistics, fisher: Tensor, layer: LayerConfig) -> _Costs:
    gram = statistics.gram
    assert gram is not None
    weight, fisher = dense_weight(module).detach(), fisher.to(gram.device)
    energies = torch.cat([((rows @ gram) * rows).sum(dim=1) for rows in map(Tensor.float, weight.split(CHUNK))])
    sensitivity = 0.5 * (fisher * energies).sum().item() / max(statistics.tokens, 1)
    rows = sampled_rows(len(weight)).to(gram.device)
    share = fisher[rows] / (fisher[rows] * energies[rows]).sum().clamp_min(torch.finfo(torch.float32).tiny)
    errors = candidate_errors(weight[rows].float(), gram, layer)
    return _Costs(sensitivity, {_key(candidate): (share * error).sum().item() for candidate, error in errors})
