"""Products of bf16 in fp32, where the processor has no instructions for bf16: faster, and rounded alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layersample.environment import has_bf16
from layersample.sampling.pace import PROGRESS, Say

_PRODUCTS = frozenset(
    (
        nn.functional.linear,
        nn.functional.scaled_dot_product_attention,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        Tensor.matmul,
        Tensor.mm,
        Tensor.bmm,
        Tensor.__matmul__,
    )
)


@contextmanager
def fast_products(model: nn.Module, report: Say = PROGRESS.info) -> Iterator[None]:
    """Compute products of bf16 matrices in fp32, and round them to bf16, where that is faster.

    bf16 instructions add up in fp32 as well and round once. So a product differs by the order of its sums alone: by
    one unit in the last place of bf16 where a sum lies at the edge of two, and mostly not at all.

    Args:
        model: What runs in the block; nothing is done unless it has bf16 weights on a CPU that lacks bf16.
        report: Is told that this is done.
    """
    if has_bf16() or not any(
        p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in model.parameters()
    ):
        yield
        return
    report(
        "The processor has no instructions for bf16: products are computed in fp32 and rounded to bf16, which may "
        "differ in the last bit."
    )
    with _InFloat32():
        yield


class _InFloat32(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(map(_is_narrow, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        wide = func(*map(_widen, args), **{key: _widen(value) for key, value in kwargs.items()})
        return wide.to(torch.bfloat16)


def _is_narrow(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _widen(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value
