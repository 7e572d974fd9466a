"""The kernel benchmark as a picture: latency by rows, bandwidth reached, and bits a weight against time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NMError
from .kernel_benchmark import PATTERN, KernelBenchmark, Timing
from .kernel_models import kernels
from .kernel_weights import OUTLIERS
from .pictures import require_matplotlib, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_plot_file(file: Path) -> Path:
    """Raise NMError, before anything is measured, unless a picture can be written to `file`."""
    require_matplotlib()
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
    figure = Figure(figsize=(23, 7 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), 3, squeeze=False)
    for (in_features, out_features), (latency, bandwidth, size) in zip(shapes, axes, strict=True):
        timings = [t for t in result.timings if (t.in_features, t.out_features) == (in_features, out_features)]
        timings = [t for t in timings if t.threads == threads]
        fewest = [t for t in timings if t.rows == min(t.rows for t in timings)]
        ideal = result.bandwidth(threads)
        _plot_latency(latency, timings)
        _plot_bandwidth(bandwidth, fewest, ideal)
        _plot_size(size, fewest, ideal)
        latency.set_title(f"{in_features}×{out_features}, {threads} thread{'s' if threads > 1 else ''}")
    about = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    figure.suptitle(about, fontsize="small")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_picture(figure, file, dpi=100)


def _style(timing: Timing) -> dict[str, Any]:
    """Colour by value type, marker by positions, dashes for outliers, pale for accuracy level 0."""
    name = timing.kernel
    if not timing.rivals:
        order = [dense for dense, kernel in kernels(PATTERN).items() if not kernel.rivals]
        grey = str(0.7 * order.index(name) / len(order))
        return {"color": grey, "marker": "sPXdv"[order.index(name)], "linestyle": ":"}
    types = ("float32", "float16", "bfloat16", "int8", "int4")
    return {
        "color": f"C{types.index(name.split()[1])}",
        "marker": "o" if "codes" in name else "^",
        "linestyle": "--" if str(OUTLIERS) in name else "-",
        "alpha": 0.4 if "accuracy level 0" in name else 1.0,
    }


def _plot_latency(axes: Axes, timings: list[Timing]) -> None:
    rows = sorted({timing.rows for timing in timings})
    for name in dict.fromkeys(timing.kernel for timing in timings):
        of_kernel = {timing.rows: timing for timing in timings if timing.kernel == name}
        axes.plot(rows, [of_kernel[m].median * 1e6 for m in rows], label=name, **_style(of_kernel[rows[0]]))
    axes.set(xscale="log", yscale="log", xlabel="rows of activations", ylabel="µs per matrix product")
    axes.set_xticks(rows, labels=[str(m) for m in rows], minor=False)
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.grid(alpha=0.3)


def _plot_bandwidth(axes: Axes, timings: list[Timing], ideal: float) -> None:
    names = [timing.kernel for timing in timings]
    axes.barh(names, [t.bandwidth / 1e9 for t in timings], color=[_style(t)["color"] for t in timings])
    axes.axvline(ideal / 1e9, color="black", linestyle=":", label="memory reads")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="x-small")
    axes.set(xlabel=f"GB/s of weights read, M = {timings[0].rows}")
    axes.legend()


def _plot_size(axes: Axes, timings: list[Timing], ideal: float) -> None:
    for timing in timings:
        axes.plot(timing.bits_per_weight, timing.median * 1e6, **_style(timing))
    most = max(timing.bits_per_weight for timing in timings)
    elements = timings[0].in_features * timings[0].out_features
    axes.plot([0, most], [0, most * elements / 8 / ideal * 1e6], "k:", label="memory reads")
    axes.set(xlabel="bits per weight", ylabel=f"µs per matrix product, M = {timings[0].rows}", ylim=0, xlim=0)
    axes.legend()
    axes.grid(alpha=0.3)
