"""LISA: layers drawn uniformly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from layersample import LayerSampler, SamplingContext, register


@register("lisa")
@dataclass(kw_only=True, eq=False)
class Lisa(LayerSampler):
    """Draw layers uniformly at random (LISA).

    Args:
        draw: ``"exact"`` draws exactly ``num_active`` layers without replacement, as the authors' code does.
            ``"bernoulli"`` draws each layer on its own with probability ``num_active / num_layers``, as
            Algorithm 1 of the paper does: the number varies from period to period. A draw without any layer
            counts where embeddings, head or norm train anyway, and is drawn again where nothing would. It has no
            budget to keep to: with ``draw_budget`` it is refused.

    References:
        LISA, arXiv 2403.17919; the exact draw is that of LMFlow's code.
    """

    source = "arXiv 2403.17919"

    draw: Literal["exact", "bernoulli"] = "exact"

    def __post_init__(self) -> None:
        if self.draw not in ("exact", "bernoulli"):
            raise ValueError(f"draw must be 'exact' or 'bernoulli', but got {self.draw!r}.")
        self.fixed_size = self.keeps_budget = self.draw == "exact"

    def inclusion_probabilities(self, context: SamplingContext) -> list[float]:
        """γ / N for each layer; a little more where an empty Bernoulli draw doesn't count."""
        if context.budget is not None:
            return context.budget.inclusion([1.0] * context.num_layers)
        chance = context.num_active / context.num_layers
        if self.draw == "bernoulli" and not context.allow_empty:
            chance /= 1 - (1 - chance) ** context.num_layers
        return [chance] * context.num_layers

    def sample(self, context: SamplingContext) -> list[int]:
        """Return the layers of this period."""
        if self.draw == "exact":
            return context.take(torch.randperm(context.num_layers, generator=context.generator).tolist())
        while True:
            uniform = torch.rand(context.num_layers, generator=context.generator, dtype=torch.float64)
            chosen = torch.nonzero(uniform < context.num_active / context.num_layers).flatten().tolist()
            if chosen or context.allow_empty:
                return chosen
