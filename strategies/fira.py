"""Fira: GaLore's update, and the rest of the gradient at a matching size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from layersample import LowRankStep, Side, register_projection
from layersample_strategies.galore import GaLore


@register_projection("fira")
class Fira(GaLore):  # type: ignore[misc]
    """Add to GaLore's update what its basis leaves out, scaled column by column as the optimizer scales the rest.

    The optimizer turns a column r of the projected gradient into a step s; the same column of the residual
    G − PPᵀG moves the weight by ‖s‖/‖r‖ times itself. The residual's norm may grow by ``max_growth`` a step.

    Args:
        scale: Factor on the whole update.
        max_growth: How many times its norm of the step before the residual's update may have (γ), above 1.

    References:
        arXiv 2410.01623.
    """

    source = "arXiv 2410.01623"

    def __init__(
        self,
        *,
        rank: int = 128,
        scale: float = 1.0,
        update_gap: int = 200,
        side: Side = "std",
        basis: Literal["svd", "subspace", "random"] = "subspace",
        rotate_moments: bool = False,
        max_growth: float = 1.01,
        targets: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            rank=rank,
            scale=scale,
            update_gap=update_gap,
            side=side,
            basis=basis,
            rotate_moments=rotate_moments,
            targets=targets,
        )
        self.check_growth(max_growth)
        self.max_growth = max_growth

    def apply(self, weight: Tensor, step: LowRankStep) -> None:
        """Add the projected update and the residual's."""
        super().apply(weight, step)
        residual = step.gradient - step.basis @ step.low_rank_gradient  # (k, n)
        weight.add_(step.scale_gradient(residual, max_growth=self.max_growth), alpha=self.scale)
