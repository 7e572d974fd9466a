"""A picture of a packed checkpoint: how large its weights are, and what their bits are spent on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from ..errors import NMError
from ..nn.skeleton import open_checkpoint
from ..packing.checkpoint import PackedCheckpoint
from ..packing.packed_weight import TENSOR_NAMES
from .inspect import inspect_checkpoint
from .pictures import require_matplotlib, save_picture

MAGNITUDES = np.arange(-20.0, 4.25, 0.25)  # log2|w|, edges of the bins


def magnitude_histogram(checkpoint: PackedCheckpoint) -> dict[str, npt.NDArray[np.int64]]:
    """Counts of log2|w| over MAGNITUDES of the "base" and the "outliers" of all layers, zeros left out.

    What lies outside MAGNITUDES counts in the first or last bin.
    """
    counts = {kind: np.zeros(len(MAGNITUDES) - 1, dtype=np.int64) for kind in ("base", "outliers")}
    for name in tqdm(checkpoint.layer_names(), desc="Histogram", unit="layer"):
        packed = checkpoint.packed(name)
        packed.validate(name)
        for _, part in packed.row_blocks():
            weight, outlier_mask = part.unpack(), part.outlier_mask()
            for kind, values in (("base", weight[~outlier_mask]), ("outliers", weight[outlier_mask])):
                magnitudes = np.log2(values[values != 0].abs().numpy())
                counts[kind] += np.histogram(magnitudes.clip(MAGNITUDES[0], MAGNITUDES[-1]), MAGNITUDES)[0]
    return counts


def plot_checkpoint(folder: str | Path, file: str | Path) -> None:
    """Write a PNG: the histogram of all packed weights, and the bits per weight of each layer type.

    Raises:
        NMError: matplotlib is missing, the file cannot be written, or the checkpoint is damaged.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    file = Path(file).expanduser()
    if not file.parent.is_dir():
        raise NMError(f"{file} cannot be written; there is no folder {file.parent}.")
    counts = magnitude_histogram(open_checkpoint(folder))
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, count in counts.items():
        if count.any():
            left.stairs(count, MAGNITUDES, label=f"{kind} ({count.sum():,})", fill=True, alpha=0.6)
    left.set(xlabel="log2 |weight|", ylabel="weights", yscale="log", title="Non-zero weights by magnitude")
    left.legend()
    bits = _bits_by_type(folder)
    below = np.zeros(len(bits))
    for tensor in TENSOR_NAMES:
        height = np.array([kinds.get(tensor, 0.0) for kinds in bits.values()])
        if height.any():
            right.barh(list(bits), height, left=below, label=tensor)
            below += height
    right.invert_yaxis()
    right.set(xlabel="bits per weight", title="What they are stored in")
    right.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(TENSOR_NAMES), fontsize="small", frameon=False
    )
    save_picture(figure, file)


def _bits_by_type(folder: str | Path) -> dict[str, dict[str, float]]:
    """Per layer type (the last two parts of the name) the bits per weight of each packed tensor."""
    weights: dict[str, int] = {}
    nbytes: dict[str, dict[str, int]] = {}
    for layer in inspect_checkpoint(folder).layers:
        kind = ".".join(layer.name.split(".")[-2:])
        weights[kind] = weights.get(kind, 0) + layer.weights
        sums = nbytes.setdefault(kind, {})
        for tensor, size in layer.tensor_bytes.items():
            sums[tensor] = sums.get(tensor, 0) + size
    return {kind: {tensor: 8 * size / weights[kind] for tensor, size in sums.items()} for kind, sums in nbytes.items()}
