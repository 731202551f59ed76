"""The eigenvalue spectrum of a weight matrix, from the smaller of its two Gram matrices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layersample.errors import ConfigError

Eigenvalues = NDArray[np.float64]

# weightwatcher drops eigenvalues below an absolute 1e-5: what the Gram matrix blurs must lie far below that.
_HARMLESS_BLUR = 1e-8
# Eigenvalues this many times the blur are exact to six digits.
_CLEAR_OF_BLUR = 1e6


class DegenerateMatrixError(ConfigError):
    """A weight matrix that a metric isn't defined for: says what must hold and what came."""


def spectrum(weight: Tensor) -> Tensor:
    """Return the eigenvalues of WᵀW, the squared singular values of a weight matrix.

    They come from the smaller Gram matrix (WᵀW or WWᵀ) in float64, three times faster than singular values.
    Where the Gram matrix would blur eigenvalues that matter (a largest one above about 10⁵), it falls back
    to singular values. Whether a matrix is stored transposed (GPT-2's ``Conv1D``) makes no difference.

    Args:
        weight: Floating-point matrix ``(m, n)``, or ``(num_experts, m, n)`` for fused experts, on any device.

    Returns:
        Eigenvalues, ascending, never negative, without the zeros that the shape alone makes: float64 on the
        CPU, ``(min(m, n),)`` or ``(num_experts, min(m, n))``.

    Raises:
        DegenerateMatrixError: If the weight is empty or has values that are NaN or infinite.
        ValueError: If it isn't a floating-point tensor of 2 or 3 dimensions.

    References:
        Martin and Mahoney, arXiv 1810.01075 (there the "empirical spectral density").
    """
    values = [torch.from_numpy(compute_eigenvalues(matrix)) for matrix in split_experts(weight)]
    return torch.stack(values) if weight.dim() == 3 else values[0]


def split_experts(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the matrices ``(m, n)`` of a weight ``(m, n)`` or ``(num_experts, m, n)``.

    Raises:
        ValueError: If it isn't a floating-point tensor of 2 or 3 dimensions.
        DegenerateMatrixError: If it is empty.
    """
    check_weight(weight)
    return (weight,) if weight.dim() == 2 else weight.unbind(0)


def check_weight(weight: Tensor) -> None:
    """Raise if a weight isn't one that can be measured, as `split_experts` says."""
    shape = tuple(weight.shape)
    if weight.dim() not in (2, 3):
        raise ValueError(f"A weight must have 2 dimensions, or 3 for fused experts, but got shape {shape}.")
    if not weight.dtype.is_floating_point:
        raise ValueError(
            f"A weight must be of floating point, but got {weight.dtype}: dequantize it before measuring it."
        )
    if weight.is_meta:
        raise ValueError(f"A weight must hold data, but this one of shape {shape} is on the meta device.")
    if weight.numel() == 0:
        raise DegenerateMatrixError(f"A weight must have at least one element, but got shape {shape}.")


def compute_eigenvalues(matrix: Tensor) -> Eigenvalues:
    """Return the ascending eigenvalues of the smaller Gram matrix of one matrix ``(m, n)``."""
    gram = _gram(matrix)
    if not np.isfinite(np.diagonal(gram)).all():  # each element is squared into the diagonal once
        bad = int((~torch.isfinite(matrix)).sum())
        raise DegenerateMatrixError(
            f"A weight must be finite, but {bad} of {matrix.numel()} values of a matrix of shape "
            f"{tuple(matrix.shape)} are NaN or infinite."
        )
    values = np.linalg.eigvalsh(gram)
    blur = np.finfo(np.float64).eps * len(values) * values[-1]
    if blur > _HARMLESS_BLUR and values[0] < _CLEAR_OF_BLUR * blur:
        singular = np.linalg.svd(_to_numpy(matrix), compute_uv=False)
        values = np.square(singular[::-1])
    positive: Eigenvalues = np.maximum(values, 0.0)
    return positive


def _gram(matrix: Tensor) -> Eigenvalues:
    tall = matrix.shape[0] >= matrix.shape[1]
    if matrix.device.type == "cuda":  # the product is the part that an accelerator does well
        wide = (matrix.T if tall else matrix).detach().double()  # (min, max)
        gram: Eigenvalues = (wide @ wide.T).cpu().numpy()
        return gram
    array = _to_numpy(matrix)
    # NumPy sees a matrix times its own transpose and computes one triangle only.
    product: Eigenvalues = array.T @ array if tall else array @ array.T
    return product


def _to_numpy(matrix: Tensor) -> Eigenvalues:
    # First to the CPU: some accelerators have no float64.
    array: Eigenvalues = matrix.detach().cpu().double().numpy()
    return array
