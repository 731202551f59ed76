"""Samplers that weigh layers by scores which they learn from training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layersample.sampling.sampler import SamplingContext
from layersample.sampling.weighted import WeightedSampler


@dataclass(kw_only=True, eq=False)
class ObservedSampler(WeightedSampler):
    """Weighs layers by scores learned from training. Write ``observe``, which fills :attr:`scores`, and ``collects``.

    A layer without a score yet weighs as much as the best one that has, so that each is tried soon. Scores are part
    of the state. They must be finite and at least 0, or :meth:`weights` makes such weights of them.
    """

    scores: dict[str, float] = field(init=False, repr=False, default_factory=dict)

    def weights(self, context: SamplingContext) -> list[float]:
        """Return the scores by layer."""
        known = [self.scores[name] for name in context.layers if name in self.scores]
        best = max(known, default=1.0)
        return [self.scores.get(name, best) or 0.0 for name in context.layers]

    def state_dict(self) -> dict[str, Any]:
        """The scores."""
        return {"scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the scores back."""
        self.scores = dict(state["scores"])
