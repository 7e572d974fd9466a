"""Every kernel beside ONNX Runtime's dense ones and beside the memory's speed, measured on this machine in one run.

A round measures each kernel once, so that a machine that changes speed changes it for all. Figures are medians over
the rounds.
"""

from __future__ import annotations

import fnmatch
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from ..errors import NMError
from ..patterns import NMPattern
from ..runtime.session import session_options
from .benchmark import machine
from .kernel_models import Kernel, kernels, write_chains
from .tables import format_table

if TYPE_CHECKING:
    import onnxruntime

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 8192), (576, 1536))
QUICK_SHAPES = SHAPES[:1]
PATTERN = NMPattern(8, 16)
_LEAST_SECONDS = 0.03  # of one measurement: repeated runs of a chain
_LARGEST_CHAIN = 448 << 20  # bytes; with it the weights of all kernels stay below 6 GB


@dataclass(frozen=True)
class Timing:
    """One kernel at one shape, number of threads and number of activation rows.

    Attributes:
        in_features, out_features: K and N; with K ≠ N the mean over K×N and N×K.
        layers: different weights that were multiplied by in turn.
        bits_per_weight: of memory, positions, scales and outliers included.
        seconds: per matrix product, one a round.
        rivals: the dense kernels of as many bits a value; none for these themselves.
    """

    kernel: str
    in_features: int
    out_features: int
    threads: int
    rows: int
    layers: int
    bits_per_weight: float
    seconds: list[float]
    rivals: tuple[str, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of what lies between the slowest and the fastest round, as a part of the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median

    @property
    def weight_bytes(self) -> float:
        return self.bits_per_weight * self.in_features * self.out_features / 8

    @property
    def bandwidth(self) -> float:
        """Bytes of weights read per second."""
        return self.weight_bytes / self.median


@dataclass(frozen=True)
class KernelBenchmark:
    """All measurements of one run; `str()` is a table for each shape and number of threads.

    Attributes:
        bandwidths: bytes per second of a plain loop that reads an array as large as a chain, one value a round, by
            number of threads.
        left_out: reason by name of each kernel that this ONNX Runtime cannot run.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    bandwidths: dict[int, list[float]]
    timings: list[Timing]
    left_out: dict[str, str]

    def bandwidth(self, threads: int) -> float:
        return statistics.median(self.bandwidths[threads])

    def speedup(self, timing: Timing) -> float | None:
        """Over the fastest dense kernel of as many bits a value; None for dense kernels and where none was measured."""
        same = [
            other.median
            for other in self.timings
            if other.kernel in timing.rivals and _setting(other) == _setting(timing) and other.rows == timing.rows
        ]
        return min(same) / timing.median if same else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "settings": self.settings,
            "read_bandwidth": [
                {"threads": threads, "bytes_per_second": statistics.median(values), "samples": values}
                for threads, values in self.bandwidths.items()
            ],
            "timings": [
                asdict(timing)
                | {
                    "median_seconds": timing.median,
                    "bytes_per_second": timing.bandwidth,
                    "speedup": self.speedup(timing),
                }
                for timing in self.timings
            ],
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        parts = [self._table(*setting) for setting in dict.fromkeys(map(_setting, self.timings))]
        parts += [f"{name} left out: {reason}" for name, reason in self.left_out.items()]
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.settings.items())
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        legend = (
            "µs: median per matrix product ± half the range over the rounds; GB/s: bytes of weights read; ×: times "
            "faster than the fastest dense kernel of as many bits a value (MatMul float32 for 16 bits); N:M int8 and "
            "int4 are at accuracy level 4, as MatMulNBits, unless they say 0"
        )
        return "\n\n".join([*parts, f"{legend}\n{settings}\n{about}"])

    def _table(self, in_features: int, out_features: int, threads: int) -> str:
        timings = [t for t in self.timings if _setting(t) == (in_features, out_features, threads)]
        rows = sorted({timing.rows for timing in timings})
        header = ["kernel", "bits/weight", *(f"{title} M={m}" for m in rows for title in ("µs", "GB/s", "×"))]
        lines = []
        for name in dict.fromkeys(timing.kernel for timing in timings):
            of_kernel = {timing.rows: timing for timing in timings if timing.kernel == name}
            line = [name, f"{of_kernel[rows[0]].bits_per_weight:.2f}"]
            for m in rows:
                timing, speedup = of_kernel[m], self.speedup(of_kernel[m])
                line.append(f"{timing.median * 1e6:.0f} ±{timing.spread:.0%}")
                line += [f"{timing.bandwidth / 1e9:.1f}", "" if speedup is None else f"{speedup:.2f}"]
            lines.append(line)
        title = f"{in_features}×{out_features}, {threads} thread{'s' if threads > 1 else ''}"
        return f"{title}; memory reads at {self.bandwidth(threads) / 1e9:.1f} GB/s\n{format_table(header, lines)}"


def benchmark_kernels(
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = (1, 16, 128),
    threads: Sequence[int] | None = None,
    names: Sequence[str] = ("*",),
    pattern: NMPattern = PATTERN,
    rounds: int = 5,
    chain_bytes: int | None = None,
) -> KernelBenchmark:
    """Measure kernels on chains of random weights, written to a temporary folder.

    Args:
        shapes: (K, N) of the weights.
        rows: of activations.
        threads: numbers of threads; by default one, and as many as there are cores.
        names: shell wildcards of the kernels to measure; `kernel_models.kernels` lists them all.
        pattern: that of the sparse weights.
        chain_bytes: weights of a chain; by default twice the last-level cache, or a quarter more than it where that
            would be very large.

    Raises:
        NMError: a wildcard fits no kernel, or there is no space for the weights.
    """
    chosen = select_kernels(names, pattern)
    thread_counts = sorted({1, core_count()}) if threads is None else list(threads)
    chain_bytes = default_chain_bytes(last_level_cache()) if chain_bytes is None else chain_bytes
    settings = {"rounds": rounds, "chain_MiB": round(chain_bytes / 2**20, 1)}
    result = KernelBenchmark(machine(), settings, {count: [] for count in thread_counts}, [], {})
    steps = len(shapes) * len(thread_counts) * rounds * len(rows) * len(chosen)
    with tqdm(total=steps, desc="Kernels", unit="run") as bar:
        for shape in shapes:
            with tempfile.TemporaryDirectory(prefix="optimum-nm-kernels-") as folder:
                try:
                    chains = write_chains(Path(folder), chosen, pattern, *shape, chain_bytes)
                except OSError as error:
                    raise NMError(
                        f"{folder} cannot hold the weights ({error.strerror}); TMPDIR names another place."
                    ) from None
                for count in thread_counts:
                    _measure_shape(result, chosen, chains, shape, rows, count, chain_bytes, bar)
    return result


def select_kernels(names: Sequence[str], pattern: NMPattern = PATTERN) -> list[Kernel]:
    """The kernels whose names fit one of some shell wildcards; NMError for a wildcard that fits none."""
    everything = kernels(pattern)
    for name in names:
        if not fnmatch.filter(everything, name):
            raise NMError(f"no kernel is named {name!r}; there are: {', '.join(everything)}.")
    return [kernel for kernel in everything.values() if any(fnmatch.fnmatchcase(kernel.name, name) for name in names)]


def default_chain_bytes(cache_bytes: int) -> int:
    """Weights of a chain that do not stay in a cache of some bytes."""
    return min(2 * cache_bytes, max(_LARGEST_CHAIN, cache_bytes * 5 // 4))


def last_level_cache() -> int:
    """Bytes of the first processor's largest cache, 32 MiB where the system does not say."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def core_count() -> int:
    """Physical cores that this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


def _setting(timing: Timing) -> tuple[int, int, int]:
    return timing.in_features, timing.out_features, timing.threads


def _measure_shape(
    result: KernelBenchmark,
    chosen: list[Kernel],
    chains: dict[str, Path],
    shape: tuple[int, int],
    rows: Sequence[int],
    threads: int,
    chain_bytes: int,
    bar: tqdm,
) -> None:
    """Append the timings of one shape and number of threads."""
    sessions = dict(_sessions(chosen, chains, threads, result.left_out))
    random = np.random.default_rng(0)
    activations = {m: random.standard_normal((m, shape[0]), dtype=np.float32) for m in rows}
    array = torch.ones(max(chain_bytes // 4, 1))
    samples: dict[tuple[str, int], list[float]] = {(name, m): [] for name in sessions for m in rows}
    for _ in range(result.settings["rounds"]):
        result.bandwidths[threads].append(_read_bandwidth(array, threads))
        for m, x in activations.items():
            for kernel in chosen:
                bar.update()
                if kernel.name in sessions:
                    bar.set_postfix_str(f"{shape[0]}×{shape[1]}, {threads} threads, M={m}, {kernel.name}")
                    samples[kernel.name, m].append(_run_seconds(sessions[kernel.name], x))
    by_name = {kernel.name: kernel for kernel in chosen}
    for (name, m), seconds in samples.items():
        kernel = by_name[name]
        layers = kernel.chain_length(*shape, chain_bytes)
        bits = 8 * kernel.layer_bytes(*shape) / (shape[0] * shape[1])
        per_layer = [value / layers for value in seconds]
        result.timings.append(Timing(name, *shape, threads, m, layers, bits, per_layer, kernel.rivals))


def _sessions(
    chosen: list[Kernel], chains: dict[str, Path], threads: int, left_out: dict[str, str]
) -> Iterator[tuple[str, onnxruntime.InferenceSession]]:
    import onnxruntime

    for kernel in chosen:
        try:
            options = session_options(threads)
            # threads of one session that wait busily for work take time from the session measured next
            options.add_session_config_entry("session.force_spinning_stop", "1")
            session = onnxruntime.InferenceSession(chains[kernel.name], options, providers=["CPUExecutionProvider"])
        except NMError:
            raise
        except Exception as error:  # of pybind11's own types, by reason: an older ONNX Runtime lacks some operators
            left_out[kernel.name] = str(error).splitlines()[0]
            continue
        yield kernel.name, session


def _run_seconds(session: onnxruntime.InferenceSession, x: npt.NDArray[np.float32]) -> float:
    """Median seconds of a run after the first, which wakes the session's threads and caches its activations."""
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < _LEAST_SECONDS:
        start = time.perf_counter()
        session.run(None, {"x": x})
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _read_bandwidth(array: torch.Tensor, threads: int) -> float:
    """Bytes per second of the faster of two loops that read an array once: a sum, and a matrix-vector product."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    width = min(4096, array.numel())
    matrix, vector = array[: array.numel() // width * width].view(-1, width), array[:width]
    seconds = []
    for read in (matrix.sum, lambda: torch.mv(matrix, vector)):
        for _ in range(3):
            start = time.perf_counter()
            read()
            seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return matrix.nbytes / min(seconds)
