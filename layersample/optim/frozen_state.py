"""What happens to the optimizer's state of a layer while it is frozen: drop it, keep it, or move it away."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from layersample.choices import StatePolicyName
from layersample.errors import ConfigError
from layersample.optim.host_copies import to_host, wait_for_copies
from layersample.optim.masters import AT_REST, at_rest


class StatePolicy(Protocol):
    """Handles the state of parameters that stop or start training."""

    def freeze(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Called when the parameters have just been frozen."""

    def activate(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Called before the first forward in which the parameters train."""


class Drop:
    """Free the state: memory stays flat, and a layer starts afresh at each visit (as BAdam does)."""

    def freeze(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Remove the state, but for what makes bf16 weights exact: that is a part of the weight."""
        for parameter in parameters:
            kept = at_rest(optimizer.state.pop(parameter, {}))
            if kept:
                optimizer.state[parameter] = kept

    def activate(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing to do: the optimizer makes new state at its first step."""


class Keep:
    """Leave the state where it is, as the public LISA code does: memory grows to that of full fine-tuning."""

    def freeze(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing to do."""

    def activate(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing to do."""


class Offload:
    """Hold the state in CPU memory (pinned where there is CUDA) while its layer is frozen."""

    def freeze(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the state to the CPU; the copies of one switch run side by side."""
        for parameter, key, value in _tensors(optimizer, parameters):
            optimizer.state[parameter][key] = to_host(value)
        # A checkpoint written right after the switch must not read half a copy.
        wait_for_copies()

    def activate(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the state back; later work on the device's stream waits for it by itself."""
        for parameter, key, value in _tensors(optimizer, parameters):
            if value.device != parameter.device:
                optimizer.state[parameter][key] = value.to(parameter.device, non_blocking=True)


_POLICIES: dict[StatePolicyName, type[StatePolicy]] = {"drop": Drop, "keep": Keep, "offload": Offload}


def create_policy(name: StatePolicyName) -> StatePolicy:
    """The policy of a name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in _POLICIES:
        raise ConfigError(f"state must be one of {', '.join(_POLICIES)}, but got {name!r}.")
    return _POLICIES[name]()


def _tensors(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter]
) -> Iterable[tuple[nn.Parameter, str, torch.Tensor]]:
    """State tensors that move: not step counters, which have no dimensions, nor what stays on the CPU."""
    for parameter in parameters:
        # `optimizer.state[parameter]` would make an empty entry.
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() > 0 and key not in AT_REST:
                yield parameter, key, value
