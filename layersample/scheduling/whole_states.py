"""Optimizers that keep one state for all parameters together, such as LBFGS: it is cleared at every switch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from layersample.errors import ConfigError
from layersample.optim.optimizers import Optimizers
from layersample.optim.whole_state import is_of_all, needs_closure
from layersample.scheduling.options import SchedulerOptions
from layersample.unwrapping import is_dtensor


class WholeStates:
    """Clears, at every switch, the state that an optimizer keeps for all parameters together.

    LBFGS flattens all gradients into one vector, with zeros where there is none, and keeps steps and gradients of
    that length under its first parameter. A frozen layer has no gradient. Where no step of the history is of a time
    in which it trained, the direction is zero for it as well, so that it doesn't move. So the history can't outlive
    a switch: it begins anew with each period, for the groups that always train too.

    The closure runs as often as the optimizer likes, on the weights themselves: so these can't be replaced in a step,
    by masters or what has a low rank, nor be stepped in the backward pass.

    Args:
        optimizers: The optimizers; those whose step needs no closure are none of its concern.
        options: The scheduler's options.
        asked: What else is asked for that such an optimizer can't have, by what to choose in its place.

    Raises:
        ConfigError: If there is such an optimizer, and options that don't go with it, or its parameters are sharded.
    """

    def __init__(self, optimizers: Optimizers, options: SchedulerOptions, asked: Mapping[str, bool]) -> None:
        self._each = [each for each in optimizers.each if needs_closure(each)]
        self._is_of_now = False  # or the state is of steps before sampling, of whatever trained then
        for each in self._each:
            sharded = any(is_dtensor(p) for group in each.param_groups for p in group["params"])
            needs = {
                "state='drop'": options.state != "drop",
                "projection=None": options.projection is not None,
                "step_in_backward=False": bool(options.step_in_backward),
                "inactive='freeze'": options.inactive != "freeze",
                "frozen_weights=None": options.frozen_weights is not None,
                "switch_warmup=0": options.switch_warmup > 0,
                "lr_correction=None": options.lr_correction is not None,
                "whole parameters (no FSDP)": sharded,
                **asked,
            }
            lacks = [need for need, is_lacking in needs.items() if is_lacking]
            if lacks:
                raise ConfigError(
                    f"The step of {_name(each)} needs a closure, which it runs as often as it likes, on state of all "
                    f"parameters together: layers can be sampled under it with {', '.join(lacks)} alone. Choose that, "
                    "or another optimizer, such as AdamW."
                )
        self._handles = [each.register_step_pre_hook(self._before_step) for each in self._each]

    def resumed(self, *, changed: bool) -> None:
        """The optimizer's state is a checkpoint's, of the layers that are active.

        Args:
            changed: Whether options have changed since, and other groups may have trained.
        """
        self._is_of_now = not changed

    def switched(self) -> None:
        """Other layers train now."""
        for each in self._each:
            if is_of_all(each):
                each.state.clear()

    def close(self) -> None:
        """Leave the optimizers alone. Safe to call twice."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not callable(args[1] if len(args) > 1 else kwargs.get("closure")):  # args[0] is the optimizer
            raise ConfigError(
                f"The step of {_name(optimizer)} must be called with a closure, optimizer.step(closure), which "
                "computes the loss and its gradients and returns the loss; the Trainer calls it without."
            )
        if not self._is_of_now:
            self.switched()
            self._is_of_now = True


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__
