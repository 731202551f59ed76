"""Bases of gradients, against the SVD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layersample.projection import bases
from layersample.projection.bases import (
    add_product,
    orthonormal,
    product,
    random_basis,
    randomized_basis,
    subspace_basis,
    svd_basis,
)
from layersample_benchmarks.measured_peak import measured_peak

RANK = 4


def decaying(rows: int, columns: int) -> Tensor:
    """A matrix whose singular values halve."""
    values = 0.5 ** torch.arange(min(rows, columns), dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64)).Q
    matrix: Tensor = u * values @ v.T
    return matrix


def error(gradient: Tensor, basis: Tensor) -> float:
    return float((gradient - basis @ (basis.mT @ gradient)).norm() / gradient.norm())


def is_orthonormal(basis: Tensor) -> bool:
    return torch.allclose(basis.mT @ basis, torch.eye(basis.shape[-1]).to(basis), atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 24), (24, 12)])
def test_every_basis_is_orthonormal_and_near_the_best(shape: tuple[int, int]) -> None:
    gradient = decaying(*shape)
    generator = torch.Generator().manual_seed(0)
    best = svd_basis(gradient, RANK)
    randomized = randomized_basis(gradient, RANK, generator)
    followed = subspace_basis(gradient, random_basis((shape[0], RANK), generator, gradient))
    for basis in (best, randomized, followed):
        assert basis.shape == (shape[0], RANK) and is_orthonormal(basis)
    assert error(gradient, randomized) < 1.001 * error(gradient, best)
    assert error(gradient, subspace_basis(gradient, subspace_basis(gradient, followed))) < 1.01 * error(
        gradient, best
    )
    # Up to its sign, each column is the singular vector.
    torch.testing.assert_close(
        (randomized.T @ best).abs(), torch.eye(RANK, dtype=torch.float64), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("turned", [False, True])
def test_svd_has_the_signs_of_the_weights_own(turned: bool) -> None:
    weight = decaying(24, 12)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    expected = vh.T if turned else u
    found = svd_basis(weight.T if turned else weight, RANK, turned=turned)
    assert torch.equal(found, expected[:, :RANK])


def test_a_basis_that_is_followed_keeps_its_directions() -> None:
    gradient = decaying(12, 24)
    before = svd_basis(gradient, RANK)
    after = subspace_basis(gradient + 1e-6 * torch.randn_like(gradient), before)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank_of_gradient", [0, 2])
def test_a_gradient_of_lower_rank_still_has_a_whole_basis(rank_of_gradient: int) -> None:
    gradient = torch.zeros(12, 24)
    gradient[:rank_of_gradient] = torch.randn(rank_of_gradient, 24)
    assert is_orthonormal(subspace_basis(gradient, torch.randn(12, RANK)))
    assert is_orthonormal(randomized_basis(gradient, RANK, torch.Generator().manual_seed(0)))
    assert is_orthonormal(orthonormal(torch.zeros(12, RANK)))


def test_the_svd_falls_back_to_the_gram_matrix(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gradient = torch.randn(12, 24)
    expected = svd_basis(gradient, RANK)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "svd", fails)
    found = svd_basis(gradient, RANK)
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-5)
    assert "did not converge" in caplog.text


def test_batches_of_experts_are_projected_each_by_itself() -> None:
    gradient = torch.randn(3, 12, 24, dtype=torch.float64)
    start = torch.randn(3, 12, RANK, dtype=torch.float64)
    together = subspace_basis(gradient, start)
    for i in range(3):
        torch.testing.assert_close(together[i], subspace_basis(gradient[i], start[i]))


@pytest.mark.parametrize("rows", [3, 8, 21])  # less than a block of rows, one, and some with a rest
def test_products_of_16_bit_matrices_are_those_of_their_float32_copies(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "_LEAST", 8)
    monkeypatch.setattr(bases, "_PARTS", 2)
    narrow, wide = torch.randn(rows, 5).bfloat16(), torch.randn(5, 4)
    assert torch.allclose(product(narrow, wide), narrow.float() @ wide, atol=1e-6)
    assert torch.allclose(product(wide.mT, narrow.mT), wide.mT @ narrow.mT.float(), atol=1e-6)
    weight = torch.randn(rows, 4).bfloat16()
    whole = (weight.float() + 0.5 * (narrow.float() @ wide)).bfloat16()
    add_product(weight, narrow.float(), wide, 0.5)
    assert torch.allclose(weight, whole, rtol=1e-2, atol=1e-6)
    experts = torch.randn(2, rows, 5).bfloat16()
    assert torch.allclose(product(experts, wide), experts.float() @ wide, atol=1e-6)


@pytest.mark.parametrize("chosen", ["subspace", "randomized"])
def test_a_16_bit_gradient_needs_no_float32_copy(chosen: str) -> None:
    gradient = torch.randn(512, 4096).bfloat16()
    previous = random_basis((512, RANK), torch.Generator().manual_seed(0), gradient)

    def choose(of: Tensor) -> Tensor:
        if chosen == "subspace":
            return subspace_basis(of, previous)
        return randomized_basis(of, RANK, torch.Generator().manual_seed(0))

    assert choose(gradient).dtype == torch.float32
    assert measured_peak(lambda: choose(gradient)) < 4 * gradient.numel()
    assert torch.allclose(choose(gradient), choose(gradient.float()), atol=1e-4)
