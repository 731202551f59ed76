"""GUM: both branches by a naive computation, their mean, and what goes with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from layersample import ConfigError, LayerScheduler, StepInBackward, TrainConfig, plan
from layersample.projection.bases import svd_basis
from tests.helpers import make_batch, make_llama, weights_of

GALORE: dict[str, Any] = {
    "projection": "galore",
    "projection_options": {"rank": 3, "basis": "svd", "scale": 1.0, "update_gap": 50},
}
NAME = "model.layers.2.mlp.gate_proj.weight"  # (32, 16): its columns are projected


def one_step(seed: int) -> tuple[bool, Tensor]:
    """Whether layer 2 was drawn, and how its matrix moved in a step of plain descent at rate 1."""
    model = make_llama().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = weights_of(model)[NAME]
    with LayerScheduler(model, optimizer, "gum", num_active=1, period=5, seed=seed, **GALORE) as scheduler:
        assert scheduler.active == (0, 1, 2, 3) and scheduler.coverage == 1.0
        drawn = scheduler.sampler.full_rank(scheduler._context())
        assert drawn is not None and drawn.chance == 0.25
        model(**make_batch(), use_cache=False).loss.backward()
        optimizer.step()
    return 2 in drawn.layers, weights_of(model)[NAME] - before


def test_a_drawn_layer_gets_the_rest_by_its_chance_and_the_others_the_low_rank() -> None:
    model = make_llama().double()
    model(**make_batch(), use_cache=False).loss.backward()
    gradient = model.get_parameter(NAME).grad
    assert gradient is not None
    basis = svd_basis(gradient.mT, 3, turned=True)
    low = (basis @ (basis.mT @ gradient.mT)).mT
    moved = dict(one_step(seed) for seed in range(8))
    assert set(moved) == {True, False}
    torch.testing.assert_close(moved[True], -(gradient - low) / 0.25, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved[False], -low / 0.75, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(0.25 * moved[True] + 0.75 * moved[False], -gradient, rtol=1e-9, atol=1e-12)
    assert torch.linalg.matrix_rank(moved[False]) == 3 < torch.linalg.matrix_rank(moved[True])


def steps(model: Any, optimizer: torch.optim.Optimizer, scheduler: LayerScheduler, numbers: range) -> None:
    for step in numbers:
        model(**make_batch(step), use_cache=False).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def made(model: Any, **options: Any) -> tuple[torch.optim.Optimizer, LayerScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given: dict[str, Any] = {"num_active": 1, "period": 3, "check": True, **GALORE, **options}
    return optimizer, LayerScheduler(model, optimizer, "gum", **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    """In the middle of a period too, in which state has a low rank here and a full one there."""
    whole = make_llama(dtype=dtype)
    optimizer, scheduler = made(whole)
    with scheduler:
        steps(whole, optimizer, scheduler, range(11))
    model = make_llama(dtype=dtype)
    optimizer, scheduler = made(model)
    with scheduler:
        steps(model, optimizer, scheduler, range(5))
        state = json.loads(json.dumps(scheduler.state_dict()))
        resumed = make_llama(dtype=dtype)
        resumed.load_state_dict(model.state_dict())
        again = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
        again.load_state_dict(optimizer.state_dict())
    options: dict[str, Any] = {"num_active": 1, "period": 3, "state_dict": state, **GALORE}
    with LayerScheduler(resumed, again, "gum", **options) as scheduler:
        steps(resumed, again, scheduler, range(5, 11))
    assert all(torch.equal(value, weights_of(whole)[name]) for name, value in weights_of(resumed).items())


def test_moments_of_full_rank_are_not_turned() -> None:
    """A new basis within a period turns those of low rank alone."""
    model = make_llama()
    own = {**GALORE["projection_options"], "update_gap": 1, "rotate_moments": True}
    optimizer, scheduler = made(model, projection_options=own)
    with scheduler:
        steps(model, optimizer, scheduler, range(2))
        drawn = scheduler.sampler.full_rank(scheduler._context())
        assert drawn is not None
        for index in range(4):
            weight = model.get_parameter(f"model.layers.{index}.mlp.gate_proj.weight")
            assert optimizer.state[weight]["exp_avg"].shape[0] == (16 if index in drawn.layers else 3)


def test_a_step_in_backward_is_the_same_to_the_bit() -> None:
    ended = []
    for stepping in (False, StepInBackward()):
        model = make_llama()
        optimizer, scheduler = made(model, step_in_backward=stepping)
        with scheduler:
            steps(model, optimizer, scheduler, range(7))
        ended.append(weights_of(model))
    assert all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())


def test_only_drawn_layers_hold_state_at_full_rank_and_the_plan_says_so() -> None:
    model = make_llama()
    optimizer, scheduler = made(model)
    with scheduler:
        steps(model, optimizer, scheduler, range(4))
        drawn = scheduler.sampler.full_rank(scheduler._context())
        assert drawn is not None
        for index, layer in enumerate(model.model.layers):
            held = optimizer.state[layer.mlp.gate_proj.weight]["exp_avg"]
            assert held.numel() == (32 * 16 if index in drawn.layers else 32 * 3)
    given: dict[str, Any] = {
        "batch_size": 1,
        "max_length": 16,
        "sampler": "gum",
        "projection": "galore",
        "rank": 3,
    }
    state = [
        plan(
            make_llama().config, TrainConfig(num_active=count, **given), baselines=False
        ).worst.memory.moments["forward"]["optimizer_state"]
        for count in (1, 2)
    ]
    assert 0 < state[0] < state[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"projection": None, "projection_options": None},
            "'gum' needs a projection, but got none: give projection",
        ),
        (
            {"projection": "fira", "projection_options": {"rank": 3}},
            "by what is projected alone, but Fira does more",
        ),
        ({"num_active": 4}, "num_active must be below the 4 layers"),
        ({"draw_budget": "50%"}, "draw_budget needs a sampler that keeps to it, but Gum"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(make_llama(), **options)
