"""Refining a mask: a pruned weight takes the place of a kept one of its group wherever that lowers the layer error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...config import LayerConfig
from .conjugate_gradients import conjugate_gradients
from .solution import Solution, normalized

DAMPING = 0.1
SMALLEST_GAIN = 1e-5  # of a row's error; float32 sums cannot tell less


def swap_weights(
    weight: Tensor, solution: Solution, gram: Tensor, layer: LayerConfig, rounds: int, refit: bool
) -> Solution:
    """Exchange weights within groups, each exchange by its exact change of tr[(W−Ŵ)G(W−Ŵ)ᵀ].

    A round goes over the groups in order; in each, every row makes the exchange that lowers its error most, all earlier
    ones counted. The base keeps as many of each group as it did; outliers stay where they are.

    Args:
        weight: W, float32 `[out_features, in_features]`.
        solution: without `refit`, values of W at the masks.
        gram: G `[in_features, in_features]`.
        rounds: at most so many; a round without an exchange is the last.
        refit: find new values for the survivors of a group with every exchange, and in the end for all by conjugate
            gradients, on a damped G; else they keep their values (SparseSwaps, 2512.10922).

    Returns:
        Masks and values of which no row has a greater error, on the damped G with `refit`.
    """
    matrix, scale = normalized(gram, DAMPING) if refit else (gram, torch.ones_like(weight[0]))
    matrix = matrix.float()
    target, current = weight * scale, solution.weight * scale
    mask, kept = solution.mask.to(weight.device, copy=True), solution.kept.clone()
    for _ in range(rounds):
        before = mask.clone()
        least = SMALLEST_GAIN * (((target - current) @ matrix) * (target - current)).sum(dim=1)
        for columns in _groups(weight.shape[1], layer.pattern.m):
            square, values, taken = matrix[columns, columns], current[:, columns], kept[:, columns]
            slope = (target - current) @ matrix[:, columns]
            if refit:
                goal = slope + values @ square
                changes = _changes_with_refit(square, goal, taken)
            else:
                changes = _changes(square, slope, target[:, columns], values)
            _exchange(changes, mask[:, columns], taken, least)
            current[:, columns] = _fit(square, goal, taken)[0] if refit else target[:, columns] * taken
        if torch.equal(mask, before):
            break
    if refit:
        current = conjugate_gradients(target, current, kept, matrix)
    return replace(solution, weight=current / scale, mask=mask.cpu())


def _groups(width: int, m: int) -> Iterator[slice]:
    return (slice(start, min(start + m, width)) for start in range(0, width, m))


def _exchange(changes: Tensor, mask: Tensor, kept: Tensor, least: Tensor) -> None:
    """Make in every row of a group the best exchange, in place, if it lowers the error by more than `least`.

    Args:
        changes: of the error, `[rows, m, m]`, by what comes in and what goes out.
        mask, kept: bool `[rows, m]`: the base, of which something may go out, and base and outliers.
        least: `[rows]`.
    """
    allowed = ~kept[:, :, None] & mask[:, None, :]
    best, pair = changes.masked_fill(~allowed, torch.inf).flatten(1).min(dim=1)
    rows = (best < -least).nonzero().flatten()
    incoming, outgoing = pair[rows] // mask.shape[1], pair[rows] % mask.shape[1]
    for chosen in (mask, kept):
        chosen[rows, outgoing] = False
        chosen[rows, incoming] = True


def _changes(square: Tensor, slope: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """−2w_p c_p + w_p²G_pp + 2w_u c_u + w_u²G_uu − 2w_p w_u G_pu, with `slope` c = (w − ŵ)G: p comes in, u goes out.

    Args:
        square: G of the group, `[m, m]`.
        slope, weight, values: c, w and ŵ of the group, `[rows, m]`.
    """
    diagonal = square.diagonal()
    incoming = weight * (weight * diagonal - 2 * slope)
    outgoing = values * (values * diagonal + 2 * slope)
    return incoming[:, :, None] + outgoing[:, None, :] - 2 * weight[:, :, None] * values[:, None, :] * square


def _changes_with_refit(square: Tensor, goal: Tensor, kept: Tensor) -> Tensor:
    """Of the error from that with the best values of the group to that with the best values after the exchange.

    With P the inverse of G on what is kept and z = P·goal, removing u costs z_u²/P_uu and moves the others by
    −P_u z_u/P_uu; p then gains its slope squared over what the others leave of G_pp.

    Args:
        goal: `[rows, m]`, the slope with all values of the group at zero.
    """
    values, inverse = _fit(square, goal, kept)
    reach = square @ inverse  # G_p P_u, `[rows, p, u]`
    pivot = torch.where(kept, inverse.diagonal(dim1=1, dim2=2), 1.0)[:, None, :]
    price = values[:, None, :] / pivot
    slope = (goal - values @ square)[:, :, None]
    curvature = (square.diagonal() - (reach * square).sum(dim=2))[:, :, None]
    return price * values[:, None, :] - (slope + reach * price).square() / (curvature + reach.square() / pivot)


def _fit(square: Tensor, goal: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The best values of a group `[rows, m]`, and the inverse of G on what is kept `[rows, m, m]`; zero elsewhere."""
    both = kept[:, :, None] & kept[:, None, :]
    padded = torch.where(both, square, torch.eye(len(square), dtype=square.dtype, device=square.device))
    inverse = torch.linalg.inv(padded).masked_fill(~both, 0.0)
    return (inverse @ goal[:, :, None])[:, :, 0], inverse
