"""Formats of a frozen weight: a matrix as a few small tensors, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from importlib.util import find_spec
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from layersample.errors import ConfigError
from layersample.notices import hide_missing_kernel
from layersample.registry import Registry
from layersample.unwrapping import is_fake

_BLOCK = 64  # elements of NF4 that share a scale
_GROUP = 256  # scales that share a scale of their own
# Quantiles of the normal distribution: arXiv 2305.14314, appendix E.
_NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


class FrozenFormat(ABC):
    """How a frozen matrix is held on the device. Make one of your own and name it with :func:`register_format`.

    Both functions must be deterministic: a run that is resumed quantizes its weights anew.
    """

    def check(self) -> None:  # noqa: B027
        """Make sure that whatever the format needs is installed; most need nothing.

        Raises:
            ConfigError: If it isn't.
        """

    @abstractmethod
    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Round a matrix.

        Args:
            weight: A floating-point matrix ``(rows, columns)``, finite; the rows are outputs where that is known.

        Returns:
            New tensors on the same device, which are all that is held of it.
        """

    @abstractmethod
    def dequantize(self, tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The rounded matrix.

        Args:
            tensors: What :meth:`quantize` returned.
            shape: Of the matrix, ``(rows, columns)``.
            dtype: Of the result; for a 16-bit type it must be the float32 result, rounded.
        """


FORMATS: Registry[FrozenFormat] = Registry("format of frozen weights", FrozenFormat)  # type: ignore[type-abstract]
register_format, list_formats = FORMATS.register, FORMATS.list


@register_format("int8")
class Int8(FrozenFormat):
    """8 bits an element and one scale a row: about .8% of error."""

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Codes from -127 to 127, ``(rows, columns)``, and scales ``(rows, 1)``."""
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        largest = exact.abs().amax(1, keepdim=True)  # (rows, 1)
        # A scale of 8 significant bits times a code of 8 is exact in float32, so that a product in bfloat16 is
        # rounded once: the same as by way of float32, in half the time. It is never below largest / 127.
        scale = (largest / 127 * (1 + 2**-8)).to(torch.bfloat16)
        steps = scale.to(exact.dtype)
        codes = torch.where(steps > 0, exact / steps, 0).round_().clamp_(-127, 127).to(torch.int8)
        return codes, scale

    def dequantize(self, tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Codes times scales."""
        codes, scale = tensors
        if dtype == torch.float16:  # its range is smaller than a scale's
            return codes.float().mul_(scale).to(dtype)
        return codes.to(dtype).mul_(scale)


@register_format("nf4")
class NF4(FrozenFormat):
    """4 bits an element, 64 elements a scale, and scales in 8 bits: 4.13 bits, and about 9% of error.

    The codes are those of QLoRA. A scale is kept as the square root of its part of the largest of 256 scales, so
    that small ones keep their precision beside a large one.

    References:
        QLoRA, arXiv 2305.14314.
    """

    def check(self) -> None:
        """Make sure that bitsandbytes is there, whose kernels dequantize."""
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                'frozen_weights="nf4" needs the quantized extra: pip install "layersample[quantized]"; "int8" needs '
                "nothing."
            )

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Two codes a byte, a byte a scale, and a float32 for each 256 scales."""
        blocks = _padded(weight.float().flatten(), _BLOCK)  # (blocks, 64)
        largest = blocks.abs().amax(1)
        groups = _padded(largest, _GROUP)  # (groups, 256)
        of_group = groups.amax(1, keepdim=True)
        roots = torch.where(of_group > 0, groups / of_group, 0).sqrt_().mul_(255).round_()
        roots.clamp_(min=1)  # a block of tiny weights isn't lost
        scales = roots.to(torch.uint8).flatten()[: len(largest)].contiguous()
        relative = torch.where(largest[:, None] > 0, blocks / largest[:, None], 0)
        values = torch.tensor(_NF4_VALUES, device=weight.device)
        codes = torch.bucketize(relative, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
        pairs = codes.view(-1, 2)
        return (pairs[:, 0] << 4) | pairs[:, 1], scales, of_group.flatten() / 255**2

    def dequantize(self, tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """By a kernel of bitsandbytes; in plain torch where it has none for the type."""
        codes, scales, of_group = tensors
        roots = _padded(scales.float(), _GROUP)
        largest = roots.square_().mul_(of_group[:, None]).flatten()[: len(scales)]
        kernel = dtype in (torch.float32, torch.bfloat16, torch.float16)
        if kernel and is_fake(codes):
            flat = torch.empty(
                2 * codes.numel(), dtype=dtype, device=codes.device
            )  # a plan counts what it makes
        else:
            flat = (_by_kernel if kernel else by_table)(codes, largest, dtype)
        return flat[: prod(shape)].view(shape)


def by_table(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """NF4 in plain torch: what the kernel is tested against.

    Args:
        codes: Two a byte, the first one in the upper half, ``(n / 2,)``.
        scales: float32, ``(n / 64,)``.
        dtype: Of the result.

    Returns:
        The values, ``(n,)``.
    """
    values = torch.tensor(_NF4_VALUES, device=codes.device)
    every = torch.arange(256, device=codes.device)
    table = torch.stack((values[every // 16], values[every % 16]), 1)  # (256, 2): a row a byte
    blocks = table.index_select(0, codes.int()).view(-1, _BLOCK)
    return blocks.mul_(scales[:, None]).flatten().to(dtype)


def _by_kernel(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    _bitsandbytes()
    size = [2 * codes.numel()]
    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, _BLOCK, "nf4", size, dtype)
    return flat.flatten()


@cache
def _bitsandbytes() -> ModuleType:
    """The package, whose import registers its kernels; without a warning that would mislead."""
    hide_missing_kernel()
    import bitsandbytes

    module: ModuleType = bitsandbytes
    return module


def _padded(flat: Tensor, size: int) -> Tensor:
    """Rows of a size, the last one filled up with zeros."""
    missing = -flat.numel() % size
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, size) if missing else flat.view(-1, size)
