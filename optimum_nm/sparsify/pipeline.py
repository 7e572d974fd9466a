"""The whole model: decoder blocks in order, each on the inputs that the already sparse blocks produce."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import NMConfig
from ..errors import NMError
from ..memory import keep_freed_memory, memory_bytes, release_freed_memory
from ..nn.convert import linear_layers, untie_output
from ..nn.embedding import check_shareable, share_embedding
from ..nn.experts import fused_experts, router_layers
from ..nn.weights import Weights
from ..packing.safetensors_files import TensorLocation
from ..packing.tensor_files import read_tensor
from .activations import Activations
from .architectures import decoder_blocks, output_layer_name
from .block import install_empty, sparsify_block, sparsify_outside
from .block_inputs import BlockInputs
from .layer import LayerSolver, solve_layer
from .memory_estimate import activation_bytes, estimate_bytes
from .ranks import count, own_name, rank, share
from .summary import BlockLoss, LayerSummary, SparsificationSummary, layer_type
from .work_folder import WorkFolder

logger = logging.getLogger(__name__)


@torch.no_grad()
def sparsify_model(
    weights: Weights,
    windows: Tensor,
    config: NMConfig,
    progress: bool = True,
    solve: LayerSolver = solve_layer,
    work: WorkFolder | None = None,
    memory_budget: int | None = None,
) -> SparsificationSummary:
    """Replace every linear layer that `config` does not exclude by an NMLinear, in place.

    Each block runs twice: dense on the inputs that the sparse blocks before it produce, to collect the statistics of
    all its linears at once; then, these pruned (and quantized, and fine-tuned), to make the inputs of the next block.
    Layers outside the blocks come last, on the inputs they then have.

    Args:
        weights: of a dense model. Where they are streamed, no more than two blocks are in memory.
        windows: int64 `[samples, length]`.
        config: as `resolve_names` returns it.
        solve: prunes one layer; what it returns must fit the layer's configuration.
        work: gets every block as soon as it is finished; those that it has already are not computed again. None to
            keep the result in memory only.
        memory_budget: bytes that hidden states may take in memory; if they take more they live in `work`. None for any
            number.

    Raises:
        NMError: no decoder blocks, non-finite weights or activations, a value that its stored type cannot hold.
        OSError: a file of `work` cannot be read or written.
    """
    if (advice := slow_arithmetic(weights)) is not None and rank() == 0:
        logger.warning(advice)
    keep_freed_memory()
    run = _Run(weights, windows, config, work, memory_budget)
    steps = len(run.blocks) + bool(run.outside)
    with tqdm(total=steps, initial=run.done, desc="Sparsifying", unit="block", disable=not progress) as bar:
        if progress:
            bar.write(f"Memory: about {run.summary.estimated_bytes / 1e9:.1f} GB at most.", file=sys.stderr)
        for index in range(run.done, len(run.blocks)):
            bar.set_postfix(run.sparsify_block(index, solve), refresh=False)
            bar.update()
        run.sparsify_outside(solve)
        bar.update(bool(run.outside))
    return run.summary


class _Run:
    """One pass over a model, from the first block that is not finished.

    Attributes:
        outside: the linear layers to pack that are in no block, by name.
        done: how many blocks were finished before.
    """

    def __init__(
        self, weights: Weights, windows: Tensor, config: NMConfig, work: WorkFolder | None, memory_budget: int | None
    ) -> None:
        self._mark = time.perf_counter()
        windows = share(windows)
        self._weights, self._config, self._work = weights, config, work
        self._model = model = weights.model
        self._blocks_name, self.blocks = decoder_blocks(model)
        linears = linear_layers(model)
        self.outside = {
            name: linears[name]
            for name in linears
            if not name.startswith(f"{self._blocks_name}.") and config.layer(name) is not None
        }
        if config.share_embedding:
            _check_tied(model, config)
        for name in self.outside:
            untie_output(model, name)
        self._names = list(model.state_dict())
        self.done = 0 if work is None else min(work.done, len(self.blocks))
        self.summary = SparsificationSummary()
        spilled = memory_budget is not None and activation_bytes(model, windows, config) > memory_budget
        spill = work.path if work is not None and spilled else None
        self.summary.estimated_bytes = estimate_bytes(weights, self.blocks, windows, config, spill is not None)
        self._hidden = Activations(spill, own_name("hidden"), weights.device)
        tuning = config.finetune_settings
        dense = tuning is not None and tuning.targets == "dense"
        self._dense = Activations(spill, own_name("dense"), weights.device) if dense else None
        self._targets = Activations(spill, own_name("targets"), weights.device) if tuning and not dense else None
        self._inputs = self._record_inputs(windows)
        if work is not None and self.done:
            self._go_on(work)

    def sparsify_block(self, index: int, solve: LayerSolver) -> dict[str, str]:
        """Sparsify the next block; returns what there is to show about it."""
        block = self.blocks[index]
        self._weights.open(self._names_of(index))
        if index + 1 < len(self.blocks):
            self._weights.prefetch(self._names_of(index + 1))
        layers, loss = sparsify_block(
            self._model, index, self._linears_of(index), self._inputs, self._targets_of(index), self._config, solve
        )
        prefix = f"{self._blocks_name}.{index}."
        self._finish({f"{prefix}{name}": tensor for name, tensor in block.state_dict().items()}, index, layers, loss)
        self._weights.release(block)
        release_freed_memory()
        shown = {}
        if layers:
            shown["layer_error"] = f"{sum(layer.relative_error for layer in layers) / len(layers):.4f}"
        if loss is not None:
            shown["block_loss"] = f"{loss.before:.4f} → {loss.after:.4f}"
        return shown

    def sparsify_outside(self, solve: LayerSolver) -> None:
        """Sparsify what is in no block, after the last of them."""
        finished = self._work is not None and self._work.done > len(self.blocks)
        layers = []
        if self.outside and not finished:
            self._weights.open(self._surroundings)
            layers = sparsify_outside(self._model, self.outside, self._inputs, self._config, solve)
        if finished:
            self._take_finished(len(self.blocks), self.outside)
        if self._config.share_embedding:
            share_embedding(self._model)
        if not finished:
            self._finish(self._outside_tensors(), len(self.blocks), layers, None)
        left = self._model.state_dict()
        self._weights.close(name for name in self._surroundings if name in left)
        self.summary.peak_bytes = memory_bytes()[1]
        if (unreached := self.summary.unreached()) is not None and rank() == 0:
            logger.warning(unreached)

    def _names_of(self, index: int) -> list[str]:
        prefix = f"{self._blocks_name}.{index}."
        return [name for name in self._names if name.startswith(prefix)]

    @property
    def _surroundings(self) -> list[str]:
        return [name for name in self._names if not name.startswith(f"{self._blocks_name}.")]

    def _linears_of(self, index: int) -> dict[str, nn.Module]:
        return {f"{self._blocks_name}.{index}.{name}": m for name, m in linear_layers(self.blocks[index]).items()}

    def _record_inputs(self, windows: Tensor) -> BlockInputs:
        """What blocks are called with; takes what is around them, but no output layer, and a block of each class."""
        model, weights = self._model, self._weights
        output = f"{output_layer_name(model)}."
        needed = [name for name in self._surroundings if not name.startswith(output)]
        weights.check(name for name in self._surroundings if name not in needed)
        kinds = {type(block): index for index, block in reversed(list(enumerate(self.blocks)))}
        needed += [name for index in kinds.values() for name in self._names_of(index)]
        weights.open(needed)
        tuning = self._config.finetune_settings
        batch_size = tuning.batch_size // count() if tuning else None
        inputs = BlockInputs(model, self.blocks, windows, batch_size, self._hidden, weights.device)
        weights.close(needed)
        release_freed_memory()
        if self._dense is not None:
            for hidden in self._hidden:
                self._dense.append(hidden)
        return inputs

    def _targets_of(self, index: int) -> Activations | None:
        """What fine-tuning of a block aims at, which must still be dense: see `block.sparsify_block`."""
        if self._dense is not None:
            dense = self._dense
            dense.replace(lambda batch: self._inputs.run(index, batch, dense[batch]))
            return dense
        if self._targets is not None:
            self._targets.clear()
        return self._targets

    def _finish(
        self,
        tensors: Mapping[str, Tensor | TensorLocation],
        step: int,
        layers: list[LayerSummary],
        loss: BlockLoss | None,
    ) -> None:
        """Report on a block, or on what is in none, and make it durable."""
        self._report(step, layers, loss)
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self.summary.seconds += seconds
        if self._work is not None:
            activations = [self._hidden] if self._dense is None else [self._hidden, self._dense]
            report = {"layers": [asdict(layer) for layer in layers], "loss": None if loss is None else asdict(loss)}
            self._work.commit(tensors, report, activations, seconds)

    def _report(self, step: int, layers: list[LayerSummary], loss: BlockLoss | None) -> None:
        self.summary.layers += layers
        if loss is not None:
            self.summary.block_losses[step] = loss

    def _outside_tensors(self) -> dict[str, Tensor | TensorLocation]:
        """What is stored of what is in no block, tied tensors once."""
        once: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if not name.startswith(f"{self._blocks_name}."):
                once.setdefault(id(tensor), (name, tensor))
        return {name: self._weights.content(name, tensor) for name, tensor in once.values()}

    def _go_on(self, work: WorkFolder) -> None:
        """Take over what an earlier run has finished."""
        assert work.manifest is not None
        saved = work.manifest.activations
        for activations in filter(None, (self._hidden, self._dense)):
            activations.restore(work.path, saved[activations.name])
        for index in range(self.done):
            self._take_finished(index, self._linears_of(index))
            self._weights.release(self.blocks[index])
        self.summary.seconds = work.manifest.seconds

    def _take_finished(self, step: int, linears: dict[str, nn.Module]) -> None:
        """Put the packed layers of an earlier run into the model, with their tensors where the model is in memory."""
        assert self._work is not None and self._work.manifest is not None
        report = self._work.manifest.parts[step].report
        layers = [LayerSummary(**{**layer, "shape": tuple(layer["shape"])}) for layer in report["layers"]]
        self._report(step, layers, None if report["loss"] is None else BlockLoss(**report["loss"]))
        install_empty(self._model, linears, self._config)
        if not self._weights.streamed:
            tensors = self._model.state_dict()
            for name, location in self._work.part(step).items():
                tensors[name].copy_(read_tensor(location))


def resolve_names(config: NMConfig, model: PreTrainedModel) -> NMConfig:
    """The configuration with names of this model: "lm_head" in `exclude` stands for the output layer whatever its name.

    The routers of experts are excluded too: they are small, and decide where every token goes.

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
    if (fused := fused_experts(model)) is not None:
        raise NMError(
            f"{fused} of model type {model.config.model_type!r} holds all its experts in one tensor; they can be "
            "packed where each is a module with linear layers."
        )
    routers = {f"*.{layer_type(name)}": None for name in router_layers(model) if not config.is_excluded(name)}
    config = replace(config, exclude=[*config.exclude, *routers])
    if all(config.is_excluded(name) for name in names):
        raise NMError(f"exclude is {config.exclude!r}, which leaves no linear layer to sparsify.")
    return config


def slow_arithmetic(weights: Weights) -> str | None:
    """What to say where the processor multiplies the weights' type much more slowly than float32."""
    slow = weights.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    dtype = str(weights.model.dtype).removeprefix("torch.")
    if not slow or dtype not in ("float16", "bfloat16"):
        return None
    return (
        f"The model is in {dtype}, which this processor multiplies several times more slowly than float32; load it "
        "with dtype='float32' (--dtype float32) to save that time. What is not packed is then saved as float32."
    )


def _check_tied(model: PreTrainedModel, config: NMConfig) -> None:
    output = output_layer_name(model)
    check_shareable(model, None if output is None else config.layer(output))
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        raise NMError(f"share_embedding is set, but {type(model).__name__} does not tie its output layer; unset it.")
