"""The whole model: decoder blocks in order, each on the inputs that the already sparse blocks produce."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import INTEGER_DTYPES, LayerConfig, NMConfig
from ..errors import NMError
from ..nn.convert import dense_weight, linear_layers, replace_linear, set_dense_weight, untie_output
from ..nn.embedding import check_shareable, share_embedding
from ..nn.linear import NMLinear
from ..packing.packed_weight import PackedWeight
from .architectures import decoder_blocks, output_layer_name
from .block_inputs import BlockInputs
from .equalize import fold_block
from .finetune import finetune_block
from .layer import LayerSolver, give_integers, needs_gram, pack_layer, solve_layer
from .solvers import Solution
from .statistics import InputStatistics, StatisticsCollector
from .summary import BlockLoss, LayerSummary, SparsificationSummary


@torch.no_grad()
def sparsify_model(
    model: PreTrainedModel,
    windows: Tensor,
    config: NMConfig,
    progress: bool = True,
    solve: LayerSolver = solve_layer,
) -> SparsificationSummary:
    """Replace every linear layer that `config` does not exclude by an NMLinear, in place.

    Each block runs twice: dense on the inputs that the sparse blocks before it produce, to collect the statistics of
    all its linears at once; then, these pruned (and quantized, and fine-tuned), to make the inputs of the next block.
    Layers outside the blocks come last, on the inputs they then have.

    Args:
        model: dense, in eval mode, on the device to compute on.
        windows: int64 `[samples, length]`.
        config: as `resolve_names` returns it.
        solve: prunes one layer; what it returns must fit the layer's configuration.

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
    tuning = config.finetune_settings
    inputs = BlockInputs(model, blocks, windows, tuning.batch_size if tuning else None)
    dense = _DenseOutputs(inputs) if tuning and tuning.targets == "dense" else None
    summary = SparsificationSummary()
    with tqdm(total=len(blocks) + bool(outside), desc="Sparsifying", unit="block", disable=not progress) as bar:
        for index in range(len(blocks)):
            linears = {f"{blocks_name}.{index}.{name}": m for name, m in linear_layers(blocks[index]).items()}
            layers, loss = _sparsify_block(model, index, linears, inputs, dense, config, solve)
            summary.layers += layers
            shown = {}
            if layers:
                shown["layer_error"] = f"{sum(layer.relative_error for layer in layers) / len(layers):.4f}"
            if loss is not None:
                summary.block_losses[index] = loss
                shown["block_loss"] = f"{loss.before:.4f} → {loss.after:.4f}"
            bar.set_postfix(shown, refresh=False)
            bar.update()
        if outside:
            summary.layers += _sparsify_outside(model, outside, inputs, config, solve)
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


class _DenseOutputs:
    """The hidden states of the dense model, a block behind those of the sparse one."""

    def __init__(self, inputs: BlockInputs) -> None:
        self._inputs, self._hidden = inputs, list(inputs.hidden)

    def advance(self, index: int) -> list[Tensor]:
        """Per batch the output of block `index`, which must still be dense."""
        self._hidden = [self._inputs.run(index, batch, hidden) for batch, hidden in enumerate(self._hidden)]
        return self._hidden


def _sparsify_block(
    model: PreTrainedModel,
    index: int,
    linears: dict[str, nn.Module],
    inputs: BlockInputs,
    dense: _DenseOutputs | None,
    config: NMConfig,
    solve: LayerSolver,
) -> tuple[list[LayerSummary], BlockLoss | None]:
    targets = [] if dense is None else dense.advance(index)
    keep_outputs = config.finetune is not None and dense is None
    with _collector(linears, inputs, config) as collector:
        for batch in range(len(inputs.batches)):
            output = inputs.run(index, batch)
            if keep_outputs:
                targets.append(output)
    statistics = collector.statistics()
    folded: set[str] = set()
    if config.equalization is not None and config.equalization_mode == "fold":
        run = partial(inputs.run, index, 0)
        folded = fold_block(inputs.blocks[index], linears, statistics, inputs.hidden[0], run, config.equalization)
    solutions = _solve(linears, statistics, config, folded, solve)
    loss = None
    if config.finetune is not None and solutions:
        solutions, loss = _finetune(index, linears, inputs, targets, statistics, solutions, config)
    else:
        solutions = _give_integers(linears, statistics, solutions, config)
    packed, summaries = _pack(linears, statistics, solutions, config)
    for name, weight in packed.items():
        set_dense_weight(linears[name], weight.unpack().to(dense_weight(linears[name]).device))
    inputs.advance(index)
    _install(model, packed, linears)
    return summaries, loss


