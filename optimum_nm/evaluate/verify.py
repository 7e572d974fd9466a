"""Whether a packed checkpoint is what docs/format.md says, down to the last byte; every problem is one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import INTEGER_DTYPES
from ..errors import NMError
from ..nn.convert import dense_weight, linear_layers
from ..nn.skeleton import model_skeleton
from ..packing.checkpoint import PackedCheckpoint
from ..packing.packed_weight import TENSOR_NAMES, PackedWeight
from ..packing.tensor_files import tensor_checksum
from ..packing.values import FLOAT_DTYPES, all_finite
from ..sparsify.checkpoint import CHECKSUMS_FILE
from .verify_finetuned import finetuned_problems
from .verify_onnx import onnx_problems


@dataclass
class Verification:
    """What was checked and what is wrong; `str()` is one line per problem.

    Attributes:
        layers: packed linears checked.
        tensors: tensors in the safetensors files.
        checksums: tensors whose checksum was compared; 0 where the folder has no nm_checksums.json.
        onnx: whether there is a model.onnx, which was checked too.
        finetuned: the model that was compared with the checkpoint, if one was.
    """

    folder: str
    layers: int
    tensors: int
    checksums: int
    onnx: bool
    finetuned: str | None
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": not self.problems}

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(self.problems)
        checked = [f"{self.layers} packed linears", f"{self.tensors} tensors", f"{self.checksums} checksums"]
        sound = f"{self.folder} is sound: {', '.join(checked)}{', model.onnx' if self.onnx else ''}."
        return f"{sound}\n{self.finetuned} has its pattern." if self.finetuned else sound


def verify_checkpoint(folder: str | Path, finetuned: str | Path | None = None) -> Verification:
    """Check a packed checkpoint: configuration, headers, checksums, every packed value, and model.onnx if there.

    Args:
        finetuned: folder of a dense model that was fine-tuned from it, which must be zero where the checkpoint leaves
            weights out.

    Whatever the files hold, the answer is a list of problems, never an exception.
    """
    folder = Path(folder)
    onnx_file = folder / "model.onnx"
    found = Verification(str(folder), 0, 0, 0, onnx_file.is_file(), None if finetuned is None else str(finetuned), [])
    try:
        checkpoint = PackedCheckpoint(folder)
    except NMError as error:
        found.problems.append(_one_line(error))
        return found
    found.layers, found.tensors = len(checkpoint.layer_names()), len(checkpoint.locations)
    found.problems += _file_problems(checkpoint)
    checksums = _read_checksums(folder)
    if isinstance(checksums, str):
        found.problems.append(checksums)
    elif checksums is not None:
        found.checksums = len(checkpoint.locations.keys() & checksums.keys())
        found.problems += _checksum_problems(checkpoint, checksums)
    try:
        skeleton = model_skeleton(folder)
    except Exception as error:  # transformers says in many ways that it cannot read a config.json
        found.problems.append(f"{folder}/config.json describes no model that transformers knows: {_one_line(error)}")
    else:
        found.problems += _name_problems(checkpoint, skeleton)
        found.problems += _layer_problems(checkpoint, skeleton)
        if finetuned is not None:
            found.problems += finetuned_problems(Path(finetuned), checkpoint, skeleton)
    if found.onnx:
        found.problems += onnx_problems(onnx_file, checkpoint)
    return found


def _file_problems(checkpoint: PackedCheckpoint) -> Iterator[str]:
    """The tensors of a safetensors file follow each other without a gap to the end of the file."""
    by_place = sorted(checkpoint.locations.items(), key=lambda item: (item[1].file, item[1].offset, item[1].nbytes))
    for file, tensors in groupby(by_place, key=lambda item: item[1].file):
        with file.open("rb") as stream:
            end = 8 + int.from_bytes(stream.read(8), "little")
        for name, location in tensors:
            if location.offset != end:
                yield f"{file} has tensor {name!r} at byte {location.offset}; what comes before it ends at {end}."
            end = max(end, location.offset + location.nbytes)
        if end != file.stat().st_size:
            yield f"{file} goes on for {file.stat().st_size - end} bytes behind its last tensor."


def _read_checksums(folder: Path) -> dict[str, Any] | str | None:
    """The recorded checksums, None where there are none, or what is wrong with the file."""
    path = folder / CHECKSUMS_FILE
    if not path.exists():
        return None
    try:
        checksums = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} is not readable JSON ({_one_line(error)})."
    return checksums if isinstance(checksums, dict) else f"{path} holds no JSON object of checksums."


def _checksum_problems(checkpoint: PackedCheckpoint, checksums: dict[str, Any]) -> Iterator[str]:
    for name in sorted(checksums.keys() - checkpoint.locations.keys()):
        yield f"tensor {name!r} is missing; {CHECKSUMS_FILE} lists it."
    for name, location in tqdm(checkpoint.locations.items(), desc="Checksums", unit="tensor"):
        if name not in checksums:
            yield f"tensor {name!r} has no checksum in {CHECKSUMS_FILE}."
        elif (actual := tensor_checksum(location)) != checksums[name]:
            yield f"tensor {name!r} has checksum {actual}; {CHECKSUMS_FILE} says {checksums[name]}."


def _name_problems(checkpoint: PackedCheckpoint, skeleton: PreTrainedModel) -> Iterator[str]:
    """Every tensor of the model is there, packed or not as the configuration says, and there is no other."""
    linears = linear_layers(skeleton)
    packed = {name for name in linears if checkpoint.config.layer(name) is not None}
    parameters = skeleton.state_dict(keep_vars=True)
    expected = {name: tensor for name, tensor in parameters.items() if name.removesuffix(".weight") not in packed}
    if checkpoint.config.share_embedding:
        embedding = skeleton.get_input_embeddings().weight
        expected = {name: tensor for name, tensor in expected.items() if tensor is not embedding}
    stored = {id(tensor) for name, tensor in expected.items() if name in checkpoint.locations}
    for name, tensor in expected.items():
        if name not in checkpoint.locations and id(tensor) not in stored:  # else tied to one that is there
            yield f"tensor {name!r} is missing; the model has it."
        elif name in checkpoint.locations and checkpoint.locate(name).shape != tuple(tensor.shape):
            shape = list(checkpoint.locate(name).shape)
            yield f"tensor {name!r} has shape {shape}; the model's configuration asks for {list(tensor.shape)}."
    for name in sorted(packed - set(checkpoint.layer_names())):
        yield f"tensor '{name}.values' is missing; the configuration packs {name!r}."
    known = expected.keys() | {f"{name}.{tensor}" for name in linears for tensor in TENSOR_NAMES}
    for name in sorted(checkpoint.locations.keys() - known):
        yield f"tensor {name!r} belongs to no part of the model."


def _layer_problems(checkpoint: PackedCheckpoint, skeleton: PreTrainedModel) -> Iterator[str]:
    for name, module in linear_layers(skeleton).items():
        out_features, in_features = dense_weight(module).shape
        checkpoint.features[name] = (in_features, out_features)
    for name in tqdm(checkpoint.layer_names(), desc="Packed weights", unit="layer"):
        try:
            packed = checkpoint.packed(name)
        except NMError as error:
            yield _one_line(error)
        else:
            yield from packed.problems(name)
            yield from _non_finite_problems(name, packed)


def _non_finite_problems(name: str, packed: PackedWeight) -> Iterator[str]:
    dtypes = {"values": packed.config.weight_dtype, "outlier_values": packed.config.outlier_dtype}
    for tensor_name, dtype in dtypes.items():
        if tensor_name not in packed.tensors or dtype in INTEGER_DTYPES:
            continue
        bits = packed.tensors[tensor_name]
        if bits.element_size() == FLOAT_DTYPES[dtype].itemsize and not all_finite(bits.view(FLOAT_DTYPES[dtype])):
            yield f"{name}.{tensor_name} has elements that are not finite; every weight must be a finite number."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
