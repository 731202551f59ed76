"""The norm of a gradient, in a wider type than its own and without a copy of it."""

from __future__ import annotations

import torch
from torch import Tensor

from layersample.unwrapping import is_dtensor

_BLOCK = 2**18  # elements


def norm_of(gradient: Tensor) -> Tensor:
    """The Frobenius norm of a dense gradient: of 16 bits in float32, otherwise in its own type.

    On a CPU torch makes a float32 copy of a whole 16-bit tensor for that: of an embedding, twice what the gradient
    takes. In blocks no more is there than one of them; it is also faster, and closer to the exact norm.

    Args:
        gradient: Of any shape; of a shard on several ranks, torch knows what to do.

    Returns:
        The norm, a scalar.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    widened_on_cpu = gradient.device.type == "cpu" and wide != gradient.dtype and gradient.numel() > _BLOCK
    if not widened_on_cpu or gradient.is_sparse or is_dtensor(gradient) or not gradient.is_contiguous():
        return _norm(gradient, wide)
    blocks = gradient.view(-1).split(_BLOCK)  # type: ignore[no-untyped-call]
    return _norm(torch.stack([_norm(block, wide) for block in blocks]), wide)


def _norm(values: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=dtype)
    return norm
