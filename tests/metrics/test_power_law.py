from __future__ import annotations

import numpy as np
import pytest

from layersample.metrics import DegenerateMatrixError, fit_power_law
from layersample.metrics.spectrum import Eigenvalues


def naive_fit(eigenvalues: Eigenvalues) -> tuple[float, float, float]:
    """The definition, one tail at a time: alpha, x_min, distance."""
    values = np.sort(eigenvalues[eigenvalues > 1e-5])
    few = len(values) < 20
    best = (0.0, 0.0, 2.0)
    for start in range(len(values) - 1):
        tail = values[start:]
        n = len(tail)
        if few and n < 8:
            break
        alpha = 1 + (n - 1 if few else n) / sum(np.log(value / tail[0]) for value in tail)
        model = [1 - (value / tail[0]) ** (1 - alpha) for value in tail]
        distance = max(abs(model[i] - i / n) for i in range(n))
        if distance < best[2]:
            best = (alpha, tail[0], distance)
    return best


@pytest.mark.parametrize("count", [8, 9, 19, 20, 21, 63, 64, 65, 66, 150])
@pytest.mark.parametrize("kind", ["pareto", "squared normal", "with zeros"])
def test_it_equals_the_naive_fit(count: int, kind: str) -> None:
    random = np.random.default_rng(count)
    values = random.pareto(1.7, count) + 0.1 if kind == "pareto" else random.normal(size=count) ** 2 + 1e-3
    if kind == "with zeros":
        values = np.concatenate([np.zeros(7), np.full(3, 9e-6), values])
    values = np.sort(values)
    fit = fit_power_law(values)
    assert (fit.alpha, fit.x_min, fit.distance) == pytest.approx(naive_fit(values), rel=1e-9)
    assert fit.num_tail == (values >= fit.x_min).sum()


def test_it_finds_the_exponent_of_a_power_law() -> None:
    values = np.random.default_rng(0).pareto(1.5, 5000) + 1.0  # density ∝ λ^−2.5
    assert fit_power_law(np.sort(values)).alpha == pytest.approx(2.5, abs=0.1)


def test_ties_at_the_top_do_not_divide_by_zero() -> None:
    values = np.sort(np.concatenate([np.random.default_rng(0).pareto(1.7, 30), np.full(3, 500.0)]))
    assert np.isfinite(fit_power_law(values).alpha)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(7.0) + 1, r"at least 8 eigenvalues above 1e-05, but 7 of 7 are \(the largest is 7\)"),
        (np.full(50, 1e-6), r"but 0 of 50 are"),
        (np.full(50, 3.0), "eigenvalues that differ, but all 50 above 1e-05 are 3"),
        (np.concatenate([[1.0], np.full(10, 3.0)]), None),
    ],
)
def test_what_has_no_power_law(values: Eigenvalues, message: str | None) -> None:
    if message is None:  # one that differs is enough
        assert np.isfinite(fit_power_law(values).alpha)
        return
    with pytest.raises(DegenerateMatrixError, match=message):
        fit_power_law(values)


def test_few_eigenvalues_that_differ_only_below_each_tail() -> None:
    values = np.concatenate([[1.0], np.full(10, 3.0)])
    fit = fit_power_law(values)
    assert fit.num_tail == 11
