"""What samplers share that let other samplers choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from layersample import (
    ConfigError,
    LayerSampler,
    LayerStatistics,
    Measurement,
    SamplingContext,
    create_sampler,
)


def create_inner(name: str, options: Mapping[str, Any] | None) -> LayerSampler:
    """A sampler that chooses for another one.

    Raises:
        ConfigError: If there is none of the name, or it does more than choose.
    """
    inner = create_sampler(name, options)
    if inner.needs_projection:
        raise ConfigError(
            f"What another sampler wraps or mixes must choose layers alone, but {name!r} also says what they get of a "
            "projection: give it to the scheduler itself."
        )
    return inner


@dataclass(kw_only=True, eq=False)
class WrappedSampler(LayerSampler):
    """Lets another sampler choose, and changes something about it. Write ``sample``, which asks :attr:`inner`.

    The other sampler measures, observes and is resumed as if it were alone.

    Args:
        sampler: Name of the other sampler.
        sampler_options: Its options.
    """

    passes_budget: ClassVar[bool] = False
    """Whether what the other sampler draws within a budget stays within it."""

    sampler: str = "lisa"
    sampler_options: dict[str, Any] | None = None
    inner: LayerSampler = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.inner = create_inner(self.sampler, self.sampler_options)
        self.fixed_size = self.inner.fixed_size
        self.keeps_budget = self.passes_budget and self.inner.keeps_budget
        self.collects = self.collects | self.inner.collects
        self.watches_steps = self.inner.watches_steps
        self.probe_batches = self.inner.probe_batches
        self.measure_every = self.inner.measure_every
        self.trains_everything = self.inner.trains_everything
        self.needs_batches = self.inner.needs_batches

    @property
    def measures(self) -> bool:
        """Whether the other sampler does."""
        return self.inner.measures

    @property
    def has_measured(self) -> bool:
        """Whether the other sampler has."""
        return self.inner.has_measured

    def num_drawn(self, context: SamplingContext) -> int:
        """As many as the other sampler."""
        return self.inner.num_drawn(context)

    def measure(self, measurement: Measurement) -> None:
        """Let the other sampler measure."""
        self.inner.measure(measurement)

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        """Let the other sampler observe."""
        self.inner.observe(statistics, context)

    def wants_new_period(self, statistics: LayerStatistics, context: SamplingContext) -> bool:
        """Ask the other sampler."""
        return self.inner.wants_new_period(statistics, context)

    def state_dict(self) -> dict[str, Any]:
        """The other sampler's state."""
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.inner.load_state_dict(state["inner"])
