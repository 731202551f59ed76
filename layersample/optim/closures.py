"""``optimizer.step(closure)``: the closure runs before anything is done to the optimizer, then the step."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from layersample.errors import ConfigError


def run_closures_first(optimizer: Optimizer) -> RemovableHandle:
    """Have an optimizer's closures run before its step: Lightning passes one at every step.

    An optimizer runs its closure at the beginning of its step, which is the same, but too late for gradients to be
    projected or put on masters, and amid what has been replaced by then. One that runs it again, at other weights
    (LBFGS), can't step a set of layers.

    Args:
        optimizer: The optimizer. What is hooked to it later sees the gradients.

    Returns:
        What ends it.
    """
    return optimizer.register_step_pre_hook(_run)


def _run(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
    if not callable(closure):
        return None
    with torch.enable_grad():
        result = _Result(type(optimizer).__name__, closure())
    if len(args) > 1:
        return (args[0], result, *args[2:]), kwargs
    return args, {**kwargs, "closure": result}


class _Result:
    """Stands for a closure that has run.

    Args:
        name: The optimizer's class.
        loss: What the closure returned.
    """

    def __init__(self, name: str, loss: Any) -> None:
        self._name, self._loss, self._asked = name, loss, False

    def __call__(self) -> Any:
        if self._asked:
            raise ConfigError(
                f"An optimizer must run its closure once in a step, but {self._name} runs it again, at other weights: "
                "layers can't be sampled under it."
            )
        self._asked = True
        return self._loss
