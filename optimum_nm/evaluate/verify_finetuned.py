"""Whether a model that was fine-tuned from a packed checkpoint is zero wherever the checkpoint leaves a weight out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..errors import NMError
from ..nn.convert import linear_layers
from ..packing.checkpoint import PackedCheckpoint
from ..packing.safetensors_files import DTYPES, locate_tensors
from ..packing.tensor_files import read_tensor


def finetuned_problems(folder: Path, checkpoint: PackedCheckpoint, skeleton: nn.Module) -> Iterator[str]:
    """One sentence for each packed layer whose weight in `folder`, a model with dense tensors, has another pattern.

    Args:
        checkpoint: with its `features`.
        skeleton: the model, of any weights.
    """
    try:
        locations = locate_tensors(folder)
    except NMError as error:
        yield " ".join(str(error).split())
        return
    linears = linear_layers(skeleton)
    for name in tqdm(checkpoint.layer_names(), desc="Fine-tuned weights", unit="layer"):
        location = locations.get(f"{name}.weight")
        if location is None:
            yield f"{folder} has no tensor '{name}.weight', a dense weight fine-tuned from {checkpoint.folder}."
            continue
        try:
            packed = checkpoint.packed(name)
            kept = packed.mask() | packed.outlier_mask()
        except (NMError, ValueError):  # which is among the problems of the checkpoint
            continue
        if isinstance(linears[name], Conv1D):
            kept = kept.T
        if location.shape != tuple(kept.shape) or not DTYPES[location.dtype].is_floating_point:
            found = f"{location.dtype} {list(location.shape)}"
            yield f"{name}.weight in {location.file} is {found}; the checkpoint's is of shape {list(kept.shape)}."
            continue
        yield from _added(name, read_tensor(location), kept, folder)


def _added(name: str, weight: Tensor, kept: Tensor, folder: Path) -> Iterator[str]:
    added = (weight != 0) & ~kept
    if added.any():
        place = tuple(torch.nonzero(added)[0].tolist())
        yield (
            f"{name}.weight in {folder} has {int(added.sum())} elements, the first at {place}, "
            "where the checkpoint has none; fine-tune with KeepMaskCallback."
        )
