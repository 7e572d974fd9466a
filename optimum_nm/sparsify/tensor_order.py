"""The order of tensors inside safetensors files: layers that read the same input, one after the other.

safetensors leaves the order free. Rows of packed weights that follow each other are one matrix to whoever maps the
file, so that a graph can multiply by query, key and value projections at once (`onnx.joint_projections`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..packing.safetensors_files import DTYPES, TensorLocation

JOINT_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def arranged(locations: Mapping[str, TensorLocation], names: Iterable[str]) -> list[str]:
    """The names of tensors of one file with the rows of JOINT_LAYERS side by side.

    Wider elements come before narrower ones, as transformers has it, so that all stay aligned.
    """
    return sorted(names, key=lambda name: _place(name, locations[name]))


def split_into_files(locations: Mapping[str, TensorLocation], largest: int) -> list[list[str]]:
    """The names of tensors file by file, none of more than `largest` bytes unless one parent module's tensors are.

    Args:
        locations: in the order of the model. Modules side by side, whose rows may be joint, stay in one file.
    """
    files: list[list[str]] = [[]]
    size = 0
    for group in _siblings(locations):
        nbytes = sum(locations[name].nbytes for name in group)
        if files[-1] and size + nbytes > largest:
            files.append([])
            size = 0
        files[-1] += group
        size += nbytes
    return files


def _siblings(names: Iterable[str]) -> list[list[str]]:
    """Runs of tensors whose modules have the same parent."""
    groups: list[list[str]] = []
    last = None
    for name in names:
        parent = name.split(".")[:-2]
        if parent != last:
            groups.append([])
        groups[-1].append(name)
        last = parent
    return groups


def _place(name: str, location: TensorLocation) -> tuple[int, list[str], str, str, int]:
    *parent, layer, role = ["", *name.split(".")]
    group = next((layers for layers in JOINT_LAYERS if layer in layers), (layer,))
    return -DTYPES[location.dtype].itemsize, parent, group[0], role, group.index(layer)
