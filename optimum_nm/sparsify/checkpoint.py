"""Writing the checkpoint folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, __version__

from ..config import NMConfig
from ..errors import NMError
from ..packing.safetensors_files import TensorLocation, locate_tensors
from .summary import SparsificationSummary
from .tensor_order import arrange_tensors

CHECKSUMS_FILE = "nm_checksums.json"
SUMMARY_FILE = "nm_summary.json"


@contextmanager
def output_folder(save_dir: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `save_dir` that takes its name when the `with` block ends well, and else disappears.

    Raises:
        NMError: on entering: `save_dir` exists and `overwrite` is false, or is neither empty nor a model folder, or
            cannot be written.
    """
    target = Path(save_dir).expanduser().absolute()
    if target.exists() and not overwrite:
        raise NMError(
            f"output folder {save_dir} exists; choose another, or overwrite it (--overwrite, overwrite=True)."
        )
    if target.exists() and not (target.is_dir() and ((target / "config.json").exists() or not any(target.iterdir()))):
        raise NMError(f"output folder {save_dir} is not a model folder; only a model's or an empty one is replaced.")
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
) -> None:
    """Write everything a packed checkpoint holds into an existing folder.

    config.json (with the quantization_config), model.safetensors, the generation configuration, the tokenizer, the
    checksums of the tensors and the summary.
    """
    model.config.quantization_config = config.to_dict()
    model.save_pretrained(folder)
    arrange_tensors(folder)
    # A fast tokenizer is whole in tokenizer.json; the slow one's file would be a copy of a GGUF file it was read from.
    tokenizer.save_pretrained(folder, legacy_format=False if tokenizer.is_fast else None)
    stored = locate_tensors(folder)
    for layer in summary.layers:
        if f"{layer.name}.values" not in stored:
            raise NMError(f"{layer.name} is stored under another name by transformers {__version__}; exclude it.")
    _write_json(folder / CHECKSUMS_FILE, tensor_checksums(folder))
    _write_json(folder / SUMMARY_FILE, summary.to_dict())


def tensor_checksums(folder: Path) -> dict[str, str]:
    """{tensor name: its checksum in the folder's safetensors files}."""
    return {name: tensor_checksum(location) for name, location in sorted(locate_tensors(folder).items())}


def tensor_checksum(location: TensorLocation) -> str:
    """CRC-32 of a tensor's bytes, eight hexadecimal digits."""
    with location.file.open("rb") as stream:
        stream.seek(location.offset)
        left, checksum = location.nbytes, 0
        while left:
            chunk = stream.read(min(left, 1 << 24))
            checksum = zlib.crc32(chunk, checksum)
            left -= len(chunk)
    return f"{checksum:08x}"


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
