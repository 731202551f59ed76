"""Bytes of weights, gradients and optimizer state, counted from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from layersample.optim.masters import AT_REST, MASTER
from layersample.optim.nested import tensors_in
from layersample.unwrapping import FROZEN, local_part

_KINDS_OF_STATE = ("optimizer_state", "offloaded_state", "master_weights", "master_remainders")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes held now.

    Args:
        weights: Bytes of all parameters and buffers; tied ones once, and frozen ones that are rounded as they are.
        gradients: Bytes of the gradients that exist.
        optimizer_state: Bytes of the optimizer's tensors on the device of their parameter.
        offloaded_state: Bytes of the optimizer's tensors that the ``offload`` policy holds elsewhere.
        master_weights: Bytes of the fp32 masters of bf16 weights that train.
        master_remainders: Bytes in CPU memory by which frozen bf16 weights are exact.
        host_weights: Bytes in CPU memory of the exact values of frozen weights that are rounded on the device.
    """

    weights: int
    gradients: int
    optimizer_state: int
    offloaded_state: int = 0
    master_weights: int = 0
    master_remainders: int = 0
    host_weights: int = 0


def measure_memory(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> MemoryUse:
    """Count the bytes of a model and its optimizer, or optimizers, as they are now."""
    parameters = list(model.parameters())
    held: dict[str, list[torch.Tensor]] = {kind: [] for kind in _KINDS_OF_STATE}
    optimizers = optimizer if isinstance(optimizer, Sequence) else (optimizer,)
    for parameter, state in (entry for each in optimizers for entry in each.state.items()):
        for key, values in state.items():
            for value in tensors_in(values):
                held[_kind(key, value, parameter)].append(value)
    frozen = [matrix for p in parameters if (matrix := getattr(p, FROZEN, None)) is not None]
    codes = [tensor for matrix in frozen for tensor in matrix.tensors]
    return MemoryUse(
        weights=count_bytes([*parameters, *model.buffers(), *codes]),
        host_weights=sum(matrix.host_bytes for matrix in frozen),
        gradients=count_bytes(p.grad for p in parameters if p.grad is not None),
        **{kind: count_bytes(tensors) for kind, tensors in held.items()},
    )


def _kind(key: str, value: torch.Tensor, parameter: torch.Tensor) -> str:
    if key == MASTER:
        return "master_weights"
    if key in AT_REST:
        return "master_remainders"
    # A step counter is kept on the CPU by design: it has no dimensions.
    away = value.device != parameter.device and value.dim() > 0
    return "offloaded_state" if away else "optimizer_state"


def optimizer_tensors(optimizer: Optimizer | None) -> list[torch.Tensor]:
    """All tensors in an optimizer's state."""
    states = optimizer.state.values() if optimizer is not None else ()
    return [tensor for state in states for tensor in tensors_in(state)]


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors: of a DTensor this rank's; one that several share counts once."""
    storages = [local_part(tensor).untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
