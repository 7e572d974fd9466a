"""What a run has finished, on the disk after every decoder block, so that the next one goes on from there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import Interrupted, NMError
from ..packing.safetensors_files import TensorLocation, read_header
from ..packing.tensor_files import tensor_checksum, write_tensors
from .activations import Activations
from .durable import durable_file, sync_folder, without_interruption
from .ranks import broadcast, first_rank, gather, rank
from .together import RankLost

_MANIFEST, _LOCK, _CHECKPOINT, _REPLACED = "manifest.json", "lock", "checkpoint", "replaced"
_FORMAT = 2


@dataclass
class Part:
    """The tensors of one decoder block, or those outside all blocks, and what was reported about them."""

    file: str
    checksums: dict[str, str]
    report: dict[str, Any]


@dataclass
class Manifest:
    """All that a run needs to go on.

    Attributes:
        identity: digests by name of what the result depends on.
        chosen: the configuration as it is applied, once it is known.
        parts: in the order in which they were finished; one per block, then one for what lies outside them.
        activations: by name, as `Activations.save` gives them: those after the last finished block.
        seconds: that the finished parts took.
        published: the checkpoint is whole and takes, or has taken, its name.
    """

    identity: dict[str, str]
    format: int = _FORMAT
    chosen: dict[str, Any] | None = None
    parts: list[Part] = field(default_factory=list)
    activations: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    published: bool = False


class WorkFolder:
    """A folder that only its files under their final names, and the manifest, make sense of: whatever moment a process
    is killed at, the manifest names whole files.

    Of ranks that work together, all write their activations, and the first everything else.

    Args:
        path: exists already.

    Attributes:
        manifest: of this run, once it has begun; before, of the run that left the folder, or None.
        begun: whether it has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun = False
        self.manifest: Manifest | None = None
        file = path / _MANIFEST
        try:
            saved = json.loads(file.read_text())
            self.manifest = Manifest(**{**saved, "parts": [Part(**part) for part in saved["parts"]]})
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError):
            raise NMError(f"{file} is not readable; begin anew (--restart, restart=True).") from None

    @property
    def done(self) -> int:
        """How many parts are finished."""
        return 0 if self.manifest is None else len(self.manifest.parts)

    def begin(self, identity: dict[str, str]) -> Manifest:
        """Go on with the run that left the folder, or begin a new one.

        Args:
            identity: digests by name of what the result depends on.

        Raises:
            NMError: what is finished is of something else, or is damaged.
        """
        self.manifest = first_rank(partial(self._begin, identity))
        self.begun = True
        return self.manifest

    def _begin(self, identity: dict[str, str]) -> Manifest:
        if self.manifest is not None:
            other = [name for name, digest in identity.items() if self.manifest.identity.get(name) != digest]
            if other or self.manifest.format != _FORMAT:
                what = other[0] if other else "version of optimum-nm"
                raise NMError(
                    f"{self.path} holds {self.done} finished blocks of a run with another {what}; give what that run "
                    "was given to go on, or begin anew (--restart, restart=True)."
                )
            self._check_parts()
        else:
            self.manifest = Manifest(identity)
            self._write_manifest()
        return self.manifest

    def choose(self, chosen: dict[str, Any]) -> None:
        """Remember the configuration as it is applied."""
        assert self.manifest is not None
        self.manifest.chosen = chosen
        self._write_manifest()

    def commit(
        self,
        tensors: Mapping[str, Tensor | TensorLocation],
        report: dict[str, Any],
        activations: list[Activations],
        seconds: float,
    ) -> None:
        """Make the next part durable: it is finished when this returns, and Ctrl-C waits until then.

        Args:
            tensors: what the checkpoint gets of it.
            report: about it, as JSON has it.
            activations: those after it; none if they are the same as before.
            seconds: that it took.

        Raises:
            OSError: it cannot be written.
        """
        assert self.manifest is not None
        with without_interruption():
            saved = {each.name: each.save(self.path) for each in activations}
            of_all = {name: of_rank[name] for of_rank in gather(saved) for name in of_rank}
            if rank() == 0:
                self._add_part(tensors, report, of_all, seconds)
            self.manifest = broadcast(self.manifest)

    def _add_part(
        self,
        tensors: Mapping[str, Tensor | TensorLocation],
        report: dict[str, Any],
        activations: dict[str, dict[str, Any]],
        seconds: float,
    ) -> None:
        assert self.manifest is not None
        name = f"part-{self.done:05}.safetensors"
        checksums: dict[str, str] = {}
        with durable_file(self.path / name) as stream:
            checksums |= write_tensors(stream, tensors)
        if activations:
            self.manifest.activations = activations
        self.manifest.parts.append(Part(name, checksums, report))
        self.manifest.seconds += seconds
        self._write_manifest()
        self._sweep()

    def tensors(self) -> dict[str, tuple[TensorLocation, str]]:
        """Place and checksum of every finished tensor."""
        assert self.manifest is not None
        found = {}
        for part in self.manifest.parts:
            for name, location in read_header(self.path / part.file).items():
                found[name] = (location, part.checksums[name])
        return found

    def part(self, number: int) -> dict[str, TensorLocation]:
        """The tensors of one finished part."""
        assert self.manifest is not None
        return read_header(self.path / self.manifest.parts[number].file)

    def new_checkpoint(self) -> Path:
        """The path of a folder to be made inside, which has the checkpoint until it is published."""
        shutil.rmtree(self.path / _CHECKPOINT, ignore_errors=True)
        return self.path / _CHECKPOINT

    def publish(self, target: Path) -> None:
        """Give the checkpoint folder inside its name, in place of what has it, and remove the rest."""
        assert self.manifest is not None
        checkpoint = self.path / _CHECKPOINT
        for file in checkpoint.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(checkpoint)
        self.manifest.published = True
        self._write_manifest()
        with without_interruption():
            if target.exists():
                shutil.rmtree(self.path / _REPLACED, ignore_errors=True)
                target.rename(self.path / _REPLACED)
            checkpoint.rename(target)
            sync_folder(target.parent)
            _remove(self.path)

    def _check_parts(self) -> None:
        for name, (location, checksum) in self.tensors().items():
            if tensor_checksum(location) != checksum:
                raise NMError(f"tensor {name!r} in {location.file} is damaged; begin anew (--restart, restart=True).")

    def _write_manifest(self) -> None:
        assert self.manifest is not None
        with durable_file(self.path / _MANIFEST) as stream:
            stream.write(json.dumps(asdict(self.manifest)).encode())

    def _sweep(self) -> None:
        """Remove the activations of blocks before the last finished one."""
        assert self.manifest is not None
        kept = {saved["file"] for saved in self.manifest.activations.values()}
        names = {name.partition(".")[0] for name in self.manifest.activations} | {"targets"}
        for file in self.path.iterdir():
            if file.name.rpartition("-")[0].partition(".")[0] in names and file.name not in kept:
                file.unlink()


