"""How long sparsifying a block takes beside its matrix products alone, at the speed of torch's own.

    python benchmarks/block_speed.py --shape 1b --solver mask sparsegpt

The products are two forward passes through the block's linears, half of each symmetric Gram matrix and, for sparsegpt,
a Cholesky factor, its inverse and the updates; the speed is that of one large float32 product in the same process.
Everything else is overhead: choosing masks, packing, attention, norms, measuring the error, and, once for all blocks,
recording what they are called with.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from scale import SHAPES, llama_config
from transformers import LlamaForCausalLM

from optimum_nm import NMConfig
from optimum_nm.nn.convert import dense_weight, linear_layers
from optimum_nm.nn.weights import LoadedWeights
from optimum_nm.sparsify.layer import needs_gram
from optimum_nm.sparsify.pipeline import sparsify_model

VOCABULARY = 512


def random_blocks(shape: str, layers: int) -> LlamaForCausalLM:
    """A model of few tokens."""
    config = llama_config(shape, layers, "float32")
    config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def multiplied(model: LlamaForCausalLM, tokens: int, config: NMConfig) -> float:
    """Floating-point operations of the products of one block."""
    block = model.model.layers[0]
    shapes = {name: tuple(dense_weight(module).shape) for name, module in linear_layers(block).items()}
    inputs = {(name if name.endswith("o_proj") else name.split(".")[0], k) for name, (_, k) in shapes.items()}
    operations = 2.0 * sum(2 * tokens * rows * k for rows, k in shapes.values())
    if needs_gram(config):
        operations += sum(tokens * k**2 for _, k in inputs)
    if config.solver == "sparsegpt":
        operations += sum(2 / 3 * k**3 for _, k in inputs) + sum(rows * k**2 for rows, k in shapes.values())
    return operations


def operations_per_second() -> list[float]:
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    seconds = []
    torch.mm(a, b)
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return [2 * 4096**3 / each for each in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--solver", nargs="+", default=["mask", "sparsegpt"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    windows = torch.randint(VOCABULARY, (arguments.samples, arguments.length))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.layers} blocks of {arguments.shape}"
    )
    print(f"{'a block':<10} {'seconds':>8} {'products':>9} {'ratio':>6} {'GFLOP/s of torch.mm':>20}")
    for solver in arguments.solver:
        model, config = random_blocks(arguments.shape, arguments.layers), NMConfig(solver=solver)
        operations, speeds = multiplied(model, windows.numel(), config), operations_per_second()
        start = time.perf_counter()
        sparsify_model(LoadedWeights(model), windows, config, progress=False)
        seconds = (time.perf_counter() - start) / arguments.layers
        speed = statistics.median(speeds + operations_per_second())
        products = operations / speed
        print(f"{solver:<10} {seconds:>8.1f} {products:>9.1f} {seconds / products:>6.2f} {speed / 1e9:>20.0f}")


if __name__ == "__main__":
    main()
