"""ONNX Runtime session options that know the operators of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import NMError
from .library import library_path

if TYPE_CHECKING:
    import onnxruntime


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """New `onnxruntime.SessionOptions` with MatMulNM registered, for an InferenceSession or an ORTModel.

    Args:
        threads: threads inside one operator; None leaves the choice to ONNX Runtime (all physical cores).

    Raises:
        NMError: `threads` is not a whole number above 0, or the library is missing.
    """
    import onnxruntime

    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise NMError(f"threads is {threads!r}; it must be a whole number above 0, or None.")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