@contextmanager
def work_folder(target: Path, restart: bool) -> Iterator[WorkFolder]:
    """The folder `.NAME.nm-partial` beside `target`, for one process at a time.

    An NMError, which another try would meet again, removes what the run has begun. After anything else that ends it
    early the folder stays if a block is finished.

    Args:
        restart: forget what an earlier run has finished.

    Raises:
        NMError: the folder cannot be written, or another process is writing it.
        Interrupted: the disk is full, or another rank has ended, with a sentence that says how to go on.
        KeyboardInterrupt: with such a sentence.
    """
    path = _path(target)
    created = [parent for parent in target.parents if not parent.exists()]
    work, useless = None, False
    try:
        with _opened(path, restart):
            work = WorkFolder(path)
            try:
                yield work
            except NMError as error:
                useless = work.begun and not isinstance(error, Interrupted)
                raise
    except RankLost as lost:
        raise Interrupted(f"{lost}{_how_to_go_on(work)}") from None
    except Timeout:
        raise NMError(f"another process is writing {path}; wait until it ends.") from None
    except OSError as error:
        reason = ": ".join(filter(None, (error.filename and Path(error.filename).name, error.strerror)))
        raise Interrupted(f"output folder {target} cannot be written ({reason}).{_how_to_go_on(work)}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted.{_how_to_go_on(work)}") from None
    finally:
        if rank() == 0:
            if work is not None and (useless or not work.done):
                shutil.rmtree(path, ignore_errors=True)
            for parent in created:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()


@contextmanager
def _opened(path: Path, restart: bool) -> Iterator[None]:
    """The folder, which the first rank makes and locks before the others see it."""
    if rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / _LOCK, timeout=0):
            if restart or not (path / _MANIFEST).exists():
                _clear(path)
            broadcast(None)
            yield
    else:
        broadcast(None)
        if not path.exists():
            raise NMError(f"{path} is not there for rank {rank()}; the output must be on a disk that all ranks share.")
        yield


def remove_left_over(target: Path) -> None:
    """Remove the folder of a run whose checkpoint has taken its name, where only this was cut short."""
    path = _path(target)
    if not target.exists() or not path.exists() or (path / _CHECKPOINT).exists():
        return
    with suppress(Timeout), FileLock(path / _LOCK, timeout=0):
        manifest = WorkFolder(path).manifest
        if manifest.published if manifest is not None else _only_lock(path):
            _remove(path)


def _remove(path: Path) -> None:
    """With the manifest after everything that it names, so that what is left if this is cut short can be told."""
    _clear(path, but=_MANIFEST)
    shutil.rmtree(path)


def _path(target: Path) -> Path:
    return target.with_name(f".{target.name}.nm-partial")


def _clear(path: Path, but: str = _LOCK) -> None:
    for file in path.iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        elif file.name not in (_LOCK, but):
            file.unlink()


def _only_lock(path: Path) -> bool:
    return all(file.name == _LOCK for file in path.iterdir())


def _how_to_go_on(work: WorkFolder | None) -> str:
    if work is None or not work.done:
        return ""
    return f" {work.done} blocks are finished and kept in {work.path}; the same command goes on from there."
