"""Bytes of weights, gradients and optimizer state, counted from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from layersample.distributed import local_part


@dataclass(frozen=True)
class MemoryUse:
    """Bytes held now.

    Args:
        weights: Bytes of all parameters and buffers; tied ones once.
        gradients: Bytes of the gradients that exist.
        optimizer_state: Bytes of the optimizer's tensors on the device of their parameter.
        offloaded_state: Bytes of the optimizer's tensors that the ``offload`` policy holds elsewhere.
    """

    weights: int
    gradients: int
    optimizer_state: int
    offloaded_state: int = 0


def measure_memory(model: nn.Module, optimizer: Optimizer) -> MemoryUse:
    """Count the bytes of a model and its optimizer, as they are now."""
    parameters = list(model.parameters())
    here: list[torch.Tensor] = []
    elsewhere: list[torch.Tensor] = []
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                # A step counter is kept on the CPU by design: it has no dimensions.
                away = value.device != parameter.device and value.dim() > 0
                (elsewhere if away else here).append(value)
    return MemoryUse(
        weights=count_bytes([*parameters, *model.buffers()]),
        gradients=count_bytes(p.grad for p in parameters if p.grad is not None),
        optimizer_state=count_bytes(here),
        offloaded_state=count_bytes(elsewhere),
    )


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors: of a DTensor this rank's; one that several share counts once."""
    storages = [local_part(tensor).untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
