"""GaLore: the subspace of the gradient's leading singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from layersample import Projection, ProjectionContext, Side, register_projection
from layersample.projection.bases import random_basis, randomized_basis, subspace_basis, svd_basis


@register_projection("galore")
class GaLore(Projection):
    """Project gradients onto their leading singular vectors.

    With ``basis="svd"`` this is GaLore as published: an SVD every ``update_gap`` steps, in between a basis
    that grows stale. The default follows the gradient instead, with one QR a step from the basis before, which
    costs less in all and keeps more of each gradient; every ``update_gap`` steps it starts anew.

    Args:
        scale: Factor on the update (α).
        basis: ``"subspace"`` follows the gradient; ``"svd"`` is exact every ``update_gap`` steps; ``"random"``
            draws orthonormal directions every ``update_gap`` steps.

    References:
        arXiv 2403.03507 and galore-torch 1.0.
    """

    source = "arXiv 2403.03507"
    takes_16_bits = True

    def __init__(
        self,
        *,
        rank: int = 128,
        scale: float = 0.25,
        update_gap: int = 200,
        side: Side = "std",
        basis: Literal["svd", "subspace", "random"] = "subspace",
        rotate_moments: bool = False,
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
        if basis not in ("svd", "subspace", "random"):
            raise ValueError(f"basis must be svd, subspace or random, but got {basis!r}.")
        self.kind = basis

    def basis(self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext) -> Tensor:
        """Choose it as the option ``basis`` says."""
        if previous is not None:
            return subspace_basis(gradient, previous) if self.kind == "subspace" else previous
        if self.kind == "svd":
            return svd_basis(gradient, self.rank, turned=context.turned)
        if self.kind == "random":
            return random_basis((*gradient.shape[:-1], self.rank), context.generator(), gradient)
        return randomized_basis(gradient, self.rank, context.generator())
