"""Hidden states between decoder blocks, in memory or in a file."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..packing.tensor_files import tensor_bytes

_CHUNK = 1 << 24


class ActivationFile(Sequence[Tensor]):
    """Tensors one after the other in a file; each is read anew whenever it is asked for.

    Args:
        path: of the file, which the first `append` creates.
        device: of the tensors that are read.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self._places: list[tuple[int, list[int], torch.dtype]] = []  # offset, shape, type
        self._end, self._checksum = 0, 0

    @classmethod
    def open(cls, folder: Path, saved: dict[str, Any], device: torch.device) -> ActivationFile:
        """The file that `sync` told of.

        Raises:
            OSError: it is missing or damaged.
        """
        file = cls(folder / saved["file"], device)
        file._places = [
            (offset, shape, getattr(torch, dtype.removeprefix("torch."))) for offset, shape, dtype in saved["tensors"]
        ]
        file._end, file._checksum = saved["bytes"], saved["checksum"]
        checksum = 0
        with file.path.open("rb") as stream:
            while piece := stream.read(_CHUNK):
                checksum = zlib.crc32(piece, checksum)
        if checksum != saved["checksum"]:
            raise OSError(0, "it has changed; begin anew, with --restart or restart=True", str(file.path))
        return file

    def append(self, tensor: Tensor) -> None:
        content = tensor_bytes(tensor.detach().cpu().contiguous())
        with self.path.open("ab" if self._places else "wb") as stream:
            stream.write(content)
        self._places.append((self._end, list(tensor.shape), tensor.dtype))
        self._end += len(content)
        self._checksum = zlib.crc32(content, self._checksum)

    def sync(self) -> dict[str, Any]:
        """Wait until the file is on the disk; returns what `open` needs, as JSON has it."""
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())
        tensors = [[offset, shape, str(dtype)] for offset, shape, dtype in self._places]
        return {"file": self.path.name, "bytes": self._end, "checksum": self._checksum, "tensors": tensors}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        offset, shape, dtype = self._places[index]
        tensor = torch.empty(shape, dtype=dtype)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            left = tensor_bytes(tensor)
            while left:  # one call reads less than 2 GiB
                left = left[stream.readinto(left) or len(left) :]
        return tensor.to(self.device)


class Activations(Sequence[Tensor]):
    """One tensor a batch, which blocks replace by their outputs.

    Args:
        folder: of files `NAME-GENERATION` in which the tensors live; None to have them in memory. `replace` never
            changes a file but writes the next generation, so that a run can go on from the last whole one.
        name: of the files.
        device: of the tensors.
    """

    def __init__(self, folder: Path | None = None, name: str = "hidden", device: torch.device | str = "cpu") -> None:
        self._folder, self.name, self._device = folder, name, torch.device(device)
        self._generation = 0
        self._tensors = self._new()

    def _new(self) -> list[Tensor] | ActivationFile:
        return [] if self._folder is None else self._file(self._folder)

    def _file(self, folder: Path) -> ActivationFile:
        return ActivationFile(folder / f"{self.name}-{self._generation}", self._device)

    def append(self, tensor: Tensor) -> None:
        self._tensors.append(tensor)

    def clear(self) -> None:
        self._tensors = self._new()

    def replace(self, change: Callable[[int], Tensor]) -> None:
        """Put `change(batch)`, which may read any tensor, in the place of each, in order."""
        self._generation += 1
        if isinstance(self._tensors, list):
            for batch in range(len(self._tensors)):
                self._tensors[batch] = change(batch)
            return
        following = self._new()
        for batch in range(len(self._tensors)):
            following.append(change(batch))
        self._tensors = following

    def save(self, folder: Path) -> dict[str, Any]:
        """Make the tensors durable in `folder`, where those that live in files must live; returns what `restore` needs.

        Raises:
            OSError: the file cannot be written.
        """
        if isinstance(self._tensors, ActivationFile):
            return {"generation": self._generation, **self._tensors.sync()}
        file = self._file(folder)
        for tensor in self._tensors:
            file.append(tensor)
        return {"generation": self._generation, **file.sync()}

    def restore(self, folder: Path, saved: dict[str, Any]) -> None:
        """Have what was saved.

        Raises:
            OSError: the file is missing or damaged.
        """
        file = ActivationFile.open(folder, saved, self._device)
        self._generation = saved["generation"]
        self._tensors = list(file) if self._folder is None else file

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)

    def __getitem__(self, index: Any) -> Any:
        return self._tensors[index]
