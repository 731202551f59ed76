"""Products of bf16 in fp32, where the processor has no instructions for bf16: faster, and rounded alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

from layersample.environment import has_bf16

logger = logging.getLogger(__name__)

_IN_FP32 = (
    "The processor has no instructions for bf16: products are computed in fp32 and rounded to bf16, which may "
    "differ in the last bit."
)

_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
# Those of several names are taken apart into the others, but not in torch.inference_mode.
_NAMES = (
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul"),
    *("_grouped_mm", "scaled_dot_product_attention", "convolution", "convolution_backward"),
)


def _find_products() -> dict[Any, Any]:
    """Each product, also with ``out=`` or in place, and the one that returns the same as a new tensor."""
    found = {}
    for name in _NAMES:
        packet, in_place = getattr(_ATEN, name), getattr(_ATEN, f"{name}_", None)
        found[packet.default] = packet.default
        if "out" in packet.overloads() and name != "convolution_backward":  # which has three
            found[packet.out] = packet.default
        if in_place is not None:
            found[in_place.default] = packet.default
    return found


_PRODUCTS = _find_products()


@contextmanager
def fast_products(
    model: nn.Module, report: Callable[[str], None] = logger.info, *, mixed: bool = False
) -> Iterator[None]:
    """Compute products of bf16 matrices in fp32, and round them to bf16, where the processor can't multiply bf16.

    Without that a product takes some 20 times as long as in fp32 on such a processor. On all others nothing is done.

    bf16 instructions add up in fp32 as well and round once. So a product differs by the order of its sums alone: by
    one unit in the last place of bf16 where a sum lies at the edge of two, and mostly not at all. Backward's products
    are among them, and those of a checkpoint's second forward; what is kept for backward stays bf16. What
    ``torch.compile`` has compiled doesn't go with it.

    Args:
        model: What runs in the block, forward and backward; nothing is done unless it has bf16 weights on a CPU.
        report: Is told that this is done; the log by default.
        mixed: Whether the weights are fp32, and autocast makes bf16 of them.

    Example:
        >>> with fast_products(model):  # doctest: +SKIP
        ...     for batch in loader:
        ...         model(**batch).loss.backward()
    """
    there = {p.dtype for p in model.parameters() if p.device.type == "cpu"}
    if has_bf16() or not (torch.bfloat16 in there or (mixed and there)):
        yield
        return
    if any(isinstance(mode, _InFloat32) for mode in _get_current_dispatch_mode_stack()):
        yield  # around a measurement in the middle of training, say
        return
    report(_IN_FP32)
    with _InFloat32():  # type: ignore[no-untyped-call]
        yield


def how_bf16_is_computed(precision: str) -> str:
    """What a user should know before runs in some precision begin; empty where there is nothing to say.

    Args:
        precision: Precision of the runs, as ``layersample train`` names it.
    """
    needed = precision.startswith("bf16") and not has_bf16() and not torch.accelerator.is_available()
    return _IN_FP32 if needed else ""


class _InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (_ATTENTION, _ATTENTION_BACKWARD) and _is_narrow(args[0]):
            found = func(*_widen(args), **_widen(kwargs))
            # The logarithms of forward's sums are fp32 in any case.
            return (_narrow(found[0]), found[1]) if func is _ATTENTION else _narrow(found)
        product = _PRODUCTS.get(func)
        if product is None or not _are_narrow((*args, *kwargs.values())):
            return func(*args, **kwargs)
        given = {key: value for key, value in kwargs.items() if key != "out"}
        found = _narrow(product(*_widen(args), **_widen(given)))
        if func is product:
            return found
        into = kwargs.get("out", args[0])
        # An out of another shape is changed, with a warning.
        return into.copy_(found) if into.shape == found.shape else func(*args, **kwargs)


def _is_narrow(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _are_narrow(values: tuple[Any, ...]) -> bool:
    """Whether all numbers are: what mixes types is an error, and stays one. Offsets of groups are whole ones."""
    if any(isinstance(value, torch.dtype) and value != torch.bfloat16 for value in values):
        return False  # the type of what comes out
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return bool(tensors) and all(map(_is_narrow, tensors))


def _widen(values: Any) -> Any:
    wide = tree_map_only(Tensor, lambda value: value.float() if _is_narrow(value) else value, values)
    return tree_map_only(torch.dtype, lambda _: torch.float32, wide)


def _narrow(values: Any) -> Any:
    return tree_map_only(Tensor, lambda value: value.bfloat16(), values)
