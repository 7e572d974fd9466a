"""The processes that a launcher started to work on one model together, and what becomes of them when one ends early."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import torch
import torch.distributed as dist

from ..errors import Interrupted, NMError
from ..launch import launched_processes, local_rank

_TIMEOUT = timedelta(days=7)  # of collectives: the watch ends a run long before, and a rank may have much to do alone
_NOTICE = 2.0  # seconds in which the watch learns why a collective failed
_GRACE = 60.0  # seconds in which the main thread must have ended; it may hang in a collective that never fails


class RankLost(Interrupted):
    """A rank ended before its time."""


class Watch:
    """Connections from the first rank to all others, which close when a process ends, whatever ends it.

    The first rank tells the others what it learns. The reason is raised in the main thread, where SIGTERM wakes it, or
    when a collective fails.

    Args:
        rank: of this process, among `size`.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.first_lost = False
        self.over = threading.Event()
        self._cause: NMError | None = None
        self._ending_since: float | None = None
        self._name = f"rank {rank} of {size} (process {os.getpid()} on {socket.gethostname()})"
        self._peers = self._connect()
        self._previous: Any = signal.SIG_DFL
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._previous = signal.signal(signal.SIGTERM, self._terminated)
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def raise_cause(self, otherwise: NMError | None = None) -> None:
        """Raise why the run ends, as soon as it is known; in the end `otherwise`, if there is such."""
        deadline = time.monotonic() + _NOTICE
        while self._cause is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if (cause := self._cause or otherwise) is not None:
            self._ending_since = time.monotonic()
            raise cause

    def tell(self, error: BaseException) -> None:
        """Let the other ranks end, for the reason that ends this one."""
        self._ending_since = time.monotonic()
        if self._cause is None:
            other = RankLost(f"{self._name} has ended with {type(error).__name__}.")
            self._send(error if isinstance(error, NMError) else other)

    def stop(self) -> None:
        """Leave when all are about to."""
        self._send(None)
        self._thread.join()
        for connection in self._peers:
            connection.close()
        if self._in_main:
            signal.signal(signal.SIGTERM, self._previous)

    def _connect(self) -> dict[Connection, str]:
        """Connections with the names of those at their other ends."""
        if self.rank:
            port, key, name = _from_first(None)
            first: Connection = Client((os.environ.get("MASTER_ADDR", "localhost"), port), authkey=key)
            first.send(self._name)
            peers = {first: name}
        else:
            key = secrets.token_bytes(16)
            with Listener(("", 0), backlog=self.size, authkey=key) as listener:
                _from_first((listener.address[1], key, self._name))
                connections = [listener.accept() for _ in range(self.size - 1)]
            peers = {connection: connection.recv() for connection in connections}
        for connection in peers:
            _keep_alive(connection)
        return peers

    def _send(self, told: NMError | None) -> None:
        for connection in self._peers:
            with suppress(OSError):
                connection.send(told)

    def _look(self) -> None:
        """In a thread: until all others have left, or one says or shows that the run ends early."""
        peers = dict(self._peers)
        while peers:
            for connection in wait(list(peers)):
                assert isinstance(connection, Connection)
                try:
                    told = connection.recv()
                except (EOFError, OSError):
                    told = RankLost(f"{peers[connection]} has ended unexpectedly.")
                    self.first_lost = self.rank > 0
                del peers[connection]
                if told is not None:
                    self._end(told)
                    return

    def _end(self, cause: NMError) -> None:
        """Wake the main thread, or if that does not help end the process."""
        if self._ending_since is not None:
            return
        self._cause = cause
        if not self.rank:
            self._send(cause)
        if self._in_main:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if not self.over.wait(_GRACE):
            print(cause, file=sys.stderr, flush=True)
            os._exit(1)

    def _terminated(self, *_: object) -> None:
        """At SIGTERM, from the watch or from a launcher, which may have noticed first that a rank has ended."""
        if self._ending_since is None:
            self.raise_cause(RankLost(f"{self._name} was terminated."))
        elif time.monotonic() > self._ending_since + _GRACE:  # before, it is about what is being told already
            signal.signal(signal.SIGTERM, self._previous)
            signal.raise_signal(signal.SIGTERM)


_watch: Watch | None = None


def watch() -> Watch | None:
    """Of the ranks that work together; None for a process that works alone."""
    return _watch


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as if there were no others."""
    global _watch
    kept, _watch = _watch, None
    try:
        yield
    finally:
        _watch = kept


@contextmanager
def together() -> Iterator[None]:
    """Inside, the processes that torchrun or `accelerate launch` started are ranks of one run, which end together.

    It uses the default process group of torch.distributed, which must take tensors on CPUs too, and makes one where
    there is none: gloo, with NCCL for tensors on GPUs. A process that was started alone, or is inside already, goes on
    as it is.

    Raises:
        NMError: that ended another rank.
        RankLost: another process has ended.
    """
    global _watch
    if _watch is not None or not _launched():
        yield
        return
    joined = not dist.is_initialized()
    if joined:
        _join()
    _watch = current = Watch(dist.get_rank(), dist.get_world_size())
    try:
        yield
        current.stop()
    except BaseException as error:
        current.tell(error)
        if isinstance(error, NMError):
            error.reported = current.rank > 0 and not current.first_lost
        raise
    finally:
        _watch = None
        if joined:
            dist.destroy_process_group()
        current.over.set()


def own_device(name: str) -> str:
    """The device of this process: "auto" stands for a GPU if there is one; each rank of a machine has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{local_rank()}" if name == "cuda" and _watch is not None else name


def _launched() -> bool:
    """Whether this process has others beside it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return dist.is_available() and launched_processes() > 1


def _join() -> None:
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local_rank() % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_TIMEOUT)


def _from_first(value: Any) -> Any:
    content = [value]
    dist.broadcast_object_list(content, 0)
    return content[0]


def _keep_alive(connection: Connection) -> None:
    """Have the connection close within a minute, too, when the machine at its other end vanishes."""
    with socket.socket(fileno=os.dup(connection.fileno())) as twin:
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):  # not on every system
                twin.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
