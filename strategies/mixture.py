"""Several samplers, one of which chooses in each period."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from layersample import LayerSampler, LayerStatistics, Measurement, SamplingContext, register
from layersample_strategies.wrapping import create_inner


@register("mixture")
@dataclass(kw_only=True, eq=False)
class Mixture(LayerSampler):
    """Let one of several samplers choose in each period, drawn by weights.

    All of them observe, also what another one has chosen, and measure when they would alone. A probe before the first
    draw is for those that ask for one.

    Args:
        samplers: Names of the samplers, at least one.
        shares: The chance of each, in proportion; equal by default.
        options: Options of each, one mapping a sampler; none by default.
    """

    source = "ours"

    samplers: list[str] = field(default_factory=lambda: ["lisa", "grass"])
    shares: list[float] | None = None
    options: list[dict[str, Any]] | None = None
    inner: list[LayerSampler] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.samplers:
            raise ValueError("samplers must name at least one sampler, but got none.")
        for name, values in (("shares", self.shares), ("options", self.options)):
            if values is not None and len(values) != len(self.samplers):
                raise ValueError(
                    f"{name} must hold one entry for each of the {len(self.samplers)} samplers, "
                    f"but holds {len(values)}."
                )
        shares = self.shares or [1.0] * len(self.samplers)
        if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares):
            raise ValueError(f"shares must be finite and at least 0, not all of them 0, but got {shares}.")
        self._chances = [share / sum(shares) for share in shares]
        options = self.options or [{}] * len(self.samplers)
        self.inner = [create_inner(*pair) for pair in zip(self.samplers, options, strict=True)]
        self._changed: list[set[str]] = [set() for _ in self.inner]  # since each has measured
        self._begun = False
        self.keeps_budget = all(sampler.keeps_budget for sampler in self.inner)
        self.fixed_size = all(sampler.fixed_size for sampler in self.inner)
        self.collects = frozenset().union(*(sampler.collects for sampler in self.inner))
        self.needs_batches = any(sampler.needs_batches for sampler in self.inner)
        self.probe_batches = max(sampler.probe_batches for sampler in self.inner)
        self.watches_steps = any(sampler.watches_steps for sampler in self.inner)
        every = [sampler.measure_every for sampler in self.inner if sampler.measure_every is not None]
        self.measure_every = math.gcd(*every) if every else None

    def chooser(self, context: SamplingContext) -> LayerSampler:
        """The sampler whose turn it is."""
        generator = context.generator_at(-1 - context.round)  # nothing that one of them draws by
        chances = torch.tensor(self._chances, dtype=torch.float64)
        return self.inner[int(torch.multinomial(chances, 1, generator=generator))]

    def sample(self, context: SamplingContext) -> list[int]:
        """Let it choose."""
        return list(self.chooser(context).sample(context))

    def inclusion_probabilities(self, context: SamplingContext) -> list[float] | None:
        """The mean of theirs by their chances; not known if one of them doesn't know its own."""
        total = [0.0] * context.num_layers
        for chance, sampler in zip(self._chances, self.inner, strict=True):
            own = sampler.inclusion_probabilities(context)
            if own is None:
                return None
            total = [sum_ + chance * value for sum_, value in zip(total, own, strict=True)]
        return total

    @property
    def measures(self) -> bool:
        """Whether one of them does."""
        return any(sampler.measures for sampler in self.inner)

    @property
    def has_measured(self) -> bool:
        """Whether all of them have."""
        return all(sampler.has_measured for sampler in self.inner)

    def num_drawn(self, context: SamplingContext) -> int:
        """As many as the one whose turn it is."""
        return self.chooser(context).num_drawn(context)

    def measure(self, measurement: Measurement) -> None:
        """Let those measure whose turn it is."""
        for sampler, changed in zip(self.inner, self._changed, strict=True):
            changed.update(measurement.changed)
            every = sampler.measure_every
            due = every is not None and measurement.round % every == 0
            if due or measurement.round == 0 or not self._begun:  # a run may begin to use it later
                names = tuple(name for name in measurement.layers if name in changed)
                sampler.measure(replace(measurement, changed=names))
                changed.clear()
        self._begun = True

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        """Let all of them observe."""
        for sampler in self.inner:
            if sampler.probe_batches or not context.probing:
                sampler.observe(statistics, context)

    def wants_new_period(self, statistics: LayerStatistics, context: SamplingContext) -> bool:
        """Ask the one that has chosen."""
        chooser = self.chooser(context)
        return chooser.watches_steps and chooser.wants_new_period(statistics, context)

    def state_dict(self) -> dict[str, Any]:
        """The state of each, and the layers that have trained since it measured."""
        return {
            "inner": [sampler.state_dict() for sampler in self.inner],
            "changed": [sorted(changed) for changed in self._changed],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        for sampler, own in zip(self.inner, state["inner"], strict=True):
            sampler.load_state_dict(own)
        self._changed = [set(names) for names in state["changed"]]
        self._begun = True
