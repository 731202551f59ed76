"""Models small enough for the contracts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import nn


class Chain(nn.Module):
    """A chain of linear layers with a loss."""

    def __init__(self, num_layers: int, *, widths: Sequence[int] = (4,), bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=num_layers)
        widths = widths if len(widths) > 1 else [*widths] * (num_layers + 1)
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=bias) for before, after in zip(widths, widths[1:], strict=False)
        )

    def forward(self, inputs: torch.Tensor) -> SimpleNamespace:
        """Return the loss: the mean square of what comes out."""
        for layer in self.layers:
            inputs = layer(inputs)
        return SimpleNamespace(loss=inputs.square().mean())
