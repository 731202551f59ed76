from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from layersample_benchmarks.side_by_side.power import chance_to_show, seeds_needed, smallest_difference


# Levels of one test, of 25 and of 60 that are corrected together; with some of them SciPy has no lower tail.
@pytest.mark.parametrize("level", [0.05, 0.01, 0.05 / 25, 0.05 / 60])
@pytest.mark.parametrize("seeds", [3, 4, 5, 8, 12, 24])
def test_the_smallest_difference_is_shown_by_so_many_simulated_tests(seeds: int, level: float) -> None:
    smallest = smallest_difference(1.0, seeds, level)
    drawn = np.random.default_rng(0).normal(smallest, 1.0, (20_000, seeds))
    shown = float((stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < level).mean())
    assert shown == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("level", [0.05, 0.05 / 25, 5e-5])
def test_more_seeds_and_larger_differences_have_a_higher_chance(level: float) -> None:
    by_seeds = [chance_to_show(0.4, 1.0, seeds, level) for seeds in range(2, 200)]
    by_size = [chance_to_show(size / 20, 1.0, 8, level) for size in range(100)]
    for chances in (by_seeds, by_size):
        assert all(0 <= low <= high + 1e-12 <= 1 + 1e-9 for low, high in pairwise(chances))


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
