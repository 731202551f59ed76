from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layersample.environment import has_bf16
from layersample.metrics import fast_products as module
from layersample.metrics import outlier_ratios, probe_lora
from layersample.metrics.fast_products import fast_products
from tests.helpers import make_batch, make_llama, make_mixtral


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bf16", lambda: False)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_a_product_is_that_of_fp32_rounded_once(without_bf16: None) -> None:
    layer, inputs = nn.Linear(256, 64).bfloat16(), draw(3, 5, 256, seed=1)
    expected = nn.functional.linear(inputs.float(), layer.weight.float(), layer.bias.float()).bfloat16()
    with fast_products(layer):
        assert torch.equal(layer(inputs), expected)
        for product in (inputs @ layer.weight.T, torch.matmul(inputs, layer.weight.T)):
            assert product.dtype == torch.bfloat16
            assert torch.equal(product, (inputs.float() @ layer.weight.float().T).bfloat16())


def test_differs_from_bf16_by_the_order_of_sums_alone(without_bf16: None) -> None:
    layer, inputs = nn.Linear(256, 64, bias=False).bfloat16(), draw(50, 256, seed=2)
    plain = layer(inputs)
    with fast_products(layer):
        wide = layer(inputs)
    torch.testing.assert_close(wide, plain, rtol=2**-7, atol=2**-12)  # one unit in the last place


def test_gradients_pass(without_bf16: None) -> None:
    layer, inputs = nn.Linear(8, 4).bfloat16(), draw(5, 8, seed=3).requires_grad_()
    with fast_products(layer):
        layer(inputs).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.bfloat16
    assert inputs.grad is not None and bool(inputs.grad.any())


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_measurements_agree_and_say_so(
    kind: str, without_bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = make_llama(2, dtype=torch.bfloat16)
    if kind == "mixtral":
        model = make_mixtral().bfloat16()
    batches = [make_batch(0), make_batch(1)]
    wide = outlier_ratios(model, batches, thresholds=(2.0,))
    said: list[str] = []
    probe_lora(model, batches, steps=2, rank=2, report=said.append)
    assert any("no instructions for bf16" in text for text in said)
    monkeypatch.setattr(module, "has_bf16", lambda: True)
    plain = outlier_ratios(model, batches, thresholds=(2.0,))
    for layer, by_threshold in plain.items():
        assert wide[layer][2.0] == pytest.approx(
            by_threshold[2.0], abs=0.3
        )  # a weight or two of some thousand


def test_a_model_in_fp32_is_left_alone(without_bf16: None) -> None:
    said: list[str] = []
    with fast_products(make_llama(2), said.append):
        assert not said


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_what_the_processor_has(avx512: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert has_bf16() is (avx512 or amx)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert has_bf16()
