"""A budget of a draw: never exceeded, and the chances under it are right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch

from layersample import ConfigError, LayerSampler, LayerScheduler, SamplingContext, create_sampler
from layersample.amounts import read_amount
from layersample.sampling.answers import draw
from layersample.sampling.draw_budget import DrawBudget
from layersample.sampling.faults import SamplerError
from layersample.sampling.statistics import GradientStatistics, LayerStatistics, LossStatistics
from tests.helpers import Given, make_llama

KEEP_IT: list[tuple[str, dict[str, Any]]] = [
    ("lisa", {}),
    ("prior", {"weights": "increase"}),
    ("cyclic", {}),
    ("cyclic", {"order": "reshuffled"}),
    ("grass", {}),
    ("bandit", {}),
    ("misa", {}),
    ("blockllm", {}),
    ("adagradselect", {}),
    ("adagradselect", {"epsilon": 0.0}),
    ("freeze_converged", {"sampler": "misa"}),
    ("mixture", {"samplers": ["lisa", "blockllm"]}),
]


def context(sizes: Sequence[int], limit: int, round: int = 0, seed: int = 0) -> SamplingContext:
    number = len(sizes)
    norms = tuple(float(1 + index) for index in range(number))
    statistics = LayerStatistics(
        tuple((round + index) % 3 for index in range(number)),
        tuple((round - 1) if (round + index) % 3 else None for index in range(number)),
        round,
        GradientStatistics(norms, norms, (4,) * number),
        LossStatistics(5, 2.0, 1.0, 1.0),
    )
    budget = DrawBudget(tuple(sizes), limit)
    return SamplingContext(
        tuple(map(str, range(number))),
        budget.most,
        round=round,
        seed=seed,
        statistics=statistics,
        budget=budget,
        allow_empty=True,
    )


@pytest.mark.parametrize(("name", "options"), KEEP_IT)
def test_a_budget_is_never_exceeded_by_one(name: str, options: dict[str, Any]) -> None:
    """Of units of random sizes, in many periods."""
    numbers = random.Random(0)
    for trial in range(40):
        sizes = [numbers.choice((1, 2, 3, 7, 50, 51, 1000)) for _ in range(numbers.randint(1, 12))]
        limit = numbers.randint(max(sizes), sum(sizes) + 1)  # a scheduler leaves out what is larger
        sampler = create_sampler(name, options)
        for round in range(4):
            given = context(sizes, limit, round, seed=trial)
            inclusion = sampler.inclusion_probabilities(given)
            chosen = draw(sampler, given)  # raises where it holds too much
            assert sum(sizes[index] for index in chosen) <= limit
            assert chosen
            assert inclusion is None or all(inclusion[index] > 0 for index in chosen)


def test_more_than_a_budget_is_refused_whoever_draws_it() -> None:
    class Greedy(LayerSampler):
        def sample(self, context: SamplingContext) -> list[int]:
            return [0, 1]

    with pytest.raises(
        SamplerError, match=r"keep to the budget of 4 parameters, but returned \[0, 1\] in period 0"
    ):
        draw(Greedy(), context((2, 3, 1), 4))
    assert draw(Greedy(), context((2, 3, 1), 5)) == (0, 1)


def exact(probabilities: Sequence[float], sizes: Sequence[int], limit: int) -> list[float]:
    """Over all orders in which units may be drawn one after another."""
    inclusion = [0.0] * len(sizes)
    for order in permutations(range(len(sizes))):
        chance, left = 1.0, sum(probabilities)
        for index in order:
            chance *= probabilities[index] / left if left > 1e-12 else 1.0
            left -= probabilities[index]
        for index in DrawBudget(tuple(sizes), limit).fit(order):
            inclusion[index] += chance
    return inclusion


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [((5, 2, 2, 1, 4), 6), ((5, 2, 2, 1, 4), 4), ((3, 3, 3, 3, 3), 7), ((1, 1, 1, 1, 9), 3), ((1,) * 5, 99)],
)
def test_chances_under_a_budget_are_those_of_the_draws(sizes: tuple[int, ...], limit: int) -> None:
    p = [0.4, 0.25, 0.2, 0.1, 0.05]
    expected = exact(p, sizes, limit)
    found = DrawBudget(sizes, limit).inclusion(p)
    is_exact = len({size for size in sizes if size <= limit}) == 1
    # An estimate has a standard error of at most .0078: four of them.
    assert found == pytest.approx(expected, abs=1e-9 if is_exact else 0.031)
    assert found == DrawBudget(sizes, limit).inclusion(p), "the same random numbers each time"
    sampler: Any = create_sampler("prior", {"weights": p})
    counts = [0.0] * 5
    for round in range(2000):
        for index in sampler.sample(context(sizes, limit, round)):
            counts[index] += 1 / 2000
    assert counts == pytest.approx(expected, abs=0.05)


def test_what_is_taken_for_sure_leaves_less_room() -> None:
    budget = DrawBudget((5, 2, 4, 1), 8)
    assert budget.most == 3 and budget.fit([0, 2, 1, 3]) == [0, 1, 3]
    left = budget.among([1, 2, 3], taken=[0])
    assert (left.sizes, left.limit) == ((2, 4, 1), 3)
    assert context((5, 2, 4, 1), 8).among([1, 2, 3], 2, taken=[0]).take([1, 0, 2]) == [0, 2]


@pytest.mark.parametrize(
    ("text", "amount"),
    [("2KiB", 2048), ("1.5 kb", 1500), ("3%", "3/100"), (0.1, "1/10"), ("1", "1"), ("100%", "1")],
)
def test_amounts_are_read_exactly(text: str | float, amount: int | str) -> None:
    from fractions import Fraction

    assert read_amount(text, "x") == (amount if isinstance(amount, int) else Fraction(amount))


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.1", "101%", "0MB", "nan", "inf", "many", "", "%", "1e-999999999", "5 %%", "1/2"]
)
def test_amounts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="^x must be a size such as '2GiB'"):
        read_amount(text, "x")


def scheduler(sampler: Any = "lisa", **options: Any) -> LayerScheduler:
    model = make_llama()
    return LayerScheduler(model, torch.optim.AdamW(model.parameters()), sampler, **options)


def test_a_budget_under_the_smallest_unit_is_refused_with_both_figures() -> None:
    with pytest.raises(
        ConfigError,
        match=r"smallest unit, model\.layers\.0\.self_attn\.k_proj, of 512 bytes, but draw_budget='511B' is 511: raise",
    ):
        scheduler(granularity="module", draw_budget="511B")
    with scheduler(granularity="module", draw_budget="512B") as made:
        assert made.num_active == 1
    with pytest.raises(ConfigError, match=r"of 2,336 parameters, but draw_budget='10%' is 1,"):
        scheduler(draw_budget="10%")


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("full", {}),
        ("lisa", {"draw": "bernoulli"}),
        ("warmup", {}),
        ("max_wait", {}),
        ("mixture", {"samplers": ["lisa", "full"]}),
    ],
)
def test_a_sampler_that_keeps_to_no_budget_is_refused_by_name(sampler: str, options: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match="draw_budget needs a sampler that keeps to it, but .* doesn't say that"
    ):
        scheduler(sampler, sampler_options=options, draw_budget="50%")
    with pytest.raises(ConfigError, match="but Given with its options"):
        scheduler(Given((0,)), draw_budget="50%")


def test_a_systematic_draw_has_no_budget() -> None:
    options = {"weights": "increase", "draw": "systematic"}
    with pytest.raises(ConfigError, match="a draw_budget needs draw='sequential'"):
        scheduler("prior", sampler_options=options, draw_budget="50%")


def test_what_a_budget_has_no_room_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    scheduler(granularity="block", draw_budget="4KB").close()
    assert "no room for 4 of the 8 units, which never train: model.layers.0.mlp (6,208 bytes)" in caplog.text
