from __future__ import annotations

import pytest

from layersample_benchmarks.side_by_side.rates import best_rate, choose_rate, plan_search

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
    assert plan_search(GRID, losses, {}, extensions=extensions, seeds=1).rates == tuple(rates)


def test_a_single_rate_stays_alone() -> None:
    alone = plan_search([1e-3], {1e-3: 1.0}, {}, extensions=2, seeds=3)
    assert alone.rates == (1e-3,) and alone.finalists == ()


def test_the_best_rate() -> None:
    assert best_rate({1e-3: 2.0, 1e-2: 1.0, 1e-1: None}) == 1e-2
    assert best_rate({1e-3: None}) is None and best_rate({}) is None


def test_more_seeds_decide_between_the_best_two() -> None:
    losses = {1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.0, 3e-3: None}
    assert plan_search(losses, losses, {}, extensions=0, seeds=3).finalists == (1e-3, 3e-4)
    assert plan_search(losses, dict.fromkeys(losses), {}, extensions=0, seeds=3).finalists == ()
    assert choose_rate(None, losses, {}) == 1e-3
    assert choose_rate(None, losses, {1e-3: [4.0, 4.0], 3e-4: [2.0, 2.0]}) == 3e-4
    # The mean of more seeds goes before the luck of one, and a rate that failed with one of them is out.
    assert choose_rate(None, losses, {1e-3: [9.0], 3e-4: [9.0]}) == 1e-3
    assert choose_rate(None, losses, {1e-3: [0.0, None], 3e-4: [9.0, 9.0]}) == 3e-4
    assert choose_rate(None, losses, {1e-3: [None], 3e-4: [None]}) == 1e-4
    assert choose_rate([5e-4], losses, {}) == 5e-4


@pytest.mark.parametrize(
    ("runoffs", "extensions", "rates", "finalists"),
    [
        ({}, 2, [*GRID], (3e-4, 1e-3)),
        ({3e-4: [2.0, 2.0], 1e-3: [1.0]}, 2, [*GRID], (3e-4, 1e-3)),  # a seed isn't tried yet
        ({3e-4: [1.0, 1.0], 1e-3: [2.0, 2.0]}, 2, [*GRID], (3e-4, 1e-3)),
        ({3e-4: [2.0, 2.0], 1e-3: [1.0, 1.0]}, 2, [*GRID, 3.3e-3], (3e-4, 1e-3, 3.3e-3)),
        ({3e-4: [2.0, 2.0], 1e-3: [1.0, 1.0]}, 0, [*GRID], (3e-4, 1e-3)),
    ],
)
def test_a_search_goes_on_beyond_the_edge_that_more_seeds_choose(
    runoffs: dict[float, list[float | None]],
    extensions: int,
    rates: list[float],
    finalists: tuple[float, ...],
) -> None:
    losses = {1e-4: 3.0, 3e-4: 1.4, 1e-3: 1.5}  # the first seed's best isn't at an edge
    search = plan_search(GRID, losses, runoffs, extensions=extensions, seeds=3)
    assert search.rates == tuple(rates) and search.finalists == finalists


def test_the_rate_beyond_is_tried_with_all_seeds_and_may_be_followed_by_another() -> None:
    runoffs: dict[float, list[float | None]] = {3e-4: [2.0, 2.0], 1e-3: [1.0, 1.0]}
    losses: dict[float, float | None] = {1e-4: 3.0, 3e-4: 1.4, 1e-3: 1.5, 3.3e-3: 1.6}
    assert plan_search(GRID, losses, runoffs, extensions=2, seeds=3).rates == (*GRID, 3.3e-3)
    runoffs[3.3e-3] = [0.5, 0.5]
    assert plan_search(GRID, losses, runoffs, extensions=2, seeds=3).rates == (*GRID, 3.3e-3, 1.1e-2)
    losses[1.1e-2] = None  # it diverged: further seeds aren't tried
    search = plan_search(GRID, losses, runoffs, extensions=3, seeds=3)
    assert search.rates == (*GRID, 3.3e-3, 1.1e-2) and search.finalists == (3e-4, 1e-3, 3.3e-3)
    assert choose_rate(None, losses, runoffs) == 3.3e-3
