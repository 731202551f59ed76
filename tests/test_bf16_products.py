from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layersample import bf16_products as module
from layersample.activations.save_memory import save_memory
from layersample.bf16_products import fast_products, how_bf16_is_computed
from layersample.environment import has_bf16
from layersample.metrics import outlier_ratios, probe_lora
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


@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "matmul"])
def test_products_into_a_tensor_that_is_there_are_those_into_a_new_one(name: str, without_bf16: None) -> None:
    left, right, batch = draw(7, 64, seed=5), draw(64, 9, seed=6), draw(3, 7, 64, seed=7)
    batches = (batch, right.expand(3, 64, 9).contiguous())
    given = {
        "mm": (left, right),
        "matmul": (left, right),
        "addmm": (draw(7, 9, seed=8), left, right),
        "bmm": batches,
        "baddbmm": (draw(3, 7, 9, seed=8), *batches),
        "addbmm": (draw(7, 9, seed=8), *batches),
        "mv": (left, right[:, 0].contiguous()),
        "addmv": (draw(7, seed=8), left, right[:, 0].contiguous()),
        "dot": (left[0], right[:, 0].contiguous()),
    }[name]
    function = getattr(torch, name)
    expected = function(*(tensor.float() for tensor in given)).bfloat16()
    into = torch.empty_like(expected)
    with fast_products(nn.Linear(2, 2).bfloat16()):
        assert torch.equal(function(*given), expected)
        assert function(*given, out=into) is into and torch.equal(into, expected)
        if name.startswith("add") or name == "baddbmm":
            total = given[0].clone()
            assert getattr(total, f"{name}_")(*given[1:]) is total and torch.equal(total, expected)
        wrong = torch.empty(1, 1, 2, dtype=torch.bfloat16)
        with warnings.catch_warnings(action="ignore"):  # of an out that is resized
            function(*given, out=wrong)
    assert wrong.shape == expected.shape


def test_products_of_groups_are_among_them(without_bf16: None) -> None:
    """As a mixture's experts have them."""
    inputs, weights = draw(12, 32, seed=9), draw(3, 32, 16, seed=10)
    ends = torch.tensor([4, 4, 12], dtype=torch.int32)
    multiply: Any = torch._grouped_mm
    expected = multiply(inputs.float(), weights.float(), offs=ends).bfloat16()
    with fast_products(nn.Linear(2, 2).bfloat16()):
        for more in ({}, {"out_dtype": torch.bfloat16}):
            assert torch.equal(multiply(inputs, weights, offs=ends, **more), expected)


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


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen_head", [None, False, True])
@pytest.mark.parametrize("make", [partial(make_llama, 2), make_mixtral])
def test_backward_and_a_second_forward_are_among_them(
    make: Callable[..., Any],
    attention: str,
    checkpointing: bool,
    frozen_head: bool | None,
    without_bf16: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products that backward runs are computed alike, and what is kept for it stays bf16."""
    slow: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            kwargs = kwargs or {}
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            if any(part in name for part in ("mm", "mv", "attention", "linear", "matmul")) and any(
                tensor.dtype == torch.bfloat16 for tensor in tensors
            ):
                slow.append(name)
            return func(*args, **kwargs)

    gradients: dict[bool, dict[str, Any]] = {}
    kept: dict[bool, list[torch.dtype]] = {False: [], True: []}
    for fast in (False, True):
        monkeypatch.setattr(module, "has_bf16", lambda fast=fast: not fast)
        model = make().bfloat16()
        model.set_attn_implementation(attention)
        if frozen_head is not None:  # a chunked loss multiplies into buffers of its own
            model.get_output_embeddings().weight.requires_grad_(not frozen_head)
            save_memory(model, loss_chunk=5, recompute=False)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})

        def keep(tensor: torch.Tensor, own: list[torch.dtype] = kept[fast]) -> torch.Tensor:
            own.append(tensor.dtype)
            return tensor

        with (
            Watch(),  # type: ignore[no-untyped-call]
            fast_products(model),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model(**make_batch()).loss.backward()
        gradients[fast] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert bool(slow) is not fast, slow
        slow.clear()
    assert kept[True] == kept[False]
    for name, plain in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], plain, rtol=0.05, atol=0.02)


def test_what_mixes_types_stays_an_error(without_bf16: None) -> None:
    with fast_products(nn.Linear(2, 2).bfloat16()), pytest.raises(RuntimeError, match="same dtype"):
        torch.ones(2, 2).bfloat16() @ torch.ones(2, 2)


def test_autocast_is_told_of(without_bf16: None) -> None:
    """Its weights are fp32, and what it multiplies isn't."""
    layer, inputs = nn.Linear(64, 8), draw(5, 64, seed=4).float()
    said: list[str] = []
    with fast_products(layer, said.append), fast_products(layer, said.append, mixed=True):
        with fast_products(layer, said.append, mixed=True):  # a measurement, say
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = layer(inputs)
    assert len(said) == 1 and found.dtype == torch.bfloat16
    wide = nn.functional.linear(
        inputs.bfloat16().float(), layer.weight.bfloat16().float(), layer.bias.bfloat16().float()
    )
    assert torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize(("precision", "told"), [("bf16", True), ("bf16-mixed", True), ("fp32", False)])
def test_what_is_done_is_said_before_runs_begin(
    precision: str, told: bool, without_bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert ("computed in fp32" in how_bf16_is_computed(precision)) is told
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert not how_bf16_is_computed(precision)


def test_inference_mode_has_products_of_its_own(without_bf16: None) -> None:
    layer, inputs = nn.Linear(256, 64).bfloat16(), draw(3, 5, 256, seed=1)
    with torch.inference_mode(), fast_products(layer):
        found = layer(inputs)
    wide = nn.functional.linear(inputs.float(), layer.weight.float(), layer.bias.float())
    assert torch.equal(found, wide.bfloat16())


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
