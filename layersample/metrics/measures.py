"""Measures of a weight's spectrum: how heavy its tail is, and how many directions carry it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from layersample.errors import ConfigError, unknown
from layersample.metrics.power_law import MIN_EIGENVALUES, THRESHOLD, PowerLaw, fit_power_law
from layersample.metrics.spectrum import (
    DegenerateMatrixError,
    Eigenvalues,
    compute_eigenvalues,
    split_experts,
)

_ROUNDING = 1e-12  # eigenvalues this much smaller than the largest are zeros of a float32 matrix


def alpha(weight: Tensor) -> float:
    """Return the power-law exponent α of a weight's spectrum, as weightwatcher defines it by default.

    Well trained layers lie between 2 and 6; the smaller, the heavier the tail. It agrees with weightwatcher
    0.7.7 within 1e-6.

    Args:
        weight: Matrix ``(m, n)``; of fused experts ``(num_experts, m, n)``, their mean is taken.

    Raises:
        DegenerateMatrixError: If fewer than 8 eigenvalues are above 1e-5, or they don't differ, or the
            weight isn't finite.
        ValueError: If it isn't a floating-point tensor of 2 or 3 dimensions.

    References:
        Martin and Mahoney, arXiv 1810.01075; Martin, Peng and Mahoney, arXiv 2002.06716.
    """
    return measure_weight(weight, ("alpha",))["alpha"]


def alpha_hat(weight: Tensor) -> float:
    """Return α̂ = α·log₁₀ λ_max, weightwatcher's ``alpha_weighted``.

    Args:
        weight: Matrix ``(m, n)``; of fused experts ``(num_experts, m, n)``, their mean is taken.

    Raises:
        DegenerateMatrixError: As `alpha`.

    References:
        Martin, Peng and Mahoney, arXiv 2002.06716.
    """
    return measure_weight(weight, ("alpha_hat",))["alpha_hat"]


def log_alpha_norm(weight: Tensor) -> float:
    """Return log₁₀ Σ λ^α, the logarithm of the α-Schatten norm.

    Args:
        weight: Matrix ``(m, n)``; of fused experts ``(num_experts, m, n)``, their mean is taken.

    Raises:
        DegenerateMatrixError: As `alpha`.

    References:
        Martin, Peng and Mahoney, arXiv 2002.06716.
    """
    return measure_weight(weight, ("log_alpha_norm",))["log_alpha_norm"]


def hill(weight: Tensor) -> float:
    """Return PL_Alpha_Hill: the Hill estimate of the exponent over the upper half of the spectrum.

    With λ ascending, i = N // 2 and n = N − i, it is 1 + n / Σ_{j≥i} (ln λ_j − ln λ_i). Steadier than
    `alpha`, but ruled by the matrix's aspect ratio (untrained 512×512: 2.12; 512×128: 3.50): compare
    matrices of one shape only.

    Args:
        weight: Matrix ``(m, n)``; of fused experts ``(num_experts, m, n)``, their mean is taken.

    Raises:
        DegenerateMatrixError: If the upper half of the spectrum has zeros or doesn't differ, or the weight
            isn't finite.

    References:
        TempBalance, arXiv 2312.00359; AlphaPruning, arXiv 2410.10912.
    """
    return measure_weight(weight, ("hill",))["hill"]


@lru_cache(maxsize=256)
def random_hill(shape: tuple[int, int]) -> float:
    """Return PL_Alpha_Hill of a random Gaussian matrix: what the shape alone makes of it.

    Args:
        shape: ``(m, n)``.

    References:
        FARMS, arXiv 2506.06280, on the bias of the aspect ratio.
    """
    generator = torch.Generator().manual_seed(0)
    return hill(torch.randn(shape, generator=generator))


def stable_rank(weight: Tensor) -> float:
    """Return ‖W‖_F² / ‖W‖₂² = Σλ / λ_max: from 1 to min(m, n).

    Args:
        weight: Matrix ``(m, n)``; of fused experts ``(num_experts, m, n)``, their mean is taken.

    Raises:
        DegenerateMatrixError: If the weight is all zero or isn't finite.
    """
    return measure_weight(weight, ("stable_rank",))["stable_rank"]


def measure_weight(weight: Tensor, metrics: Iterable[str]) -> dict[str, float]:
    """Measure one weight by several metrics with one decomposition.

    Args:
        weight: Matrix ``(m, n)``; of fused experts ``(num_experts, m, n)``, their mean is taken.
        metrics: Names from `METRICS`.

    Raises:
        DegenerateMatrixError: If a metric isn't defined for the weight.
        ConfigError: If a metric is unknown.
    """
    names = check_metrics(metrics)
    matrices = split_experts(weight)
    rows = []
    for index, matrix in enumerate(matrices):
        values, problems = measure_eigenvalues(compute_eigenvalues(matrix), names)
        for name, problem in problems.items():
            expert = f" of expert {index}" if weight.dim() == 3 else ""
            raise DegenerateMatrixError(f"{name}{expert} of a weight {tuple(weight.shape)}: {problem}")
        rows.append(values)
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def measure_eigenvalues(
    eigenvalues: Eigenvalues, metrics: Iterable[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the values of the metrics that a spectrum has, and why it hasn't the others."""
    tail = _Spectrum(eigenvalues)
    values: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name in metrics:
        try:
            values[name] = METRICS[name](tail)
        except DegenerateMatrixError as error:
            problems[name] = str(error)
    return values, problems


