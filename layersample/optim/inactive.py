"""A step without state for layers that aren't active, in the backward pass of those that are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from layersample.choices import Inactive, InactiveScope
from layersample.errors import ConfigError
from layersample.optim.host_copies import wait_for_copies
from layersample.optim.masters import AT_REST, MASTER, add
from layersample.optim.optimizers import Optimizers
from layersample.optim.scalers import scaler_at_work


def moving_units(num_units: int, active: Sequence[int], rule: Inactive, scope: InactiveScope) -> list[int]:
    """Which units move though they aren't active.

    Args:
        num_units: Number of units that are sampled.
        active: Indices of those that are active.
        rule: What inactive ones do.
        scope: Which of them: ``"above"`` are those behind the lowest active one, where the backward pass comes by
            anyway; none where no unit is active.

    Returns:
        Indices, ascending.
    """
    if rule == "freeze":
        return []
    lowest = -1 if scope == "all" else min(active, default=num_units)
    return [i for i in range(lowest + 1, num_units) if i not in set(active)]


class InactiveStepper:
    """Moves parameters by their gradients alone, one at a time, from hooks on the parameters.

    p ← p - r·η·g, or p - r·η·sign(g), where η is the learning rate of the parameter's group at that moment. There is
    no momentum, weight decay or clipping. The gradient is freed before the next one is made.

    Each backward pass is a step: of accumulated batches each moves the weights by its part. A sign has no size to be
    divided among them, so there ``"signsgd"`` is refused.

    Args:
        optimizers: The optimizers that hold the parameters.
        rule: ``"sgd"`` or ``"signsgd"``.
        lr_scale: r, the learning rate relative to the group's.
        master_weights: Whether bf16 weights have exact values beyond them, which are updated in their place.

    Raises:
        ConfigError: If an optimizer's wrapper would undo the steps, or scales gradients.

    References:
        BREAD, OpenReview DBybUx7ARy. The authors' code (microsoft/BlockOptimizers) takes the first group's learning
        rate for all parameters, and its default r is 1.
    """

    def __init__(
        self, optimizers: Optimizers, rule: Inactive, *, lr_scale: float, master_weights: bool
    ) -> None:
        if optimizers.beside:
            raise ConfigError(
                f"inactive={rule!r} needs an optimizer whose parameters nothing else moves, but "
                f"{type(optimizers.beside[0][0]).__name__} keeps state of its own around it: train with the optimizer "
                "inside of it."
            )
        if any(getattr(outer, "scaler", None) is not None for outer in optimizers.outer):  # accelerate's
            raise ConfigError(_scaled(rule))
        self._optimizers, self._rule, self._lr_scale = optimizers, rule, lr_scale
        self._master_weights = master_weights
        self._places: dict[Tensor, tuple[Optimizer, int]] = {}
        self._stepped: set[Tensor] = set()  # since the optimizer's last step
        self._hooks: list[RemovableHandle] = []
        self._looked = False
        self._waits = [o.register_state_dict_pre_hook(lambda _: wait_for_copies()) for o in optimizers.each]

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move these parameters from now on, and no others."""
        self._unhook()
        self._places = {
            parameter: (optimizer, index)
            for optimizer in self._optimizers.each
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
            for p in parameters
        ]

    def end_step(self) -> None:
        """One more optimizer step is done."""
        self._stepped.clear()

    def close(self) -> None:
        """Move nothing any more. Safe to call twice."""
        self._unhook()
        for handle in self._waits:
            handle.remove()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._looked = [], False
        self._stepped.clear()

    @torch.no_grad()
    def _on_gradient(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        self._check(parameter)
        optimizer, index = self._places[parameter]
        group = optimizer.param_groups[index]  # its learning rate may be another at each step
        if self._rule == "signsgd":
            gradient = (gradient.coalesce() if gradient.is_sparse else gradient).sign()
        rate: Any = group["lr"] * (self._lr_scale if group.get("maximize") else -self._lr_scale)
        if isinstance(rate, Tensor):  # on the device, which isn't waited for
            gradient, rate = gradient * rate.to(gradient.device), 1.0
        if self._master_weights and parameter.dtype == torch.bfloat16:
            self._move_exactly(optimizer, parameter, gradient, rate)
        else:
            parameter.add_(gradient, alpha=rate)
        parameter.grad = None

    def _move_exactly(
        self, optimizer: Optimizer, parameter: nn.Parameter, gradient: Tensor, rate: float
    ) -> None:
        state = optimizer.state.get(parameter, {})
        change = gradient.to_dense() if gradient.is_sparse else gradient
        if MASTER in state:  # the layer has only just stopped training
            parameter.copy_(state[MASTER].add_(change.float(), alpha=rate))
            return
        kept = {key: value for key, value in state.items() if key not in AT_REST}
        optimizer.state[parameter] = {**kept, **add(parameter, state, change, alpha=rate)}

    def _check(self, parameter: Tensor) -> None:
        if not self._looked:  # before anything has moved, once a period: it looks at all objects there are
            self._looked = True
            if scaler_at_work():
                raise ConfigError(_scaled(self._rule))
        if self._rule != "signsgd":
            return
        if parameter in self._stepped or self._optimizers.waits:
            raise ConfigError(
                "inactive='signsgd' needs one backward pass an optimizer step, because signs of gradients of parts "
                "don't add up to that of the whole, but there are several: leave gradient accumulation out, or choose "
                "inactive='sgd'."
            )
        self._stepped.add(parameter)


def _scaled(rule: Inactive) -> str:
    return (
        f"inactive={rule!r} needs gradients that aren't scaled, because it steps before a GradScaler could undo that, "
        "but there is one at work: train in bf16 or fp32 without it, or del the scaler of an earlier run."
    )
