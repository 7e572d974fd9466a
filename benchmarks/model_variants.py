"""The models that models.py compares: packed ones, and what users of onnxruntime-genai have instead.

All come from one dense folder of float16 weights. `python model_variants.py WORK SHAPE NAME` builds one, in a process
of its own, so that the memory of a build is free for the next. A folder holds model.onnx, which gives the logits after
the last token only, as generation needs them, and every-token.onnx on the same weights, for perplexity.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_nm import NMOptimizer

EVERY_TOKEN = "every-token.onnx"
SMOLLM2 = "smollm2"
SHAPES = {  # random weights: hidden, intermediate, layers, heads, key-value heads, vocabulary
    "0.5b": (1024, 4096, 24, 16, 8, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
}
Build = Callable[[str, Path, Path], None]  # shape, dense folder, folder to make


def dense_model(shape: str, folder: Path) -> None:
    """SmolLM2, or random weights in a given shape, as a Hugging Face folder of float16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    source, file = demo_data().smollm2()
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder, legacy_format=False)
    if shape == SMOLLM2:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float16)
    else:
        hidden, intermediate, layers, heads, key_value_heads, vocabulary = SHAPES[shape]
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            tie_word_embeddings=True,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)


def packed(weight_dtype: str, outliers: str | None = None) -> Build:
    """8:16 in every layer; embedding and output layer are one dense table of the same type, int4 in groups of 32.

    SmolLM2 is sparsified as by the preset "fast", on fewer windows; random weights only need any mask.
    """

    def build(shape: str, dense: Path, folder: Path) -> None:
        from optimum_nm import NMOptimizer

        settings = _FAST if shape == SMOLLM2 else _ANY_MASK
        _optimize(NMOptimizer.from_pretrained(dense), shape, folder, settings, weight_dtype, outliers)

    return build


def stored_as(weight_dtype: str) -> Build:
    """The weights of "8:16 float16", which are not sparsified again, as integers."""

    def build(shape: str, dense: Path, folder: Path) -> None:
        import torch
        from transformers import AutoTokenizer

        from optimum_nm import NMModelForCausalLM, NMOptimizer

        sparse = dense.with_name(folder_name("8:16 float16"))
        model = NMModelForCausalLM.from_pretrained(sparse, dtype=torch.float32).dequantize()
        calibration = {"calibration_samples": 12, "calibration_length": 1024} if shape == SMOLLM2 else {}
        settings = _ANY_MASK | calibration
        optimizer = NMOptimizer(model, AutoTokenizer.from_pretrained(sparse))
        _optimize(optimizer, shape, folder, settings, weight_dtype, None)

    return build


_TABLE_GROUPS = {"int4": {"group_size": 32}}  # of 128 would cost more text than the 1.3 MB are worth
_FAST: dict[str, Any] = {"preset": "fast", "calibration_samples": 12}
_ANY_MASK: dict[str, Any] = {
    "score": "magnitude",
    "equalization": None,
    "variance_correction": None,
    "calibration_samples": 1,
    "calibration_length": 16,
}


def _optimize(
    optimizer: NMOptimizer,
    shape: str,
    folder: Path,
    settings: dict[str, Any],
    weight_dtype: str,
    outliers: str | None,
) -> None:
    """Sparsify, pack, and export for a bare session and for onnxruntime-genai."""
    from optimum_nm import NMConfig
    from optimum_nm.onnx.export import export_checkpoint

    config = NMConfig(
        weight_dtype=weight_dtype,
        outliers=outliers,
        exclude=[],
        overrides={"lm_head": {"pattern": "16:16", "outliers": None, **_TABLE_GROUPS.get(weight_dtype, {})}},
        share_embedding=True,
        **settings,
    )
    text = demo_data().wikipedia_articles()[0] if shape == SMOLLM2 else ["a few words " * 50]
    optimizer.optimize(folder, config, text)
    export_checkpoint(folder).rename(folder / EVERY_TOKEN)
    export_checkpoint(folder, runtime="genai")


def dense_float32(shape: str, dense: Path, folder: Path) -> None:
    """mobius's own graph and weights."""
    import onnx
    import onnx_ir

    from optimum_nm.onnx.fused import dense_fused_graph
    from optimum_nm.onnx.genai import CONFIG_FILE, genai_config

    folder.mkdir()
    for file in dense.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, folder / file.name)
    onnx_ir.save(dense_fused_graph(dense), folder / "model.onnx", external_data="model.onnx.data")
    config = genai_config(folder, onnx.load(folder / "model.onnx", load_external_data=False).graph, library="")
    del config["model"]["decoder"]["session_options"]["custom_ops_library"]
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    _cut_to_last_token(folder)


