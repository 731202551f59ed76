"""GaLore: the subspace of the gradient's leading singular vectors."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Literal, get_args

from torch import Tensor

from layersample import Projection, ProjectionContext, register_projection
from layersample.projection.bases import random_basis, randomized_basis, subspace_basis, svd_basis

Basis = Literal["svd", "subspace", "random"]


@dataclass(kw_only=True, eq=False)
class _BasisOption:
    """The option that is called as the method is: in one class, dataclasses would take the method for its default."""

    basis: InitVar[Basis] = "subspace"


@register_projection("galore")
@dataclass(kw_only=True, eq=False)
class GaLore(_BasisOption, Projection):
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

    scale: float = 0.25

    def __post_init__(self, basis: Basis) -> None:
        super().__post_init__()
        if basis not in get_args(Basis):
            raise ValueError(f"basis must be one of {', '.join(get_args(Basis))}, but got {basis!r}.")
        self.kind = basis

    def basis(  # type: ignore[misc]  # the option is no attribute
        self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext
    ) -> Tensor:
        """Choose it as the option ``basis`` says."""
        if previous is not None:
            return subspace_basis(gradient, previous) if self.kind == "subspace" else previous
        if self.kind == "svd":
            return svd_basis(gradient, self.rank, turned=context.turned)
        if self.kind == "random":
            return random_basis((*gradient.shape[:-1], self.rank), context.generator(), gradient)
        return randomized_basis(gradient, self.rank, context.generator())
