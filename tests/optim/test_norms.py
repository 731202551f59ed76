"""Norms of gradients, against torch's in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from layersample.optim.norms import norm_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (700, 801)])
def test_is_that_of_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for values in (gradient, gradient.t(), gradient[:, 1::2]):
        norm = norm_of(values)
        assert norm.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(norm.double(), values.double().norm(), rtol=2e-3, atol=0)


def test_what_is_no_number_stays_none() -> None:
    gradient = torch.ones(1000, 1000, dtype=torch.bfloat16)
    gradient[999, 999] = torch.inf
    assert norm_of(gradient).isinf()
    gradient[0, 0] = torch.nan
    assert norm_of(gradient).isnan()


def test_makes_no_wide_copy() -> None:
    gradient = torch.randn(1500, 1000, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        norm_of(gradient)
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    sizes = [e.nbytes() for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes and max(sizes) < gradient.nbytes / 2
