"""Bases of low-rank projections: orthonormal columns that span most of a gradient's energy."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from layersample.unwrapping import is_dtensor

logger = logging.getLogger(__name__)

_PARTS, _LEAST = 16, 256  # a 16-bit matrix is widened in so many parts, of at least so many rows


def svd_basis(gradient: Tensor, rank: int, *, turned: bool = False) -> Tensor:
    """The leading left singular vectors: the best basis there is, and the most expensive.

    Args:
        gradient: Finite matrix ``(k, n)``, or ``(batch, k, n)``; 16 bits will do.
        rank: Columns of the basis, at most ``min(k, n)``.
        turned: Whether the gradient of the weight is ``gradient.mT``. Singular vectors have no sign of their own;
            so they have those of the weight's own SVD, as in GaLore's code.

    Returns:
        Orthonormal columns ``(k, rank)``, or a batch of them.

    References:
        GaLore, arXiv 2403.03507.
    """
    gradient = gradient.to(wide_type(gradient))
    try:
        whole = replicate(gradient)
        u, _, vh = torch.linalg.svd(whole.mT if turned else whole, full_matrices=False)
        leading: Tensor = (vh.mT if turned else u)[..., :rank]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        logger.warning("The SVD of a gradient failed (%s); its Gram matrix is decomposed in float64.", error)
        wide = replicate(gradient).double()
        vectors = torch.linalg.eigh(wide @ wide.mT).eigenvectors  # eigenvalues ascend: the last ones lead
        leading = vectors[..., -rank:].flip(-1).to(gradient.dtype)
    return leading.contiguous()


def subspace_basis(gradient: Tensor, previous: Tensor) -> Tensor:
    """One step of subspace iteration from the basis of the step before: two products and a Householder QR.

    It is nearly as good as an SVD, at a small part of its cost (``python -m layersample_benchmarks.projection_cost``).

    Args:
        gradient: Finite matrix ``(k, n)``, or ``(batch, k, n)``; 16 bits will do.
        previous: The basis to start from, ``(k, rank)``.

    Returns:
        Orthonormal columns ``(k, rank)``. They turn as little as the gradient does, so that moments stay comparable.
    """
    return orthonormal(product(gradient, product(gradient.mT, previous)))


def randomized_basis(
    gradient: Tensor, rank: int, generator: torch.Generator, *, oversampling: int = 8, power_steps: int = 2
) -> Tensor:
    """The leading left singular vectors from random directions: subspace iteration and a small eigenproblem.

    Args:
        gradient: Finite matrix ``(k, n)``, or ``(batch, k, n)``; 16 bits will do.
        rank: Columns of the basis, at most ``min(k, n)``.
        generator: Source of the random directions.
        oversampling: Directions more than ``rank`` that are followed.
        power_steps: Steps of subspace iteration.

    Returns:
        Orthonormal columns ``(k, rank)``, or a batch of them, ordered as singular vectors are.

    References:
        Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.3.
    """
    followed = min(rank + oversampling, gradient.shape[-2])
    columns = random_basis((*gradient.shape[:-1], followed), generator, gradient)
    for _ in range(power_steps):
        columns = subspace_basis(gradient, columns)
    seen = product(columns.mT, gradient)  # (followed, n)
    # Eigenvalues ascend: the last ones lead.
    vectors: Tensor = torch.linalg.eigh(replicate(seen @ seen.mT)).eigenvectors
    return columns @ vectors[..., -rank:].flip(-1)


def random_basis(size: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Random orthonormal columns of a shape ``(..., k, rank)``, for products with a tensor on its device.

    The numbers are drawn on the CPU, so that they are the same on every device.
    """
    return orthonormal(draw_normal(size, generator, like))


def draw_normal(size: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers, drawn on the CPU: the same on all ranks.

    They are of the type and on the device of a tensor; in float32 for a 16-bit one.
    """
    numbers = torch.randn(size, generator=generator, dtype=torch.float32).to(like.device, wide_type(like))
    if is_dtensor(like):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = like.device_mesh
        return DTensor.from_local(numbers, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return numbers


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in the wider of their types; a 16-bit matrix is widened block by block, never whole.

    Args:
        left: ``(..., m, k)``.
        right: ``(..., k, n)``.

    Returns:
        ``(..., m, n)``.
    """
    if left.dtype == right.dtype:
        return left @ right
    dtype = torch.promote_types(left.dtype, right.dtype)
    if left.dim() > 2 or is_dtensor(left):
        return left.to(dtype) @ right.to(dtype)
    result = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=left.device)
    if left.dtype != dtype:
        for rows, block in zip(_parts(left), _parts(result), strict=True):
            torch.mm(rows.to(dtype), right, out=block)
    else:
        for columns, block in zip(_parts(right, 1), _parts(result, 1), strict=True):
            torch.mm(left, columns.to(dtype), out=block)
    return result


def add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``weight += scale · left @ right`` in place, without a matrix of the weight's size beside it.

    Args:
        weight: ``(..., m, n)``; a 16-bit one is rounded once.
        left: ``(..., m, k)``, float32 or float64.
        right: ``(..., k, n)``, of the same type.
        scale: Factor of the product.
    """
    if weight.dtype == left.dtype:
        add_in_place = weight.addmm_ if weight.dim() == 2 else weight.baddbmm_
        add_in_place(left, right, alpha=scale)
    elif weight.dim() > 2 or is_dtensor(weight):
        weight.add_((left @ right).mul_(scale))
    else:
        for rows, block in zip(_parts(weight), _parts(left), strict=True):
            rows.add_((block @ right).mul_(scale))


def _parts(matrix: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    parts = torch.split(matrix, max(_LEAST, -(-matrix.shape[dim] // _PARTS)), dim)
    # Where only memory is followed, one part stands for all: they come and go one after the other.
    return parts[:1] if isinstance(matrix, FakeTensor) else parts


def wide_type(tensor: Tensor) -> torch.dtype:
    """The type that products with a tensor are computed in: its own, and float32 for a 16-bit one."""
    return torch.promote_types(tensor.dtype, torch.float32)


def replicate(tensor: Tensor) -> Tensor:
    """A tensor as it is; of a DTensor, the whole of it on every rank."""
    if is_dtensor(tensor):
        from torch.distributed.tensor import Replicate

        return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    return tensor


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the same space, in the same order and directions.

    By Householder reflections: Cholesky-QR fails where a gradient has a lower rank than the basis.
    """
    q: Tensor
    q, r = torch.linalg.qr(replicate(columns))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)  # (..., rank)
    return q * signs.unsqueeze(-2)
