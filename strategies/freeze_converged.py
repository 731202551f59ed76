"""Layers whose gradients have become small are frozen for good, whatever the sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layersample import LayerStatistics, SamplingContext, register
from layersample_strategies.wrapping import WrappedSampler


@register("freeze_converged")
@dataclass(kw_only=True, eq=False)
class FreezeConverged(WrappedSampler):  # type: ignore[misc]
    """Freeze a layer for good once its gradient is small (GradES); of the others, another sampler chooses.

    After a period in which a layer trained, it is frozen if the mean of its gradient's root mean square is below
    ``threshold``; not in the first ``grace`` periods, and never so many that fewer than ``num_active`` are left.

    The paper freezes matrices one by one, by the L1 norm of their gradients. A unit is a whole layer here, and
    the norm that of the library's statistics, per element; so the paper's thresholds don't carry over.

    Args:
        threshold: Root mean square, above 0; with ``relative`` as a share of the layer's own in its first period.
        relative: Whether the threshold is relative.
        grace: Periods in which nothing is frozen, at least 0.

    References:
        GradES, arXiv 2509.01842 and the authors' code.
    """

    source = "arXiv 2509.01842"
    collects = frozenset({"gradients"})
    passes_budget = True

    threshold: float = 0.1
    relative: bool = True
    grace: int = 10
    first: dict[str, float] = field(init=False, repr=False, default_factory=dict)
    converged: list[str] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"threshold must be finite and above 0, but got {self.threshold}.")
        if self.grace < 0:
            raise ValueError(f"grace must be at least 0 periods, but got grace={self.grace}.")

    def sample(self, context: SamplingContext) -> list[int]:
        """Ask the other sampler among those that have not converged."""
        left = self._left(context)
        place = dict(enumerate(left))  # in which an index of -1 is an error
        return [place[index] for index in self.inner.sample(context.among(left, context.num_active))]

    def inclusion_probabilities(self, context: SamplingContext) -> list[float] | None:
        """0 for what has converged; those of the other sampler among the rest."""
        left = self._left(context)
        inclusion = self.inner.inclusion_probabilities(context.among(left, context.num_active))
        if inclusion is None:
            return None
        known = dict(zip(left, inclusion, strict=True))
        return [known.get(index, 0.0) for index in range(context.num_layers)]

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        """Tell the other sampler, then see which layers have converged."""
        left = self._left(context)
        self.inner.observe(statistics.subset(left), context.among(left, context.num_active))
        for index in context.active:
            norm, name = statistics.gradient_rms[index], context.layers[index]
            if norm is None:
                continue
            first = self.first.setdefault(name, norm)
            small = norm < self.threshold * (first if self.relative else 1.0)
            enough = context.num_layers - len(self.converged) > context.num_active
            if small and enough and context.round >= self.grace and name not in self.converged:
                self.converged.append(name)

    def wants_new_period(self, statistics: LayerStatistics, context: SamplingContext) -> bool:
        """Ask the other sampler."""
        left = self._left(context)
        among = context.among(left, context.num_active)
        wants: bool = self.inner.wants_new_period(statistics.subset(left), among)
        return wants

    def state_dict(self) -> dict[str, Any]:
        """What has converged, the first norms, and the other sampler's state."""
        return {**super().state_dict(), "first": self.first, "converged": list(self.converged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.first, self.converged = dict(state["first"]), list(state["converged"])

    def _left(self, context: SamplingContext) -> list[int]:
        return [index for index, name in enumerate(context.layers) if name not in self.converged]
