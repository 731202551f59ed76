from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch

from layersample import LayerScheduler
from layersample.optim.zero_grads import ZeroGradHook
from tests.helpers import make_batch, make_llama, weights_of


def test_it_leaves_the_optimizer_as_it_was_found() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    called: list[int] = []
    outer = ZeroGradHook(optimizer, lambda: called.append(1))
    inner = ZeroGradHook(optimizer, lambda: called.append(2))
    parameter.grad = torch.ones(2)
    assert "set_to_none" in inspect.signature(optimizer.zero_grad).parameters
    optimizer.zero_grad(set_to_none=False)
    assert called == [2, 1] and parameter.grad is not None and not parameter.grad.any()
    inner.remove()
    outer.remove()
    outer.remove()
    assert "zero_grad" not in vars(optimizer)
    optimizer.zero_grad()
    assert called == [2, 1] and parameter.grad is None


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"projection": "galore", "projection_options": {"rank": 4}}),
        (torch.float32, {"switch_warmup": 3}),
    ],
    ids=["plain", "masters", "projection", "own rates"],
)
def test_a_batch_whose_step_failed_can_be_left_out(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory has run out in the step: nothing of its gradients is in the next one."""

    def train(*, fails: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = make_llama(dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with LayerScheduler(model, optimizer, period=2, seed=3, **options) as scheduler:
            for number in range(6):
                if number == 2 and not fails:
                    continue
                model(**make_batch(seed=number)).loss.backward()
                if number == 2:
                    with monkeypatch.context() as patch, pytest.raises(TypeError):
                        patch.setattr(sys.modules[torch.optim.Adam.__module__], "adam", None)
                        optimizer.step()
                    optimizer.zero_grad()
                    assert all(p.grad is None for p in model.parameters())
                    assert len(optimizer.param_groups) == 1
                    continue
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        return weights_of(model)

    with_it, without = train(fails=True), train(fails=False)
    assert all(torch.equal(with_it[name], without[name]) for name in without)