def check_metrics(metrics: Iterable[str]) -> tuple[str, ...]:
    """Return the names of metrics, each once.

    Raises:
        ConfigError: If one is unknown or there are none.
    """
    names = tuple(dict.fromkeys([metrics] if isinstance(metrics, str) else metrics))
    if not names:
        raise ConfigError(f"metrics must name at least one of {', '.join(METRICS)}, but got none.")
    for name in names:
        if name not in METRICS:
            raise ConfigError(unknown("metric", name, METRICS))
    return names


class _Spectrum:
    """Eigenvalues, ascending and not all zero, with their power law fitted once when it is asked for."""

    def __init__(self, eigenvalues: Eigenvalues) -> None:
        self._eigenvalues = eigenvalues

    @property
    def values(self) -> Eigenvalues:
        if self._eigenvalues[-1] <= 0.0:
            raise DegenerateMatrixError("A weight must have elements that aren't zero, but all of them are.")
        return self._eigenvalues

    @cached_property
    def power_law(self) -> PowerLaw:
        return fit_power_law(self.values)


def _alpha(spectrum: _Spectrum) -> float:
    return spectrum.power_law.alpha


def _alpha_hat(spectrum: _Spectrum) -> float:
    return spectrum.power_law.alpha * float(np.log10(spectrum.values[-1]))


def _log_alpha_norm(spectrum: _Spectrum) -> float:
    # λ^α may overflow, its logarithm doesn't.
    largest = spectrum.values[-1]
    shares = (spectrum.values / largest) ** spectrum.power_law.alpha
    return _alpha_hat(spectrum) + float(np.log10(shares.sum()))


def _hill(spectrum: _Spectrum) -> float:
    values = spectrum.values
    upper = values[len(values) // 2 :]
    if upper[0] <= _ROUNDING * values[-1]:
        rank = int((values > _ROUNDING * values[-1]).sum())
        raise DegenerateMatrixError(
            f"The Hill estimate needs the upper half of the spectrum above zero, {len(upper)} of "
            f"{len(values)} eigenvalues, but {rank} {'is' if rank == 1 else 'are'}."
        )
    if upper[-1] - upper[0] <= 1e-9 * upper[-1]:
        raise DegenerateMatrixError(
            f"The Hill estimate needs eigenvalues that differ in the upper half of the spectrum, but all "
            f"{len(upper)} are {upper[-1]:.6g}."
        )
    return 1.0 + len(upper) / float(np.log(upper / upper[0]).sum())


def _stable_rank(spectrum: _Spectrum) -> float:
    return float(spectrum.values.sum() / spectrum.values[-1])


METRICS: dict[str, Callable[[_Spectrum], float]] = {
    "alpha": _alpha,
    "alpha_hat": _alpha_hat,
    "hill": _hill,
    "log_alpha_norm": _log_alpha_norm,
    "stable_rank": _stable_rank,
}

# What a value depends on besides the weight: part of its key in the cache. A changed metric counts its
# "definition" up.
_POWER_LAW = {"definition": 1, "threshold": THRESHOLD, "min_eigenvalues": MIN_EIGENVALUES}
PARAMETERS: dict[str, dict[str, float]] = {
    "alpha": _POWER_LAW,
    "alpha_hat": _POWER_LAW,
    "hill": {"definition": 1, "rounding": _ROUNDING},
    "log_alpha_norm": _POWER_LAW,
    "stable_rank": {"definition": 1},
}
