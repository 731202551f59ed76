"""A check of a run by itself: frozen weights don't move, active ones do, and nothing frozen holds memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from layersample.choices import StatePolicyName
from layersample.optim.masters import AT_REST, combine
from layersample.unwrapping import local_part, unwrap_optimizer


class SelfCheckError(RuntimeError):
    """Layer sampling didn't do what it promises; the message says where."""


class SelfCheck:
    """Compares every parameter at the end of a period with what it was at its beginning, bit by bit.

    Args:
        optimizer: The optimizer whose steps are watched.
        state: The state policy, which says what a frozen parameter may hold.
    """

    def __init__(self, optimizer: Optimizer, state: StatePolicyName) -> None:
        self._optimizer = optimizer
        self._state = state
        self._digests: dict[str, bytes] = {}
        self._moves = False
        self._handle = unwrap_optimizer(optimizer).register_step_pre_hook(self._note_step)

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A step at a learning rate of 0 (the first one of a warm-up) moves nothing, and rightly so.
        self._moves |= any(float(group["lr"]) != 0 for group in optimizer.param_groups)

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note the bits of all parameters at the beginning of a period."""
        self._moves = False
        self._digests = {name: self._digest(parameter) for name, parameter in parameters.items()}

    def end(self, parameters: Mapping[str, nn.Parameter], active: Mapping[str, tuple[str, ...]]) -> None:
        """Compare at the end of a period, before anything is frozen.

        Args:
            parameters: All parameters by name.
            active: Names of the parameters of each layer or group that trained, by its name.

        Raises:
            SelfCheckError: If a promise doesn't hold.
        """
        training = {name for names in active.values() for name in names}
        changed = {name for name, digest in self._digests.items() if self._digest(parameters[name]) != digest}
        for name in sorted(changed - training):
            raise SelfCheckError(f"{name} was frozen in this period, but its weights changed.")
        for layer, names in active.items():
            here = [name for name in names if local_part(parameters[name]).numel()]  # a shard may be empty
            if self._moves and here and not changed.intersection(here):
                raise SelfCheckError(
                    f"{layer} was active in this period, but none of its weights changed: it got no gradient, "
                    "or its updates are too small for the weights' dtype."
                )
        for name, parameter in parameters.items():
            if name not in training:
                self._check_memory(name, parameter)

    def _check_memory(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            raise SelfCheckError(f"{name} is frozen, but holds a gradient.")
        state = self._optimizer.state.get(parameter, {})
        held = {key: value for key, value in state.items() if key not in AT_REST}
        tensors = [v for v in held.values() if isinstance(v, torch.Tensor) and v.dim() > 0]
        if self._state == "drop" and held:
            raise SelfCheckError(f"{name} is frozen, but the optimizer holds state for it (state='drop').")
        if self._state == "offload" and any(tensor.device.type != "cpu" for tensor in tensors):
            raise SelfCheckError(f"{name} is frozen, but its state isn't in CPU memory (state='offload').")

    def _digest(self, parameter: nn.Parameter) -> bytes:
        """A hash of a parameter's bits; of its exact fp32 values where it has them beyond bf16."""
        exact = parameter.detach()
        if parameter.dtype == torch.bfloat16:
            exact = combine(parameter, self._optimizer.state.get(parameter, {}))
        data = local_part(exact).contiguous().cpu().reshape(-1).view(torch.uint8)
        return hashlib.blake2b(data.numpy().data, digest_size=16).digest()

    def close(self) -> None:
        """Stop watching the optimizer."""
        self._handle.remove()
