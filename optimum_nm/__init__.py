"""N:M sparse language models with structured outliers: sparsify, pack, export to ONNX, run in ONNX Runtime.

Importing this package teaches transformers the quantization method "nm", so that `AutoModelForCausalLM` loads packed
checkpoints. Everything heavy is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from .config import NMConfig as NMConfig
    from .nn.linear import NMLinear as NMLinear
    from .nn.modeling import NMModel as NMModel
    from .nn.modeling import NMModelForCausalLM as NMModelForCausalLM
    from .optimizer import NMOptimizer as NMOptimizer
    from .packing.packed_weight import PackedWeight as PackedWeight
    from .patterns import NMPattern as NMPattern
    from .runtime.library import library_path as library_path
    from .runtime.session import session_options as session_options

__version__ = "0.1.0"

_HOME = {
    "NMConfig": "config",
    "NMPattern": "patterns",
    "NMOptimizer": "optimizer",
    "PackedWeight": "packing.packed_weight",
    "NMLinear": "nn.linear",
    "NMModel": "nn.modeling",
    "NMModelForCausalLM": "nn.modeling",
    "session_options": "runtime.session",
    "library_path": "runtime.library",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


@wrapt.when_imported("transformers.modeling_utils")
def _register_quantizer(_: Any) -> None:
    """transformers has no entry-point discovery: without this it returns randomly initialised linears."""
    from .nn.quantizer import register

    register()
