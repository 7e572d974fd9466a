"""Sparsify SmolLM2-135M-Instruct at 11:16, run it in ONNX Runtime, and measure it beside the dense model.

`make demo` runs this file. It leaves the model, report.md and report.json in the folder demo/.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from demo_data import smollm2, wikipedia_articles
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, TextStreamer

from optimum_nm import NMConfig, NMOptimizer, session_options
from optimum_nm.config import SOLVERS
from optimum_nm.evaluate.benchmark import Benchmark, benchmark
from optimum_nm.evaluate.dense_variants import VARIANTS, dense_variants
from optimum_nm.evaluate.perplexity import Perplexity, evaluate_onnx
from optimum_nm.onnx.export import export_checkpoint

PROMPT = "What is photosynthesis? Answer in two sentences."
WINDOW = 1024  # tokens, of calibration and of evaluation


def configuration(args: argparse.Namespace) -> NMConfig:
    """int4 values in every decoder layer; by default 11:16: more of every 16 gains more than outliers.

    A fifth of SmolLM2's weights is one table, its input embedding and output layer. It stays dense (16:16) as int8, and
    is stored once for both.
    """
    return NMConfig(
        pattern=args.pattern,
        outliers=args.outliers,
        solver=args.solver,
        weight_dtype="int4",
        exclude=[],
        overrides={"lm_head": {"pattern": "16:16", "outliers": None, "weight_dtype": "int8"}},
        share_embedding=True,
        calibration_samples=args.samples,
        calibration_length=WINDOW,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    args = read_arguments(arguments)
    start = time.perf_counter()
    config = configuration(args)
    parts = [str(part).replace(":", "x") for part in (config.pattern, config.outliers) if part]
    sparse = args.output / "-".join(["sparse-int4", *parts])
    with step("Reading Wikipedia articles"):
        train, held_out = wikipedia_articles()
    folder, gguf_file = smollm2()
    optimizer = NMOptimizer.from_pretrained(folder, gguf_file=gguf_file)
    weights = optimizer.model.num_parameters()
    summary = optimizer.optimize(sparse, config, train, overwrite=True)
    print(summary)
    with step("Exporting to ONNX"):
        export_checkpoint(sparse)
    answer = chat(sparse, args.threads)
    dense = dense_variants(str(folder), {"gguf_file": gguf_file}, args.dense, args.output / "dense")
    speed = benchmark([sparse], dense, threads=args.threads, rounds=args.rounds)
    limit = args.windows * WINDOW + 1  # nothing predicts the first token
    quality = [evaluate_onnx(model.folder, held_out, WINDOW, limit=limit) for model in speed.models]

    table = comparison(speed, quality, weights)
    minutes = {"sparsify": summary.seconds / 60, "total": (time.perf_counter() - start) / 60}
    notes = explain(speed, quality, weights, minutes)
    text = f"# Demo\n\n{table}\n\n{notes}\n\n**{PROMPT}** {answer}\n\n```\n{summary}\n```\n"
    data = {
        "config": NMConfig.from_pretrained(sparse).to_dict(),
        "speed": speed.to_dict(),
        "perplexity": [result.to_dict() for result in quality],
        "weights": weights,
        "prompt": PROMPT,
        "answer": answer,
        "summary": summary.to_dict(),
        "minutes": minutes,
    }
    write_whole(args.output / "report.md", text)
    write_whole(args.output / "report.json", json.dumps(data, indent=2) + "\n")
    print(f"\n{table}\n\n{notes}\nWritten to {args.output}/report.md and report.json.")


def chat(folder: Path, threads: int) -> str:
    """The model's answer to PROMPT, from Optimum's own model class in plain onnxruntime, shown as it comes."""
    model = ORTModelForCausalLM.from_pretrained(folder, session_options=session_options(threads))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(f"\n{PROMPT}")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = model.generate(**prompt, max_new_tokens=96, do_sample=False, streamer=streamer)[0]
    return tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def comparison(speed: Benchmark, quality: list[Perplexity], weights: int) -> str:
    """One row a model, as a Markdown table."""
    header = ["in ONNX Runtime", "perplexity", "MB", "bits/weight", "load s", "prefill tok/s", "decode tok/s", "×"]
    rows = [
        [
            model.name,
            f"{result.perplexity:.2f}",
            f"{model.file_bytes / 1e6:.0f}",
            f"{8 * model.file_bytes / weights:.2f}",
            f"{model.median('load_seconds'):.2f}",
            f"{model.median('prefill'):.0f}",
            f"{model.median('decode'):.1f}",
            f"{model.median('decode') / speed.models[0].median('decode'):.2f}",
        ]
        for model, result in zip(speed.models, quality, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def explain(speed: Benchmark, quality: list[Perplexity], weights: int, minutes: dict[str, float]) -> str:
    settings = speed.settings
    return (
        "All rows are the same fused graph. Dense int8 and int4 are ONNX Runtime's MatMulNBits with a scale for every "
        "128 and 32 columns, int4's embedding too; the sparse model stores embedding and output layer once, as int8. "
        f"Perplexity over {quality[0].tokens} tokens of held-out Wikipedia articles in windows of {WINDOW}. "
        f"MB and bits per weight: the files that ONNX Runtime reads, {weights / 1e6:.1f} million weights. "
        f"Load time with warm files; medians of {settings['rounds']} rounds with {settings['prompt_tokens']} prompt "
        f"tokens and {settings['new_tokens']} new ones, {settings['threads']} threads. "
        f"{', '.join(f'{name} {value}' for name, value in speed.machine.items())}.\n"
        f"Sparsified in {minutes['sparsify']:.1f} minutes; everything together took {minutes['total']:.1f}.\n"
    )


@contextmanager
def step(name: str) -> Iterator[None]:
    print(f"{name} …", end=" ", flush=True)
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:.0f} s")


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name first: it is never there in part."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the models and the report")
    parser.add_argument("--pattern", default="11:16", metavar="N:M", help="how many of how many weights are kept")
    parser.add_argument("--outliers", metavar="K:B", help="salient weights of every B kept besides, as 16:256")
    parser.add_argument("--solver", choices=SOLVERS, default="admm", help="mask is quicker, and worse")
    parser.add_argument("--samples", type=int, default=12, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--windows", type=int, default=12, help=f"evaluation windows of {WINDOW} tokens")
    parser.add_argument("--dense", nargs="+", choices=VARIANTS, default=["float32", "int8", "int4"], help="to compare")
    parser.add_argument("--rounds", type=int, default=3, help="speed measurements of each model")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of ONNX Runtime")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
