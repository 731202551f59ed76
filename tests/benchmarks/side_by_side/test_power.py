from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from layersample_benchmarks.side_by_side.power import chance_to_show, seeds_needed, smallest_difference


@pytest.mark.parametrize(("difference", "seeds", "level"), [(1.3, 8, 0.05), (3.0, 3, 0.05), (1.0, 12, 0.01)])
def test_the_chance_is_that_of_simulated_tests(difference: float, seeds: int, level: float) -> None:
    drawn = np.random.default_rng(0).normal(difference, 1.0, (20_000, seeds))
    shown = float((stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < level).mean())
    assert chance_to_show(difference, 1.0, seeds, level) == pytest.approx(shown, abs=0.01)


def test_the_smallest_difference_is_shown_with_the_chance_and_scales_with_the_spread() -> None:
    for seeds in (2, 3, 8, 30):
        smallest = smallest_difference(0.02, seeds, 0.003)
        assert chance_to_show(smallest, 0.02, seeds, 0.003) == pytest.approx(0.8, abs=1e-3)
        assert smallest == pytest.approx(2 * smallest_difference(0.01, seeds, 0.003))
    assert smallest_difference(1.0, 1, 0.05) == math.inf and smallest_difference(0.0, 3, 0.05) == 0.0


def test_the_seeds_needed_are_the_fewest() -> None:
    smallest = smallest_difference(1.0, 8, 0.05)
    assert seeds_needed(smallest * 1.001, 1.0, 0.05) == 8, "there and back again"
    half = seeds_needed(smallest / 2, 1.0, 0.05)
    assert half is not None
    assert (
        chance_to_show(smallest / 2, 1.0, half, 0.05)
        >= 0.8
        > chance_to_show(smallest / 2, 1.0, half - 1, 0.05)
    )
    assert seeds_needed(1e-3, 1.0, 0.05) is None and seeds_needed(0.0, 1.0, 0.05) is None
    assert seeds_needed(1e3, 1.0, 0.05) == 2
