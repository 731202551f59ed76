"""Every projection that comes with layersample, through its contract; and projections that don't keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from layersample import Projection, ProjectionContext, create_projection, list_projections
from layersample.testing import ProjectionContract

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(("galore", {"basis": basis}) for basis in ("subspace", "svd", "random")),
    ("galore", {"rotate_moments": True, "update_gap": 2}),
    ("fira", {}),
    ("fira", {"basis": "svd", "update_gap": 2}),
    ("apollo", {}),
    ("apollo", {"rank": 1, "per_channel": False, "scale": 128.0}),
]


@pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in VARIANTS]
)
class TestBuiltIn(ProjectionContract):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str, options: dict[str, Any]) -> None:
        self._made = (name, options)

    def make(self) -> Projection:
        name, options = self._made
        return create_projection(name, {"rank": 4, **options})


def test_every_built_in_projection_is_in_the_contract() -> None:
    built_in = {
        n for n, cls in list_projections().items() if cls.__module__.startswith("layersample_strategies")
    }
    assert built_in == {name for name, _ in VARIANTS}
    assert all(list_projections()[name].source for name in built_in)


@dataclass(kw_only=True, eq=False)
class Faulty(Projection):
    """Break one rule of the contract.

    Args:
        way: Which one.
    """

    takes_16_bits = True
    way: str = "none"

    def basis(self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext) -> Tensor:
        if self.way == "overwrites":
            gradient.mul_(2)
        if self.way == "global":
            return torch.randn(*gradient.shape[:-1], self.rank)
        basis = torch.eye(gradient.shape[-2])[:, : self.rank].expand(*gradient.shape[:-1], self.rank)
        if self.way == "degenerate":
            return torch.zeros_like(basis)
        if self.way == "16 bits":
            return basis.to(gradient.dtype)
        return basis[..., :-1] if self.way == "narrow" else basis


@pytest.mark.parametrize(
    ("way", "test"),
    [
        ("overwrites", "test_leaves_its_gradient_as_it_is"),
        ("global", "test_same_context_gives_the_same_basis"),
        ("degenerate", "test_a_basis_has_rank_columns"),
        ("narrow", "test_a_basis_has_rank_columns"),
        ("16 bits", "test_takes_16_bits_if_it_says_so"),
    ],
)
def test_the_contract_finds_what_is_wrong(way: str, test: str) -> None:
    class Contract(ProjectionContract):
        def __init__(self, way: str) -> None:
            self._way = way

        def make(self) -> Projection:
            return Faulty(rank=4, way=self._way)

    getattr(Contract("none"), test)()
    with pytest.raises(AssertionError):
        getattr(Contract(way), test)()
