"""A check of a run by itself: frozen weights don't move, active ones do, and nothing frozen holds memory."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from layersample.choices import StatePolicyName
from layersample.optim.frozen_state import has_two_weights
from layersample.optim.masters import AT_REST, combine
from layersample.optim.nested import tensors_in
from layersample.optim.optimizers import Optimizers
from layersample.optim.step_in_backward import has_values
from layersample.unwrapping import exact_values, local_part


class SelfCheckError(RuntimeError):
    """Layer sampling didn't do what it promises; the message says where."""


class SelfCheck:
    """Compares every parameter at the end of a period with what it was at its beginning, bit by bit.

    Args:
        optimizers: The optimizers whose steps are watched.
        state: The state policy, which says what a frozen parameter may hold.
    """

    def __init__(self, optimizers: Optimizers, state: StatePolicyName) -> None:
        self._optimizers = optimizers
        self._state = state
        self._digests: dict[str, bytes] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._pushed: set[str] = set()  # what a step has had reason to move
        self._handles = [each.register_step_pre_hook(self._note_step) for each in optimizers.each]

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A step at a learning rate of 0 (the first one of a warm-up) moves nothing, and rightly so. Nor does one
        # whose gradients are zero (a constant reward) or not there (BERT's pooler, LayerDrop).
        # Adafactor's is None where it finds its own.
        if all(group["lr"] is not None and float(group["lr"]) == 0 for group in optimizer.param_groups):
            return
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is not None and name not in self._pushed and has_values(local_part(gradient)):
                self._pushed.add(name)

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note the bits of all parameters at the beginning of a period."""
        self._pushed.clear()
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._digests = {name: self._digest(parameter) for name, parameter in parameters.items()}

    def settle(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note the bits of frozen parameters anew, where dropping state gave them the weights of evaluation."""
        if any(has_two_weights(each) for each in self._optimizers.each):
            self._digests |= {name: self._digest(p) for name, p in parameters.items() if not p.requires_grad}

    def end(
        self,
        parameters: Mapping[str, nn.Parameter],
        active: Mapping[str, tuple[str, ...]],
        *,
        moving: Collection[str] = (),
    ) -> None:
        """Compare at the end of a period, before anything is frozen.

        Args:
            parameters: All parameters by name.
            active: Names of the parameters of each layer or group that trained, by its name.
            moving: Names of the parameters that moved without state while they were inactive.

        Raises:
            SelfCheckError: If a promise doesn't hold.
        """
        training = {name for names in active.values() for name in names}
        changed = {
            name
            for name, digest in self._digests.items()
            if name in parameters and self._digest(parameters[name]) != digest
        }
        for name in sorted(changed.difference(training, moving)):
            raise SelfCheckError(f"{name} was frozen in this period, but its weights changed.")
        for layer, names in active.items():
            pushed = self._pushed.intersection(names) & parameters.keys()  # some may have been taken out
            if pushed and not changed.intersection(names):
                some = parameters[min(pushed)]
                raise SelfCheckError(
                    f"{layer} was active in this period and got gradients, but none of its weights changed: its "
                    f"updates are lost, or too small for weights in {some.dtype}. A higher learning rate or "
                    "master_weights=True may help."
                )
        for name, parameter in parameters.items():
            if name not in training:
                self._check_memory(name, parameter)

    def _check_memory(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            raise SelfCheckError(f"{name} is frozen, but holds a gradient.")
        state = self._optimizers.state_of(parameter)
        held = {key: value for key, value in state.items() if key not in AT_REST}
        tensors = [value for value in tensors_in(held) if value.dim() > 0]
        if self._state == "drop" and held:
            raise SelfCheckError(f"{name} is frozen, but the optimizer holds state for it (state='drop').")
        if self._state == "offload" and any(tensor.device.type != "cpu" for tensor in tensors):
            raise SelfCheckError(f"{name} is frozen, but its state isn't in CPU memory (state='offload').")

    def _digest(self, parameter: nn.Parameter) -> bytes:
        """A hash of a parameter's bits; of its exact fp32 values where it has them beyond bf16."""
        exact = exact_values(parameter).detach()
        if parameter.dtype == torch.bfloat16:
            exact = combine(exact, self._optimizers.state_of(parameter))
        data = local_part(exact).contiguous().cpu().reshape(-1).view(torch.uint8)
        return hashlib.blake2b(data.numpy().data, digest_size=16).digest()

    def close(self) -> None:
        """Stop watching the optimizer."""
        for handle in self._handles:
            handle.remove()
