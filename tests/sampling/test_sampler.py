from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from layersample import LayerSampler, SamplingContext, WeightedSampler
from layersample.sampling.draws import Draw
from layersample.sampling.statistics import LayerStatistics
from layersample.testing import SamplerContract

LAYERS = tuple(f"layers.{i}" for i in range(5))


class Weights(WeightedSampler):
    """Fixed weights.

    Args:
        weights: One a layer.
    """

    def __init__(self, *, weights: tuple[float, ...] = (1, 2, 3, 4, 5, 6, 7)) -> None:
        self._weights = weights

    def weights(self, context: SamplingContext) -> tuple[float, ...]:
        return self._weights


class TestWeightedSampler(SamplerContract):
    def make(self) -> LayerSampler:
        return Weights()


class Alternate(LayerSampler):
    """Train even layers, then odd layers, in turn."""

    def sample(self, context: SamplingContext) -> range:
        return range(context.round % 2, context.num_layers, 2)


class TestTheTenLineSampler(SamplerContract):
    def make(self) -> LayerSampler:
        return Alternate()


def test_generator_depends_on_seed_and_round_alone() -> None:
    def draw(seed: int, round: int) -> list[float]:
        return torch.rand(4, generator=SamplingContext(LAYERS, 2, round=round, seed=seed).generator).tolist()

    assert draw(3, 5) == draw(3, 5)
    assert draw(3, 5) != draw(3, 6)
    assert draw(3, 5) != draw(4, 5)
    # What a run drew must stay what it draws, in later versions too.
    assert draw(0, 0) == pytest.approx([0.5913, 0.6585, 0.4950, 0.8908], abs=1e-4)


def test_generator_is_drawn_from_once() -> None:
    context = SamplingContext(LAYERS, 2)
    assert torch.rand(1, generator=context.generator) != torch.rand(1, generator=context.generator)


def test_statistics_are_of_as_many_layers_as_there_are() -> None:
    statistics = SamplingContext(LAYERS, 2).statistics
    assert (statistics.visits, statistics.last_active) == ((0,) * 5, (None,) * 5)
    for given in (LayerStatistics((), ()), LayerStatistics((0,) * 5, (None,) * 4)):
        with pytest.raises(ValueError, match="one entry for each of the 5 layers, but holds [04]"):
            SamplingContext(LAYERS, 2, statistics=given)


def test_weights_are_followed() -> None:
    sampler = Weights(weights=(0, 0, 1, 0, 3))
    assert sorted(sampler.sample(SamplingContext(LAYERS, 2))) == [2, 4]
    first = [sampler.sample(SamplingContext(LAYERS, 1, round=i))[0] for i in range(4000)]
    assert first.count(4) / 4000 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4000))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 2), "must give 5 weights, one a layer, but gave 2"),
        ((1, 1, math.nan, 1, 1), "weight of layers.2 is nan"),
        ((1, 1, -1, 1, 1), "weight of layers.2 is -1"),
        ((1, 1, math.inf, 1, 1), "weight of layers.2 is inf"),
        ((0, 0, 3, 0, 0), "num_active=2 layers must have a probability above 0, but 1 have"),
        ((0, 0, 0, 0, 0), "At least one of the 5 weights must be above 0"),
    ],
)
def test_bad_weights_are_named(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weights(weights=weights).sample(SamplingContext(LAYERS, 2))


class Tempered(WeightedSampler):
    """Weights 1, 2, 4 and so on."""

    def weights(self, context: SamplingContext) -> list[float]:
        return [2.0**i for i in range(context.num_layers)]


@pytest.mark.parametrize("draw", ["sequential", "systematic"])
class TestDraws(SamplerContract):
    @pytest.fixture(autouse=True)
    def _choose(self, draw: Draw) -> None:
        self._draw = draw

    def make(self) -> LayerSampler:
        return Tempered(temperature=2.0, min_probability=0.05, draw=self._draw)


def test_temperature_and_floor() -> None:
    context = SamplingContext(LAYERS, 2)
    assert Tempered().probabilities(context) == pytest.approx([1 / 31, 2 / 31, 4 / 31, 8 / 31, 16 / 31])
    flat = Tempered(temperature=1e6).probabilities(context)
    assert flat == pytest.approx([0.2] * 5, abs=1e-4)
    sharp = Tempered(temperature=0.01).probabilities(context)
    assert sharp[4] == pytest.approx(1)
    floored = Tempered(temperature=0.01, min_probability=0.1).probabilities(context)
    assert min(floored) == pytest.approx(0.1) and sum(floored) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be finite and above 0, but got 0"),
        ({"min_probability": -0.1}, "min_probability must be between 0 and 1, but got -0.1"),
        ({"draw": "lots"}, "draw must be 'sequential' or 'systematic', but got 'lots'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tempered(**options)


def test_a_floor_above_uniform() -> None:
    with pytest.raises(ValueError, match="min_probability must be at most 1 / 5 layers, but got 0.3"):
        Tempered(min_probability=0.3).probabilities(SamplingContext(LAYERS, 2))
