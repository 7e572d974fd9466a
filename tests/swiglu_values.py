"""SwiGLU of many widths and sizes on one instruction set; prints the largest relative error as JSON."""

import json

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from optimum_nm import session_options
from optimum_nm.onnx.operator import DOMAIN, SWIGLU, VERSION
from optimum_nm.runtime.library import load_library


def swiglu_model(functions=(), opset=18):
    """X [rows, tokens, 2·width] → Y [rows, tokens, width]."""
    node = helper.make_node(SWIGLU, ["X"], ["Y"], name="gate", domain=DOMAIN)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "tokens", name]) for name in "XY")
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph([node], "one", [x], [y])
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=8)


def reference(x):
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def main():
    session = onnxruntime.InferenceSession(swiglu_model().SerializeToString(), session_options(2))
    generator = np.random.default_rng(0)
    largest = 0.0
    for scale in (1e-3, 1, 30):
        for shape in [(1, 1, width) for width in range(1, 40)] + [(2, 0, 5), (3, 70, 129), (1, 33, 1536)]:
            x = (generator.standard_normal((*shape[:-1], 2 * shape[-1])) * scale).astype(np.float32)
            (y,) = session.run(None, {"X": x})
            expected = reference(x)
            assert y.shape == shape == expected.shape
            error = np.abs(y - expected) / (np.abs(expected) + 1e-25)  # below 1e-37 gates are taken for closed
            largest = max(largest, float(error.max(initial=0)))
    return {"isa": load_library().nm_isa().decode(), "error": largest}


if __name__ == "__main__":
    print(json.dumps(main()))
