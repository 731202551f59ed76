"""A guarantee that no layer waits too long, whatever the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from layersample import ConfigError, SamplingContext, register
from layersample_strategies.wrapping import WrappedSampler


@register("max_wait")
@dataclass(kw_only=True, eq=False)
class MaxWait(WrappedSampler):  # type: ignore[misc]
    """Let another sampler choose, but let no layer wait longer than some periods in a row.

    A layer has d periods left until it must train. In each period as many layers are taken for sure, those with the
    least d first, as all deadlines need to be kept: max over h of (layers with d ≤ h) − γ·(h − 1). The other sampler
    chooses as ever; of its choice as many are left out as were taken for sure beside it, the shortest wait first.

    Args:
        periods: Most periods in a row in which a layer doesn't train, at least N / γ − 1 for N layers.
    """

    source = "ours"

    periods: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.periods < 0:
            raise ValueError(f"periods must be at least 0, but got periods={self.periods}.")

    def sample(self, context: SamplingContext) -> list[int]:
        """Take those that must train, and what the other sampler chooses.

        Raises:
            ConfigError: If ``num_active`` layers a period can't reach all of them in time.
        """
        if (self.periods + 1) * context.num_active < context.num_layers:
            raise ConfigError(
                f"periods must be at least {-(-context.num_layers // context.num_active) - 1} for "
                f"{context.num_layers} layers, {context.num_active} at a time, but got periods={self.periods}."
            )
        wait = context.statistics.staleness
        # 1 must train now. A layer that trained in the period before has waited for none: its staleness is 1.
        left = [max(1, self.periods + 2 - waited) for waited in wait]
        need = [
            sum(own <= horizon for own in left) - context.num_active * (horizon - 1)
            for horizon in range(1, self.periods + 2)
        ]
        by_deadline = sorted(range(context.num_layers), key=lambda index: (left[index], index))
        sure = by_deadline[: min(max(0, *need), context.num_active)]
        chosen = [index for index in self.inner.sample(context) if index not in sure]
        room = max(0, max(context.num_active, len(chosen)) - len(sure))
        return [*sure, *sorted(chosen, key=lambda index: (-wait[index], index))[:room]]
