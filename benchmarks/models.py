"""Whole models at native speed: packed ones beside what users of onnxruntime-genai and llama.cpp have instead.

    python benchmarks/models.py --work /tmp/models

builds what is missing in the work folder, each model in a process of its own, and measures on this machine: tokens per
second in onnxruntime-genai, of one sequence and of 4 and 16 together, and of one in a bare InferenceSession; seconds to
the first token after 512; all greedy; perplexity on held-out Wikipedia articles. SmolLM2-135M-Instruct comes from
examples/demo_data.py; 0.5b and 1b are Llamas of random weights. A round measures every model once, so that a machine
that changes speed changes it for all.
Figures are medians over the rounds. Each is kept in the work folder as it comes: started again, the program goes on;
with another operator library it begins anew.

llama.cpp is measured with the Python that has llama-cpp-python, by default this one if it has.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from model_measurements import held_out_tokens
from model_variants import SHAPES, SMOLLM2, VARIANTS, build_models, demo_data

from optimum_nm import library_path
from optimum_nm.evaluate.benchmark import described, machine
from optimum_nm.evaluate.tables import markdown_table
from optimum_nm.evaluate.whole_file import write_text

HERE = Path(__file__).parent
LLAMA_KINDS = ("Q4_0", "Q8_0")
RIVALS = {  # of the same weight type
    "8:16 float16": ("float32",),
    "8:16 int8": ("int8 block 32", "int8 block 128", "llama.cpp Q8_0"),
    "8:16 int4": ("int4 block 32", "int4 block 128", "llama.cpp Q4_0"),
    "8:16 + 16:256 int8": ("int8 block 32", "int8 block 128", "llama.cpp Q8_0"),
    "8:16 + 16:256 int4": ("int4 block 32", "int4 block 128", "llama.cpp Q4_0"),
}


class OnnxModel:
    """A folder of model_variants.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def speed(self, threads: int) -> dict[str, float]:
        genai, session = (self._measure(kind, threads) for kind in ("genai", "session"))
        return genai | session

    def perplexity(self, windows: int, threads: int) -> dict[str, float]:
        return self._measure("perplexity", windows)

    def size(self) -> dict[str, float]:
        """Bytes of the graph and the files that hold its weights, and the graph's nodes."""
        import onnx

        files = [file for file in self.folder.iterdir() if file.suffix in (".safetensors", ".data")]
        graph = onnx.load(self.folder / "model.onnx", load_external_data=False).graph
        weights = sum(file.stat().st_size for file in files)
        return {"bytes": weights + (self.folder / "model.onnx").stat().st_size, "nodes": len(graph.node)}

    def _measure(self, kind: str, number: int) -> dict[str, float]:
        return output_of(sys.executable, HERE / "model_measurements.py", kind, self.folder, number)


class LlamaModel:
    """A GGUF file, quantized by llama.cpp unless it is there."""

    def __init__(self, python: str, kind: str, work: Path) -> None:
        self.program = (python, HERE / "llama_speed.py")
        self.file = work / f"{kind}.gguf"
        self.work = work
        if not self.file.is_file():
            folder, source = demo_data().smollm2()
            output_of(*self.program, "quantize", folder / source, self.file, kind)

    def speed(self, threads: int) -> dict[str, float]:
        return output_of(*self.program, "speed", self.file, threads)

    def perplexity(self, windows: int, threads: int) -> dict[str, float]:
        tokens = self.work / "tokens.json"
        tokens.write_text(json.dumps(held_out_tokens(self.work / "dense", windows)))
        return output_of(*self.program, "perplexity", self.file, tokens, threads)

    def size(self) -> dict[str, float]:
        return {"bytes": self.file.stat().st_size}


