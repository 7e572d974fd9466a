"""What each decoder block is called with, and running blocks one at a time on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import NMError

TOKENS_PER_BATCH = 4096


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

    Attributes:
        hidden: per batch `[batch, length, hidden_size]`, at first the inputs of block 0.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor, batch_size: int | None = None
    ) -> None:
        self.model, self.blocks = model, blocks
        self.batches = windows.split(batch_size or max(1, TOKENS_PER_BATCH // windows.shape[1]))
        self.hidden: list[Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._forms = self._output_forms(windows[:1])
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
        for batch in range(len(self.batches)):
            self.hidden[batch] = self.run(index, batch)
            if not torch.isfinite(self.hidden[batch]).all():
                raise NMError(
                    f"decoder block {index} produces activations that are not finite in {self.hidden[batch].dtype}; "
                    "load the model with dtype='float32'."
                )

    def run_surroundings(self) -> None:
        """One forward pass per batch of what is not a block: embeddings, projections around the blocks, the logits.

        The blocks pass their input on, the last one returns `self.hidden`.
        """
        for batch, hidden in enumerate(self.hidden):
            self.logits(batch, hidden)

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
        with self._idle_blocks([], final=hidden):
            return self.model(input_ids=self.batches[batch].to(self.model.device), use_cache=False).logits

    def _forward(self, token_ids: Tensor) -> None:
        with suppress(_Reached):
            self.model(input_ids=token_ids.to(self.model.device), use_cache=False)

    def _output_forms(self, window: Tensor) -> list[tuple[Any, ...] | None]:
        """What each block returns beside the hidden states: None for a bare tensor, else the rest of the tuple."""
        forms: list[tuple[Any, ...] | None] = []

        def record(block: nn.Module, args: Any, output: Any) -> None:
            forms.append(None if isinstance(output, Tensor) else tuple(output[1:]))
            if block is self.blocks[-1]:
                raise _Reached

        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(block.register_forward_hook(record))
            self._forward(window)
        if len(forms) != len(self.blocks):
            raise NMError(
                f"model type {self.model.config.model_type!r} runs {len(forms)} of its {len(self.blocks)} decoder "
                "blocks; each must run once, in order."
            )
        return forms

    @contextmanager
    def _idle_blocks(self, calls: list[Any], final: Tensor | None = None) -> Iterator[None]:
        """Blocks that only record their arguments in `calls`; the last one ends the pass unless `final` is given."""
        last = len(self.blocks) - 1

        def idle(index: int) -> Any:
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
                form = self._forms[index]
                return hidden if form is None else (hidden, *form)

            return forward

        try:
            for index, block in enumerate(self.blocks):
                block.forward = idle(index)  # type: ignore[method-assign]
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)


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
