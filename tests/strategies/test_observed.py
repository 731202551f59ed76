"""Samplers that learn from training: their formulas against numbers worked by hand, and a problem with one answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layersample import ConfigError, LayerSampler, LayerScheduler, SamplingContext, create_sampler
from layersample.layers.costs import LayerCosts
from layersample.sampling.draw_budget import DrawBudget
from layersample.sampling.statistics import GradientStatistics, LayerStatistics, LossStatistics

LAYERS = ("a", "b", "c")


def context(
    *,
    active: tuple[int, ...] = (),
    norms: Sequence[float | None] = (None,) * 3,
    loss: LossStatistics | None = None,
    visits: tuple[int, ...] = (1, 1, 1),
    size: int = 4,
    **more: Any,
) -> SamplingContext:
    """A context of three layers with some statistics."""
    gradients = GradientStatistics(tuple(norms), tuple(norms), (size,) * 3)
    statistics = LayerStatistics(visits, (None,) * 3, more.get("round", 0), gradients, loss)
    return SamplingContext(LAYERS, **{"num_active": 1, **more}, statistics=statistics, active=active)


def told(sampler: LayerSampler, **what: Any) -> None:
    given = context(**what)
    sampler.observe(given.statistics, given)


def test_grass_is_a_softmax_of_mean_norms() -> None:
    sampler: Any = create_sampler("grass", {"decay": 0.5, "tau": 2.0})
    assert sampler.probabilities(context(visits=(0, 0, 1))) == [0.5, 0.5, 0.0]
    told(sampler, active=(0, 1, 2), norms=(2.0, 4.0, 12.0))  # over √4: 1, 2, 6
    assert sampler.scores == {"a": 1.0, "b": 2.0, "c": 6.0}
    told(sampler, active=(1,), norms=(99.0, 8.0, 99.0))  # .5·2 + .5·4
    told(sampler, active=(0,), norms=(None, None, None))  # a gradient that was no number
    assert sampler.scores == {"a": 1.0, "b": 3.0, "c": 6.0}
    # Their mean is 10/3: e^(score / (10/3) / 2) is 1.16183, 1.56831, 2.45960.
    assert sampler.probabilities(context()) == pytest.approx([0.223871, 0.302194, 0.473935], abs=1e-6)


def test_grass_tries_every_layer_before_it_weighs_them() -> None:
    sampler: Any = create_sampler("grass")
    visits = [0, 0, 0]
    for round in range(2):
        given = context(visits=tuple(visits), num_active=2, round=round)
        for index in sampler.sample(given):
            visits[index] += 1
        told(sampler, active=tuple(i for i in range(3) if visits[i]), norms=(1.0, 1.0, 1.0))
    assert min(visits) == 1


def test_the_bandit_is_exp3_per_unit_of_cost() -> None:
    sampler: Any = create_sampler("bandit", {"rate": 0.3, "exploration": 0.1})
    costs = LayerCosts(flops=(1.0, 2.0, 3.0), trained_bytes=(0.0,) * 3, activation_bytes=(0.0,) * 3)
    given = context(costs=costs)
    assert sampler.probabilities(given) == pytest.approx([1 / 3] * 3)
    sampler.sample(given)
    told(sampler, active=(0,), loss=LossStatistics(5, 3.0, 2.0, 2.0), costs=costs)
    # Cost 1/2 of the mean: reward 2, the largest, so 1; .3 · 1 / (1/3) = .9. e^.9 = 2.459603.
    assert sampler.scores == pytest.approx({"a": 0.9})
    p = [0.9 * e / 4.459603 + 0.1 / 3 for e in (2.459603, 1.0, 1.0)]
    assert sampler.probabilities(given) == pytest.approx(p, abs=1e-6)
    sampler.sample(given)
    told(sampler, active=(2,), loss=LossStatistics(5, 2.0, 2.5, 2.5), costs=costs)
    # The loss rose by 1/2; at a cost of 3/2 that is −1/3, over the largest −1/6.
    assert sampler.scores["c"] == pytest.approx(-0.3 / 6 / p[2], abs=1e-6)
    told(sampler, active=(1,), loss=LossStatistics(5, None, None, math.nan))
    assert "b" not in sampler.scores


def test_the_bandit_says_that_it_was_told_no_loss() -> None:
    sampler = create_sampler("bandit")
    with pytest.raises(ConfigError, match=r"that of 1: call scheduler.step\(loss=loss\)"):
        told(sampler, active=(0,), loss=LossStatistics(1, None, None, 1.0))


def test_misa_is_a_softmax_of_squared_running_norms() -> None:
    sampler: Any = create_sampler("misa")
    told(sampler, active=(0, 1), norms=(5.0, 10.0, 99.0))  # .2 · 5 and .2 · 10
    told(sampler, active=(0, 2), norms=(1.0, 99.0, None))  # .8 · 1 + .2 · 1
    assert sampler.scores == pytest.approx({"a": 1.0, "b": 2.0})
    # e^1, e^4 and e^0 add up to 58.316432.
    assert sampler.probabilities(context()) == pytest.approx([0.0466126, 0.9362396, 0.0171478], abs=1e-7)
    sampler.scores["b"] = 9.0
    assert sampler.weights(context())[1] == pytest.approx(math.exp(5))


def test_misa_fills_a_budget_as_the_authors_code_does() -> None:
    """The two that have waited longest come first, where they fit; of the rest what fits is drawn by weight."""
    sampler: Any = create_sampler("misa", {"oldest": 2})
    names = tuple("abcde")
    sampler.scores = dict.fromkeys(names, 1.0) | {"d": 2.0}
    norms: Any = GradientStatistics((None,) * 5, (None,) * 5, (1,) * 5)
    given = SamplingContext(
        names,
        3,
        round=9,
        statistics=LayerStatistics((1,) * 5, (8, 7, 3, 5, 2), 9, norms),
        budget=DrawBudget((2, 3, 5, 3, 4), 7),
    )
    # e has waited longest and leaves 3; c doesn't fit, and isn't tried again. Of b and d one fits, of a both or none:
    # weights e^1, e^1 and e^4 add up to 60.0347, and a leaves room for no other one.
    assert all(sampler.sample(given)[0] == 4 for _ in range(3))
    p = {"a": math.e / 60.034714, "b": math.e / 60.034714, "d": math.exp(4) / 60.034714}
    found = sampler.inclusion_probabilities(given)
    assert found[4] == 1.0 and found[2] == 0.0
    assert [found[0], found[1], found[3]] == pytest.approx(list(p.values()), abs=0.03)


def test_misa_lets_each_unit_train_for_a_step_before_it_weighs_them() -> None:
    sampler: Any = create_sampler("misa")
    sampler.scores = {"c": 2.0}
    given = context(visits=(0, 0, 1))
    assert sampler.sample(given) == [0] and sampler.watches_steps
    for active, wanted in (((0,), True), ((0, 1), False)):
        now = context(visits=(0, 0, 1), active=active)
        assert sampler.wants_new_period(now.statistics, now) is wanted
    assert len(sampler.sample(context())) == 1 and not sampler.watches_steps
    alone: Any = create_sampler("misa", {"explore": False, "oldest": 0})
    alone.scores = {"a": 0.0, "b": 0.0, "c": 9.0}
    drawn = [alone.sample(context(visits=(0, 0, 1), seed=seed))[0] for seed in range(50)]
    assert drawn.count(2) > 40, "it weighs them from the start"


def test_what_one_period_adds_to_a_bandit_s_score_is_bounded() -> None:
    sampler: Any = create_sampler("bandit", {"rate": 0.3, "per": "period"})
    sampler.scores = {"a": 9.0}
    told(sampler, active=(1,), loss=LossStatistics(5, 3.0, 2.0, 2.0))  # .3 · 1 / (.1 / 3 + …) = 9
    assert sampler.scores["b"] == 1.0
    told(sampler, active=(2,), loss=LossStatistics(5, 2.0, 3.0, 3.0))
    assert sampler.scores["c"] == -1.0


def test_misa_takes_those_that_have_waited_longest() -> None:
    sampler: Any = create_sampler("misa", {"oldest": 1})
    sampler.scores = {"a": 2.0, "b": 2.0}
    given = context(num_active=2, round=9)
    statistics = LayerStatistics((1, 1, 1), (8, 7, 3), 9, given.statistics.gradients)
    given = SamplingContext(LAYERS, 2, round=9, statistics=statistics)
    assert all(
        2 in sampler.sample(SamplingContext(LAYERS, 2, 9, seed=i, statistics=statistics)) for i in range(20)
    )
    assert sampler.inclusion_probabilities(given) == pytest.approx([0.5, 0.5, 1.0])


def test_adagradselect_takes_the_largest_sums_and_later_draws_by_counts() -> None:
    sampler: Any = create_sampler("adagradselect", {"epsilon_decay": 0.5})
    told(sampler, active=(0, 1), norms=(1.0, 2.0, 99.0))
    told(sampler, active=(0, 2), norms=(3.0, 99.0, 1.0))
    assert sampler.scores == {"a": 4.0, "b": 2.0, "c": 1.0}
    assert sampler.sample(context()) == [0]
    assert sampler.sample(context(visits=(1, 1, 0))) == [2], "what hasn't trained comes first"
    taken = sum(sampler.takes_largest(context(round=2, seed=seed)) for seed in range(2000))
    assert taken / 2000 == pytest.approx(math.exp(-1), abs=0.04)
    # The mean of Dirichlet(n + δ) is (n + δ) / Σ: (6, 3, 1) / 10.
    seeds = range(2000)
    drawn = [sampler.weights(context(visits=(5, 2, 0), round=90, seed=seed)) for seed in seeds]
    assert [sum(p) / 2000 for p in zip(*drawn, strict=True)] == pytest.approx([0.6, 0.3, 0.1], abs=0.02)


def test_blockllm_takes_the_largest_norms_for_their_visits_until_the_loss_stalls() -> None:
    sampler: Any = create_sampler("blockllm", {"patience": 2})
    some = LossStatistics(3, 2.0, 1.0, 1.0)
    told(sampler, active=(0, 1, 2), norms=(3.0, 2.0, 1.0), loss=some)
    # 3 / e^(4/4) = 1.104, 2 / e^(1/4) = 1.558, 1 / e^(1/4) = .779.
    assert sampler.sample(context(visits=(4, 1, 1), round=4, num_active=2)) == [1, 0]
    assert sampler.sample(context(visits=(4, 1, 0), round=4)) == [2], "what hasn't trained comes first"

    tells = 0

    def asked(loss: float, *, new: bool = True) -> bool:
        nonlocal tells
        tells += new
        given = context(active=(0,), loss=LossStatistics(tells, None, None, loss))
        wanted: bool = sampler.wants_new_period(given.statistics, given)
        return wanted

    # The last two have a mean of 1.2, 1.5, 1.8; all of them 1.467, 1.5, 1.6.
    losses = (2.0, 1.0, 1.4, 1.6, 2.0, math.nan)
    assert [asked(loss) for loss in losses] == [False, False, False, False, True, False]
    told(sampler, active=(0,), norms=(3.0, 2.0, 1.0), loss=some)
    tells = 0
    assert not asked(9.0), "another choice begins"
    assert not any(asked(9.0, new=False) for _ in range(9)) and not asked(9.0), "a loss counts once"
    again: Any = create_sampler("blockllm", {"patience": 2})
    again.load_state_dict(sampler.state_dict())
    assert again.state_dict() == sampler.state_dict() and not asked(9.0, new=False)
    with pytest.raises(ConfigError, match="was told none"):
        told(sampler, active=(0,), loss=LossStatistics())


def test_spectrum_is_the_authors_ratio() -> None:
    from layersample_strategies.spectrum import signal_to_noise

    # Quartiles 2 and 4: IQR 2; 2 / 1.349 · (1 + √(5/20)) = 2.2239; (3 + 4 + 10) / (1 + 2) / 10.
    assert signal_to_noise(np.array([1.0, 2.0, 3.0, 4.0, 10.0]), (5, 20)) == pytest.approx(17 / 30)
    sampler: Any = create_sampler("spectrum", {"choose": "top"})
    sampler.scores = {"a": 1.0, "b": 3.0, "c": 2.0}
    assert sampler.sample(context(num_active=1)) == [1]
    assert sorted(sampler.sample(context(num_active=2))) == [1, 2]


class Planted(nn.Module):
    """Four layers, of which one alone moves the output: the others are multiplied by almost nothing."""

    def __init__(self, planted: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=4)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.factors = [1.0 if index == planted else 1e-3 for index in range(4)]
        self.wanted = nn.Buffer(torch.randn(8, 8, generator=generator))

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        hidden = sum(factor * layer(inputs) for factor, layer in zip(self.factors, self.layers, strict=True))
        return SimpleNamespace(loss=(hidden - inputs @ self.wanted).square().mean())


@pytest.mark.parametrize("name", ["grass", "bandit"])
def test_a_layer_that_carries_all_the_decrease_gets_most_draws(name: str) -> None:
    """With the sampler's defaults, whichever layer it is; of 2048 examples a step the loss hardly scatters."""
    planted_in = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        planted = int(torch.randint(4, (), generator=generator))
        planted_in.append(planted)
        torch.manual_seed(seed)
        model = Planted(planted, generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        drawn: list[int] = []
        with LayerScheduler(model, optimizer, name, num_active=1, period=4, seed=seed) as scheduler:
            while scheduler.round < 100:
                if len(drawn) == scheduler.round:
                    drawn.extend(scheduler.active)
                loss = model(torch.randn(2048, 8, generator=generator)).loss
                loss.backward()
                optimizer.step()
                scheduler.step(loss=loss)
                optimizer.zero_grad()
        assert drawn[50:].count(planted) >= 25, (seed, planted, drawn)
    assert set(planted_in) == set(range(4)), "it is in each place at least once"
