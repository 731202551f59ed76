"""GRASS: layers drawn by the mean norm of their gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from layersample import LayerStatistics, ObservedSampler, SamplingContext, register


@register("grass")
@dataclass(kw_only=True, eq=False)
class Grass(ObservedSampler):
    """Draw layers by a softmax of the mean norm of their gradients (GRASS).

    A layer's norm is m_l = mean over a period of √(‖g_l‖² / N_l), with its number of elements N_l. The score of a
    layer that trained becomes ``decay``·score + (1 − ``decay``)·m_l; the others keep theirs. Probabilities are
    p = softmax(score / τ), with scores relative to their mean, since a gradient's size has no unit that a
    temperature could be given in.

    The paper's probe phase takes the norms of all layers without training: ``probe_batches``. Without it the first
    periods draw only among layers that have not trained yet, so each is known after ⌈N / γ⌉ periods, at no cost.

    Args:
        decay: Weight of a score's past, from 0 to below 1.
        tau: Temperature of the softmax (τ), above 0: the larger, the closer to uniform.
        probe_batches: Calibration batches of the probe phase; 0 leaves it out.

    References:
        arXiv 2604.07808; the authors published no code, and no value of ``decay`` and ``tau`` is known to us: both
        defaults are ours. Written from reports of the paper: that scores are taken relative to their mean is ours
        too.
    """

    source = "arXiv 2604.07808"
    collects = frozenset({"gradients"})

    decay: float = 0.9
    tau: float = 1.0
    probe_batches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, but got {self.decay}.")
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"tau must be finite and above 0, but got {self.tau}.")
        if self.probe_batches < 0:
            raise ValueError(f"probe_batches must be at least 0, but got {self.probe_batches}.")

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        """Update the scores of the layers that trained."""
        for index in context.active:
            norm, name = statistics.gradient_rms[index], context.layers[index]
            if norm is not None:
                self.scores[name] = self.decay * self.scores.get(name, norm) + (1 - self.decay) * norm

    def weights(self, context: SamplingContext) -> list[float]:
        """Return e^(score / τ) once each layer has trained; before that, only those that haven't have a weight."""
        visits = context.statistics.visits
        fresh = [v == 0 and name not in self.scores for v, name in zip(visits, context.layers, strict=True)]
        if sum(fresh) >= context.num_active:
            return [float(is_fresh) for is_fresh in fresh]
        if any(fresh):  # fewer than a draw holds: all of them are drawn, as good as surely
            return [1.0 if is_fresh else 1e-9 for is_fresh in fresh]
        known = [self.scores[name] for name in context.layers if name in self.scores]
        average = sum(known) / max(len(known), 1)  # of a layer that trained, and had no gradient
        scores = [self.scores.get(name, average) for name in context.layers]
        mean = sum(scores) / len(scores) or 1.0
        largest = max(scores)  # so that no power overflows
        return [math.exp((score - largest) / mean / self.tau) for score in scores]
