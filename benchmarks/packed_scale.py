"""What is done with a packed model of Llama's sizes: time and memory of exporting, checking, evaluating, opening it.

    python benchmarks/packed_scale.py --shape 8b --work /tmp/packed-scale

The checkpoint (8:16, int4, groups of 128; embedding and output layer bfloat16) has random weights and is written into
several files, once. Every step is a process of its own, which takes it on a small checkpoint before. Memory is what it
then takes on top: at most, and at its end without the pages of mapped files, which the system can take back at any
time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from scale import SHAPES, llama_config, save_byte_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from optimum_nm import NMConfig, session_options
from optimum_nm.evaluate.inspect import inspect_checkpoint
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.evaluate.perplexity import evaluate_onnx, evaluate_torch
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.memory import memory_bytes
from optimum_nm.nn.convert import dense_weight, linear_layers
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.onnx.convert import convert_onnx
from optimum_nm.onnx.export import export_checkpoint
from optimum_nm.packing.codes import pack_fields
from optimum_nm.packing.packed_weight import packed_shapes
from optimum_nm.packing.safetensors_files import INDEX_FILE
from optimum_nm.packing.tensor_files import write_tensors

PACKING = NMConfig(weight_dtype="int4", positions="codes")
BLOCKS_PER_FILE = 8
TEXT = "the size of a model is no reason to hold it in memory twice. " * 4
TOKENS = 33
ZERO_FILLED = "zero-filled.onnx"


def write_packed(folder: Path, shape: str, layers: int) -> None:
    """A packed Llama checkpoint of random tensors that are valid, BLOCKS_PER_FILE blocks a file."""
    config = llama_config(shape, layers, "bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = linear_layers(model)
    files: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = int(name.split(".")[2]) // BLOCKS_PER_FILE + 1 if name.startswith("model.layers.") else 0
        files.setdefault(f"model-{part:05}-of-{math.ceil(layers / BLOCKS_PER_FILE):05}.safetensors", []).append(name)
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for file, names in files.items():
        content: dict[str, Tensor] = {}
        for name in names:
            layer = name.removesuffix(".weight")
            if layer in linears and not PACKING.is_excluded(layer):
                out_features, in_features = dense_weight(linears[layer]).shape
                content |= {f"{layer}.{role}": t for role, t in _packed(in_features, out_features, random).items()}
            elif not (config.tie_word_embeddings and layer == "lm_head"):
                content[name] = _dense(model.state_dict()[name].shape)
        with (unfinished / file).open("wb") as stream:
            write_tensors(stream, content)
        weight_map |= dict.fromkeys(content, file)
    (unfinished / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.quantization_config = PACKING.to_dict()
    config.save_pretrained(unfinished)
    save_byte_tokenizer(unfinished)
    unfinished.rename(folder)


def _packed(in_features: int, out_features: int, random: np.random.Generator) -> dict[str, Tensor]:
    layer = PACKING.layer("")
    assert layer is not None
    shapes = {name: shape for name, (shape, _) in packed_shapes(in_features, out_features, layer).items()}
    count, bits = math.comb(layer.pattern.m, layer.pattern.n), layer.pattern.code_bits
    codes = random.integers(0, count, (out_features, layer.pattern.groups(in_features)), dtype=np.int32)
    spread = 4.6 * (layer.pattern.density * in_features) ** 0.5  # of sixteen levels; products keep the variance
    scales = (random.uniform(0.9, 1.1, shapes["scales"]) / spread).astype(np.float16)
    return {
        "values": torch.from_numpy(random.integers(0, 256, shapes["values"], dtype=np.uint8)),
        "positions": torch.from_numpy(pack_fields(codes, bits)),
        "scales": torch.from_numpy(scales.view(np.int16)),
    }


def _dense(shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16
    return torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.randn(shape, generator=generator, dtype=dtype)


def write_zero_filled(folder: Path, layers: int) -> None:
    """An ONNX file that multiplies by the unpacked float16 weights of the first blocks, a data file for each block."""
    checkpoint = open_checkpoint(folder)
    for old in folder.glob("zero-filled-*.data"):
        old.unlink()
    nodes, initializers, outputs, widths = [], [], [], set()
    for name in checkpoint.layer_names():
        block = int(name.split(".")[2])
        if block >= layers:
            continue
        in_features, out_features = checkpoint.features[name]
        weight = checkpoint.packed(name).unpack(torch.float16).t().contiguous()
        tensor = TensorProto(name=f"{name}.weight", data_type=TensorProto.FLOAT16, dims=weight.shape)
        tensor.data_location = TensorProto.EXTERNAL
        data = folder / f"zero-filled-{block}.data"
        with data.open("ab") as stream:
            place = {"location": data.name, "offset": stream.tell(), "length": weight.nbytes}
            stream.write(weight.numpy().data)
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
        nodes.append(helper.make_node("MatMul", [f"x{in_features}", tensor.name], [name], name=f"/{name}/MatMul"))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", out_features]))
        widths.add(in_features)
    inputs = [helper.make_tensor_value_info(f"x{width}", TensorProto.FLOAT16, ["rows", width]) for width in widths]
    graph = helper.make_graph(nodes, "linears", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(folder / ZERO_FILLED))


def export(folder: Path, graph: str) -> str:
    path = export_checkpoint(folder, graph=graph)
    return f"model.onnx of {path.stat().st_size / 1e6:.1f} MB"


def inspect(folder: Path) -> str:
    totals = inspect_checkpoint(folder).totals()
    return f"{totals['file_bytes'] / 1e9:.2f} GB, {totals['bits_per_weight']:.2f} bits a packed weight"


def verify(folder: Path) -> str:
    verification = verify_checkpoint(folder)
    return "; ".join(verification.problems) or f"{verification.layers} layers are sound"


def evaluate(folder: Path, runtime: str) -> str:
    how = evaluate_torch if runtime == "torch" else evaluate_onnx
    result = how(str(folder), [TEXT], window=TOKENS - 1, limit=TOKENS)
    return f"{result.tokens} tokens"


def open_model(folder: Path) -> str:
    """A session of ONNX Runtime, and the first token."""
    start, processor = time.perf_counter(), time.process_time()
    decoder = OnnxDecoder(folder / "model.onnx", session_options())
    opened, used = time.perf_counter(), time.process_time() - processor
    decoder.generate([1, 2, 3], 1)
    token = time.perf_counter() - opened
    return f"session after {opened - start:.2f} s ({used:.2f} s of a processor), a token {token:.2f} s later"


def convert(folder: Path) -> str:
    target = folder / "converted.onnx"
    summary = convert_onnx(folder / ZERO_FILLED, target, weight_dtype="int4", overwrite=True)
    return f"{summary.bytes_before / 1e9:.2f} GB to {summary.bytes_after / 1e9:.2f} GB"


STEPS: dict[str, Callable[[Path], str]] = {
    "export traced": partial(export, graph="traced"),
    "export fused": partial(export, graph="fused"),
    "open": open_model,
    "inspect": inspect,
    "verify": verify,
    "evaluate torch": partial(evaluate, runtime="torch"),
    "evaluate onnx": partial(evaluate, runtime="onnxruntime"),
    "convert-onnx": convert,
}


def measure(name: str, small: Path, folder: Path) -> dict[str, float | str]:
    """Time and memory of a step on `folder`, beyond what the process has after the same step on `small`."""
    STEPS[name](small)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is in use
    before, private = memory_bytes()[0], _private_bytes()
    start, processor = time.perf_counter(), time.process_time()
    note = STEPS[name](folder)
    return {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
        "peak": memory_bytes()[1] - before,
        "private": _private_bytes() - private,
        "note": note,
    }


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--convert-layers", type=int, default=4, help="of the ONNX file for convert-onnx, 0.4 GB each")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="only these")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layers = arguments.layers or SHAPES[arguments.shape][2]
    small, folder = arguments.work / "small", arguments.work / f"{arguments.shape}-{layers}-packed"
    if arguments.process is not None:
        print(json.dumps(measure(arguments.process, small, folder)))
        return
    for target, shape, count in ((small, "tiny", 1), (folder, arguments.shape, layers)):
        if not target.exists():
            write_packed(target, shape, count)
        if "convert-onnx" in arguments.steps:
            write_zero_filled(target, min(count, arguments.convert_layers))
    print(f"{'':<15} {'seconds':>8} {'processor':>10} {'GB at most':>11} {'GB private':>11}")
    for name in arguments.steps:
        command = [sys.executable, __file__, *sys.argv[1:], "--process", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures = json.loads(output.splitlines()[-1])
        times = f"{figures['seconds']:>8.2f} {figures['processor']:>10.2f}"
        memory = f"{figures['peak'] / 1e9:>11.2f} {figures['private'] / 1e9:>11.2f}"
        print(f"{name:<15} {times} {memory}  {figures['note']}", flush=True)


if __name__ == "__main__":
    main()
