from __future__ import annotations

import pytest

from layersample_benchmarks.side_by_side.rates import best_rate, choose_rate, find_finalists, find_rates

GRID = (1e-4, 3e-4, 1e-3)


@pytest.mark.parametrize(
    ("losses", "extensions", "rates"),
    [
        ({}, 2, [*GRID]),
        ({1e-4: 3.0, 3e-4: 2.0}, 2, [*GRID]),  # the grid isn't tried yet
        ({1e-4: 3.0, 3e-4: 1.0, 1e-3: 2.0}, 2, [*GRID]),
        ({1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.0}, 2, [*GRID, 3.3e-3]),
        ({1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.0}, 0, [*GRID]),
        ({1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.0, 3.3e-3: 0.5}, 1, [*GRID, 3.3e-3]),
        ({1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.0, 3.3e-3: 0.5}, 2, [*GRID, 3.3e-3, 1.1e-2]),
        ({1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.0, 3.3e-3: None}, 2, [*GRID, 3.3e-3]),  # it diverged
        ({1e-4: 1.0, 3e-4: 2.0, 1e-3: 3.0}, 1, [3.3e-5, *GRID]),
        ({1e-4: None, 3e-4: None, 1e-3: None}, 2, [*GRID]),
    ],
)
def test_a_grid_goes_on_beyond_its_edge(
    losses: dict[float, float | None], extensions: int, rates: list[float]
) -> None:
    assert find_rates(GRID, losses, extensions) == rates


def test_a_single_rate_stays_alone() -> None:
    assert find_rates([1e-3], {1e-3: 1.0}, 2) == [1e-3]


def test_the_best_rate() -> None:
    assert best_rate({1e-3: 2.0, 1e-2: 1.0, 1e-1: None}) == 1e-2
    assert best_rate({1e-3: None}) is None and best_rate({}) is None


def test_more_seeds_decide_between_the_best_two() -> None:
    losses = {1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.0, 3e-3: None}
    assert find_finalists(losses) == [1e-3, 3e-4] and find_finalists({1e-3: None}) == []
    assert choose_rate(None, losses, {}) == 1e-3
    assert choose_rate(None, losses, {1e-3: [4.0, 4.0], 3e-4: [2.0, 2.0]}) == 3e-4
    # The mean of more seeds goes before the luck of one, and a rate that failed with one of them is out.
    assert choose_rate(None, losses, {1e-3: [9.0], 3e-4: [9.0]}) == 1e-3
    assert choose_rate(None, losses, {1e-3: [0.0, None], 3e-4: [9.0, 9.0]}) == 3e-4
    assert choose_rate(None, losses, {1e-3: [None], 3e-4: [None]}) == 1e-4
    assert choose_rate([5e-4], losses, {}) == 5e-4
