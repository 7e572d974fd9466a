"""What ranks that work together do at the joints of a run, which for a process that works alone is next to nothing.

Every rank runs its own share of the calibration windows, and after these functions all have the same: sums over all
windows, and what one of them has computed. Each function is called by all ranks, in the same order.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import NMConfig
from ..errors import NMError
from .together import alone, watch

T = TypeVar("T")


def rank() -> int:
    """The number of this process; 0 is the first, which reads what all need and alone writes the result."""
    current = watch()
    return 0 if current is None else current.rank


def count() -> int:
    """How many there are."""
    current = watch()
    return 1 if current is None else current.size


def share(windows: Tensor) -> Tensor:
    """The windows of this rank: every `count()`-th, so that each batch of a multiple of `count()` is shared evenly."""
    return windows[rank() :: count()]


def check_shares(windows: Tensor, config: NMConfig) -> None:
    """Raise NMError unless each rank gets a window, and as much as the others of every batch that is trained on."""
    ranks = count()
    solved, distilled = (len(windows[:number]) for number in (config.calibration_samples, config.distill_samples))
    if solved < ranks:
        raise NMError(f"the calibration text makes {solved} windows; {ranks} processes need at least {ranks}.")
    for settings, number in ((config.finetune_settings, solved), (config.distill_settings, distilled)):
        if settings is not None and (number % ranks or settings.batch_size % ranks):
            raise NMError(
                f"{settings.FIELD} trains on {number} windows in batches of {settings.batch_size}; both must be "
                f"multiples of the number of processes, {ranks}."
            )


def own_name(name: str) -> str:
    """The name of a file that each rank has one of."""
    return name if count() == 1 else f"{name}.{rank()}"


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    return _reduce(tensor, dist.ReduceOp.SUM)


def maximum_(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place."""
    return _reduce(tensor, dist.ReduceOp.MAX)


def average_(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place."""
    return sum_(tensor) if count() == 1 else sum_(tensor).div_(count())


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean over ranks of gradients, those of ranks that a parameter has none on being zero; none stay none."""
    if count() == 1:
        return
    reached = maximum_(torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8))
    for parameter, anywhere in zip(parameters, reached.tolist(), strict=True):
        if anywhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            average_(parameter.grad)


def gather(value: T) -> list[T]:
    """The values of all ranks, in order."""
    return [broadcast(value, source) for source in range(count())]


def broadcast(value: T, source: int = 0) -> T:
    """The value that `source` has."""
    if count() == 1:
        return value
    content = [_pickled(value) if rank() == source else b""]
    with _collective():
        dist.broadcast_object_list(content, source)
    return value if rank() == source else _unpickled(content[0])


def first_rank(compute: Callable[[], T]) -> T:
    """What `compute`, which only the first rank calls, returns or raises."""
    if count() == 1:
        return compute()
    result: T | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            with alone():
                result = compute()
        except (ValueError, OSError) as raised:  # NMError is the first
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def divide(costs: Mapping[str, int], compute: Callable[[str], T]) -> dict[str, T]:
    """`compute(name)` of each name, each on one rank, so that all have about as much to do.

    Args:
        costs: of each name, relative to each other.
    """
    if count() == 1:
        return {name: compute(name) for name in costs}
    owners = assign(costs, count())
    own = {name: compute(name) for name, owner in owners.items() if owner == rank()}
    return {name: broadcast(own.get(name), owner) for name, owner in owners.items()}  # type: ignore[misc]


def assign(costs: Mapping[str, int], ranks: int) -> dict[str, int]:
    """A rank for each name: the costliest first, each to the rank that has least to do."""
    loads = [0] * ranks
    owners = dict.fromkeys(costs, 0)
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def _reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if count() > 1:
        with _collective():
            dist.all_reduce(tensor, operation)
    return tensor


@contextmanager
def _collective() -> Iterator[None]:
    """A collective fails because another rank has ended; that is what is raised then."""
    try:
        yield
    except RuntimeError:
        current = watch()
        assert current is not None
        current.raise_cause()
        raise


def _pickled(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _unpickled(content: bytes) -> Any:
    """Tensors of another rank's GPU come to this one's."""

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.cuda()

    return torch.load(io.BytesIO(content), map_location=place, weights_only=False)
