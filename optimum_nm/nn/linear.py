"""NMLinear: a linear layer whose weight stays packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import LayerConfig
from ..packing.packed_weight import TENSOR_NAMES, PackedWeight, packed_shapes
from .matmul import operator_arguments


class NMLinear(nn.Module):
    """`Y = X Wᵀ + bias` with W in the packed format, multiplied as it is on the CPU and unpacked per call elsewhere.

    The packed tensors are buffers named as in docs/format.md, integers to every cast. The weight takes no gradient; the
    input and the bias do.

    Args:
        in_features, out_features: of the weight.
        bias: whether there is one.
        config: how the weight is stored.
        dtype: of the bias; torch's default if None.
        device: where to allocate.

    Attributes:
        accuracy_level: 0 keeps activations float32; 4 lets the kernel round them to int8 per row and block where the
            stored values are integers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: LayerConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self.accuracy_level = 0
        shapes = packed_shapes(in_features, out_features, config)
        for name in TENSOR_NAMES:
            shape, kind = shapes.get(name, (None, None))
            self.register_buffer(name, None if shape is None else torch.zeros(shape, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: Tensor | None = None) -> NMLinear:
        """A layer that holds `packed`'s own tensors and a copy of the bias `[out_features]`."""
        packed.validate()
        dtype = None if bias is None else bias.dtype
        linear = cls(packed.in_features, packed.out_features, bias is not None, packed.config, dtype, device="meta")
        for name, tensor in packed.tensors.items():
            setattr(linear, name, tensor)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear

    @property
    def packed(self) -> PackedWeight:
        """The weight, its tensors on the CPU."""
        tensors = {name: getattr(self, name) for name in TENSOR_NAMES if getattr(self, name) is not None}
        cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return PackedWeight(self.in_features, self.out_features, self.config, cpu)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, both float32, float16 or bfloat16."""
        return torch.ops.optimum_nm.matmul(
            input,
            self.values,
            self.positions,
            self.scales,
            self.outlier_values,
            self.outlier_positions,
            self.bias,
            *operator_arguments(self.config, self.in_features, self.out_features),
            self.accuracy_level,
        )

    def extra_repr(self) -> str:
        layer = self.config
        outliers = f", outliers={layer.outliers}" if layer.outliers else ""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, pattern={layer.pattern}{outliers}, weight_dtype={layer.weight_dtype}"
