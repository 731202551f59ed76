"""Which optimizers a view works on: one at a time."""

from __future__ import annotations

from weakref import WeakSet

from torch.optim import Optimizer

from layersample.errors import ConfigError
from layersample.unwrapping import unwrap_optimizer

VIEWED: WeakSet[Optimizer] = WeakSet()
"""Those that a view works on, without wrappers."""


def is_viewed(optimizer: Optimizer) -> bool:
    """Whether a view works on an optimizer."""
    return unwrap_optimizer(optimizer) in VIEWED


def check_unviewed(optimizer: Optimizer) -> None:
    """Make sure that no view works on an optimizer: of two, each would undo what the other does.

    Args:
        optimizer: The optimizer, or accelerate's wrapper of it.

    Raises:
        ConfigError: If one does; it says how to end it.
    """
    if is_viewed(optimizer):
        raise ConfigError(
            "An optimizer must have one LayerScheduler at a time, but one made earlier (by this same notebook cell, "
            "perhaps) still works on it: close() the earlier one first (scheduler.close(), or with the Trainer "
            "callback.scheduler.close()), or use it as `with LayerScheduler(...) as scheduler:`."
        )
