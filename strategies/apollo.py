"""APOLLO: the whole gradient, scaled by what the optimizer does to a random projection of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from layersample import LowRankStep, Projection, ProjectionContext, Side, register_projection
from layersample.projection.bases import draw_normal


@register_projection("apollo")
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

    def __init__(
        self,
        *,
        rank: int = 256,
        scale: float = 1.0,
        update_gap: int = 200,
        side: Side = "std",
        per_channel: bool = True,
        rotate_moments: bool = False,
        max_growth: float = 1.01,
        targets: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            rank=rank,
            scale=scale,
            update_gap=update_gap,
            side=side,
            rotate_moments=rotate_moments,
            targets=targets,
        )
        self.check_growth(max_growth)
        self.per_channel, self.max_growth = per_channel, max_growth

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
