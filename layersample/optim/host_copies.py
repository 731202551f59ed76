"""Tensors in CPU memory, where copies from a device run side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from layersample.unwrapping import local_part


def to_host(tensor: Tensor) -> Tensor:
    """A tensor in CPU memory; from CUDA a copy that has only begun, into pinned memory.

    What reads it on the CPU must wait for :func:`wait_for_copies`; work on the device's stream need not. The shards of
    a DTensor are copied one after another: it has no pinned memory of its own.
    """
    if not tensor.is_cuda or local_part(tensor) is not tensor:
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def wait_for_copies() -> None:
    """Wait until all copies that :func:`to_host` has begun are whole; nothing to do without CUDA."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
