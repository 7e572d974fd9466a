"""The kernel benchmark as a picture: latency by rows, bandwidth reached, and bits a weight against time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NMError
from .kernel_benchmark import KernelBenchmark, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_plot_file(file: Path) -> Path:
    """Raise NMError, before anything is measured, unless a picture can be written to `file`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NMError("matplotlib is not installed; `pip install 'optimum-nm[report]'` brings it.") from None
    if file.suffix.lower() != ".png":
        raise NMError(f"plot {str(file)!r} has not the ending .png; pictures are PNG files.")
    if not file.absolute().parent.is_dir():
        raise NMError(f"plot {str(file)!r} lies in a folder that does not exist.")
    return file


def plot(result: KernelBenchmark, file: Path) -> None:
    """Write one row of three diagrams for each shape, of the greatest number of threads.

    Raises:
        NMError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    threads = max(result.bandwidths)
    shapes = list(dict.fromkeys((t.in_features, t.out_features) for t in result.timings))
    figure = Figure(figsize=(20, 7 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), 3, squeeze=False)
    colours = _colours(result)
    for (in_features, out_features), (latency, bandwidth, size) in zip(shapes, axes, strict=True):
        timings = [t for t in result.timings if (t.in_features, t.out_features) == (in_features, out_features)]
        timings = [t for t in timings if t.threads == threads]
        fewest = [t for t in timings if t.rows == min(t.rows for t in timings)]
        ideal = result.bandwidth(threads)
        _plot_latency(latency, timings, colours)
        _plot_bandwidth(bandwidth, fewest, ideal, colours)
        _plot_size(size, fewest, ideal, colours)
        latency.set_title(f"{in_features}×{out_features}, {threads} threads")
    about = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    figure.suptitle(about, fontsize="small")
    temporary = file.with_name(f".{file.name}.partial")
    try:
        figure.savefig(temporary, format="png", dpi=100)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise NMError(f"plot {str(file)!r} cannot be written ({error.strerror}).") from None


def _colours(result: KernelBenchmark) -> dict[str, Any]:
    from matplotlib import colormaps

    names = list(dict.fromkeys(timing.kernel for timing in result.timings))
    return {name: colormaps["turbo"]((index + 0.5) / len(names)) for index, name in enumerate(names)}


def _plot_latency(axes: Axes, timings: list[Timing], colours: dict[str, Any]) -> None:
    for name in dict.fromkeys(timing.kernel for timing in timings):
        of_kernel = sorted((t for t in timings if t.kernel == name), key=lambda timing: timing.rows)
        rows = [timing.rows for timing in of_kernel]
        line = "o-" if name.startswith("8:16") else "s--"
        axes.plot(rows, [t.median * 1e6 for t in of_kernel], line, color=colours[name], label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows of activations", ylabel="µs per matrix product")
    axes.legend(fontsize="xx-small")
    axes.grid(alpha=0.3)


def _plot_bandwidth(axes: Axes, timings: list[Timing], ideal: float, colours: dict[str, Any]) -> None:
    names = [timing.kernel for timing in timings]
    axes.barh(names, [t.bandwidth / 1e9 for t in timings], color=[colours[name] for name in names])
    axes.axvline(ideal / 1e9, color="black", linestyle=":", label="memory reads")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="x-small")
    axes.set(xlabel=f"GB/s of weights read, {timings[0].rows} rows")
    axes.legend()


def _plot_size(axes: Axes, timings: list[Timing], ideal: float, colours: dict[str, Any]) -> None:
    bits = [timing.bits_per_weight for timing in timings]
    for timing in timings:
        marker = "o" if timing.kernel.startswith("8:16") else "s"
        axes.plot(timing.bits_per_weight, timing.median * 1e6, marker, color=colours[timing.kernel])
        axes.annotate(timing.kernel, (timing.bits_per_weight, timing.median * 1e6), fontsize="xx-small")
    elements = timings[0].in_features * timings[0].out_features
    axes.plot([0, max(bits)], [0, max(bits) * elements / 8 / ideal * 1e6], "k:", label="memory reads")
    axes.set(xlabel="bits per weight", ylabel=f"µs per matrix product, {timings[0].rows} rows", ylim=0)
    axes.legend()
    axes.grid(alpha=0.3)
