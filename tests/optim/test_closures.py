"""``optimizer.step(closure)``, as Lightning calls it at every step, against backward() and then step()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from layersample import ConfigError, LayerScheduler, StepInBackward
from tests.helpers import make_batch, make_llama

COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masters": {"dtype": torch.bfloat16},
    "galore": {"projection": "galore", "projection_options": {"rank": 4}},
    "backward": {"step_in_backward": StepInBackward()},
    "everything": {
        "dtype": torch.bfloat16,
        "projection": "galore",
        "projection_options": {"rank": 4},
        "step_in_backward": StepInBackward(max_norm=0.1),
    },
}


def run(
    how: str, *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[dict[str, Tensor], list[float]]:
    model = make_llama(dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with LayerScheduler(
        model, optimizer, "cyclic", num_active=2, period=2, check=True, **options
    ) as scheduler:
        for step in range(5):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = model(**make_batch(step), use_cache=False).loss
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            if how == "before":
                loss = closure()
                assert optimizer.step() is None
            elif how == "positional":
                loss = optimizer.step(closure)
            else:
                loss = optimizer.step(closure=closure)
            losses.append(float(loss.detach()))
            scheduler.step()
        return {name: value.clone() for name, value in scheduler.fp32_state_dict().items()}, losses


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_closure_is_backward_before_the_step(options: dict[str, Any], how: str) -> None:
    expected, losses = run("before", **options)
    weights, ours = run(how, **options)
    assert ours == losses
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


class Twice(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            closure()
            return closure()
        return None


def test_an_optimizer_that_runs_its_closure_twice_is_refused() -> None:
    model = make_llama()
    optimizer = Twice(model.parameters())
    with (
        LayerScheduler(model, optimizer, "lisa"),
        pytest.raises(ConfigError, match="Twice runs it again"),
    ):
        optimizer.step(lambda: model(**make_batch()).loss)
    assert optimizer.step(lambda: 3.0) == 3.0  # a scheduler that is closed doesn't hinder it
