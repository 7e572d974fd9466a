"""One decoder block: statistics, solutions, fine-tuning, packed layers in place of dense ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import INTEGER_DTYPES, LayerConfig, NMConfig
from ..memory import release_freed_memory
from ..nn.convert import dense_weight, replace_linear, set_dense_weight
from ..nn.linear import NMLinear
from ..packing.packed_weight import PackedWeight
from .activations import Activations
from .block_inputs import BlockInputs
from .equalize import fold_block
from .finetune import finetune_block
from .layer import LayerSolver, give_integers, needs_gram, pack_layer, whole_block_at_once
from .ranks import divide
from .solvers import Solution
from .statistics import InputStatistics, StatisticsCollector, in_parts
from .summary import BlockLoss, LayerSummary


def sparsify_block(
    model: PreTrainedModel,
    index: int,
    linears: dict[str, nn.Module],
    inputs: BlockInputs,
    targets: Activations | None,
    config: NMConfig,
    solve: LayerSolver,
) -> tuple[list[LayerSummary], BlockLoss | None]:
    """Put NMLinear layers in the place of one decoder block's linears, and advance `inputs` to its output.

    Args:
        index: of the block, which is dense.
        linears: its linear layers by their full names.
        inputs: the hidden states that reach it.
        targets: what fine-tuning aims at, per batch; if empty it becomes the block's own dense output. None without
            fine-tuning.
        config: as `resolve_names` returns it.
        solve: prunes one layer.

    Raises:
        NMError: activations that are not finite, a value that its stored type cannot hold.
    """
    packed: dict[str, PackedWeight] = {}
    summaries: list[LayerSummary] = []
    loss = None
    parts = [linears] if whole_block_at_once(config) else in_parts(linears, needs_gram(config))
    for part in parts:
        statistics = _statistics(index, part, inputs, targets, config)
        folded: set[str] = set()
        if config.equalization is not None and config.equalization_mode == "fold":
            run = partial(inputs.run, index, 0)
            folded = fold_block(inputs.blocks[index], part, statistics, inputs.hidden[0], run, config.equalization)
        solve_one = partial(_solve, part, statistics, config, folded, solve)
        if targets is None:
            packed_part, summaries_part = _pack_each(part, statistics, config, solve_one)
        else:
            solutions = divide(_costs(part, config), solve_one)
            if solutions:
                solutions, loss = _finetune(index, part, inputs, targets, statistics, solutions, config)
            packed_part, summaries_part = _pack(part, statistics, solutions, config)
        packed |= packed_part
        summaries += summaries_part
    for name, weight in packed.items():
        set_dense_weight(linears[name], weight.unpack().to(dense_weight(linears[name]).device))
    release_freed_memory()
    inputs.advance(index)
    _install(model, packed, linears)
    return summaries, loss


def _statistics(
    index: int, linears: dict[str, nn.Module], inputs: BlockInputs, targets: Activations | None, config: NMConfig
) -> dict[str, InputStatistics]:
    """Of a block's linears, from its dense pass, whose outputs become the targets where there are none yet."""
    aim = targets if targets is not None and not len(targets) else None
    with _collector(linears, inputs, config) as collector:
        for batch in range(len(inputs.batches)):
            if aim is not None:
                aim.append(inputs.run(index, batch))
                continue
            with collector.inputs_of_one_pass():
                inputs.run(index, batch)
    release_freed_memory()
    return collector.statistics()


def sparsify_outside(
    model: PreTrainedModel, linears: dict[str, nn.Module], inputs: BlockInputs, config: NMConfig, solve: LayerSolver
) -> list[LayerSummary]:
    """As `sparsify_block`, for linear layers outside all blocks, on the outputs of the last."""
    with _collector(linears, inputs, config) as collector:
        inputs.run_surroundings()
    statistics = collector.statistics()
    packed, summaries = _pack_each(
        linears, statistics, config, partial(_solve, linears, statistics, config, set(), solve)
    )
    _install(model, packed, linears)
    return summaries


def _collector(linears: dict[str, nn.Module], inputs: BlockInputs, config: NMConfig) -> StatisticsCollector:
    return StatisticsCollector(linears, needs_gram(config), len(inputs.batches), config.seed)


def _pack_each(
    linears: dict[str, nn.Module],
    statistics: dict[str, InputStatistics],
    config: NMConfig,
    solve_one: Callable[[str], Solution],
) -> tuple[dict[str, PackedWeight], list[LayerSummary]]:
    """One layer after the other, so that one solution is in memory."""

    def pack(name: str) -> tuple[PackedWeight, LayerSummary]:
        solution = solve_one(name)
        weight = dense_weight(linears[name]).detach().float()
        solution = give_integers(weight, solution, statistics[name], _layer(config, name), config)
        return pack_layer(name, weight, solution, statistics[name], _layer(config, name))

    return _parted(divide(_costs(linears, config), pack))


def _parted(
    results: dict[str, tuple[PackedWeight, LayerSummary]],
) -> tuple[dict[str, PackedWeight], list[LayerSummary]]:
    packed = {name: weight for name, (weight, _) in results.items()}
    return packed, [summary for _, summary in results.values()]


def _costs(linears: dict[str, nn.Module], config: NMConfig) -> dict[str, int]:
    """How much there is to do for each layer that is not excluded: products with its Gram matrix, if it needs one."""
    shapes = {name: dense_weight(linears[name]).shape for name in _packed(linears, config)}
    with_gram = needs_gram(config)
    return {name: rows * width + with_gram * (rows + width) * width**2 for name, (rows, width) in shapes.items()}


def _packed(linears: dict[str, nn.Module], config: NMConfig) -> list[str]:
    """The names of the layers that are not excluded."""
    return [name for name in linears if not config.is_excluded(name)]


def _solve(
    linears: dict[str, nn.Module],
    statistics: dict[str, InputStatistics],
    config: NMConfig,
    folded: set[str],
    solve: LayerSolver,
    name: str,
) -> Solution:
    weight = dense_weight(linears[name]).detach().float()
    return solve(weight, statistics[name], _layer(config, name), config, name in folded)


def _finetune(
    index: int,
    linears: dict[str, nn.Module],
    inputs: BlockInputs,
    targets: Sequence[Tensor],
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
        floats = tuned

        def round_layer(name: str) -> Solution:
            return give_integers(floats[name].weight, floats[name], statistics[name], layers[name], config)

        tuned, integer_loss = train(divide(_costs(linears, config), round_layer), layers)
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

    def pack(name: str) -> tuple[PackedWeight, LayerSummary]:
        weight = dense_weight(linears[name]).detach().float()
        return pack_layer(name, weight, solutions[name], statistics[name], _layer(config, name))

    return _parted(divide(_costs(linears, config), pack))


def _install(model: PreTrainedModel, packed: dict[str, PackedWeight], linears: dict[str, nn.Module]) -> None:
    for name, weight in packed.items():
        linear = NMLinear.from_packed(weight, getattr(linears[name], "bias", None))
        replace_linear(model, name, linear.to(device=dense_weight(linears[name]).device))


def install_empty(model: PreTrainedModel, linears: dict[str, nn.Module], config: NMConfig) -> None:
    """Put NMLinear layers without values in the place of linears, of which packed tensors are stored already."""
    for name in _packed(linears, config):
        weight, bias = dense_weight(linears[name]), getattr(linears[name], "bias", None)
        dtype = None if bias is None else bias.dtype
        layer = NMLinear(weight.shape[1], weight.shape[0], bias is not None, _layer(config, name), dtype, weight.device)
        replace_linear(model, name, layer)
