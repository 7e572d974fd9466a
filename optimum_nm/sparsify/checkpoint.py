"""Writing the checkpoint folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, __version__

from ..config import NMConfig
from ..errors import NMError
from ..packing.safetensors_files import INDEX_FILE, SINGLE_FILE, TensorLocation
from ..packing.tensor_files import write_tensors
from .summary import SparsificationSummary
from .tensor_order import arranged, split_into_files

CHECKSUMS_FILE = "nm_checksums.json"
SUMMARY_FILE = "nm_summary.json"
LARGEST_FILE = 5_000_000_000  # bytes of weights, as in transformers 4


def check_target(save_dir: str | Path, overwrite: bool) -> Path:
    """The absolute path of a checkpoint folder to be made.

    Raises:
        NMError: it exists and `overwrite` is false, or is neither empty nor a model folder.
    """
    target = Path(save_dir).expanduser().absolute()
    if target.exists() and not overwrite:
        raise NMError(
            f"output folder {save_dir} exists; choose another, or overwrite it (--overwrite, overwrite=True)."
        )
    if target.exists() and not (target.is_dir() and ((target / "config.json").exists() or not any(target.iterdir()))):
        raise NMError(f"output folder {save_dir} is not a model folder; only a model's or an empty one is replaced.")
    return target


@contextmanager
def output_folder(save_dir: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `save_dir` that takes its name when the `with` block ends well, and else disappears.

    Raises:
        NMError: on entering: as `check_target`, or it cannot be written.
    """
    target = check_target(save_dir, overwrite)
    created = [parent for parent in target.parents if not parent.exists()]
    temporary = None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise NMError(f"output folder {save_dir} cannot be written ({error.strerror}).") from None
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes it private
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            target.rename(old / "old")
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in created:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: NMConfig,
    summary: SparsificationSummary,
    stored: Mapping[str, tuple[TensorLocation, str]],
) -> None:
    """Write everything a packed checkpoint holds into a new folder.

    config.json (with the quantization_config), model.safetensors, in several files where it is large, the generation
    configuration, the tokenizer, the checksums of the tensors and the summary.

    Args:
        model: packed; its tensors may be on the meta device.
        stored: place and checksum of each of its tensors, tied ones once.

    Raises:
        OSError: a file cannot be written, or a stored tensor has changed.
    """
    folder.mkdir()
    model.config.quantization_config = config.to_dict()
    tensors = {name: stored[own] for name, own in _file_names(folder, model, stored).items()}
    # A fast tokenizer is whole in tokenizer.json; the slow one's file would be a copy of a GGUF file it was read from.
    tokenizer.save_pretrained(folder, legacy_format=False if tokenizer.is_fast else None)
    for layer in summary.layers:
        if f"{layer.name}.values" not in tensors:
            raise NMError(f"{layer.name} is stored under another name by transformers {__version__}; exclude it.")
    locations = {name: location for name, (location, _) in tensors.items()}
    checksums = _write_weights(folder, locations)
    changed = [name for name, checksum in checksums.items() if tensors[name][1] != checksum]
    if changed:
        raise OSError(0, f"tensor {changed[0]!r} has changed", str(locations[changed[0]].file))
    _write_json(folder / CHECKSUMS_FILE, dict(sorted(checksums.items())))
    _write_json(folder / SUMMARY_FILE, summary.to_dict())


def _file_names(folder: Path, model: PreTrainedModel, stored: Mapping[str, object]) -> dict[str, str]:
    """{name in the file: name in `stored`} of every tensor, in the model's order.

    transformers, which knows the names and what is tied, saves the model with a number in the place of each tensor,
    and so writes the rest of the folder.
    """
    tensors = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        if name in stored:
            names.setdefault(id(tensor), name)
    numbers = {key: torch.tensor([number]) for number, key in enumerate(names)}
    model.save_pretrained(folder, state_dict={name: numbers[id(tensor)] for name, tensor in tensors.items()})
    saved = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    in_order = list(names.values())
    return {name: in_order[int(saved[name])] for name in sorted(saved, key=lambda name: int(saved[name]))}


def _write_weights(folder: Path, locations: dict[str, TensorLocation]) -> dict[str, str]:
    """Write the weight files, and the index of several; returns the checksums."""
    files = split_into_files(locations, LARGEST_FILE)
    checksums: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        with (folder / file).open("wb") as stream:
            checksums |= write_tensors(stream, {name: locations[name] for name in arranged(locations, names)})
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(location.nbytes for location in locations.values())
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return checksums


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
