"""Whether a GradScaler is at work, which must be known before its scale can be undone by it."""

from __future__ import annotations

import gc
from typing import Any

import torch


def scaler_at_work() -> bool:
    """Whether there is a ``GradScaler`` that is enabled and has scaled a loss.

    It looks at all objects there are, so ask once a run or a period. One that nothing refers to any more
    doesn't count.
    """
    return _find() and gc.collect() >= 0 and _find()


def _find() -> bool:
    return any(_scales(one) for one in gc.get_objects())


def _scales(one: object) -> bool:
    if not issubclass(type(one), torch.amp.GradScaler):  # type(), since a proxy's __class__ may do anything
        return False
    scaler: Any = one
    return bool(scaler.is_enabled()) and scaler._scale is not None
