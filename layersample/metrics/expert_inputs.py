"""See the inputs of fused experts, that no module hook sees: each expert is a slice of one 3-D weight."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Seen = Callable[[str, int, Tensor, bool], None]

_LINEAR = nn.functional.linear
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class _WatchExperts(TorchFunctionMode):
    """Reports each product of an input with a slice of a watched weight."""

    def __init__(self, weights: Mapping[str, Tensor], seen: Seen) -> None:
        super().__init__()
        self._weights = {
            weight.untyped_storage().data_ptr(): (name, weight) for name, weight in weights.items()
        }
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _LINEAR or func in _PRODUCTS:
            self._look(args[0], args[1], func is _LINEAR)
        return func(*args, **(kwargs or {}))

    def _look(self, inputs: Tensor, matrix: Tensor, is_linear: bool) -> None:
        known = self._weights.get(matrix.untyped_storage().data_ptr()) if matrix.dim() == 2 else None
        if known is None:
            return
        name, weight = known
        expert = (matrix.storage_offset() - weight.storage_offset()) // weight.stride(0)
        as_stored = matrix.stride() == weight.stride()[1:]
        # F.linear's weight is (out, in), a product's is (in, out); either may be a transposed view.
        self._seen(name, expert, inputs, is_linear == as_stored)


@contextlib.contextmanager
def watch_experts(model: nn.Module, weights: Mapping[str, Tensor], seen: Seen) -> Iterator[None]:
    """Report the inputs of fused experts while the model runs.

    transformers' experts run one by one meanwhile (its ``eager`` implementation), as grouped kernels don't
    show which token goes where.

    Args:
        model: The model that runs.
        weights: Fused weights ``(num_experts, a, b)`` by name.
        seen: Called with the name, the expert, its input ``(tokens, in)`` and whether ``b`` is the input's
            dimension (else ``a`` is).
    """
    if not weights:
        yield
        return
    config = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    can_set = before is not None and hasattr(model, "set_experts_implementation")
    try:
        if can_set:
            model.set_experts_implementation("eager")  # type: ignore[operator]
        with _WatchExperts(weights, seen):
            yield
    finally:
        if can_set:
            model.set_experts_implementation(before)  # type: ignore[operator]
