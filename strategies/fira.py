"""Fira: GaLore's update, and the rest of the gradient at a matching size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from layersample import LowRankStep, register_projection
from layersample_strategies.galore import Basis, GaLore


@register_projection("fira")
@dataclass(kw_only=True, eq=False)
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

    scale: float = 1.0
    max_growth: float = 1.01

    def __post_init__(self, basis: Basis) -> None:  # type: ignore[override]  # mypy loses the option
        super().__post_init__(basis)
        self.check_growth(self.max_growth)

    def apply(self, weight: Tensor, step: LowRankStep) -> None:
        """Add the projected update and the residual's."""
        super().apply(weight, step)
        residual = step.gradient - step.basis @ step.low_rank_gradient  # (k, n)
        weight.add_(step.scale_gradient(residual, max_growth=self.max_growth), alpha=self.scale)
