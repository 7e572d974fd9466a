"""The quantization method "nm" of transformers: how `from_pretrained` builds and checks a packed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import QUANT_METHOD, NMConfig
from ..packing.checkpoint import PackedCheckpoint
from .convert import dense_weight, linear_layers, replace_linear, set_dense_weight, tie_output
from .embedding import NMEmbedding, check_shareable, share_embedding
from .experts import SplitExperts, split_experts
from .linear import NMLinear


class NMQuantizationConfig(QuantizationConfigMixin):
    """NMConfig as transformers wants it: made from, and turned into, the `quantization_config` of config.json."""

    def __init__(self, **settings: Any) -> None:
        self.nm_config = NMConfig.from_dict(settings)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.nm_config.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.nm_config})"


class NMQuantizer(HfQuantizer):
    """Puts an empty NMLinear in the place of every packed linear; transformers then loads its buffers as any others."""

    requires_calibration = True  # only checkpoints that are packed already can be loaded; NMOptimizer makes them
    requires_parameters_quantization = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        assert isinstance(self.quantization_config, NMQuantizationConfig)
        config = self.quantization_config.nm_config
        split_experts(model)
        linears = linear_layers(model)
        self.modules_to_not_convert = [name for name in linears if config.is_excluded(name)]
        # transformers only warns of a missing tensor and leaves the layer random
        checkpoint = PackedCheckpoint(_model_folder(model))
        for name, module in linears.items():
            layer = config.layer(name)
            if layer is not None:
                weight, bias = dense_weight(module), getattr(module, "bias", None)
                out_features, in_features = weight.shape
                checkpoint.features[name] = (in_features, out_features)
                checkpoint.check_layer(name)
                linear = NMLinear(in_features, out_features, bias is not None, layer, weight.dtype, weight.device)
                replace_linear(model, name, linear.requires_grad_(False))
                # some architectures initialise a child's dense weight from its parent, and there is none
                model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]

        if config.share_embedding:
            output = model.get_output_embeddings()
            check_shareable(model, output.config if isinstance(output, NMLinear) else None)
            share_embedding(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, NMLinear):
                module.packed.validate(name)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """What transformers 5 changes of the names in files, and the tensors: nothing, where experts are split."""
        split = any(isinstance(module, SplitExperts) for module in model.modules())
        return [] if split else weight_conversions

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are: a packed layer passes gradients to its input."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @torch.no_grad()
    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Put back layers of the classes the architecture has (GPT-2's are Conv1D), holding the unpacked weights."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype  # 5.x gives a name
        with torch.device("meta"):
            skeleton = type(model)(model.config)
        split_experts(skeleton)
        shares_embedding = isinstance(model.get_input_embeddings(), NMEmbedding)
        for name, module in list(model.named_modules()):
            if isinstance(module, NMEmbedding):
                replace_linear(model, name, _dense_embedding(module, dtype))
            elif isinstance(module, NMLinear):
                replace_linear(model, name, _dense_layer(module, skeleton.get_submodule(name), dtype))
        if shares_embedding:
            tie_output(model)
        return model


def _dense_layer(packed: NMLinear, skeleton: nn.Module, dtype: torch.dtype) -> nn.Module:
    assert isinstance(packed.values, torch.Tensor)
    device = packed.values.device
    dense = skeleton.to_empty(device=device).to(dtype)
    set_dense_weight(dense, packed.packed.unpack().to(device))
    if packed.bias is not None:
        assert isinstance(dense.bias, torch.Tensor)
        dense.bias.copy_(packed.bias)
    return dense


def _dense_embedding(packed: NMEmbedding, dtype: torch.dtype) -> nn.Embedding:
    return nn.Embedding.from_pretrained(packed.output_layer.packed.unpack().to(dtype))


def _model_folder(model: PreTrainedModel) -> Path:
    """The folder, local or in the Hub's cache, that the model is being loaded from."""
    name = str(model.config.name_or_path)
    if Path(name).is_dir():
        return Path(name)
    revision = getattr(model.config, "_commit_hash", None)
    return Path(str(cached_file(name, "config.json", revision=revision, local_files_only=True))).parent


def register() -> None:
    """Make the method known to transformers."""
    register_quantization_config(QUANT_METHOD)(NMQuantizationConfig)
    register_quantizer(QUANT_METHOD)(NMQuantizer)
