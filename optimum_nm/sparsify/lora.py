"""LoRA adapters of PEFT that change no weight that is zero, so that a sparse model keeps its pattern."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..errors import NMError


def mask_lora(model: nn.Module) -> int:
    """Let the LoRA adapters of a PEFT model change only what is not zero in their layers, in training and when merged.

    A sparse linear layer then computes `x Wᵀ + scaling · dropout(x) ((B A) ⊙ (W ≠ 0))ᵀ`, and merging adds the same
    product: `merge_and_unload()` gives a model with all the zeros it had. Adapters trained without it lose what they
    have at zeros; those that are added later are not masked.

    Args:
        model: of `peft.get_peft_model` or `PeftModel.from_pretrained`; any other is left alone.

    Returns:
        How many layers have a masked adapter.

    Raises:
        NMError: an adapter is a variant of LoRA, as DoRA is, that changes the weight in another way.
    """
    masked = 0
    for name, layer in lora_layers(model).items():
        if not (layer.get_base_layer().weight == 0).any():
            continue
        for adapter in layer.lora_A:
            variant = layer.lora_variant.get(adapter)
            if variant is not None and not isinstance(variant, _masked_lora()):
                kind = type(variant).__name__
                raise NMError(f"{name} has a {kind} adapter; plain LoRA is needed to keep the zeros of its weight.")
            layer.lora_variant[adapter] = _masked_lora()()
        masked += 1
    return masked


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers with LoRA adapters, by name."""
    if "peft" not in sys.modules:  # then no model can have any
        return {}
    from peft.tuners.lora import Linear

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


@cache
def _masked_lora() -> Any:
    """The class, made when PEFT, which need not be installed, is."""
    from peft.tuners.lora.layer import LoraVariant

    class MaskedLora(LoraVariant):
        """What PEFT asks instead of its own formulas for an adapter of a layer, `module`."""

        def supports_lora_conversion(self) -> bool:
            return False

        @staticmethod
        def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            return orig_weight + _masked_delta(module, active_adapter).to(orig_weight.dtype)

        @staticmethod
        def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
            orig_weight.data += _masked_delta(module, active_adapter).to(orig_weight.dtype)

        @staticmethod
        def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            return orig_weight - _masked_delta(module, active_adapter).to(orig_weight.dtype)

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
            delta = _masked_delta(module, active_adapter)
            if module.fan_in_fan_out:  # the weight of a Conv1D is [in_features, out_features]
                delta = delta.T
            bias = module.lora_B[active_adapter].bias
            bias = None if bias is None else bias * module.scaling[active_adapter]
            return result + functional.linear(module.lora_dropout[active_adapter](x), delta, bias)

    return MaskedLora


def _masked_delta(module: Any, adapter: str) -> Tensor:
    return module.get_delta_weight(adapter) * (module.get_base_layer().weight != 0)
