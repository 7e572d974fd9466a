"""Packed models beside the dense ones of ONNX Runtime, measured on this machine.

Every measurement runs in a fresh process, one after another; a round measures each model once, so that a machine that
changes speed changes it for all. Figures are medians over the rounds, with the lowest and the highest.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import NMError
from ..packing.checkpoint import PackedCheckpoint
from ..runtime.library import load_library
from .tables import format_table

FIGURES = ("load_seconds", "prefill", "decode", "resident_bytes", "peak_bytes")


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        file_bytes: the ONNX file and the files that hold its weights.
        samples: per name of FIGURES one value a round; see `measure.measure`.
    """

    name: str
    folder: str
    file_bytes: int
    samples: dict[str, list[float]]

    def median(self, figure: str) -> float:
        return statistics.median(self.samples[figure])

    def to_dict(self) -> dict[str, Any]:
        medians = {figure: self.median(figure) for figure in FIGURES}
        return {"name": self.name, "folder": self.folder, "file_bytes": self.file_bytes} | {
            figure: {"median": medians[figure], "lowest": min(values), "highest": max(values), "samples": values}
            for figure, values in self.samples.items()
        }


@dataclass(frozen=True)
class Benchmark:
    """The models side by side on one machine; `str()` is a table."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    models: list[Measured]

    def to_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "settings": self.settings,
            "models": [model.to_dict() for model in self.models],
        }

    def __str__(self) -> str:
        first = self.models[0]
        header = ["model", "size MiB", "load s", "memory MiB", "peak MiB", "prefill tok/s", "decode tok/s", "decode ×"]
        rows = [
            [
                model.name,
                f"{model.file_bytes / 2**20:.1f}",
                f"{model.median('load_seconds'):.2f}",
                f"{model.median('resident_bytes') / 2**20:.0f}",
                f"{model.median('peak_bytes') / 2**20:.0f}",
                _with_spread(model.samples["prefill"]),
                _with_spread(model.samples["decode"]),
                f"{model.median('decode') / first.median('decode'):.2f}",
            ]
            for model in self.models
        ]
        settings = f"{described(self.settings)}; median (lowest–highest); × {first.name}"
        return f"{format_table(header, rows)}\n\n{settings}\n{described(self.machine)}"


def benchmark(
    packed: list[Path],
    dense: dict[str, Path],
    *,
    threads: int | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    rounds: int = 5,
) -> Benchmark:
    """Measure exported models one after another.

    Args:
        packed: folders of packed checkpoints with their model.onnx.
        dense: folders by the name to show, each with a model.onnx of the same vocabulary, listed first.
        threads: of ONNX Runtime; None for its own choice.

    Raises:
        NMError: a folder has no model.onnx, or a measurement fails.
    """
    folders = model_folders(packed, dense)
    settings = settings_of(threads, prompt_tokens, new_tokens)
    results = measure_in_rounds("measure", folders, packed[0], settings, rounds)
    models = [
        Measured(
            name,
            str(folder),
            sum(file.stat().st_size for file in _weight_files(folder)),
            {figure: [result[figure] for result in results[name]] for figure in FIGURES},
        )
        for name, folder in folders.items()
    ]
    return Benchmark(machine(), settings | {"rounds": rounds}, models)


def settings_of(threads: int | None, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "threads": threads}


def described(items: dict[str, Any]) -> str:
    """Settings or a machine in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in items.items())


def model_folders(packed: list[Path], dense: dict[str, Path]) -> dict[str, Path]:
    """All folders by the name to show, the dense ones first, each with a model.onnx.

    Raises:
        NMError: a folder has no model.onnx.
    """
    folders = {f"dense {name}": folder for name, folder in dense.items()} | _named(packed)
    for folder in folders.values():
        if not (folder / "model.onnx").is_file():
            raise NMError(f"{folder} has no model.onnx; `optimum-cli nm export --model {folder}` writes it.")
    return folders


def measure_in_rounds(
    module: str, folders: dict[str, Path], checkpoint: Path, settings: dict[str, Any], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """What a module of this package, run as a program, tells about each folder's model.onnx, once a round.

    Args:
        checkpoint: packed; its vocabulary is that of all.
        settings: arguments of the module's function, beside `path` and `vocabulary`.
    """
    for folder in folders.values():
        _read_all(_weight_files(folder))
    specification = settings | {"vocabulary": _vocabulary(checkpoint)}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    with tqdm(total=rounds * len(folders), desc="Benchmark", unit="run") as bar:
        for _ in range(rounds):
            for name, folder in folders.items():
                bar.set_postfix_str(name)
                results[name].append(_run_apart(module, specification | {"path": str(folder / "model.onnx")}, name))
                bar.update()
    return results


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return {
        "CPU": model,
        "cores": os.cpu_count(),
        "instruction set": load_library().nm_isa().decode(),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    } | {package: importlib.metadata.version(package) for package in ("onnxruntime", "optimum-nm")}


def _named(packed: list[Path]) -> dict[str, Path]:
    """Checkpoint folders by their last name, or by the whole where two end alike."""
    names = [folder.resolve().name for folder in packed]
    return {
        (name if names.count(name) == 1 else str(folder)): folder for name, folder in zip(names, packed, strict=True)
    }


def _vocabulary(folder: Path) -> int:
    config = PackedCheckpoint(folder).model_config
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise NMError(f"{folder}/config.json has vocab_size {vocabulary!r}; a whole number above 0 is needed.")
    return vocabulary


def _weight_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name.startswith("model.onnx") or file.suffix == ".safetensors"]


def _read_all(files: list[Path]) -> None:
    """Bring files into the system's cache: what is compared is how fast models load, not how fast the disk is."""
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def _run_apart(module: str, specification: dict[str, Any], name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__}.{module}", json.dumps(specification)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise NMError(f"{name} ({specification['path']}) cannot be measured: {reason}")
    return json.loads(run.stdout.splitlines()[-1])


def _with_spread(values: list[float]) -> str:
    digits = 1 if statistics.median(values) < 1000 else 0
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"
