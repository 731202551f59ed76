"""A budget for each draw: how much the units that train at a time may hold together, in bytes or parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from layersample.sampling.draws import sequential_inclusion

_DRAWS = 4096  # of an estimate: a standard error of at most .8 percent


@dataclass(frozen=True)
class DrawBudget:
    """What the units of one draw may hold together; what always trains doesn't count.

    Args:
        sizes: What each unit holds that may train. A scheduler samples from those alone that fit by themselves.
        limit: Most of a draw.
        unit: What both are counted in.
    """

    sizes: tuple[int, ...]
    limit: int
    unit: Literal["bytes", "parameters"] = "parameters"

    def fit(self, order: Iterable[int]) -> list[int]:
        """Take units in an order, as long as there is room; one that doesn't fit is left out, and the next tried.

        Args:
            order: Indices of units, the preferred one first.
        """
        taken, left = [], self.limit
        for index in order:
            if self.sizes[index] <= left:
                taken.append(index)
                left -= self.sizes[index]
        return taken

    def total(self, indices: Iterable[int]) -> int:
        """What some units hold together."""
        return sum(self.sizes[index] for index in indices)

    @property
    def most(self) -> int:
        """The largest number of units that fit together."""
        return len(self.fit(sorted(range(len(self.sizes)), key=lambda index: self.sizes[index])))

    def among(self, indices: Sequence[int], taken: Iterable[int] = ()) -> DrawBudget:
        """What is left for some of the units.

        Args:
            indices: The units; they are counted along these.
            taken: Units that have been taken already.
        """
        left = self.limit - self.total(taken)
        return replace(self, sizes=tuple(self.sizes[index] for index in indices), limit=left)

    def inclusion(self, probabilities: Sequence[float]) -> list[float]:
        """The chance of each unit to be in a draw that takes one after another by weight, as long as there is room.

        It is exact where all units that can be drawn fit together, or are of one size. Otherwise it is estimated
        from 4096 draws, always with the same random numbers: a standard error of at most .8 percent. An estimate
        says at least half a draw of a unit that can be drawn.

        Args:
            probabilities: Non-negative, one a unit.
        """
        possible = [i for i, p in enumerate(probabilities) if p > 0 and self.sizes[i] <= self.limit]
        sizes = {self.sizes[index] for index in possible}
        if self.total(possible) <= self.limit:
            return [float(index in possible) for index in range(len(self.sizes))]
        if len(sizes) == 1:  # a unit that doesn't fit alone takes no one's place
            own = [p if index in possible else 0.0 for index, p in enumerate(probabilities)]
            return sequential_inclusion(own, self.limit // sizes.pop())
        return list(_estimate(tuple(probabilities), self.sizes, self.limit))


@lru_cache(maxsize=64)
def _estimate(probabilities: tuple[float, ...], sizes: tuple[int, ...], limit: int) -> tuple[float, ...]:
    p = np.asarray(probabilities, dtype=np.float64)
    # Drawing in sequence is a race of exponential clocks with the probabilities as rates.
    clocks = np.random.default_rng(0).standard_exponential((_DRAWS, len(p)))
    with np.errstate(divide="ignore"):
        order = np.argsort(np.where(p > 0, clocks / p, np.inf), axis=1)  # (draws, units)
    held = np.asarray(sizes, dtype=np.int64)
    left = np.full(_DRAWS, limit, dtype=np.int64)
    counts = np.zeros(len(p))
    for place in range(len(p)):
        unit = order[:, place]  # (draws,)
        fits = (held[unit] <= left) & (p[unit] > 0)
        left -= np.where(fits, held[unit], 0)
        np.add.at(counts, unit[fits], 1.0)
    possible = (p > 0) & (held <= limit)
    return tuple(map(float, np.where(possible, np.maximum(counts, 0.5), 0.0) / _DRAWS))
