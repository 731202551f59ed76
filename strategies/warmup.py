"""More layers at first, whatever the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from layersample import SamplingContext, register
from layersample_strategies.wrapping import WrappedSampler


@register("warmup")
@dataclass(kw_only=True, eq=False)
class Warmup(WrappedSampler):  # type: ignore[misc]
    """Train more layers at first, and ``num_active`` after some periods; which ones, another sampler says.

    In period r of the first ``periods``, num_active + (first − num_active)·(1 − r / periods) layers train, rounded to
    the nearest number. Plans are made for ``first`` layers, which hold most.

    Args:
        first: Layers of the first period; more than there are means all of them.
        periods: Periods until ``num_active`` is reached, at least 1.
    """

    source = "ours"

    first: int = 8
    periods: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fixed_size = False
        for name, value in (("first", self.first), ("periods", self.periods)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but got {name}={value}.")

    def num_drawn(self, context: SamplingContext) -> int:
        """As many as are due."""
        drawn: int = self.inner.num_drawn(self._due(context))
        return drawn

    def sample(self, context: SamplingContext) -> list[int]:
        """Ask the other sampler for as many as are due."""
        return list(self.inner.sample(self._due(context)))

    def inclusion_probabilities(self, context: SamplingContext) -> list[float] | None:
        """Those of the other sampler for as many."""
        inclusion = self.inner.inclusion_probabilities(self._due(context))
        return None if inclusion is None else list(inclusion)

    def _due(self, context: SamplingContext) -> SamplingContext:
        most = max(min(self.first, context.num_layers), context.num_active)
        left = max(0.0, 1 - context.round / self.periods)
        count = context.num_active + round((most - context.num_active) * left)
        return context.among(range(context.num_layers), count)
