"""What calibration keeps of each linear layer's inputs, accumulated while a block runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NMError
from ..nn.convert import dense_weight
from ..packing.values import all_finite
from .ranks import count, gather, maximum_, sum_

SAMPLED_TOKENS = 2048  # inputs kept as they are, on which the output error is measured when there is no Gram matrix
SAMPLED_SHARE = 16  # of the inputs at most is sampled, so that measuring costs little beside calibration
SAMPLED_FEW = 256  # of a batch are not too many, however few there are
STATISTICS_BYTES = 1 << 32  # of the layers that one pass over the calibration data goes for, where several may be made
FLOAT32 = 4
ROWS_AT_ONCE = 128
COLUMNS_AT_ONCE = 512


@dataclass
class InputStatistics:
    """Of the inputs `X [tokens, in_features]` of one linear layer, in float32; layers fed by one tensor share them.

    Either the Gram matrix is kept or some of the inputs are.
    """

    tokens: int
    square_sum: Tensor
    absolute_max: Tensor
    gram: Tensor | None
    samples: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, module: nn.Module, with_gram: bool) -> InputStatistics:
        weight = dense_weight(module)
        zeros = torch.zeros(weight.shape[1], device=weight.device)
        gram = torch.zeros(len(zeros), len(zeros), device=weight.device) if with_gram else None
        return cls(0, zeros, zeros.clone(), gram)

    def add(self, inputs: Tensor, sampled: int, generator: torch.Generator) -> None:
        """Add `[..., in_features]`, of which `sampled` randomly chosen rows are kept; `complete` is to follow.

        Below its diagonal blocks the Gram matrix waits for `complete`: half of it is the same as the other half.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(rows):
            return
        self.tokens += len(rows)
        for part in rows.split(ROWS_AT_ONCE):
            self.square_sum += part.square().sum(dim=0)
            self.absolute_max = torch.maximum(self.absolute_max, part.abs().amax(dim=0))
        if self.gram is not None:
            for block in column_blocks(rows.shape[1]):
                self.gram[block, block.start :].addmm_(rows[:, block].t(), rows[:, block.start :])
            return
        most = min(sampled, len(rows), max(SAMPLED_FEW, len(rows) // SAMPLED_SHARE))
        chosen = torch.randint(len(rows), (most,), generator=generator)
        self.samples.append(rows[chosen.to(rows.device)])

    def complete(self) -> InputStatistics:
        """Those of the inputs on all ranks, when all have been added, in place."""
        self.tokens = int(sum_(torch.tensor(self.tokens)))
        sum_(self.square_sum)
        maximum_(self.absolute_max)
        if self.gram is not None:
            sum_(self.gram)
            for block in column_blocks(len(self.gram)):
                self.gram[block.stop :, block] = self.gram[block, block.stop :].t()
        else:
            self.samples = [rows for of_rank in gather(self.samples) for rows in of_rank]
        return self

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂, `[in_features]`."""
        return self.square_sum.sqrt()

    def assume_if_unreached(self) -> None:
        """Where no token came, as to some experts, be the statistics of unit inputs: weights then go by magnitude."""
        if not self.tokens:
            self.square_sum.fill_(1.0)
            if self.gram is not None:
                self.gram.fill_diagonal_(1.0)

    def rescale(self, scale: Tensor) -> None:
        """The statistics of X / scale."""
        self.square_sum /= scale.square()
        self.absolute_max /= scale
        self.samples = [rows / scale for rows in self.samples]
        if self.gram is not None:
            self.gram /= scale.outer(scale)

    def energy(self, weight: Tensor) -> float:
        """tr[W G Wᵀ], from the Gram matrix if there is one, else up to a constant from the sampled rows."""
        if self.gram is not None:
            return _energy(weight, self.gram)
        if not self.samples:
            return weight.square().sum().item()
        return (torch.cat(self.samples) @ weight.t()).square().sum().item()


def _energy(weight: Tensor, gram: Tensor) -> float:
    """tr[W G Wᵀ], every pair of columns taken once."""
    energy = 0.0
    for block in column_blocks(len(gram)):
        product = (weight[:, block] @ gram[block, block.start :]).mul_(weight[:, block.start :])
        size = block.stop - block.start
        energy += product[:, :size].sum().item() + 2 * product[:, size:].sum().item()
    return energy


def column_blocks(width: int) -> list[slice]:
    """Of a symmetric matrix, for what is done to the diagonal blocks and what is right of them."""
    return [slice(begin, min(begin + COLUMNS_AT_ONCE, width)) for begin in range(0, width, COLUMNS_AT_ONCE)]


def statistics_bytes(linears: Mapping[str, nn.Module], with_gram: bool) -> int:
    """Memory of the statistics of linears; those of one module and one width share their inputs."""
    inputs = {(name.rpartition(".")[0], dense_weight(module).shape[1]) for name, module in linears.items()}
    return FLOAT32 * sum(width * (width if with_gram else SAMPLED_TOKENS) for _, width in inputs)


def in_parts(linears: Mapping[str, nn.Module], with_gram: bool) -> list[dict[str, nn.Module]]:
    """Linears in parts whose statistics take STATISTICS_BYTES at most, as those of a hundred experts together do not.

    Those of one module stay together.
    """
    parts: list[dict[str, nn.Module]] = [{}]
    for _, names in groupby(linears, key=lambda name: name.rpartition(".")[0]):
        siblings = {name: linears[name] for name in names}
        if parts[-1] and statistics_bytes({**parts[-1], **siblings}, with_gram) > STATISTICS_BYTES:
            parts.append({})
        parts[-1] |= siblings
    return parts


class _Collected(Exception):
    """Ends a forward pass of which nothing more is needed."""


class StatisticsCollector:
    """Accumulates InputStatistics of linear layers through forward pre-hooks, inside a `with` statement.

    Args:
        linears: {full name: module}.
        with_gram: accumulate Gram matrices, `in_features²` floats each.
        batches: how many batches will follow on this rank, which share SAMPLED_TOKENS with those of the others.
        seed: of the choice of sampled tokens.
    """

    def __init__(self, linears: dict[str, nn.Module], with_gram: bool, batches: int, seed: int) -> None:
        self._linears = linears
        self._with_gram = with_gram
        self._sampled = -(-SAMPLED_TOKENS // (batches * count()))
        self._generator = torch.Generator().manual_seed(seed)
        self._collected: dict[str, InputStatistics] = {}
        self._leaders: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None
        self._calls: Counter[str] = Counter()
        self._may_stop = False
        self._hooks = ExitStack()

    def __enter__(self) -> StatisticsCollector:
        for name, module in self._linears.items():
            self._hooks.enter_context(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._last = None

    @contextmanager
    def inputs_of_one_pass(self) -> Iterator[None]:
        """A forward pass whose outputs nobody needs: it ends once every layer has been given its inputs.

        The first goes to its end, to tell whether each layer is called once.
        """
        self._calls.clear()
        with suppress(_Collected):
            yield
        self._may_stop = self._calls.total() == len(self._linears) == len(self._calls)
        self._calls.clear()

    def _hook(self, name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            add(module, args[0])
            self._calls[name] += 1
            if self._may_stop and len(self._calls) == len(self._linears):
                self._last = None
                raise _Collected

        def add(module: nn.Module, inputs: Tensor) -> None:
            leader = self._last[0] if self._last is not None and self._last[1] is inputs else name
            if self._leaders.setdefault(name, leader) != name:
                return
            if name not in self._collected:
                self._collected[name] = InputStatistics.empty(module, self._with_gram)
            self._collected[name].add(inputs, self._sampled, self._generator)
            self._last = (name, inputs)

        return collect

    def statistics(self) -> dict[str, InputStatistics]:
        """Of the inputs on all ranks, per layer name; the same object for layers that one tensor feeds.

        Raises:
            NMError: the inputs of a layer were not finite.
        """
        leaders = {name: leader for of_rank in gather(self._leaders) for name, leader in of_rank.items()}
        summed: dict[str, InputStatistics] = {}
        result = {}
        for name, module in self._linears.items():
            leader = leaders.get(name, name)
            if leader not in summed:
                own = self._collected.get(leader) or InputStatistics.empty(module, self._with_gram)
                summed[leader] = own.complete()
            result[name] = summed[leader]
            result[name].assume_if_unreached()
            if len(result[name].samples) > 1:
                result[name].samples = [torch.cat(result[name].samples)]
            if not all_finite(result[name].square_sum):
                raise NMError(f"{name} receives activations that are not finite; they must be finite numbers.")
        return result