class Results:
    """Figures by shape and model, in a file that is replaced at each change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text()) if path.is_file() else {}

    def of(self, shape: str, name: str) -> dict[str, Any]:
        return self.figures.setdefault(shape, {}).setdefault(name, {"rounds": []})

    def save(self) -> None:
        write_text(self.path, json.dumps(self.figures, indent=1) + "\n")


def output_of(*command: str | Path | int) -> dict[str, float]:
    """What another program prints in its last line."""
    program = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if program.returncode:
        sys.exit(f"{' '.join(map(str, command))} ends with status {program.returncode}.")
    return json.loads(program.stdout.splitlines()[-1])


def measure(models: dict[str, OnnxModel | LlamaModel], shape: str, args: argparse.Namespace, results: Results) -> None:
    """Fill in what the results lack."""
    for name, model in models.items():
        found = results.of(shape, name)
        found |= model.size()
        if shape == SMOLLM2 and found.get("windows") != args.windows:
            found |= model.perplexity(args.windows, args.threads) | {"windows": args.windows}
        results.save()
    for count in range(1, args.rounds + 1):
        for name, model in models.items():
            rounds = results.of(shape, name)["rounds"]
            if len(rounds) < count:
                print(f"{shape}: round {count} of {name}", file=sys.stderr, flush=True)
                rounds.append(model.speed(args.threads))
                results.save()


def spread(figures: dict[str, Any], figure: str, digits: int) -> str:
    """Median, lowest and highest of the rounds."""
    values = [sample[figure] for sample in figures["rounds"] if figure in sample]
    if not values:
        return ""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def median(figures: dict[str, Any], figure: str) -> float:
    return statistics.median(sample[figure] for sample in figures["rounds"])


def table(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    header = [
        "shape",
        "model",
        "MB",
        "nodes",
        "perplexity",
        "decode tok/s",
        "of 4 sequences",
        "of 16",
        "512 tokens to first, s",
        "session tok/s",
    ]
    rows = [
        [
            shape,
            name,
            f"{found['bytes'] / 1e6:.1f}",
            str(found.get("nodes", "")),
            f"{found['perplexity']:.2f}" if "perplexity" in found else "",
            spread(found, "decode", 1),
            spread(found, "decode 4", 0),
            spread(found, "decode 16", 0),
            spread(found, "first", 3),
            spread(found, "session", 1),
        ]
        for shape, models in figures.items()
        for name, found in models.items()
    ]
    return markdown_table(header, rows)


def comparison(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Packed models over their rivals: more is better in speed, less in size and time to the first token."""
    rows = [
        [
            shape,
            name,
            rival,
            f"{median(models[name], 'decode') / median(models[rival], 'decode'):.2f}",
            f"{models[name]['bytes'] / models[rival]['bytes']:.2f}",
            f"{median(models[name], 'first') / median(models[rival], 'first'):.2f}",
        ]
        for shape, models in figures.items()
        for name, rivals in RIVALS.items()
        for rival in rivals
        if name in models and rival in models
    ]
    return markdown_table(["shape", "model", "over", "decode ×", "size ×", "first token ×"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results, kept")
    parser.add_argument("--shape", nargs="+", choices=(SMOLLM2, *SHAPES), default=[SMOLLM2], help="what to measure")
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each model (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every runtime (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=12, help="of 1024 tokens, for perplexity (default: %(default)s)")
    here = sys.executable if importlib.util.find_spec("llama_cpp") else None
    parser.add_argument("--llama-python", default=here, help="one with llama-cpp-python (default: %(default)s)")
    parser.add_argument("--build-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    models: dict[str, dict[str, OnnxModel | LlamaModel]] = {}
    for shape in args.shape:
        models[shape] = {name: OnnxModel(path) for name, path in build_models(args.work, shape, args.models).items()}
        if shape == SMOLLM2 and args.llama_python is not None:
            for kind in LLAMA_KINDS:
                models[shape][f"llama.cpp {kind}"] = LlamaModel(args.llama_python, kind, args.work / shape)
    if args.build_only:
        return
    library = hashlib.sha256(library_path().read_bytes()).hexdigest()[:8]
    results = Results(args.work / f"results-{args.threads}-threads-{library}.json")
    for shape in args.shape:
        measure(models[shape], shape, args, results)
    print(f"{args.threads} threads, greedy; median (lowest–highest) of the rounds; {described(machine())}\n")
    print(table(results.figures), comparison(results.figures), sep="\n\n")


if __name__ == "__main__":
    main()
