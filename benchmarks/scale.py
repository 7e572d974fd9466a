"""Sparsification of models the size of Llama's: time, per block too, peak memory, bytes read and written.

    python benchmarks/scale.py --shape 1b --work /tmp/scale
    python benchmarks/scale.py --shape 8b --work /tmp/scale --kill-after 10 20

The dense checkpoint has random weights and is written a block at a time, once. Each run is a process of its own, whose
memory and files are its own; `--kill-after` ends it by SIGKILL once so many blocks are finished and goes on, and
`--in-memory` loads the whole model first, to compare time and bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_nm import NMConfig, NMOptimizer
from optimum_nm.packing.safetensors_files import INDEX_FILE
from optimum_nm.packing.tensor_files import write_tensors
from optimum_nm.sparsify.checkpoint import CHECKSUMS_FILE

VOCABULARY = 128256
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, whether embeddings are tied
SHAPES = {
    "tiny": (256, 1024, 4, 4, True),
    "1b": (2048, 8192, 16, 32, True),
    "3b": (3072, 8192, 28, 24, True),
    "8b": (4096, 14336, 32, 32, False),
}


def llama_config(shape: str, layers: int, dtype: str) -> LlamaConfig:
    hidden, intermediate, _, heads, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads),
        tie_word_embeddings=tied,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder)


def write_dense(folder: Path, shape: str, layers: int, stored: str) -> None:
    """A random Llama checkpoint, a file per block."""
    config, dtype = llama_config(shape, layers, stored), getattr(torch, stored)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    files: dict[str, list[str]] = {}
    for name in tensors:
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            part = name.split(".")[2] if name.startswith("model.layers.") else "around"
            files.setdefault(f"model-{part}.safetensors", []).append(name)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        content = {name: _random(tensors[name].shape, generator).to(dtype) for name in names}
        with (partial / file).open("wb") as stream:
            write_tensors(stream, content)
    weight_map = {name: file for file, names in files.items() for name in names}
    (partial / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(partial)
    save_byte_tokenizer(partial)
    partial.rename(folder)


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02


def sparsify(dense: Path, output: Path, config: dict[str, object], arguments: argparse.Namespace) -> None:
    """What one process does; prints its figures as JSON."""
    letters = random.Random(0)
    text = "".join(letters.choice("etaoin shrdlu") for _ in range(1 << 20))
    start = time.perf_counter()
    optimizer = NMOptimizer.from_pretrained(dense, dtype=arguments.dtype)
    if arguments.live:
        optimizer = NMOptimizer(optimizer.model, optimizer.tokenizer)
    summary = optimizer.optimize(output, NMConfig(**config), [text], memory_budget=arguments.memory_budget)
    lines = Path("/proc/self/io").read_text().splitlines()
    io = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    figures = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time(),
        "seconds_per_block": summary.seconds / arguments.layers,
        "peak_bytes": summary.peak_bytes,
        "estimated_bytes": summary.estimated_bytes,
        "read_bytes": io["rchar"],
        "written_bytes": io["wchar"],
    }
    print(json.dumps(figures))


def run(output: Path, kill_after: Sequence[int] = (), live: bool = False) -> dict[str, float]:
    """Run `sparsify` in processes that end early after so many finished blocks, and one that ends well."""
    shutil.rmtree(output, ignore_errors=True)
    work = output.with_name(f".{output.name}.nm-partial")
    shutil.rmtree(work, ignore_errors=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--process", str(output)]
    if live:
        command.append("--live")
    for blocks in kill_after:
        process = subprocess.Popen(command)
        while process.poll() is None and not (work / f"part-{blocks - 1:05}.safetensors").exists():
            time.sleep(0.1)
        process.kill()
        process.wait()
        print(f"killed after {blocks} blocks", file=sys.stderr)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has: memory and time per block are the same")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints, with room for three")
    parser.add_argument("--stored", choices=("float32", "bfloat16"), default="bfloat16", help="type in the files")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type to compute in")
    parser.add_argument("--solver", default="admm", help="admm is that of the preset fast")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--memory-budget")
    parser.add_argument("--kill-after", type=int, nargs="*", default=[], metavar="BLOCKS")
    parser.add_argument("--in-memory", action="store_true", help="run it with the whole model in memory too")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--live", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or SHAPES[arguments.shape][2]
    dense = arguments.work / f"{arguments.shape}-{arguments.layers}-{arguments.stored}"
    if arguments.process is not None:
        windows = {"calibration_samples": arguments.samples, "calibration_length": arguments.length}
        config = {"solver": arguments.solver, **windows}
        sparsify(dense, arguments.process, config, arguments)
        return
    if not dense.exists():
        write_dense(dense, arguments.shape, arguments.layers, arguments.stored)
    streamed, in_memory = arguments.work / "streamed", arguments.work / "in-memory"
    results = {"streamed": run(streamed, arguments.kill_after)}
    if arguments.in_memory:
        results["in memory"] = run(in_memory, live=True)
        checksums = [(folder / CHECKSUMS_FILE).read_text() for folder in (streamed, in_memory)]
        print("the same bytes" if checksums[0] == checksums[1] else "OTHER BYTES")
    columns = ("seconds", "processor", "per block", "peak GB", "estimate", "read GB", "written GB")
    print(f"{'':<10}", *(f"{column:>10}" for column in columns))
    for name, figures in results.items():
        seconds = [figures[key] for key in ("seconds", "processor_seconds", "seconds_per_block")]
        gigabytes = [figures[key] / 1e9 for key in ("peak_bytes", "estimated_bytes", "read_bytes", "written_bytes")]
        print(f"{name:<10}", *(f"{figure:>10.2f}" for figure in (*seconds, *gigabytes)))


if __name__ == "__main__":
    main()
