"""Products with a frozen weight: what backward needs is its codes, never the input, the weight or a buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from layersample.frozen.matrix import Rounded


class _Product(torch.autograd.Function):
    """``inputs @ weight.T + bias`` for a weight ``(out, in)`` that is dequantized in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, bias: Tensor | None, rounded: Rounded, dtype: torch.dtype, *codes: Tensor
    ) -> Tensor:
        # As saved tensors, codes that someone overwrites before backward raise an error there.
        ctx.save_for_backward(*codes)
        ctx.rounded, ctx.dtype = rounded, dtype
        return nn.functional.linear(inputs, rounded.matrix(0, codes).to(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_inputs, needs_bias = ctx.needs_input_grad[:2]
        codes = ctx.saved_tensors  # once: gradient checkpointing gives them a single time
        of_inputs = of_bias = None
        rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        if needs_inputs:
            weight = ctx.rounded.matrix(0, codes).to(ctx.dtype)
            of_inputs = (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
        if needs_bias:
            of_bias = rows.sum(0)
        return of_inputs, of_bias, None, None, *(None for _ in codes)


class _ConvProduct(torch.autograd.Function):
    """``inputs @ weight + bias`` for a weight ``(in, out)``, as GPT-2 stores them."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, bias: Tensor, rounded: Rounded, dtype: torch.dtype, *codes: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*codes)
        ctx.rounded, ctx.dtype = rounded, dtype
        return torch.addmm(bias, inputs, rounded.matrix(0, codes).to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_inputs, needs_bias = ctx.needs_input_grad[:2]
        codes = ctx.saved_tensors
        weight = ctx.rounded.matrix(0, codes).to(ctx.dtype) if needs_inputs else None
        of_inputs = None if weight is None else grad @ weight.t()
        return of_inputs, grad.sum(0) if needs_bias else None, None, None, *(None for _ in codes)


def frozen_linear(inputs: Tensor, rounded: Rounded, bias: Tensor | None) -> Tensor:
    """``nn.Linear`` with a frozen weight ``(out, in)``, as autocast would have it."""
    inputs, bias, dtype = _cast(inputs, bias, rounded)
    with torch.autocast(inputs.device.type, enabled=False):
        product: Tensor = _Product.apply(inputs, bias, rounded, dtype, *rounded.tensors)  # type: ignore[no-untyped-call]
    return product


def frozen_conv1d(inputs: Tensor, rounded: Rounded, bias: Tensor) -> Tensor:
    """transformers' ``Conv1D`` with a frozen weight ``(in, out)``."""
    shape = (*inputs.shape[:-1], rounded.shape[1])
    inputs, cast_bias, dtype = _cast(inputs.view(-1, inputs.shape[-1]), bias, rounded)
    with torch.autocast(inputs.device.type, enabled=False):
        product: Tensor = _ConvProduct.apply(inputs, cast_bias, rounded, dtype, *rounded.tensors)  # type: ignore[no-untyped-call]
    return product.view(shape)


def _cast(inputs: Tensor, bias: Tensor | None, rounded: Rounded) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """Inputs and bias in the type that the product is computed in, and that type; autograd casts them back."""
    kind = inputs.device.type
    if not torch.is_autocast_enabled(kind) or inputs.dtype == torch.float64:
        return inputs, bias, rounded.dtype
    dtype = torch.get_autocast_dtype(kind)
    return inputs.to(dtype), None if bias is None else bias.to(dtype), dtype
