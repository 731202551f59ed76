"""AdaGradSelect: the layers with the largest gradients at first, later those that trained often."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from layersample import LayerStatistics, ObservedSampler, SamplingContext, register


@register("adagradselect")
@dataclass(kw_only=True, eq=False)
class AdaGradSelect(ObservedSampler):
    """Train the layers with the largest gradients at first, later draw those that trained often (AdaGradSelect).

    With probability ε_t = ε₀·e^(−λt), t the number of the period, the layers with the largest sums of gradient
    norms so far are taken; those that have not trained yet come first, since nothing is known of them. Otherwise
    p ~ Dirichlet(n + δ), with n the number of periods in which each layer trained, and layers are drawn by p without
    replacement.

    The paper counts steps, and draws anew in each; a draw lasts a period here. Its units are transformer blocks, which
    are whole layers; smaller ones are ours.

    Args:
        epsilon: Chance of the largest gradients at the start (ε₀), from 0 to 1.
        epsilon_decay: How fast it falls (λ), per period, at least 0.
        delta: What is added to each count (δ), above 0: the larger, the closer to uniform.

    References:
        arXiv 2512.15764; there is no code. Its values aren't known to us: the defaults are ours.
    """

    source = "arXiv 2512.15764"
    collects = frozenset({"gradients"})

    epsilon: float = 1.0
    epsilon_decay: float = 0.05
    delta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon must be between 0 and 1, but got {self.epsilon}.")
        if not (math.isfinite(self.epsilon_decay) and self.epsilon_decay >= 0):
            raise ValueError(f"epsilon_decay must be finite and at least 0, but got {self.epsilon_decay}.")
        if not (math.isfinite(self.delta) and self.delta > 0):
            raise ValueError(f"delta must be finite and above 0, but got {self.delta}.")

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        """Add the norms of the layers that trained to their sums."""
        for index in context.active:
            norm, name = statistics.gradient_norm[index], context.layers[index]
            if norm is not None:
                self.scores[name] = self.scores.get(name, 0.0) + norm

    def takes_largest(self, context: SamplingContext) -> bool:
        """Whether this period takes the layers with the largest gradients."""
        chance = self.epsilon * math.exp(-self.epsilon_decay * context.round)
        return self._chance_and_seed(context)[0] < chance

    def sample(self, context: SamplingContext) -> list[int]:
        """Take the largest, or draw."""
        if not self.takes_largest(context):
            return super().sample(context)
        visits = context.statistics.visits

        def rank(index: int) -> tuple[bool, float, int]:
            return visits[index] > 0, -self.scores.get(context.layers[index], 0.0), index

        return context.take(sorted(range(context.num_layers), key=rank))

    def weights(self, context: SamplingContext) -> list[float]:
        """Return this period's p."""
        _, seed = self._chance_and_seed(context)
        counts = np.asarray(context.statistics.visits, dtype=np.float64) + self.delta
        return [max(float(p), 1e-12) for p in np.random.default_rng(seed).dirichlet(counts)]

    def _chance_and_seed(self, context: SamplingContext) -> tuple[float, int]:
        """Numbers that have nothing to do with those that the layers are drawn by: of a period below 0."""
        generator = context.generator_at(-1 - context.round)
        chance = float(torch.rand((), generator=generator, dtype=torch.float64))
        # torch has no Dirichlet distribution that takes a generator.
        return chance, int(torch.randint(2**31, (), generator=generator))

    def inclusion_probabilities(self, context: SamplingContext) -> None:  # type: ignore[override]
        """Not known: p itself is drawn."""
        return None
