"""Fit a power law to a spectrum's tail: maximum likelihood, its start by Kolmogorov-Smirnov distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layersample.metrics.spectrum import DegenerateMatrixError, Eigenvalues

THRESHOLD = 1e-5  # weightwatcher drops eigenvalues up to this absolute size
MIN_EIGENVALUES = 8  # weightwatcher skips matrices with fewer
_FEW = 20  # below this many weightwatcher corrects the estimate's bias
_ROWS = 64  # tails compared at a time: bounds the memory at 64 × N


@dataclass(frozen=True)
class PowerLaw:
    """A density ∝ λ^(−alpha) on the eigenvalues from ``x_min`` up.

    Args:
        alpha: Exponent, above 1; the smaller, the heavier the tail.
        x_min: Eigenvalue at which the tail starts.
        distance: Kolmogorov-Smirnov distance between the tail and the fit, from 0 to 1.
        num_tail: Eigenvalues in the tail.
    """

    alpha: float
    x_min: float
    distance: float
    num_tail: int


def fit_power_law(eigenvalues: Eigenvalues) -> PowerLaw:
    """Fit a power law as weightwatcher 0.7.7 does by default.

    Eigenvalues up to 1e-5 are dropped. Each that is left is tried as the start x_min of the tail, with
    α = 1 + n / Σ ln(λ_i / x_min) over the n eigenvalues of the tail; the one of the smallest
    Kolmogorov-Smirnov distance wins. Below 20 eigenvalues the bias is corrected (n − 1 for n) and a tail
    must hold at least 8.

    Args:
        eigenvalues: Ascending, ``(N,)``.

    Raises:
        DegenerateMatrixError: If fewer than 8 eigenvalues are above 1e-5, or those are all equal.

    References:
        Clauset, Shalizi and Newman, arXiv 0706.1062; Martin, Peng and Mahoney, arXiv 2002.06716.
    """
    kept = eigenvalues[eigenvalues > THRESHOLD]
    if len(kept) < MIN_EIGENVALUES:
        raise DegenerateMatrixError(
            f"A power law needs at least {MIN_EIGENVALUES} eigenvalues above {THRESHOLD:g}, but {len(kept)} "
            f"of {len(eigenvalues)} are (the largest is {eigenvalues[-1]:.3g})."
        )
    if kept[-1] - kept[0] <= 1e-9 * kept[-1]:
        raise DegenerateMatrixError(
            f"A power law needs eigenvalues that differ, but all {len(kept)} above {THRESHOLD:g} are "
            f"{kept[-1]:.6g}."
        )
    logs = np.log(kept)
    alphas = _estimate_alphas(logs)
    distances = _measure_distances(logs, alphas)
    best = int(np.argmin(distances))
    if not np.isfinite(alphas[best]):
        raise DegenerateMatrixError(
            f"A power law needs a tail of eigenvalues that differ, but the largest {MIN_EIGENVALUES} of "
            f"{len(kept)} are all {kept[-1]:.6g}."
        )
    return PowerLaw(float(alphas[best]), float(kept[best]), float(distances[best]), len(kept) - best)


def _estimate_alphas(logs: Eigenvalues) -> Eigenvalues:
    """Exponent of the tail from each eigenvalue but the last, ``(N − 1,)``; infinite where there is none."""
    tail = len(logs) - np.arange(len(logs) - 1)
    # Σ_{j≥i} (ln λ_j − ln λ_i) built from the gaps: sums of what isn't negative, so nothing cancels.
    spread = np.cumsum(((tail - 1) * np.diff(logs))[::-1])[::-1]
    few = len(logs) < _FEW
    usable = spread > (1e-12 if few else 0.0)
    if few:
        usable &= tail >= MIN_EIGENVALUES
    alphas = np.full(len(spread), np.inf)
    np.divide(tail - 1 if few else tail, spread, out=alphas, where=usable)
    return alphas + 1.0


def _measure_distances(logs: Eigenvalues, alphas: Eigenvalues) -> Eigenvalues:
    """Kolmogorov-Smirnov distance of each tail from its fit, ``(N − 1,)``; 1 where there is no fit."""
    count = len(logs)
    distances = np.ones(count - 1)
    for first in range(0, count - 1, _ROWS):
        rows = np.arange(first, min(first + _ROWS, count - 1))
        rows = rows[np.isfinite(alphas[rows])]
        if not len(rows):
            continue
        columns = np.arange(first, count)
        # 1 − (λ/x_min)^(1−α) against the share of the tail below λ.
        gap = logs[first:] - logs[rows, None]  # (rows, columns)
        gap *= 1.0 - alphas[rows, None]
        np.minimum(gap, 0.0, out=gap)  # what lies below the tail must not overflow
        np.exp(gap, out=gap)
        gap += (columns - rows[:, None]) / (count - rows[:, None])
        gap -= 1.0
        np.abs(gap, out=gap)
        gap[columns < rows[:, None]] = 0.0
        distances[rows] = gap.max(axis=1)
    return distances
