"""Formats: small errors, one rounding whatever the type, and kernels that equal the plain reference to the bit."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from layersample.errors import ConfigError
from layersample.frozen.formats import FORMATS, NF4, FrozenFormat, by_table, list_formats, register_format
from layersample.notices import hide_missing_kernel

SHAPES = ((48, 64), (7, 13), (1, 1), (130, 300))
TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


@pytest.mark.parametrize(("name", "error"), [("int8", 0.0085), ("nf4", 0.095)])
@pytest.mark.parametrize("dtype", TYPES)
def test_errors_are_those_of_the_format(name: str, error: float, dtype: torch.dtype) -> None:
    chosen, weight = FORMATS.create(name), normal((1536, 576), dtype)
    rounded = chosen.dequantize(chosen.quantize(weight), (1536, 576), dtype)
    assert rounded.dtype == dtype
    relative = (rounded - weight).float().norm() / weight.float().norm()
    assert 0.8 * error < float(relative) < error


@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sixteen_bits_are_float32_rounded_once(name: str, shape: tuple[int, int]) -> None:
    chosen = FORMATS.create(name)
    codes = chosen.quantize(normal(shape))
    exact = chosen.dequantize(codes, shape, torch.float32)
    for dtype in TYPES:
        assert torch.equal(chosen.dequantize(codes, shape, dtype), exact.to(dtype))


@pytest.mark.parametrize(("name", "bits"), [("int8", 8.03), ("nf4", 4.13)])
def test_bits_an_element(name: str, bits: float) -> None:
    codes = FORMATS.create(name).quantize(normal((1536, 576)))
    assert sum(8 * tensor.nbytes for tensor in codes) / (1536 * 576) <= bits


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_zeros_stay_zeros_and_outliers_leave_others_alone(name: str) -> None:
    chosen, weight = FORMATS.create(name), normal((64, 64))
    weight[3] = 0
    weight[5] *= 1e4
    rounded = chosen.dequantize(chosen.quantize(weight), (64, 64), torch.float32)
    assert not rounded[3].any()
    others = torch.arange(64) > 5
    assert (rounded - weight)[others].norm() < 0.25 * weight[others].norm()
    zeros = torch.zeros(2, 3)
    assert torch.equal(chosen.dequantize(chosen.quantize(zeros), (2, 3), torch.float32), zeros)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_quantizing_is_deterministic_and_leaves_the_weight_alone(name: str) -> None:
    chosen, weight = FORMATS.create(name), normal((40, 50))
    before = weight.clone()
    first, second = chosen.quantize(weight), chosen.quantize(weight)
    assert all(map(torch.equal, first, second)) and torch.equal(weight, before)
    assert all(tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr() for tensor in first)


def test_nf4_has_the_codes_of_bitsandbytes() -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = normal((256, 192), torch.bfloat16)
    theirs, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    codes, scales, of_group = NF4().quantize(weight)
    assert torch.equal(codes, theirs.flatten())
    ours = (scales.float().view(-1, 256).square() * of_group[:, None]).flatten()
    torch.testing.assert_close(ours, state.absmax, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", TYPES[:3])
def test_the_kernel_equals_plain_torch_to_the_bit(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        codes, scales, of_group = tensors = NF4().quantize(normal(shape))
        roots = scales.float().square()
        largest = roots * of_group.repeat_interleave(256)[: len(scales)]
        plain = by_table(codes, largest, dtype)[: shape[0] * shape[1]].view(shape)
        assert torch.equal(NF4().dequantize(tensors, shape, dtype), plain)


def test_an_unknown_format_names_the_closest() -> None:
    with pytest.raises(ConfigError, match="Unknown format of frozen weights 'nf5'. Did you mean 'nf4'"):
        FORMATS.create("nf5")


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "layersample.frozen.formats.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(ConfigError, match=r'pip install "layersample\[quantized\]"'):
        NF4().check()
    FORMATS.create("int8").check()


def test_a_kernel_that_nothing_calls_is_not_missed(caplog: Any) -> None:
    hide_missing_kernel()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning(
        "Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'"
    )
    logger.warning("Something else that is amiss.")
    assert caplog.messages == ["Something else that is amiss."]


def test_a_format_of_ones_own(monkeypatch: Any) -> None:
    monkeypatch.setattr(FORMATS, "classes", dict(FORMATS.classes))

    @register_format("halves")
    class Halves(FrozenFormat):
        """Half precision."""

        def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
            return (weight.half().clone(),)

        def dequantize(
            self, tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype
        ) -> Tensor:
            return tensors[0].to(dtype)

    assert list(list_formats()) == ["halves", "int8", "nf4"]
    assert isinstance(FORMATS.create("halves"), Halves)
    with pytest.raises(ValueError, match="is taken by"):
        register_format("int8")(Halves)
