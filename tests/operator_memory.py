"""Memory of sessions whose weight lies in a file of its own, beside a session that holds it; a program of its own."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from operator_models import chain_model

from optimum_nm import PackedWeight, session_options
from optimum_nm.config import NMConfig
from optimum_nm.packing.packed_weight import packed_shapes

ROWS, COLUMNS = 8192, 8192  # 64 MiB of float16 values


def anonymous_bytes():
    """Memory of this process that belongs to no file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def weight():
    """A valid weight made without the time that packing takes: every group marks its first half."""
    config = NMConfig(positions="bitmap", exclude=[]).layer("")
    tensors = {
        name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in packed_shapes(COLUMNS, ROWS, config).items()
    }
    tensors["positions"].view(-1, 2).copy_(torch.tensor([0xFF, 0x00], dtype=torch.uint8))
    return PackedWeight(COLUMNS, ROWS, config, tensors)


def load(path, x):
    session = onnxruntime.InferenceSession(str(path), session_options(1))
    return session, session.run(None, {"x": x})[0]


def main(folder):
    packed = weight()
    size = packed.nbytes
    onnx.save(chain_model([packed]), folder / "embedded.onnx")
    onnx.save(chain_model([packed]), folder / "external.onnx", save_as_external_data=True, location="weights")
    del packed
    x = np.ones((1, 1, COLUMNS), np.float32)
    load(folder / "external.onnx", x)  # what the runtime needs but once
    start = anonymous_bytes()
    first, a = load(folder / "external.onnx", x)
    second, b = load(folder / "external.onnx", x)
    two_sessions = anonymous_bytes() - start
    del first, second
    start = anonymous_bytes()
    embedded, c = load(folder / "embedded.onnx", x)
    found = {"weight": size, "two_sessions": two_sessions, "embedded": anonymous_bytes() - start}
    del embedded
    json.dump(found | {"same": bool((a == b).all() and (a == c).all())}, sys.stdout)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
