"""One choice for every layer within a number of bytes, so that the sum of what they cost is least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..config import LayerConfig


@dataclass(frozen=True)
class Choice:
    """One way to store a layer.

    Attributes:
        nbytes: of all its packed tensors.
        relative_error: of the layer's output, measured.
        loss: what it is predicted to add to the model's loss, in nats a token.
    """

    layer: LayerConfig
    nbytes: int
    relative_error: float
    loss: float


def lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that are best for some price of a byte: by ascending bytes, each saves less a byte than the last."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.nbytes, choice.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def allocate(choices: Mapping[str, Sequence[Choice]], nbytes: int) -> dict[str, Choice] | None:
    """Choose for every layer so that all take at most `nbytes`, and the sum of losses is as low as can be found.

    Every layer begins with its smallest choice, and the step along a layer's hull that saves most loss a byte comes
    first: as long as all steps fit, that is the optimum for the bytes then taken (Lagrange multipliers; Everett 1963).
    What is left at the end goes to whatever single change still saves most.

    Returns:
        None if even the smallest choices take more.
    """
    hulls = {name: lower_hull(options) for name, options in choices.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = nbytes - sum(choice.nbytes for choice in chosen.values())
    if left < 0:
        return None
    steps = [
        (_gain(before, after), name, before, after) for name, hull in hulls.items() for before, after in pairwise(hull)
    ]
    for _, name, before, after in sorted(steps, key=lambda step: -step[0]):
        if chosen[name] is before and after.nbytes - before.nbytes <= left:
            chosen[name] = after
            left -= after.nbytes - before.nbytes
    while changes := [
        (chosen[name].loss - choice.loss, name, choice)
        for name, options in choices.items()
        for choice in options
        if choice.loss < chosen[name].loss and choice.nbytes - chosen[name].nbytes <= left
    ]:
        _, name, choice = max(changes, key=lambda change: change[0])
        left -= choice.nbytes - chosen[name].nbytes
        chosen[name] = choice
    return chosen


def _gain(before: Choice, after: Choice) -> float:
    """Loss saved a byte."""
    return (before.loss - after.loss) / (after.nbytes - before.nbytes)
