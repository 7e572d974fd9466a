"""Whole models at native speed: packed ones beside ONNX Runtime's own quantization of the same dense model.

Every model is a fused graph and runs in onnxruntime-genai and in a bare InferenceSession, greedy, batch 1. Each
measurement is a process of its own; a round measures every model once, so that a machine that changes speed changes it
for all. Figures are medians over the rounds.

    python benchmarks/models.py --work /tmp/models --rounds 3

builds what is missing in the work folder first. `--shape 0.5b` takes a randomly initialised Llama of that size in place
of SmolLM2-135M (examples/demo_data.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, FIRST_PROMPT, NEW = 32, 512, 64
PACKED = ("float16", "int8", "int4")
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "0.5b": (1024, 4096, 24, 16, 8, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
}


def dense_model(shape: str, folder: Path) -> None:
    """SmolLM2, or random weights in a given shape, as a Hugging Face folder of float16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from demo_data import smollm2

    source, file = smollm2()
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder, legacy_format=False)
    if shape == "smollm2":
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
            dtype=torch.float16,
        )
        torch.set_default_dtype(torch.float16)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)


def packed_model(weight_dtype: str) -> Callable[[Path, Path], None]:
    """8:16 of the largest weights; embedding and output layer are one dense table, in the same type."""

    def build(dense: Path, folder: Path) -> None:
        from optimum_nm import NMConfig, NMOptimizer
        from optimum_nm.onnx.export import export_checkpoint

        config = NMConfig(
            score="magnitude",
            equalization=None,
            variance_correction=None,
            weight_dtype=weight_dtype,
            exclude=[],
            overrides={"lm_head": {"pattern": "16:16"}},
            share_embedding=True,
            calibration_samples=1,
            calibration_length=16,
        )
        NMOptimizer.from_pretrained(dense).optimize(folder, config, ["a few words " * 50])
        export_checkpoint(folder, runtime="genai")

    return build


def dense_float32(dense: Path, folder: Path) -> None:
    """mobius's own graph and weights."""
    command = [sys.executable, "-m", "mobius", "build", "--config", str(dense), "--ep", "cpu", "--dtype", "f32"]
    subprocess.run([*command, "--runtime", "ort-genai", str(folder)], check=True, stdout=subprocess.DEVNULL)


