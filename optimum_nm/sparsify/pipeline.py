"""The whole model: decoder blocks in order, each on the inputs that the already sparse blocks produce."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import NMConfig
from ..errors import NMError
from ..nn.convert import dense_weight, linear_layers, replace_linear, set_dense_weight, untie_output
from ..nn.embedding import check_shareable, share_embedding
from ..nn.linear import NMLinear
from ..packing.packed_weight import PackedWeight
from .architectures import decoder_blocks, output_layer_name
from .block_inputs import BlockInputs
from .equalize import fold_block
from .layer import needs_gram, sparsify_layer
from .statistics import InputStatistics, StatisticsCollector
from .summary import LayerSummary, SparsificationSummary


@torch.no_grad()
def sparsify_model(
    model: PreTrainedModel, windows: Tensor, config: NMConfig, progress: bool = True
) -> SparsificationSummary:
    """Replace every linear layer that `config` does not exclude by an NMLinear, in place.

    Each block runs twice: dense on the inputs that the sparse blocks before it produce, to collect the statistics of
    all its linears at once; then, these pruned (and quantized), to make the inputs of the next block. Layers outside
    the blocks come last, on the inputs they then have.

    Args:
        model: dense, in eval mode, on the device to compute on.
        windows: int64 `[samples, length]`.
        config: as `resolve_names` returns it.

    Raises:
        NMError: no decoder blocks, non-finite weights or activations, a value that its stored type cannot hold.
    """
    start = time.perf_counter()
    blocks_name, blocks = decoder_blocks(model)
    check_finite(model)
    outside = {
        name: module
        for name, module in linear_layers(model).items()
        if not name.startswith(f"{blocks_name}.") and config.layer(name) is not None
    }
    if config.share_embedding:
        _check_tied(model, config)
    for name in outside:
        untie_output(model, name)
    inputs = BlockInputs(model, blocks, windows)
    summary = SparsificationSummary()
    with tqdm(total=len(blocks) + bool(outside), desc="Sparsifying", unit="block", disable=not progress) as bar:
        for index in range(len(blocks)):
            linears = {f"{blocks_name}.{index}.{name}": m for name, m in linear_layers(blocks[index]).items()}
            layers = _sparsify_block(model, index, linears, inputs, config)
            summary.layers += layers
            if layers:
                error = sum(layer.relative_error for layer in layers) / len(layers)
                bar.set_postfix(layer_error=f"{error:.4f}", refresh=False)
            bar.update()
        if outside:
            summary.layers += _sparsify_outside(model, outside, inputs, config)
            bar.update()
    if config.share_embedding:
        share_embedding(model)
    summary.seconds = time.perf_counter() - start
    return summary


def resolve_names(config: NMConfig, model: PreTrainedModel) -> NMConfig:
    """The configuration with names of this model: "lm_head" in `exclude` stands for the output layer whatever its name.

    Raises:
        NMError: there is no linear layer, a pattern matches none, or all are excluded.
    """
    names = list(linear_layers(model))
    if not names:
        raise NMError(f"{type(model).__name__} has no dense linear layer left; load the dense model again.")
    output = output_layer_name(model)
    if "lm_head" in config.exclude and output in names and not config.is_excluded(output):
        config = replace(config, exclude=[*config.exclude, output])
    config.check_names(names)
    if all(config.is_excluded(name) for name in names):
        raise NMError(f"exclude is {config.exclude!r}, which leaves no linear layer to sparsify.")
    return config


def _check_tied(model: PreTrainedModel, config: NMConfig) -> None:
    output = output_layer_name(model)
    check_shareable(model, None if output is None else config.layer(output))
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        raise NMError(f"share_embedding is set, but {type(model).__name__} does not tie its output layer; unset it.")


def check_finite(model: nn.Module) -> None:
    """Raise NMError naming the first parameter that has an element which is not finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NMError(f"{name} has elements that are not finite; every weight must be a finite number.")


def _collector(linears: dict[str, nn.Module], inputs: BlockInputs, config: NMConfig) -> StatisticsCollector:
    return StatisticsCollector(linears, needs_gram(config), len(inputs.batches), config.seed)


def _sparsify_block(
    model: PreTrainedModel, index: int, linears: dict[str, nn.Module], inputs: BlockInputs, config: NMConfig
) -> list[LayerSummary]:
    with _collector(linears, inputs, config) as collector:
        for batch in range(len(inputs.batches)):
            inputs.run(index, batch)
    statistics = collector.statistics()
    folded: set[str] = set()
    if config.equalization is not None and config.equalization_mode == "fold":
        run = partial(inputs.run, index, 0)
        folded = fold_block(inputs.blocks[index], linears, statistics, inputs.hidden[0], run, config.equalization)
    packed, summaries = _sparsify_linears(linears, statistics, config, folded)
    for name, weight in packed.items():
        set_dense_weight(linears[name], weight.unpack().to(dense_weight(linears[name]).device))
    inputs.advance(index)
    _install(model, packed, linears)
    return summaries


def _sparsify_outside(
    model: PreTrainedModel, linears: dict[str, nn.Module], inputs: BlockInputs, config: NMConfig
) -> list[LayerSummary]:
    with _collector(linears, inputs, config) as collector:
        inputs.run_surroundings()
    packed, summaries = _sparsify_linears(linears, collector.statistics(), config, set())
    _install(model, packed, linears)
    return summaries


def _sparsify_linears(
    linears: dict[str, nn.Module], statistics: dict[str, InputStatistics], config: NMConfig, folded: set[str]
) -> tuple[dict[str, PackedWeight], list[LayerSummary]]:
    packed: dict[str, PackedWeight] = {}
    summaries: list[LayerSummary] = []
    for name, module in linears.items():
        layer = config.layer(name)
        if layer is not None:
            weight = dense_weight(module).detach().float()
            packed[name], summary = sparsify_layer(name, weight, statistics[name], layer, config, name in folded)
            summaries.append(summary)
    return packed, summaries


def _install(model: PreTrainedModel, packed: dict[str, PackedWeight], linears: dict[str, nn.Module]) -> None:
    for name, weight in packed.items():
        linear = NMLinear.from_packed(weight, getattr(linears[name], "bias", None))
        replace_linear(model, name, linear.to(device=dense_weight(linears[name]).device))
