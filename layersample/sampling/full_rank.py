"""Layers that a projection leaves at full rank for a period."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FullRank:
    """Layers whose projected weights get, for one period, what the projection leaves out of their gradients.

    With P the basis and q the chance of a layer, its gradient is (G − PPᵀG) / q, at full rank; that of all others is
    PᵀG / (1 − q), at low rank. Their mean is the whole gradient G.

    Args:
        layers: Indices of the layers that were drawn.
        chance: The chance q of each layer, above 0 and below 1.
    """

    layers: frozenset[int]
    chance: float
