"""A step of a large master slice by slice: its gradient is never whole in fp32 beside the one in bf16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

LARGEST = 2**23
"""Elements that are stepped at once: 32 MiB in fp32, of a matrix of Llama-2-7B a fifth or less."""
_ROWS = 64  # a multiple of what a processor's vectors hold, so that no element is computed in another way
# Each element's update depends on that element's gradient and state alone. Any other optimizer may look at a whole
# matrix (Adafactor, Muon, whatever has trust ratios), which doesn't show from outside.
_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    *(torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adadelta),
)


def find_slices(optimizer: Optimizer, parameter: Tensor) -> list[slice]:
    """The rows of a parameter that are stepped one after another.

    Args:
        optimizer: The optimizer; what isn't known to treat each element by itself isn't divided.
        parameter: The parameter, of any shape.

    Returns:
        One slice where it is stepped at once.
    """
    rows = len(parameter) if parameter.dim() else 1
    each = max(LARGEST * rows // max(parameter.numel(), 1) // _ROWS * _ROWS, _ROWS)
    if type(optimizer) not in _ELEMENTWISE or rows <= each:
        return [slice(0, rows)]
    return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


class SlicedState:
    """The optimizer's own state of a parameter that it steps slice by slice.

    Each slice begins with the state from before the step, of its own rows; what isn't of the parameter's shape (the
    number of steps) counts once.

    Args:
        own: The state of the whole parameter; empty before its first step.
        shape: The parameter's shape.
    """

    def __init__(self, own: Mapping[str, Any], shape: torch.Size) -> None:
        self._before, self._shape = dict(own), shape
        self._whole = dict(own)

    def begin(self, rows: slice) -> dict[str, Any]:
        """State of some rows, for the optimizer to write to."""
        return {key: self._rows_of(value, rows) for key, value in self._before.items()}

    def end(self, rows: slice, own: Mapping[str, Any]) -> dict[str, Any]:
        """Take over what the optimizer has made of it.

        Args:
            rows: The rows.
            own: Their state.

        Returns:
            The state of the whole parameter, as far as that has been stepped.
        """
        for key, value in own.items():
            if not isinstance(value, Tensor) or value.shape != (rows.stop - rows.start, *self._shape[1:]):
                self._whole[key] = value
                continue
            if key not in self._before and rows.start == 0:  # its first step
                self._whole[key] = value.new_empty(self._shape)
            there = self._whole[key][rows]
            if there.untyped_storage()._cdata != value.untyped_storage()._cdata:  # most write in place
                there.copy_(value)
        return self._whole

    def _rows_of(self, value: Any, rows: slice) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[rows] if value.shape == self._shape else value.clone()
