"""A bandit of one's own, in ten lines."""

from __future__ import annotations

from dataclasses import dataclass

from layersample import LayerStatistics, ObservedSampler, SamplingContext, register


@register("eager")
@dataclass(kw_only=True, eq=False)
class Eager(ObservedSampler):
    """Draw layers in proportion to how much the loss fell while they last trained."""

    collects = frozenset({"loss"})
    min_probability: float = 0.01

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        """Keep the decrease of the loss as the score of each layer that trained."""
        loss = statistics.loss
        if loss.before is not None and loss.after is not None:
            for index in context.active:
                self.scores[context.layers[index]] = max(loss.before - loss.after, 1e-6)
