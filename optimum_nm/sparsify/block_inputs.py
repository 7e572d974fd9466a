"""What each decoder block is called with, and running blocks one at a time on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import NMError
from ..packing.values import all_finite
from .activations import Activations

FORM_TOKENS = 16  # tell in which form a block returns its output
TOKENS_PER_BATCH = 2048  # products are as fast with these as with more, whose intermediate results take more memory


class _Reached(Exception):
    """Ends a forward pass at the last decoder block, so that no logits are computed."""


class BlockInputs:
    """The hidden states between decoder blocks, one tensor a batch, with every other argument that each block takes.

    Position embeddings, masks and the like are recorded per block (some architectures alternate between masks) from a
    forward pass in which the blocks themselves do nothing; equal tensors are kept once.

    Args:
        model: in eval mode; its blocks may still change afterwards.
        blocks: as `decoder_blocks` finds them.
        windows: token ids, int64 `[samples, length]`, on the CPU.
        batch_size: windows per batch; by default as many as make TOKENS_PER_BATCH.
        hidden: empty; keeps the hidden states.
        device: to compute on; the model's by default.

    Attributes:
        hidden: per batch `[batch, length, hidden_size]`, at first the inputs of block 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        windows: Tensor,
        batch_size: int | None = None,
        hidden: Activations | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.blocks = model, blocks
        self.batches = windows.split(batch_size or max(1, TOKENS_PER_BATCH // windows.shape[1]))
        self.hidden = Activations() if hidden is None else hidden
        self._device = model.device if device is None else device
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._forms = self._output_forms(windows[:1, :FORM_TOKENS])
        known: list[Tensor] = []
        for batch in self.batches:
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            with self._idle_blocks(calls):
                self._forward(batch)
            self._calls.append(_share(calls, known))

    def run(
        self, index: int, batch: int, hidden: Tensor | None = None, parameters: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Output of block `index` for one batch, `[batch, length, hidden_size]`.

        Args:
            hidden: the block's input; `self.hidden[batch]` by default.
            parameters: by name inside the block, to be used in place of its own.
        """
        args, kwargs = self._calls[batch][index]
        hidden = self.hidden[batch] if hidden is None else hidden
        if "hidden_states" in kwargs:
            kwargs = kwargs | {"hidden_states": hidden}
        else:
            args = (hidden, *args)
        return _hidden_states(torch.func.functional_call(self.blocks[index], parameters or {}, args, kwargs))

    def advance(self, index: int) -> None:
        """Replace the hidden states by the output of block `index`.

        Raises:
            NMError: an output is not finite.
        """

        def output(batch: int) -> Tensor:
            hidden = self.run(index, batch)
            if not all_finite(hidden):
                raise NMError(
                    f"decoder block {index} produces activations that are not finite in {hidden.dtype}; "
                    "load the model with dtype='float32'."
                )
            return hidden

        self.hidden.replace(output)

    def run_surroundings(self) -> None:
        """One forward pass per batch of what is not a block: embeddings, projections around the blocks, the logits.

        The blocks pass their input on, the last one returns `self.hidden`.
        """
        for batch, hidden in enumerate(self.hidden):
            self._output(batch, hidden)

    def entry(self, batch: int) -> Tensor:
        """The input of block 0 for one batch, computed anew by what precedes it, with its graph."""
        reached: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            reached.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            raise _Reached

        self.blocks[0].forward = stop  # type: ignore[method-assign, assignment]
        try:
            self._forward(self.batches[batch])
        finally:
            vars(self.blocks[0]).pop("forward", None)
        return reached[0]

    def logits(self, batch: int, hidden: Tensor) -> Tensor:
        """The model's output for one batch, `[batch, length, vocabulary]`, if the last block's is `hidden`."""
        return self._output(batch, hidden).logits

    def _output(self, batch: int, hidden: Tensor) -> Any:
        with self._idle_blocks([], final=hidden):
            return self.model(input_ids=self.batches[batch].to(self._device), use_cache=False)

    def _forward(self, token_ids: Tensor) -> None:
        with suppress(_Reached):
            self.model(input_ids=token_ids.to(self._device), use_cache=False)

    def _output_forms(self, window: Tensor) -> list[tuple[Any, ...] | None]:
        """What each block returns beside the hidden states: None for a bare tensor, else the rest of the tuple.

        Only the first block of each class is run to find out; the weights of no other are needed.
        """
        forms: dict[type[nn.Module], tuple[Any, ...] | None] = {}
        run: list[int] = []

        def forward(index: int, block: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
            def replacement(*args: Any, **kwargs: Any) -> Any:
                run.append(index)
                if type(block) not in forms:
                    output = compute(*args, **kwargs)
                    forms[type(block)] = None if isinstance(output, Tensor) else tuple(output[1:])
                if index == len(self.blocks) - 1:
                    raise _Reached
                return _as_output(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], forms[type(block)])

            return replacement

        with self._replaced_forwards(forward):
            self._forward(window)
        if run != list(range(len(self.blocks))):
            raise NMError(
                f"model type {self.model.config.model_type!r} runs {len(run)} of its {len(self.blocks)} decoder "
                "blocks; each must run once, in order."
            )
        return [forms[type(block)] for block in self.blocks]

    def _idle_blocks(self, calls: list[Any], final: Tensor | None = None) -> AbstractContextManager[None]:
        """Blocks that only record their arguments in `calls`; the last one ends the pass unless `final` is given."""
        last = len(self.blocks) - 1

        def idle(index: int, block: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                if final is None:
                    if index == 0:
                        self.hidden.append(hidden.detach().clone())
                    placeholder = {"hidden_states": None} if "hidden_states" in kwargs else {}
                    calls.append((args if placeholder else args[1:], kwargs | placeholder))
                    if index == last:
                        raise _Reached
                elif index == last:
                    hidden = final
                return _as_output(hidden, self._forms[index])

            return forward

        return self._replaced_forwards(idle)

    @contextmanager
    def _replaced_forwards(self, replace: Callable[[int, nn.Module, Callable[..., Any]], Any]) -> Iterator[None]:
        """Blocks whose forward is `replace(index, block, its own forward)`."""
        try:
            for index, block in enumerate(self.blocks):
                block.forward = replace(index, block, block.forward)  # type: ignore[method-assign]
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)


def _as_output(hidden: Tensor, form: tuple[Any, ...] | None) -> Any:
    return hidden if form is None else (hidden, *form)


def _hidden_states(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _share(value: Any, known: list[Tensor]) -> Any:
    """`value` with every tensor that equals one in `known` replaced by it; new ones are added."""
    if isinstance(value, Tensor):
        for tensor in known:
            if tensor is value or (
                tensor.shape == value.shape and tensor.dtype == value.dtype and torch.equal(tensor, value)
            ):
                return tensor
        known.append(value)
        return value
    if type(value) in (tuple, list):
        return type(value)(_share(item, known) for item in value)
    if type(value) is dict:
        return {key: _share(item, known) for key, item in value.items()}
    return value
