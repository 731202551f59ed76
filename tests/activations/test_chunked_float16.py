"""The chunked loss in float16, where gradients would underflow without the loss scaler's factor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layersample import ChunkedLoss
from layersample.activations.chunked_cross_entropy import LogitTransform, chunked_cross_entropy
from tests.helpers import make_llama

VOCABULARY, HIDDEN, POSITIONS = 4096, 32, 96
SCALES = [32768.0, 65536.0, 2.0**20]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.2
    return hidden, weight, torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)


def gradients(kind: str, scale: float, transform: LogitTransform, num_items: int) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, without the scaler's factor: exact in float64, else in autocast float16."""
    hidden, weight, targets = inputs()
    dtype = torch.float64 if kind == "exact" else torch.float32
    hidden, weight = hidden.to(dtype).requires_grad_(True), weight.to(dtype).requires_grad_(True)
    with torch.autocast("cpu", torch.float16, enabled=kind != "exact"):
        if kind == "chunked":
            loss = chunked_cross_entropy(
                hidden, weight, None, targets, transform=transform, num_items=num_items, chunk_size=20
            )
        else:
            logits = transform(F.linear(hidden, weight).to(dtype))
            loss = F.cross_entropy(logits, targets, reduction="sum") / num_items
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad.double() / scale, weight.grad.double() / scale


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.07), LogitTransform(2.0, softcap=3.0)]
)
@pytest.mark.parametrize("num_items", [POSITIONS, 5000])  # alone, and as a part of many micro-batches
def test_under_loss_scaling_it_is_as_exact_as_the_plain_loss(
    transform: LogitTransform, scale: float, num_items: int
) -> None:
    exact = gradients("exact", 1.0, transform, num_items)
    chunked = gradients("chunked", scale, transform, num_items)
    # The plain loss at the scale that suits it best: at 1 it underflows.
    plain = gradients("plain", 32768.0, transform, num_items)
    for name, ours, theirs, right in zip(("hidden", "weight"), chunked, plain, exact, strict=True):
        assert off(ours, right) < max(1.5 * off(theirs, right), 1e-3), name


def test_a_model_in_float16_as_a_whole_has_finite_gradients_of_its_type() -> None:
    hidden, weight, targets = (t.half() if t.is_floating_point() else t for t in inputs())
    hidden.requires_grad_(True)
    weight.requires_grad_(True)
    chunked_cross_entropy(hidden, weight, None, targets, chunk_size=20).backward()  # type: ignore[no-untyped-call]
    exact = gradients("exact", 1.0, LogitTransform(), POSITIONS)
    for found, right in zip((hidden.grad, weight.grad), exact, strict=True):
        assert found is not None and found.dtype == torch.float16
        assert off(found.double(), right) < 2e-2  # without a scaler the smallest are lost in any case


@pytest.mark.parametrize("scale", [32768.0, 65536.0])
def test_norms_and_layers_of_a_model_are_as_exact_as_with_the_plain_loss(scale: float) -> None:
    model = make_llama().train()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}

    def run(model: nn.Module, chunked: bool, half: bool) -> dict[str, Tensor]:
        model = copy.deepcopy(model)
        saver: Any = ChunkedLoss(model, chunk_size=5) if chunked else None
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = model(**batch, use_cache=False).loss
        (loss * scale).backward()
        if saver is not None:
            saver.close()
        return {n: p.grad.double() / scale for n, p in model.named_parameters() if p.grad is not None}

    exact, plain, chunked = (
        run(copy.deepcopy(model).double(), False, False),
        run(model, False, True),
        run(model, True, True),
    )
    for name in ("model.norm.weight", "model.layers.3.mlp.up_proj.weight", "lm_head.weight"):
        assert off(chunked[name], exact[name]) < 1.5 * off(plain[name], exact[name]) + 1e-3, name
