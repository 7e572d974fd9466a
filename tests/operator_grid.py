"""MatMulNM against a float64 reference over a grid; run as a program, because an instruction set is chosen once."""

import itertools
import json
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto
from operator_models import chain_model, random_packed, reference, relative_error

from optimum_nm import session_options
from optimum_nm.config import POSITION_FORMATS, WEIGHT_DTYPES
from optimum_nm.runtime.library import load_library

PATTERNS = ("1:4", "2:4", "4:8", "7:8", "3:16", "8:16", "16:32", "4:4", "32:32")
OUTLIERS = (None, "4:256", "3:20")
WIDTHS = (1, 7, 40, 96, 300, 512, 1040)
HEIGHTS = (1, 5, 24, 33)
LEADING = (((),), ((1,), (17,), (0,)), ((2, 3), (3, 0), (1, 40)), ((1, 2, 2),))  # by rank
# float32 sums, and one rounding of the output to the type of the activations
TOLERANCE = {TensorProto.FLOAT: 1e-5, TensorProto.FLOAT16: 2.0**-11, TensorProto.BFLOAT16: 2.0**-8}


def as_type(x, activation):
    """float32 numbers rounded as the model's Cast rounds them."""
    if activation == TensorProto.FLOAT16:
        return x.astype(np.float16).astype(np.float32)
    if activation == TensorProto.BFLOAT16:  # numbers of eight bits, which both rounding modes leave alone
        return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return x


def errors():
    """{case: its relative error beside what is allowed}; each dimension of the grid cycles at a pace of its own."""
    generator = np.random.default_rng(0)
    widths, heights, leading = itertools.cycle(WIDTHS), itertools.cycle(HEIGHTS), itertools.cycle(LEADING)
    activations = itertools.cycle(TOLERANCE)
    for dtype, positions, pattern, outliers in itertools.product(WEIGHT_DTYPES, POSITION_FORMATS, PATTERNS, OUTLIERS):
        width, height, activation = next(widths), next(heights), next(activations)
        options = {"pattern": pattern, "outliers": outliers, "dtype": dtype, "positions": positions, "group_size": 32}
        packed = random_packed(height, width, **options)
        bias = None if height == 24 else generator.standard_normal(height).astype(np.float32)
        shapes = next(leading)
        names = [f"d{i}" for i in range(len(shapes[0]))]
        model = chain_model([packed], [bias], activation=activation, leading=names)
        session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1))
        for shape in shapes:
            x = as_type(generator.standard_normal((*shape, width)).astype(np.float32), activation)
            (y,) = session.run(None, {"x": x})
            case = f"{height}x{width} {options} bias={bias is not None} activation={activation} {shape}"
            yield case, relative_error(y, reference([packed], x, [bias])) / (TOLERANCE[activation] + 1e-5)


if __name__ == "__main__":
    found = dict(errors())
    isa = load_library().nm_isa().decode()
    json.dump({"isa": isa, "cases": len(found), "wrong": {k: v for k, v in found.items() if not v <= 1}}, sys.stdout)
