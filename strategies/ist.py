"""IST: layers drawn by how much worse the model gets when their response is damped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from layersample import ConfigError, MeasuredSampler, Measurement, SamplingContext, register
from layersample.metrics import damped_losses


@register("ist")
@dataclass(kw_only=True, eq=False)
class Ist(MeasuredSampler):
    """Draw layers by how much worse the model gets when their response is damped (IST).

    Every ``every`` periods the loss of one batch is computed ``probes`` times, each time with a part of the layers
    damped, which are drawn by σ(I). With rewards r = e^(−loss) relative to their mean r̄, each layer that was damped
    gets I ← I + ``rate`` · (r − r̄) · σ(I) · (1 − σ(I)): it is the larger, the less the layer matters. Layers to train
    are drawn by p ∝ σ(−I). Until the first measurement all I are 0.

    The authors train adapters, and damp these: so it is here, where layers have LoRA adapters. Where whole layers
    train, which is ours, what a layer adds to its input is damped: x + ``damping`` · (f(x) − x). The authors draw a
    quarter of the layers in each step, which is ``period=1``.

    Args:
        every: Periods between measurements.
        probes: Losses of a measurement, at least 2; fewer where there aren't so many sets of layers to damp.
        damping: What is left of a damped layer's response (β), from 0 to below 1.
        damped: Part of the layers that is damped at a time, above 0 and below 1.
        rate: Learning rate of the scores (μ), above 0.
        num_batches: Calibration batches, of which each measurement takes another one, at least 1.

    References:
        arXiv 2410.11772 (EMNLP Findings 2024) and the authors' code, whose values are the defaults.
    """

    source = "arXiv 2410.11772"

    needs_batches = True

    every: int | None = 10
    probes: int = 3
    damping: float = 0.25
    damped: float = 0.5
    rate: float = 10.0
    num_batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 2:
            raise ValueError(f"probes must be at least 2, but got probes={self.probes}.")
        if not 0 <= self.damping < 1:
            raise ValueError(f"damping must be at least 0 and below 1, but got {self.damping}.")
        if not 0 < self.damped < 1:
            raise ValueError(f"damped must be above 0 and below 1, but got {self.damped}.")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate must be finite and above 0, but got {self.rate}.")
        if self.num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, but got {self.num_batches}.")

    def measure(self, measurement: Measurement) -> None:
        """Update the scores; before the first period there is nothing to learn from, as in the authors' code.

        Raises:
            ConfigError: If parts of layers are sampled, or there are no batches.
        """
        layers = measurement.model_layers.layers
        if parts := [layer.name for layer in layers if layer.within is not None]:
            raise ConfigError(
                f"The sampler 'ist' damps whole layers, so granularity must be 'layer', but {parts[0]} is a part of "
                "one."
            )
        if measurement.batches is None:
            raise ConfigError(
                "The sampler 'ist' computes losses of calibration batches, but got none: give batches= to the "
                "scheduler."
            )
        if measurement.round == 0:
            return
        names = [layer.name for layer in layers]
        number = measurement.round // (self.every or 1)
        batch = _one_of(measurement, number % self.num_batches)
        sets = self._draw_damped(names, measurement.generator)
        losses = damped_losses(measurement.model, batch, sets, self.damping)
        if all(map(math.isfinite, losses)):
            self.scores = update_scores(self.scores, sets, losses, self.rate)

    def weights(self, context: SamplingContext) -> list[float]:
        """Return σ(−I)."""
        return [_sigmoid(-self.scores.get(name, 0.0)) for name in context.layers]

    def _draw_damped(self, names: Sequence[str], generator: torch.Generator) -> list[list[str]]:
        """Different sets of layers, by σ(I)."""
        count = max(1, int(self.damped * len(names)))
        weights = torch.tensor([_sigmoid(self.scores.get(name, 0.0)) for name in names], dtype=torch.float64)
        found: list[list[str]] = []
        while len(found) < min(self.probes, math.comb(len(names), count)):
            drawn = sorted(torch.multinomial(weights, count, generator=generator).tolist())
            chosen = [names[index] for index in drawn]
            if chosen not in found:
                found.append(chosen)
        return found


def update_scores(
    scores: Mapping[str, float], sets: Sequence[Sequence[str]], losses: Sequence[float], rate: float
) -> dict[str, float]:
    """The scores after some losses.

    Args:
        scores: I of each layer; 0 where there is none.
        sets: The layers that were damped for each loss.
        losses: The losses.
        rate: Learning rate (μ).
    """
    rewards = [math.exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    updated = dict(scores)
    for chosen, reward in zip(sets, rewards, strict=True):
        for name in chosen:
            slope = _sigmoid(scores.get(name, 0.0))
            updated[name] = updated.get(name, 0.0) + rate * (reward - mean) * slope * (1 - slope)
    return updated


def _one_of(measurement: Measurement, number: int) -> Mapping[str, Any]:
    """One of the calibration batches; where there are fewer, they are counted anew."""
    found = list(islice(measurement.read("Damping layers", number + 1), number + 1))
    if not found:
        raise ConfigError("The sampler 'ist' needs at least one calibration batch, but got none.")
    return found[number % len(found)]


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
