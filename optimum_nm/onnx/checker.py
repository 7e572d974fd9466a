"""onnx's checker, for files with operators that the `onnx` package does not know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import defs

from .operator import operator_schemas

# ONNX Runtime has these in ONNX's own domain, though ONNX has them not, or only since a later version; its graph
# optimizer and the model builder of onnxruntime-genai write them. Inputs and outputs; "?" marks optional ones.
_RUNTIME_NORMS = {
    "SimplifiedLayerNormalization": (("X", "scale"), ("Y", "InvStdDev?")),
    "LayerNormalization": (("X", "scale", "B?"), ("Y", "Mean?", "InvStdDev?")),
}


def check_file(path: Path, check_custom_domain: bool = False) -> None:
    """As `onnx.checker.check_model` on a path, which may use the operators of this package and of ONNX Runtime.

    Raises:
        onnx.checker.ValidationError: the file is no valid model.
    """
    with _schemas():
        onnx.checker.check_model(str(path), check_custom_domain=check_custom_domain)


@contextmanager
def _schemas() -> Iterator[None]:
    """Schemas that the `onnx` package has only meanwhile.

    With them `import onnx.reference`, and so torch's exporter, would fail: it asks for operator names that are unique
    over all domains, and ONNX has a SwiGLU of its own.
    """
    wanted = [*operator_schemas(), *(_norm_schema(name) for name in _RUNTIME_NORMS)]
    schemas = [schema for schema in wanted if not defs.has(schema.name, schema.since_version, schema.domain)]
    for schema in schemas:
        defs.register_schema(schema)
    try:
        yield
    finally:
        for schema in schemas:
            defs.deregister_schema(schema.name, schema.since_version, schema.domain)


def _norm_schema(name: str) -> defs.OpSchema:
    inputs, outputs = _RUNTIME_NORMS[name]
    types = defs.OpSchema.AttrType
    attributes = {"axis": types.INT, "epsilon": types.FLOAT, "stash_type": types.INT}
    floats = ["tensor(float16)", "tensor(float)", "tensor(double)", "tensor(bfloat16)"]
    return defs.OpSchema(
        name,
        "",
        1,
        "As ONNX Runtime has it.",
        inputs=[_parameter(text) for text in inputs],
        outputs=[_parameter(text) for text in outputs],
        type_constraints=[("T", floats, "floats")],
        attributes=[defs.OpSchema.Attribute(name, kind, name, required=False) for name, kind in attributes.items()],
    )


def _parameter(text: str) -> defs.OpSchema.FormalParameter:
    name = text.removesuffix("?")
    options = defs.OpSchema.FormalParameterOption
    option = options.Single if name == text else options.Optional
    return defs.OpSchema.FormalParameter(name, "T", name, param_option=option)