def dense_blocks(bits: int, block_size: int) -> Callable[[Path, Path], None]:
    """ONNX Runtime's MatMulNBits in mobius's graph, embedding and output layer one quantized table."""

    def build(dense: Path, folder: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        source = folder.parent / "float32"
        model = onnx.load(source / "model.onnx")
        output_weight = _transpose_output_weight(model.graph)
        quantizer = MatMulNBitsQuantizer(model, bits, block_size, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        graph = quantizer.model.model.graph
        _look_up_quantized(graph, output_weight, bits, block_size)
        folder.mkdir()
        quantizer.model.save_model_to_file(str(folder / "model.onnx"), use_external_data_format=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copyfile(file, folder / file.name)

    return build


def _transpose_output_weight(graph: Any) -> str:
    """The quantizer knows matrices only, not the Transpose by which the output layer shares the embedding."""
    from onnx import numpy_helper

    node = next(node for node in graph.node if node.op_type == "Transpose")
    table = next(tensor for tensor in graph.initializer if tensor.name == node.input[0])
    graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(table).T.copy(), node.output[0]))
    graph.node.remove(node)
    return node.output[0]


def _look_up_quantized(graph: Any, output_weight: str, bits: int, block_size: int) -> None:
    import numpy as np
    from onnx import helper, numpy_helper

    gather = next(node for node in graph.node if node.op_type == "Gather" and "input_ids" in node.input)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    packed = tensors[f"{output_weight}_Q{bits}"]
    rows = [packed.dims[0], packed.dims[1] * packed.dims[2]]
    graph.initializer.append(numpy_helper.from_array(np.array(rows), "embedding_rows"))
    shaped = helper.make_node("Reshape", [packed.name, "embedding_rows"], ["embedding_packed"])
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
    table = tensors[gather.input[0]]
    bounds = {"embedding_from": [0], "embedding_to": [table.dims[1]], "embedding_axis": [2]}
    graph.initializer.extend([numpy_helper.from_array(np.array(value), name) for name, value in bounds.items()])
    cut = helper.make_node("Slice", ["embedding_padded", *bounds], [gather.output[0]])
    graph.initializer.remove(table)
    graph.node.remove(gather)
    for node in (cut, look_up, shaped):
        graph.node.insert(0, node)


VARIANTS: dict[str, Callable[[Path, Path], None]] = {
    "float32": dense_float32,
    "int8 block 32": dense_blocks(8, 32),
    "int8 block 128": dense_blocks(8, 128),
    "int4 block 32": dense_blocks(4, 32),
    "int4 block 128": dense_blocks(4, 128),
    **{f"8:16 {weight_dtype}": packed_model(weight_dtype) for weight_dtype in PACKED},
}


def built(work: Path, shape: str, names: list[str]) -> dict[str, Path]:
    """The folder of each model, built unless it is there."""
    dense = work / shape / "dense"
    if not (dense / "config.json").is_file():
        dense_model(shape, dense)
    folders = {name: work / shape / name.replace(" ", "-").replace(":", "-") for name in names}
    for name in dict.fromkeys(["float32", *names]):
        folder = work / shape / name.replace(" ", "-").replace(":", "-")
        if not (folder / "genai_config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            VARIANTS[name](dense, folder)
    return folders


def measure_genai(folder: Path, threads: int) -> dict[str, float]:
    """Tokens per second after a short prompt, and seconds to the first token after a long one."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def generator(prompt: int) -> genai.Generator:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=prompt + NEW, min_length=prompt + NEW, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(list(range(100, 100 + prompt)))
        return generator

    warm = generator(PROMPT)
    for _ in range(8):
        warm.generate_next_token()
    start = time.perf_counter()
    generator(FIRST_PROMPT).generate_next_token()
    first = time.perf_counter() - start
    decoding = generator(PROMPT)
    decoding.generate_next_token()
    start = time.perf_counter()
    for _ in range(NEW - 1):
        decoding.generate_next_token()
    return {"genai": (NEW - 1) / (time.perf_counter() - start), "first": first}


def measure_session(folder: Path, threads: int) -> dict[str, float]:
    """Tokens per second of a bare InferenceSession."""
    from optimum_nm import session_options
    from optimum_nm.evaluate.onnx_decoder import OnnxDecoder

    decoder = OnnxDecoder(folder / "model.onnx", session_options(threads))
    decoder.generate(list(range(100, 100 + PROMPT)), 8)
    decoder.reset()
    token = int(decoder.read(list(range(100, 100 + PROMPT)))[-1].argmax())
    start = time.perf_counter()
    for _ in range(NEW):
        token = int(decoder.read([token])[-1].argmax())
    return {"session": NEW / (time.perf_counter() - start)}


def measure(folder: Path, threads: int) -> dict[str, float]:
    """Both runtimes, each in a process of its own."""
    figures: dict[str, float] = {}
    for runtime in ("genai", "session"):
        command = [sys.executable, __file__, "--measure", runtime, str(folder), str(threads)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{folder}: {run.stderr.strip().splitlines()[-1]}")
        figures |= json.loads(run.stdout.splitlines()[-1])
    return figures


def megabytes(folder: Path) -> float:
    """The graph and the files that hold its weights."""
    files = [file for file in folder.iterdir() if file.suffix == ".safetensors" or file.name.startswith("model.onnx")]
    return sum(file.stat().st_size for file in files) / 1e6


def nodes(folder: Path) -> int:
    import onnx

    return len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, kept")
    parser.add_argument("--shape", choices=("smollm2", *SHAPES), default="smollm2")
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--build-only", action="store_true")
    args = parser.parse_args()
    folders = built(args.work, args.shape, args.models)
    if args.build_only:
        return
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for _ in range(args.rounds):
        for name, folder in folders.items():
            samples[name].append(measure(folder, args.threads))
    print(f"{args.shape}, {args.threads} threads, {args.rounds} rounds, greedy, batch 1")
    print("| model | MB | nodes | genai tok/s | session tok/s | first token after 512, s |")
    print("|---|---|---|---|---|---|")
    for name, folder in folders.items():
        median = {key: statistics.median(sample[key] for sample in samples[name]) for key in samples[name][0]}
        print(
            f"| {name} | {megabytes(folder):.1f} | {nodes(folder)} | {median['genai']:.1f} | {median['session']:.1f} | "
            f"{median['first']:.3f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        runtime, measured, thread_count = sys.argv[2:]
        measurements = {"genai": measure_genai, "session": measure_session}
        print(json.dumps(measurements[runtime](Path(measured), int(thread_count))))
    else:
        main()
