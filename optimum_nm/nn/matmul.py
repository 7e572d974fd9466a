"""`torch.ops.optimum_nm.matmul`: the C kernel as a torch operator that torch.compile, export and autograd know."""

from __future__ import annotations

import ctypes
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LayerConfig
from ..errors import NMError
from ..packing.packed_weight import TENSOR_NAMES, PackedWeight
from ..patterns import NMPattern, OutlierPattern
from ..runtime.library import NM_DTYPES, NM_POSITIONS, NMBuffer, NMMatmulArgs, NMOpenMPPool, NMWeight, load_library

_TENSORS = "Tensor values, Tensor? positions, Tensor? scales, Tensor? outlier_values, Tensor? outlier_positions"
_GEOMETRY = "int in_features, int out_features, int n, int m, str dtype, str positions_format, int group_size"
_OUTLIERS = "int outlier_k, int outlier_block, str outlier_dtype"
_MESSAGE_BYTES = 512

library = torch.library.Library("optimum_nm", "DEF")
library.define(
    f"matmul(Tensor input, {_TENSORS}, Tensor? bias, {_GEOMETRY}, {_OUTLIERS}, int accuracy_level) -> Tensor"
)
library.define(f"unpack({_TENSORS}, {_GEOMETRY}, {_OUTLIERS}) -> Tensor")


def operator_arguments(config: LayerConfig, in_features: int, out_features: int) -> tuple[Any, ...]:
    """The operator's arguments between `bias` and `accuracy_level`."""
    outliers = config.outliers or OutlierPattern(1, 1)
    return (
        in_features,
        out_features,
        config.pattern.n,
        config.pattern.m,
        config.weight_dtype,
        config.positions,
        config.group_size,
        outliers.k if config.outliers else 0,
        outliers.block,
        config.outlier_dtype,
    )


def _unpack(
    values: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    outlier_values: Tensor | None,
    outlier_positions: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """The float32 weight `[out_features, in_features]` on the device of `values`."""
    in_features, out_features, n, m, dtype, positions_format, group_size, k, block, outlier_dtype = geometry
    outliers = OutlierPattern(k, block) if k else None
    config = LayerConfig(NMPattern(n, m), outliers, dtype, group_size, positions_format, outlier_dtype)
    tensors = (values, positions, scales, outlier_values, outlier_positions)
    present = {name: t.cpu() for name, t in zip(TENSOR_NAMES, tensors, strict=True) if t is not None}
    return PackedWeight(in_features, out_features, config, present).unpack().to(values.device)


def _unpack_fake(values: Tensor, *rest: Any) -> Tensor:
    in_features, out_features = rest[4:6]
    return values.new_empty(out_features, in_features, dtype=torch.float32)


def _buffer(tensor: Tensor | None) -> NMBuffer:
    return NMBuffer() if tensor is None else NMBuffer(tensor.data_ptr(), tensor.nbytes)


def _dtype_code(tensor: Tensor) -> int:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise NMError(f"input of the packed layer is {name}; it must be float32, float16 or bfloat16.")
    return NM_DTYPES[name]


def _checked_weight(tensors: tuple[Tensor | None, ...], geometry: tuple[Any, ...]) -> NMWeight:
    """The C description of a weight, checked the first time these very tensors are seen."""
    values = tensors[0]
    assert values is not None
    fingerprint = (geometry, *((t.data_ptr(), t._version) for t in tensors if t is not None))
    known = getattr(values, "_nm_weight", None)
    if known is not None and known[0] == fingerprint:
        return known[1]
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise NMError("a tensor of the packed weight is not contiguous; it must be.")
    in_features, out_features, n, m, dtype, positions, group_size, k, block, outlier_dtype = geometry
    weight = NMWeight(
        in_features,
        out_features,
        n,
        m,
        NM_DTYPES[dtype],
        NM_POSITIONS[positions],
        group_size,
        k,
        block,
        NM_DTYPES[outlier_dtype],
        *map(_buffer, tensors),
    )
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if load_library().nm_weight_check(weight, message, _MESSAGE_BYTES):
        raise NMError(f"packed weight [{out_features}, {in_features}]: {message.value.decode()}")
    values._nm_weight = (fingerprint, weight)  # type: ignore[attr-defined]
    return weight


@lru_cache
def _gomp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch computes with; None where torch uses another."""
    folder = Path(torch.__file__).parent
    candidates = [*sorted((folder / "lib").glob("libgomp*")), *sorted(folder.with_name("torch.libs").glob("libgomp*"))]
    for path in candidates:
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _matmul_cpu(
    input: Tensor,
    values: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    outlier_values: Tensor | None,
    outlier_positions: Tensor | None,
    bias: Tensor | None,
    *geometry_and_accuracy: Any,
) -> Tensor:
    *geometry, accuracy_level = geometry_and_accuracy
    tensors = (values, positions, scales, outlier_values, outlier_positions)
    weight = _checked_weight(tensors, tuple(geometry))
    if input.shape[-1] != weight.in_features:
        raise NMError(f"input has {input.shape[-1]} features; the packed layer takes {weight.in_features}.")
    rows = input.contiguous()
    bias = None if bias is None else bias.contiguous()
    output = input.new_empty(*input.shape[:-1], weight.out_features)
    native, gomp = load_library(), _gomp_parallel()
    pool = NMOpenMPPool(gomp, torch.get_num_threads())
    args = NMMatmulArgs(
        ctypes.sizeof(NMMatmulArgs),
        ctypes.pointer(weight),
        rows.data_ptr(),
        output.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows.numel() // weight.in_features,
        _dtype_code(rows),
        0 if bias is None else _dtype_code(bias),
        accuracy_level,
        ctypes.cast(native.nm_openmp_parallel_for, ctypes.c_void_p) if gomp else None,
        ctypes.cast(ctypes.pointer(pool), ctypes.c_void_p),
    )
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if native.nm_matmul(args, message, _MESSAGE_BYTES):
        raise NMError(message.value.decode())
    return output


@lru_cache
def _warn_once(device: str) -> None:
    warnings.warn(f"Packed layers on {device} are unpacked at every call: there is no kernel for it yet.", stacklevel=3)


def _matmul_elsewhere(input: Tensor, *rest: Any) -> Tensor:
    *tensors, bias = rest[:6]
    _warn_once(input.device.type)
    weight = torch.ops.optimum_nm.unpack(*tensors, *rest[6:-1]).to(input.dtype)
    return torch.nn.functional.linear(input, weight, None if bias is None else bias.to(input.dtype))


def _matmul_fake(input: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], rest[6])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(tensor for tensor in inputs[1:6]))
    ctx.geometry = inputs[7:-1]
    ctx.bias_dtype = None if inputs[6] is None else inputs[6].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.optimum_nm.unpack(*ctx.saved_tensors, *ctx.geometry).to(grad.dtype)
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return (grad @ weight, *(None,) * 5, grad_bias, *(None,) * (len(ctx.geometry) + 1))


library.impl("unpack", _unpack, "CompositeExplicitAutograd")
torch.library.register_fake("optimum_nm::unpack", _unpack_fake, lib=library)
library.impl("matmul", _matmul_cpu, "CPU")
library.impl("matmul", _matmul_elsewhere, "CompositeExplicitAutograd")
torch.library.register_fake("optimum_nm::matmul", _matmul_fake, lib=library)
torch.library.register_autograd("optimum_nm::matmul", _backward, setup_context=_save_for_backward, lib=library)
