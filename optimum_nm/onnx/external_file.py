"""The file beside an ONNX file that holds its initializers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

ALIGNMENT = 64  # of each tensor: a cache line
LARGEST_EMBEDDED = 1024  # bytes; smaller tensors are in the ONNX file, where shape inference can read them


class ExternalFile:
    """External data in the making, from `external_file`."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self._stream = stream

    def append(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        """Write the bytes of a tensor, and tell where they lie."""
        self._stream.write(b"\0" * (-self._stream.tell() % ALIGNMENT))
        offset = self._stream.tell()
        tensor.tofile(self._stream)  # type: ignore[attr-defined]  # all have it, the protocol does not say so
        return ir.ExternalTensor(
            self.path.name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=self.path.parent,
        )

    def move_initializers(self, model: ir.Model) -> None:
        """Append all initializers of a model that are not here yet; small ones become part of the ONNX file."""
        for graph in model.graphs():
            for name, value in graph.initializers.items():
                tensor = value.const_value
                if tensor is None or tensor.dtype == ir.DataType.STRING:
                    continue
                path = Path(tensor.path) if isinstance(tensor, ir.ExternalTensor) else None
                if path == self.path:
                    continue
                if tensor.nbytes > LARGEST_EMBEDDED:
                    value.const_value = self.append(tensor, name)
                elif path is not None:
                    (value.const_value,) = ir.external_data.convert_tensors_from_external([tensor])


@contextmanager
def external_file(path: Path) -> Iterator[ExternalFile]:
    """A new file, which is to be in the folder of the ONNX file; open as long as the `with` lasts."""
    with path.open("wb") as stream:
        yield ExternalFile(path, stream)
