"""Fine-tuning a sparse model without losing its pattern."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import NMError
from ..nn.convert import dense_weight, linear_layers
from ..nn.experts import fused_experts
from .lora import lora_layers, mask_lora


class KeepMaskCallback(TrainerCallback):
    """Keeps at zero, after every step of a `transformers.Trainer`, what was zero in the linear layers when it began.

    For a sparse model with dense tensors, as `model.dequantize()` gives it:
    `Trainer(model, …, callbacks=[KeepMaskCallback()])`. LoRA adapters of PEFT are masked by `mask_lora`, so that
    `merge_and_unload()` keeps the zeros too.

    Raises:
        NMError: when training begins, no linear layer that is trained has a zero, or experts that are trained are no
            linear layers; or as `mask_lora`.
    """

    def __init__(self) -> None:
        self._pruned: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        fused = fused_experts(model)
        if fused is not None and any(p.requires_grad for p in model.get_submodule(fused).parameters()):
            raise NMError(
                f"{fused} holds all its experts in one tensor, whose zeros KeepMaskCallback does not keep; train the "
                "model that dequantize() gives."
            )
        lora = lora_layers(model).values()
        adapters = {matrix for layer in lora for matrix in (*layer.lora_A.values(), *layer.lora_B.values())}
        weights = [dense_weight(module) for module in linear_layers(model).values() if module not in adapters]
        self._pruned = [(weight, weight == 0) for weight in weights if weight.requires_grad and (weight == 0).any()]
        if not mask_lora(model) and not self._pruned:
            raise NMError(
                f"{type(model).__name__} has no zeros in linear layers that are trained; KeepMaskCallback needs a "
                "sparse model, as model.dequantize() gives it."
            )

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for weight, pruned in self._pruned:
            weight.masked_fill_(pruned, 0.0)
