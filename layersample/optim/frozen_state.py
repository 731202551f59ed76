"""What happens to the optimizer's state of a layer while it is frozen: drop it, keep it, or move it away."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.choices import StatePolicyName
from layersample.optim.host_copies import to_host, wait_for_copies
from layersample.optim.masters import AT_REST, at_rest
from layersample.optim.nested import map_tensors, opaque_in
from layersample.optim.whole_state import is_of_all

logger = logging.getLogger(__name__)


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
        parameters = list(parameters)
        if is_of_all(
            optimizer
        ):  # and no more the first parameter's, under which it is kept, than any other's
            return
        if has_two_weights(optimizer):
            _settle(optimizer, [parameter for parameter in parameters if optimizer.state.get(parameter)])
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
    """Hold the state in CPU memory (pinned where there is CUDA) while its layer is frozen.

    All tensors in it move, those in lists, dictionaries and attributes of objects too. What can't be looked into stays
    where it is, and is named once.
    """

    def __init__(self) -> None:
        self._named: set[str] = set()

    def freeze(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the state to the CPU; the copies of one switch run side by side."""
        for parameter in parameters:
            state = _own(optimizer, parameter)
            self._name_what_stays(state)
            _update(optimizer, parameter, map_tensors(state, lambda t: to_host(t) if _moves(t) else t))
        # A checkpoint written right after the switch must not read half a copy.
        wait_for_copies()

    def activate(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the state back; later work on the device's stream waits for it by itself."""
        for parameter in parameters:

            def back(tensor: Tensor, device: torch.device = parameter.device) -> Tensor:
                away = _moves(tensor) and tensor.device != device
                return tensor.to(device, non_blocking=True) if away else tensor

            _update(optimizer, parameter, map_tensors(_own(optimizer, parameter), back))

    def _name_what_stays(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            for kind in set(opaque_in(value)) - self._named:
                self._named.add(kind)
                logger.warning(
                    "state='offload' can't look into the optimizer's state %r, which holds a %s: tensors in it stay "
                    "where they are.",
                    key,
                    kind,
                )


_POLICIES: dict[StatePolicyName, type[StatePolicy]] = {"drop": Drop, "keep": Keep, "offload": Offload}


def create_policy(name: StatePolicyName) -> StatePolicy:
    """The policy of a name."""
    return _POLICIES[name]()


def has_two_weights(optimizer: Optimizer) -> bool:
    """Whether weights are others in evaluation than in training, as of schedule-free optimizers."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def _settle(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Give frozen parameters the weights of evaluation for good: without their state no one could do so later."""
    chosen = {id(parameter) for parameter in parameters}
    before = [dict(group) for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in chosen]
        optimizer.eval()
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)  # its mode as well: the others go on in training


def _own(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The state of a parameter that moves: not what stays on the CPU."""
    # `optimizer.state[parameter]` would make an empty entry.
    return {key: value for key, value in optimizer.state.get(parameter, {}).items() if key not in AT_REST}


def _update(optimizer: Optimizer, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    if state:
        optimizer.state[parameter].update(state)


def _moves(tensor: Tensor) -> bool:
    """Whether a tensor follows its parameter: not a step counter, which has no dimensions, nor memory of both."""
    return tensor.dim() > 0 and not getattr(tensor, "is_paged", False)
