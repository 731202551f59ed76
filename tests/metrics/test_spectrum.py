from __future__ import annotations

import pytest
import torch

from layersample.metrics import DegenerateMatrixError, spectrum


@pytest.mark.parametrize("shape", [(20, 20), (8, 40), (40, 8), (1, 5), (5, 1)])
def test_it_is_the_squared_singular_values(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    naive = torch.linalg.svdvals(weight.double()).square().flip(0)
    torch.testing.assert_close(spectrum(weight), naive, rtol=1e-10, atol=1e-12)


def test_it_is_float64_ascending_and_never_negative() -> None:
    low_rank = torch.randn(50, 3) @ torch.randn(3, 40)
    values = spectrum(low_rank)
    assert values.dtype == torch.float64 and values.shape == (40,)
    assert (values.diff() >= 0).all() and (values >= 0).all()


def test_a_transposed_or_strided_weight_has_the_same_spectrum() -> None:
    weight = torch.randn(12, 30)
    torch.testing.assert_close(spectrum(weight.T), spectrum(weight))
    torch.testing.assert_close(spectrum(torch.stack([weight, weight], 2)[:, :, 0]), spectrum(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 24).to(dtype)
    torch.testing.assert_close(spectrum(weight), torch.linalg.svdvals(weight.double()).square().flip(0))


def test_a_parameter_that_requires_grad() -> None:
    assert not spectrum(torch.nn.Parameter(torch.randn(9, 9))).requires_grad


def test_fused_experts_one_by_one() -> None:
    weight = torch.randn(3, 10, 14)
    torch.testing.assert_close(spectrum(weight), torch.stack([spectrum(expert) for expert in weight]))


def test_what_the_gram_matrix_blurs_comes_from_singular_values() -> None:
    # λ from 1e-6 to 1e12: the Gram matrix resolves nothing below about 1e-3.
    left, right = (torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0] for _ in range(2))
    singular = torch.logspace(-3, 6, 30, dtype=torch.float64)
    torch.testing.assert_close(
        spectrum(left @ torch.diag(singular) @ right), singular.square(), rtol=1e-4, atol=0.0
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(9, 20), (20, 9)])
def test_values_that_are_not_finite(value: float, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    weight[3, 5] = value
    with pytest.raises(
        DegenerateMatrixError, match=r"must be finite, but 1 of 180 values of a matrix of shape"
    ):
        spectrum(weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), r"must have 2 dimensions, or 3 .* got shape \(3,\)"),
        (torch.zeros(1, 2, 3, 4), r"got shape \(1, 2, 3, 4\)"),
        (torch.zeros(3, 3, dtype=torch.int8), "floating point, but got torch.int8: dequantize"),
        (torch.zeros(3, 0), r"at least one element, but got shape \(3, 0\)"),
        (torch.zeros(3, 3, device="meta"), "meta device"),
    ],
)
def test_what_is_no_weight(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectrum(weight)
