from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy import stats

from layersample import create_sampler, list_samplers
from layersample.sampling.draws import (
    draw_sequential,
    draw_systematic,
    sequential_inclusion,
    systematic_inclusion,
)
from layersample.sampling.sampler import SamplingContext

CASES: list[tuple[list[float], int]] = [
    ([0.5, 0.2, 0.2, 0.1], 2),
    ([1, 2, 3, 4, 5, 6], 3),
    ([1e-4, 0.9, 0.05, 0.04], 2),
    ([1, 1, 1], 2),
    ([0, 3, 1, 2], 2),
    ([5, 0, 1], 2),
    ([2, 1], 2),
]


def enumerate_inclusion(weights: list[float], num_active: int) -> list[float]:
    """Over all orders in which layers can be drawn."""
    inclusion = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), num_active):
        chance, left = 1.0, sum(weights)
        for index in order:
            chance *= weights[index] / left if left > 0 else 0.0
            left -= weights[index]
        for index in order:
            inclusion[index] += chance
    return inclusion


@pytest.mark.parametrize(("weights", "num_active"), CASES)
def test_sequential_inclusion_is_that_of_all_orders(weights: list[float], num_active: int) -> None:
    assert sequential_inclusion(weights, num_active) == pytest.approx(
        enumerate_inclusion(weights, num_active), abs=1e-10
    )


@pytest.mark.parametrize(("weights", "num_active"), CASES)
def test_systematic_inclusion_is_in_proportion_up_to_1(weights: list[float], num_active: int) -> None:
    inclusion = systematic_inclusion(weights, num_active)
    assert sum(inclusion) == pytest.approx(num_active)
    below = [i for i, value in enumerate(inclusion) if 0 < value < 1]
    assert all(
        inclusion[i] / weights[i] == pytest.approx(inclusion[below[0]] / weights[below[0]]) for i in below
    )
    if max(weights) * num_active <= sum(weights):
        assert inclusion == pytest.approx([num_active * w / sum(weights) for w in weights])


# OwLore's layers: many alike, a few that stand out.
SPREAD = [0.27, 0.30, 0.13, 0.11, 0.06, 0.05, 0.04, 0.03, 0.03, 0.08]


@pytest.mark.parametrize("draw", ["sequential", "systematic"])
def test_20000_draws_match_the_computed_inclusion(draw: Any) -> None:
    draws = 20_000
    function, inclusion = {
        "sequential": (draw_sequential, sequential_inclusion(SPREAD, 3)),
        "systematic": (draw_systematic, systematic_inclusion(SPREAD, 3)),
    }[draw]
    counts = [0] * len(SPREAD)
    generator = torch.Generator().manual_seed(7)
    for _ in range(draws):
        chosen = function(torch.tensor(SPREAD, dtype=torch.float64), 3, generator)
        assert len(set(chosen)) == 3
        for index in chosen:
            counts[index] += 1
    # A layer is in a draw or not. Draws of a fixed size make counts vary less than independent ones: χ² is safe.
    certain = [i for i, pi in enumerate(inclusion) if pi >= 1]
    assert all(counts[i] == draws for i in certain)
    rest = [i for i in range(len(SPREAD)) if i not in certain]
    statistic = sum(
        (counts[i] - draws * inclusion[i]) ** 2 / (draws * inclusion[i] * (1 - inclusion[i])) for i in rest
    )
    assert stats.chi2.sf(statistic, len(rest)) > 1e-3


def test_sequential_inclusion_is_not_gamma_times_p() -> None:
    p = [value / sum(SPREAD) for value in SPREAD]
    assert abs(sequential_inclusion(p, 3)[1] - 3 * p[1]) > 0.1


@pytest.mark.parametrize("name", ["full", "lisa", "cyclic"])
def test_samplers_know_their_inclusion(name: str) -> None:
    names = tuple(map(str, range(6)))
    counts, expected = [0.0] * 6, [0.0] * 6
    assert name in list_samplers()
    sampler = create_sampler(name)
    for seed in range(3000):
        context = SamplingContext(names, 2, round=seed % 3, seed=seed)
        inclusion = sampler.inclusion_probabilities(context)
        assert inclusion is not None
        for index in sampler.sample(context):
            counts[index] += 1
        expected = [total + value for total, value in zip(expected, inclusion, strict=True)]
    assert counts == pytest.approx(expected, rel=0.1)
