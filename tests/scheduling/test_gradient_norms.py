"""Norms of gradients at the end of an ordinary step; what samplers see of them is in test_statistics.py."""

from __future__ import annotations

import torch

from layersample.optim.norms import norm_of
from layersample.scheduling.gradient_norms import _squares


def test_large_16_bit_gradients_have_the_norm_that_a_step_in_backward_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = {index: [torch.randn(700, 801, generator=generator).bfloat16()] for index in range(2)}
    squares = _squares(gradients)
    assert all(torch.equal(squares[index], norm_of(own[0]).square()) for index, own in gradients.items())
    assert all(square.dtype == torch.float32 for square in squares.values())


def test_a_layer_of_several_types_adds_up_in_the_widest() -> None:
    narrow, wide = torch.tensor([3.0, 4.0], dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)
    square = _squares({3: [narrow, wide]})[3]
    assert square.dtype == torch.float64 and square.item() == 26.0
