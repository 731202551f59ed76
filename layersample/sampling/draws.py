"""Drawing layers by weight, and the chance that each layer has to be drawn: computed, not assumed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Draw = Literal["sequential", "systematic"]
Array = NDArray[np.float64]

_STEP = 0.05  # of the integral over ln t; halving it changes nothing above 1e-12


def draw_sequential(probabilities: torch.Tensor, num_active: int, generator: torch.Generator) -> list[int]:
    """Draw one layer after another, each in proportion to the probabilities of those that are left.

    Args:
        probabilities: Non-negative, shape ``(num_layers,)``.
        num_active: Layers to draw.
        generator: Source of randomness.
    """
    return torch.multinomial(probabilities, num_active, generator=generator).tolist()


def draw_systematic(probabilities: torch.Tensor, num_active: int, generator: torch.Generator) -> list[int]:
    """Draw so that each layer's inclusion is exactly that of :func:`systematic_inclusion`.

    The inclusions are laid end to end in a random order, and the layers at u, u + 1, u + 2 … are taken.

    Args:
        probabilities: As for :func:`draw_sequential`.
        num_active: Layers to draw.
        generator: Source of randomness.

    References:
        Madow, Ann. Math. Statist. 20 (1949) 333; the random order is Hartley and Rao's (1962).
    """
    inclusion = torch.tensor(systematic_inclusion(probabilities.tolist(), num_active), dtype=torch.float64)
    certain = torch.nonzero(inclusion >= 1).flatten().tolist()
    order = torch.randperm(len(inclusion), generator=generator)
    order = order[(inclusion[order] > 0) & (inclusion[order] < 1)]
    left = num_active - len(certain)
    if left == 0:
        return certain
    ends = inclusion[order].cumsum(0)
    ends[-1] = left  # what rounding left over
    # A layer covers less than 1 of the line from 0 to `left`, so no two marks fall into it.
    marks = torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(left, dtype=torch.float64)
    return certain + order[torch.searchsorted(ends, marks, right=True)].tolist()


def systematic_inclusion(probabilities: Sequence[float], num_active: int) -> list[float]:
    """``num_active`` times the probability; where that is above 1 it is 1, and the rest share what is left."""
    p = np.asarray(probabilities, dtype=np.float64)
    inclusion = np.zeros_like(p)
    certain = np.zeros(len(p), dtype=bool)
    while True:
        left = num_active - int(certain.sum())
        rest = ~certain & (p > 0)
        inclusion[rest] = left * p[rest] / p[rest].sum() if rest.any() else 0.0
        inclusion[certain] = 1.0
        over = rest & (inclusion >= 1.0)
        if not over.any():
            return [float(value) for value in inclusion]
        certain |= over


def sequential_inclusion(probabilities: Sequence[float], num_active: int) -> list[float]:
    """The chance of each layer to be in a sequential draw.

    Drawing in sequence is a race of exponential clocks with the probabilities as rates: a layer is in if
    fewer than ``num_active`` others ring before it. So π_l = ∫ p_l e^(-p_l t) P(N_l(t) < γ) dt, where N_l(t)
    counts the others that have rung by t, a Poisson-binomial number. The integral is taken over ln t by the
    trapezoidal rule, which converges exponentially for an integrand that dies off at both ends.

    Args:
        probabilities: Non-negative, one a layer; at least ``num_active`` above 0.
        num_active: Layers that are drawn.
    """
    return list(_sequential_inclusion(tuple(probabilities), num_active))


@lru_cache(maxsize=64)
def _sequential_inclusion(probabilities: tuple[float, ...], num_active: int) -> tuple[float, ...]:
    p = np.asarray(probabilities, dtype=np.float64) / sum(probabilities)
    possible = np.flatnonzero(p > 0)
    inclusion = np.zeros(len(p))
    if len(possible) <= num_active:
        inclusion[possible] = 1.0
        return tuple(map(float, inclusion))
    rates = p[possible]  # (n,)
    time = np.exp(np.arange(np.log(1e-15), np.log(50.0 / rates.min()), _STEP))  # (nodes,)
    rung = -np.expm1(-np.outer(time, rates))  # (nodes, n)
    n = len(rates)
    # others[:, l, k]: chance that k of the layers but l have rung; only k < num_active is ever needed.
    others = np.zeros((len(time), n, num_active))
    others[:, :, 0] = 1.0
    for i in range(n):
        chance = np.repeat(rung[:, i, None, None], n, axis=1)  # (nodes, n, 1)
        chance[:, i] = 0.0  # a layer isn't one of its own others
        moved = others * chance
        others -= moved
        others[:, :, 1:] += moved[:, :, :-1]
    density = time[:, None] * rates * np.exp(-np.outer(time, rates))  # (nodes, n), over ln t
    inclusion[possible] = _STEP * (density * others.sum(axis=2)).sum(axis=0)
    return tuple(map(float, inclusion))
