"""A hook on an optimizer's ``zero_grad``, for which torch has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.optim import Optimizer


class ZeroGradHook:
    """Calls something in front of an optimizer's ``zero_grad``, until it is removed.

    Args:
        optimizer: Any torch optimizer, without a wrapper.
        first: What is called.
    """

    def __init__(self, optimizer: Optimizer, first: Callable[[], None]) -> None:
        self._optimizer = optimizer
        zero_grad = optimizer.zero_grad

        @wraps(zero_grad)  # accelerate asks for its arguments
        def hooked(*args: Any, **kwargs: Any) -> None:
            first()
            zero_grad(*args, **kwargs)

        self._before, self._hooked = vars(optimizer).get("zero_grad"), hooked
        optimizer.zero_grad = hooked  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave ``zero_grad`` as it was found; what somebody has put in its place since stays. Safe to call twice."""
        if vars(self._optimizer).get("zero_grad") is not self._hooked:
            return
        if self._before is None:
            del self._optimizer.zero_grad
        else:
            self._optimizer.zero_grad = self._before  # type: ignore[method-assign]
