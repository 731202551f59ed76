"""Optimizers that keep one state for all of their parameters together, such as LBFGS, by what shows of them."""

from __future__ import annotations

import inspect

from torch.optim import Optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer can't be called without a closure."""
    try:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    except (TypeError, ValueError):  # a step that isn't written in Python
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def is_of_all(optimizer: Optimizer) -> bool:
    """Whether what an optimizer holds under one parameter is of all of them: it holds nothing under any other."""
    return len(optimizer.state) == 1 and needs_closure(optimizer)