def dense_blocks(bits: int, block_size: int) -> Build:
    """ONNX Runtime's MatMulNBits in mobius's graph, embedding and output layer one quantized table."""

    def build(shape: str, dense: Path, folder: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        source = dense.with_name(folder_name("float32"))
        model = onnx.load(source / EVERY_TOKEN)
        output_weight = _transpose_output_weight(model.graph)
        quantizer = MatMulNBitsQuantizer(model, bits, block_size, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        _look_up_quantized(quantizer.model.model.graph, output_weight, bits, block_size)
        folder.mkdir()
        quantizer.model.save_model_to_file(str(folder / "model.onnx"), use_external_data_format=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copyfile(file, folder / file.name)
        _cut_to_last_token(folder)

    return build


def _cut_to_last_token(folder: Path) -> None:
    """Packed models compute no logits but the last for onnxruntime-genai; neither shall the others."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    (folder / "model.onnx").rename(folder / EVERY_TOKEN)
    model = onnx.load(folder / EVERY_TOKEN, load_external_data=False)
    place, node = next((i, node) for i, node in enumerate(model.graph.node) if "logits" in node.output)
    bounds = {"last_from": [-1], "last_to": [np.iinfo(np.int64).max], "last_axis": [1]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in bounds.items())
    model.graph.node.insert(place, helper.make_node("Slice", [node.input[0], *bounds], ["last_hidden"]))
    node.input[0] = "last_hidden"
    logits = next(output for output in model.graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, folder / "model.onnx")


def _transpose_output_weight(graph: Any) -> str:
    """The quantizer knows matrices only, not the Transpose by which the output layer shares the embedding."""
    from onnx import numpy_helper

    node = next(node for node in graph.node if node.op_type == "Transpose")
    table = next(tensor for tensor in graph.initializer if tensor.name == node.input[0])
    graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(table).T.copy(), node.output[0]))
    graph.node.remove(node)
    return node.output[0]


def _look_up_quantized(graph: Any, output_weight: str, bits: int, block_size: int) -> None:
    """Let the input embedding read the quantized output layer."""
    import numpy as np
    from onnx import helper, numpy_helper

    gather = next(node for node in graph.node if node.op_type == "Gather" and "input_ids" in node.input)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    table = tensors[f"{output_weight}_Q{bits}"]
    rows = [table.dims[0], table.dims[1] * table.dims[2]]
    graph.initializer.append(numpy_helper.from_array(np.array(rows), "embedding_rows"))
    shaped = helper.make_node("Reshape", [table.name, "embedding_rows"], ["embedding_packed"])
    look_up = helper.make_node(
        "GatherBlockQuantized",
        ["embedding_packed", "input_ids", f"{output_weight}_scales"],
        ["embedding_padded"],
        domain="com.microsoft",
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    dense_table = tensors[gather.input[0]]
    bounds = {"embedding_from": [0], "embedding_to": [dense_table.dims[1]], "embedding_axis": [2]}
    graph.initializer.extend([numpy_helper.from_array(np.array(value), name) for name, value in bounds.items()])
    cut = helper.make_node("Slice", ["embedding_padded", *bounds], [gather.output[0]])
    graph.initializer.remove(dense_table)
    graph.node.remove(gather)
    for node in (cut, look_up, shaped):
        graph.node.insert(0, node)


VARIANTS: dict[str, Build] = {
    "float32": dense_float32,
    "int8 block 32": dense_blocks(8, 32),
    "int8 block 128": dense_blocks(8, 128),
    "int4 block 32": dense_blocks(4, 32),
    "int4 block 128": dense_blocks(4, 128),
    "8:16 float16": packed("float16"),
    "8:16 int8": stored_as("int8"),
    "8:16 int4": stored_as("int4"),
    "8:16 + 16:256 int8": packed("int8", "16:256"),
    "8:16 + 16:256 int4": packed("int4", "16:256"),
}


def folder_name(name: str) -> str:
    return name.replace(" + ", "-").replace(" ", "-").replace(":", "x")


def build_models(work: Path, shape: str, names: list[str]) -> dict[str, Path]:
    """The folder of each model, each built in a process of its own unless it is there.

    Others are made from "dense", "float32" and "8:16 float16".
    """
    for name in dict.fromkeys(["dense", "float32", "8:16 float16", *names]):
        if not (work / shape / folder_name(name)).is_dir():
            print(f"{shape}: building {name}", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, __file__, str(work), shape, name], check=True)
    return {name: work / shape / folder_name(name) for name in names}


def build_one(work: Path, shape: str, name: str) -> None:
    """Build in a folder of another name first: what has its own name is whole."""
    folder, dense = work / shape / folder_name(name), work / shape / "dense"
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if name == "dense":
        dense_model(shape, unfinished)
    else:
        VARIANTS[name](shape, dense, unfinished)
    unfinished.rename(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    seconds = time.perf_counter() - start
    print(f"{shape}: built {name} in {seconds:.0f} s and {max(peak, children) / 1e9:.1f} GB", file=sys.stderr)


def held_out_articles() -> list[str]:
    return demo_data().wikipedia_articles()[1]


def demo_data() -> Any:
    """The module of the examples that has the model and the text."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import demo_data as module

    return module


if __name__ == "__main__":
    build_one(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
