"""Finding and loading the shared library that holds the kernels and ONNX Runtime's operator."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from functools import lru_cache
from pathlib import Path

from ..errors import NMError

DISTRIBUTION = "optimum-nm"
LIBRARY_FILE = "liboptimum_nm.so"
ENVIRONMENT_VARIABLE = "OPTIMUM_NM_LIBRARY"

# enum nm_dtype and enum nm_positions of nm_matmul.h
NM_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4}
NM_POSITIONS = {"codes": 0, "bitmap": 1}

NM_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


class NMBuffer(ctypes.Structure):
    """`nm_buffer`."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


class NMWeight(ctypes.Structure):
    """`nm_weight`."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("n", ctypes.c_int32),
        ("m", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("positions_format", ctypes.c_int32),
        ("group_size", ctypes.c_int64),
        ("outlier_k", ctypes.c_int32),
        ("outlier_block", ctypes.c_int32),
        ("outlier_dtype", ctypes.c_int32),
        ("values", NMBuffer),
        ("positions", NMBuffer),
        ("scales", NMBuffer),
        ("outlier_values", NMBuffer),
        ("outlier_positions", NMBuffer),
    )


class NMMatmulArgs(ctypes.Structure):
    """`nm_matmul_args`. `parallel_for` is the address of a C function, or None."""

    _fields_ = (
        ("struct_bytes", ctypes.c_size_t),
        ("weight", ctypes.POINTER(NMWeight)),
        ("a", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("activation_dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("accuracy_level", ctypes.c_int32),
        ("parallel_for", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
    )


class NMOpenMPPool(ctypes.Structure):
    """`nm_openmp_pool`: the address of GOMP_parallel and a number of threads."""

    _fields_ = (("gomp_parallel", ctypes.c_void_p), ("threads", ctypes.c_uint))


def library_path() -> Path:
    """The shared library: `$OPTIMUM_NM_LIBRARY` if set, else the one installed with this package.

    Raises:
        NMError: there is no such file.
    """
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if override:
        path = Path(override)
        if not path.is_file():
            raise NMError(f"{ENVIRONMENT_VARIABLE} is {override!r}, which is no file; it must name {LIBRARY_FILE}.")
        return path.resolve()
    beside = Path(__file__).parents[1] / "lib" / LIBRARY_FILE
    if beside.is_file():
        return beside
    # an editable install leaves the Python files in the checkout and puts the library among the installed packages
    try:
        installed = importlib.metadata.distribution(DISTRIBUTION).locate_file(f"optimum_nm/lib/{LIBRARY_FILE}")
    except importlib.metadata.PackageNotFoundError:
        installed = beside
    path = Path(str(installed))
    if not path.is_file():
        raise NMError(f"{LIBRARY_FILE} is not at {path}; run `pip install .` in the checkout to build it.")
    return path


@lru_cache
def load_library() -> ctypes.CDLL:
    """The library with the C interface of nm_matmul.h declared: nm_weight_check, nm_matmul, nm_isa.

    Raises:
        NMError: the library is missing, or the file is not this library.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
        library.nm_weight_check.argtypes = (ctypes.POINTER(NMWeight), ctypes.c_char_p, ctypes.c_size_t)
        library.nm_weight_check.restype = ctypes.c_int
        library.nm_matmul.argtypes = (ctypes.POINTER(NMMatmulArgs), ctypes.c_char_p, ctypes.c_size_t)
        library.nm_matmul.restype = ctypes.c_int
        library.nm_isa.argtypes = ()
        library.nm_isa.restype = ctypes.c_char_p
        library.nm_openmp_parallel_for.argtypes = (ctypes.c_void_p, NM_TASK, ctypes.c_void_p, ctypes.c_size_t)
        library.nm_openmp_parallel_for.restype = None
    except (OSError, AttributeError) as error:
        raise NMError(f"{path} is not a usable {LIBRARY_FILE} ({error}); rebuild it with `pip install .`.") from None
    return library
