"""APOLLO: the whole gradient, scaled by what the optimizer does to a random projection of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from layersample import LowRankStep, Projection, ProjectionContext, register_projection
from layersample.projection.bases import draw_normal


@register_projection("apollo")
@dataclass(kw_only=True, eq=False)
class Apollo(Projection):
    """Scale the whole gradient by what the optimizer does to a random projection of it; there is no SVD.

    A channel of the gradient is multiplied by ‖s‖/‖r‖, where r is the same channel of the projected gradient
    and s what the optimizer makes of it. APOLLO-Mini is ``rank=1, per_channel=False, scale=128``.

    Args:
        scale: Factor on the update; its square root is applied, as in APOLLO's code.
        per_channel: Whether each channel has a factor of its own, or the whole matrix one.
        max_growth: How many times its norm of the step before an update may have (γ), above 1.

    References:
        arXiv 2412.05270 and its code's defaults (rank 256, gap 200, scale 1).
    """

    source = "arXiv 2412.05270"
    takes_16_bits = True

    rank: int = 256
    per_channel: bool = True
    max_growth: float = 1.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_growth(self.max_growth)

    def basis(self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext) -> Tensor:
        """Draw Gaussian columns of variance 1/rank where they are due."""
        if previous is not None:
            return previous
        size = (*gradient.shape[:-1], self.rank)
        return draw_normal(size, context.generator(), gradient).div_(math.sqrt(self.rank))

    def apply(self, weight: Tensor, step: LowRankStep) -> None:
        """Add the scaled gradient."""
        update = step.scale_gradient(
            step.gradient.clone(), max_growth=self.max_growth, per_channel=self.per_channel
        )
        weight.add_(update, alpha=math.sqrt(self.scale))