def _sparsify_outside(
    model: PreTrainedModel, linears: dict[str, nn.Module], inputs: BlockInputs, config: NMConfig, solve: LayerSolver
) -> list[LayerSummary]:
    with _collector(linears, inputs, config) as collector:
        inputs.run_surroundings()
    statistics = collector.statistics()
    solutions = _solve(linears, statistics, config, set(), solve)
    solutions = _give_integers(linears, statistics, solutions, config)
    packed, summaries = _pack(linears, statistics, solutions, config)
    _install(model, packed, linears)
    return summaries


def _solve(
    linears: dict[str, nn.Module],
    statistics: dict[str, InputStatistics],
    config: NMConfig,
    folded: set[str],
    solve: LayerSolver,
) -> dict[str, Solution]:
    """Of every layer that is not excluded, by full name."""
    solutions: dict[str, Solution] = {}
    for name, module in linears.items():
        layer = config.layer(name)
        if layer is not None:
            weight = dense_weight(module).detach().float()
            solutions[name] = solve(weight, statistics[name], layer, config, name in folded)
    return solutions


def _give_integers(
    linears: dict[str, nn.Module],
    statistics: dict[str, InputStatistics],
    solutions: dict[str, Solution],
    config: NMConfig,
) -> dict[str, Solution]:
    """Near the dense weights, where integers are stored."""
    return {
        name: give_integers(
            dense_weight(linears[name]).detach().float(), solution, statistics[name], _layer(config, name), config
        )
        for name, solution in solutions.items()
    }


def _finetune(
    index: int,
    linears: dict[str, nn.Module],
    inputs: BlockInputs,
    targets: list[Tensor],
    statistics: dict[str, InputStatistics],
    solutions: dict[str, Solution],
    config: NMConfig,
) -> tuple[dict[str, Solution], BlockLoss]:
    """Train floats; where integers are stored, make the trained weights such, and train these.

    Integers trained from the start hardly move, and end where the solver put them; integers near trained floats keep
    what was learned (docs/accuracy.md).
    """
    settings = config.finetune_settings
    assert settings is not None
    local_names = {module: name for name, module in inputs.blocks[index].named_modules()}
    names = {name: local_names[linears[name]] for name in solutions}

    def train(start: dict[str, Solution], layers: dict[str, LayerConfig]) -> tuple[dict[str, Solution], BlockLoss]:
        local = {names[name]: (solution, layers[name]) for name, solution in start.items()}
        tuned, loss = finetune_block(inputs, index, targets, local, settings, config.seed + index)
        return {name: tuned[local_name] for name, local_name in names.items()}, loss

    layers = {name: _layer(config, name) for name in solutions}
    tuned, loss = train(solutions, {name: replace(layer, weight_dtype="float32") for name, layer in layers.items()})
    if any(layer.weight_dtype in INTEGER_DTYPES for layer in layers.values()):
        integers = {
            name: give_integers(solution.weight, solution, statistics[name], layers[name], config)
            for name, solution in tuned.items()
        }
        tuned, integer_loss = train(integers, layers)
        loss = BlockLoss(loss.before, integer_loss.after)
    return tuned, loss


def _layer(config: NMConfig, name: str) -> LayerConfig:
    layer = config.layer(name)
    assert layer is not None
    return layer


def _pack(
    linears: dict[str, nn.Module],
    statistics: dict[str, InputStatistics],
    solutions: dict[str, Solution],
    config: NMConfig,
) -> tuple[dict[str, PackedWeight], list[LayerSummary]]:
    packed: dict[str, PackedWeight] = {}
    summaries: list[LayerSummary] = []
    for name, solution in solutions.items():
        weight = dense_weight(linears[name]).detach().float()
        packed[name], summary = pack_layer(name, weight, solution, statistics[name], _layer(config, name))
        summaries.append(summary)
    return packed, summaries


def _install(model: PreTrainedModel, packed: dict[str, PackedWeight], linears: dict[str, nn.Module]) -> None:
    for name, weight in packed.items():
        linear = NMLinear.from_packed(weight, getattr(linears[name], "bias", None))
        replace_linear(model, name, linear.to(device=dense_weight(linears[name]).device))
