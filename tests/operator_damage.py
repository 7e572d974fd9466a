"""Sessions of damaged MatMulNM models, as a program of its own: a crash would be its exit status."""

import json
import random
import sys

import numpy as np
import onnxruntime
from onnx import helper
from operator_models import chain_model, random_packed

from optimum_nm import session_options

KINDS = [
    {"pattern": "8:16", "outliers": "3:20", "dtype": "int4", "group_size": 16},
    {"pattern": "2:4", "dtype": "float16", "positions": "bitmap"},
    {"pattern": "16:32", "outliers": "4:256", "dtype": "bfloat16", "outlier_dtype": "float32"},
    {"pattern": "16:16", "dtype": "int8", "group_size": 32, "outliers": "1:7"},
]
NUMBERS = [-(2**63), -(2**31), -2, -1, 0, 1, 3, 4, 7, 8, 16, 17, 32, 40, 255, 256, 257, 2**31 - 1, 2**31, 2**62]
WORDS = ["", "codes", "bitmap", "float32", "float16", "bfloat16", "int8", "int4", "x" * 1000, "\0"]
ATTEMPTS = 500


def damage_attribute(node, generator):
    attribute = generator.choice(node.attribute)
    kept = WORDS if generator.random() < 0.5 else NUMBERS
    attribute.CopyFrom(helper.make_attribute(attribute.name, generator.choice(kept)))


def damage_bytes(tensor, generator):
    raw = bytearray(tensor.raw_data)
    for _ in range(generator.randint(1, 4) if raw else 0):
        raw[generator.randrange(len(raw))] = generator.randrange(256)
    tensor.raw_data = bytes(raw)


def damage_shape(tensor, generator):
    """Fewer or more columns or rows, the bytes at random."""
    dims = [max(0, size + generator.choice([-1, 0, 0, 1, 8])) for size in tensor.dims]
    if generator.random() < 0.2:
        dims = [int(np.prod(dims))]
    width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    del tensor.dims[:]
    tensor.dims.extend(dims)
    tensor.raw_data = generator.randbytes(width * int(np.prod(dims)))


def main():
    generator = random.Random(0)
    options = session_options(1)
    options.log_severity_level = 4  # not a line for each
    found = {"taken": 0, "refused": 0, "strange": []}
    for _ in range(ATTEMPTS):
        model = chain_model([random_packed(9, 70, **generator.choice(KINDS))], [np.ones(9)])
        tensors = [tensor for tensor in model.graph.initializer if tensor.raw_data]
        for _ in range(generator.randint(1, 2)):
            kind = generator.random()
            if kind < 0.3:
                damage_attribute(model.graph.node[1], generator)
            elif kind < 0.8:
                damage_bytes(generator.choice(tensors), generator)
            else:
                damage_shape(generator.choice(tensors), generator)
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), options)
            for rows in (1, 40):
                session.run(None, {"x": np.ones((1, rows, 70), np.float32)})
            found["taken"] += 1
        except Exception as error:
            found["refused"] += 1
            if "MatMulNM node '/layer0/MatMul': " not in str(error):
                found["strange"].append(str(error))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
