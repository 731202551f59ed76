"""MISA: modules drawn by the running norm of their gradients, and the longest unseen ones for sure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from layersample import LayerStatistics, ObservedSampler, SamplingContext, register

_MOST = 5.0  # the exponent's bound in the authors' code


@register("misa")
@dataclass(kw_only=True, eq=False)
class Misa(ObservedSampler):
    """Draw modules, or layers, by the running norm of their gradients (MISA).

    With Ḡ_b the mean of ‖g_b‖_F over the period, the score of what trained becomes G ← ``decay``·G +
    (1 − ``decay``)·Ḡ_b, and p ∝ e^min(5, η·G²). Of each draw, the ``oldest`` that have waited longest are in for sure.

    The paper's units are the matrices of the layers, and a draw holds a part δ of all parameters:
    ``granularity="module"`` and ``draw_budget="3%"``, as the preset has them. A module that doesn't fit any more is
    left out, and the draw goes on.

    As in the authors' code, units that have never trained come first, and until all have, a draw lasts one step. Three
    things differ from it. It corrects the bias of the running mean anew in each period on top of the last correction,
    so that it compounds; there is none here, and scores begin at 0. It divides the norms of a period that lasted one
    step by 50; here the mean is over the steps that there were. It never trains norms, which here go with a module.

    Args:
        eta: Factor in the exponent (η), above 0; 500 in the authors' pre-training.
        decay: Weight of a score's past, from 0 to below 1.
        oldest: Units of a draw that have waited longest, at least 0. Of ``num_active`` at most half are taken, or
            scores would have no say where few layers train: ours.
        explore: Whether units that have never trained come first, and each draw lasts a step until all have.

    References:
        arXiv 2511.00056 (NeurIPS 2025) and the authors' code.
    """

    source = "arXiv 2511.00056"
    collects = frozenset({"gradients"})

    eta: float = 1.0
    decay: float = 0.8
    oldest: int = 2
    explore: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.eta) and self.eta > 0):
            raise ValueError(f"eta must be finite and above 0, but got {self.eta}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, but got {self.decay}.")
        if self.oldest < 0:
            raise ValueError(f"oldest must be at least 0 layers, but got oldest={self.oldest}.")
        self.watches_steps = self.explore  # until all have trained

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        """Update the scores of the layers that trained."""
        for index in context.active:
            norm, name = statistics.gradient_norm[index], context.layers[index]
            if norm is not None:
                self.scores[name] = self.decay * self.scores.get(name, 0.0) + (1 - self.decay) * norm

    def wants_new_period(self, statistics: LayerStatistics, context: SamplingContext) -> bool:
        """Whether there are units that have never trained."""
        new = {index for index, visits in enumerate(statistics.visits) if visits == 0}
        return self.explore and not new <= set(context.active)

    def weights(self, context: SamplingContext) -> list[float]:
        """Return e^min(5, η·G²)."""
        scores = [self.scores.get(name, 0.0) for name in context.layers]
        return [math.exp(min(_MOST, self.eta * score**2)) for score in scores]

    def sample(self, context: SamplingContext) -> list[int]:
        """Take those that have waited longest, and draw the rest."""
        self.watches_steps = self.explore and 0 in context.statistics.visits
        sure, rest = self._split(context)
        drawn = super().sample(self._among(context, sure, rest)) if rest else []
        return [*sure, *(rest[index] for index in drawn)]

    def inclusion_probabilities(self, context: SamplingContext) -> list[float]:
        """1 for those that have waited longest; for the rest that of the draw among them."""
        sure, rest = self._split(context)
        among = super().inclusion_probabilities(self._among(context, sure, rest)) if rest else []
        known = {**dict.fromkeys(sure, 1.0), **dict(zip(rest, among, strict=True))}
        return [known.get(index, 0.0) for index in range(context.num_layers)]

    def _split(self, context: SamplingContext) -> tuple[list[int], list[int]]:
        """Those that are in for sure, and those to draw from; the lowest of those that have waited alike."""
        by_wait = sorted(range(context.num_layers), key=lambda index: -context.statistics.staleness[index])
        new = context.statistics.visits.count(0) if self.explore else 0
        budget = context.budget
        if budget is None:
            sure = by_wait[: min(max(new, min(self.oldest, context.num_active // 2)), context.num_active)]
            rest = sorted(by_wait[len(sure) :]) if len(sure) < context.num_active else []
        else:
            sure = budget.fit(by_wait[: max(new, self.oldest)])
            room = budget.limit - budget.total(sure)
            rest = [i for i, size in enumerate(budget.sizes) if i not in sure and size <= room]
        return sure, rest

    def _among(self, context: SamplingContext, sure: list[int], rest: list[int]) -> SamplingContext:
        return context.among(rest, context.num_active - len(sure), taken=sure)
