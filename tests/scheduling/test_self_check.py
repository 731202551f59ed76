from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from layersample import LayerScheduler
from layersample.optim.optimizers import Optimizers
from layersample.scheduling.self_check import SelfCheck, SelfCheckError
from tests.helpers import make_batch, make_llama


def prepare(
    state: Any = "drop", lr: float = 0.1
) -> tuple[Any, torch.optim.Optimizer, SelfCheck, dict[str, Any]]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model[0].requires_grad_(False)
    check = SelfCheck(Optimizers(optimizer), state)
    parameters = dict(model.named_parameters())
    check.begin(parameters)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer, check, parameters


ACTIVE = {"1": ("1.weight", "1.bias")}


def test_a_good_period_passes() -> None:
    _, _, check, parameters = prepare()
    check.end(parameters, ACTIVE)


def test_a_single_flipped_bit_is_seen() -> None:
    model, _, check, parameters = prepare()
    bits = model[0].weight.data.view(torch.int32)
    bits[2, 1] ^= 1
    with pytest.raises(SelfCheckError, match="0.weight was frozen in this period, but its weights changed"):
        check.end(parameters, ACTIVE)


def test_an_active_layer_that_did_not_move_is_named() -> None:
    model, optimizer, check, parameters = prepare(lr=1e-12)  # too little for float32
    message = "1 was active in this period and got gradients, but none of its weights changed.*torch.float32"
    with pytest.raises(SelfCheckError, match=message):
        check.end(parameters, ACTIVE)


@pytest.mark.parametrize("gradient", [None, 0.0])
def test_what_got_no_gradient_or_one_of_zeros_may_stay_where_it_is(gradient: float | None) -> None:
    model, optimizer, check, parameters = prepare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # without momentum
    check = SelfCheck(Optimizers(optimizer), "keep")
    check.begin(parameters)
    for parameter in model[1].parameters():
        parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
    optimizer.step()
    check.end(parameters, ACTIVE)


def test_a_learning_rate_of_zero_moves_nothing_and_rightly() -> None:
    _, _, check, parameters = prepare(lr=0.0)
    check.end(parameters, ACTIVE)


def adafactor(parameters: Any) -> Any:
    """Its learning rate is None: it finds its own."""
    return Adafactor(parameters)


def schedule_free(parameters: Any) -> Any:
    """It trains on other weights than it is evaluated with, which a layer is frozen with."""
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=1e-2)
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("make", [adafactor, schedule_free])
def test_a_good_run_of_an_optimizer_that_is_unlike_others_passes(make: Any) -> None:
    model = make_llama()
    optimizer = make(model.parameters())
    with LayerScheduler(model, optimizer, "cyclic", num_active=1, period=2, check=True) as scheduler:
        for step in range(8):
            model(**make_batch(step)).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def test_a_change_of_a_frozen_layer_is_seen_under_a_schedule_free_optimizer_too() -> None:
    model = make_llama()
    optimizer = schedule_free(model.parameters())
    scheduler = LayerScheduler(model, optimizer, "cyclic", num_active=1, period=2, check=True)
    frozen: Any = None
    with pytest.raises(SelfCheckError, match="was frozen in this period"):
        for step in range(4):
            model(**make_batch(step)).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step == 1:
                frozen = model.model.layers[0].mlp.up_proj.weight
                assert not frozen.requires_grad
                with torch.no_grad():
                    frozen[0, 0] += 1
    scheduler.close(check=False)


def test_a_gradient_on_a_frozen_parameter_is_seen() -> None:
    model, _, check, parameters = prepare()
    model[0].bias.grad = torch.zeros(3)
    with pytest.raises(SelfCheckError, match="0.bias is frozen, but holds a gradient"):
        check.end(parameters, ACTIVE)


def test_state_of_a_frozen_parameter_is_seen_under_drop_alone() -> None:
    for state, fails in (("drop", True), ("keep", False), ("offload", False)):
        model, optimizer, check, parameters = prepare(state)
        optimizer.state[model[0].bias] = {"exp_avg": torch.zeros(3)}
        if fails:
            with pytest.raises(SelfCheckError, match="0.bias is frozen, but the optimizer holds state"):
                check.end(parameters, ACTIVE)
        else:
            check.end(parameters, ACTIVE)


def test_watches_the_optimizer_until_it_is_closed() -> None:
    _, optimizer, check, _ = prepare()
    check.close()
    assert not optimizer._optimizer_step_pre_hooks
