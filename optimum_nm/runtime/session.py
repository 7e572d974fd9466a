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
        NMError: `threads` is not a whole number above 0, the library is missing, or ONNX Runtime refuses it.
    """
    import onnxruntime

    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise NMError(f"threads is {threads!r}; it must be a whole number above 0, or None.")
    options = onnxruntime.SessionOptions()
    path = library_path()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's errors have no class in common
        raise NMError(f"ONNX Runtime {onnxruntime.__version__} cannot use {path}: {error}") from None
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
