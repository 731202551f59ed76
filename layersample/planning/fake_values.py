"""What stands for the values of fake tensors, which have none, where a model or an optimizer asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


class FakeValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers for fake tensors where their values matter: all is finite, no step was done, nothing is wrong.

    Torch's own fake tensors raise where code reads a value (``item()``, ``nonzero()``), and refuse products of
    experts in other types than bf16, though real tensors have them. Real tensors are left alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer an operation, or leave it to torch."""
        answer = _ANSWERS.get(func)
        if answer is not None and isinstance(args[0], FakeTensor):
            return answer(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _item(asked: Tensor) -> bool | float | int:
    if asked.dtype == torch.bool:
        return True
    return 1.0 if asked.dtype.is_floating_point else 0


def _nonzero(asked: Tensor) -> Tensor:
    return asked.new_empty((0, asked.dim()), dtype=torch.int64)


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype


def _grouped_mm(
    first: Tensor,
    second: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The product of groups of rows or columns with a matrix each, in any type.

    Args:
        first: ``(rows, k)`` or ``(groups, rows, k)``.
        second: ``(k, columns)`` or ``(groups, k, columns)``.
        offs: Where each group ends, ``(groups,)``.
        bias: Not used by any experts.
        out_dtype: Type of the product; that of ``first`` by default.
    """
    shape = [first.shape[-2], second.shape[-1]]
    if first.dim() == second.dim():  # the rows, or the columns, of each group lie behind one another
        groups = len(first) if first.dim() == 3 or offs is None else len(offs)
        shape.insert(0, groups)
    return first.new_empty(shape, dtype=out_dtype or first.dtype)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: _item,
    _aten.nonzero.default: _nonzero,
    _aten.equal.default: _equal,
    _aten._grouped_mm.default: _grouped_mm,
}
