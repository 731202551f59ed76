from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from layersample.config import TrainConfig
from layersample.planning.fake_values import FakeValues
from layersample.planning.simulation import simulate_step
from tests.helpers import make_llama

TINY = make_llama(2).config
LAYER = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16
GROUP = 260 * 16


def matrix() -> list[tuple[str, str, str | None, bool]]:
    """Type of weights × state of frozen layers × projection × step in backward."""
    every = itertools.product(
        ("fp32", "bf16", "bf16-mixed"), ("drop", "keep", "offload"), (None, "galore"), (False, True)
    )
    return [
        *every,
        ("fp16-mixed", "keep", None, False),
        ("bf16", "keep", "apollo", True),
        ("bf16", "keep", "fira", False),
    ]


@pytest.mark.parametrize(("precision", "state", "projection", "in_backward"), matrix())
def test_every_combination_is_planned(
    precision: Any, state: Any, projection: str | None, in_backward: bool
) -> None:
    options: dict[str, Any] = {"step_in_backward": True, "clip_by": "running"} if in_backward else {}
    config = TrainConfig(
        **{"batch_size": 1, "max_length": 8, "num_active": 1, "precision": precision, "state": state},
        **{"projection": projection, "rank": 2 if projection else None, "projection_options": {}},
        **options,
    )
    step = simulate_step(TINY, config, (1,)).moments["optimizer"]
    trained = 2 * GROUP + 16 + LAYER
    bits = 2 if precision == "bf16" else 4
    assert step["gradients"] == (0 if in_backward else bits * trained)
    # What is frozen keeps no master beside its weight.
    assert step["masters"] == (4 * trained if precision == "bf16" else 0)
    holding = trained + (LAYER if state == "keep" else 0)
    if projection is None:
        assert step["optimizer_state"] == pytest.approx(2 * 4 * holding, rel=0.01)
    else:
        assert 0 < step["optimizer_state"] < 2 * 4 * holding


def test_code_that_asks_for_values_goes_on() -> None:
    with FakeTensorMode(), FakeValues():
        fake = torch.ones(3, 4)
        assert (
            fake.sum().item() == 1.0
            and bool(fake.isfinite().all())
            and int(torch.ones(1, dtype=torch.int64)) == 0
        )
        assert fake.nonzero().shape == (0, 2)
        assert torch.equal(fake, torch.zeros(3, 4)) and not torch.equal(fake, torch.zeros(4, 3))
    with FakeValues():
        real = torch.tensor([0.0, 7.0])
        assert real[1].item() == 7.0 and real.nonzero().tolist() == [[1]]
        assert not torch.equal(real, torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_experts_have_the_shapes_of_real_ones(dtype: torch.dtype) -> None:
    def products() -> list[torch.Tensor]:
        rows = torch.zeros(32, 16, dtype=dtype, requires_grad=True)
        weights = torch.zeros(2, 16, 8, dtype=dtype, requires_grad=True)
        ends = torch.tensor([16, 32], dtype=torch.int32)
        product = F.grouped_mm(rows, weights, offs=ends)
        (product * product).sum().backward()  # type: ignore[no-untyped-call]
        assert rows.grad is not None and weights.grad is not None
        return [product, rows.grad, weights.grad]

    real = products()
    with FakeTensorMode(), FakeValues():
        fake = products()
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
