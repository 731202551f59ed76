from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from layersample import LayerScheduler, create_sampler
from layersample.sampling.reuse import forget
from tests.helpers import make_llama


def begin(sampler: Any, **more: Any) -> LayerScheduler:
    model = make_llama()
    return LayerScheduler(model, torch.optim.SGD(model.parameters()), sampler, period=2, **more)


def train(scheduler: LayerScheduler) -> Any:
    for loss in (2.0, 1.0):
        scheduler.step(loss=loss)
    state = copy.deepcopy(scheduler.state_dict())
    scheduler.close()
    return state


def test_a_run_that_begins_with_what_another_one_taught_its_sampler_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bandit = create_sampler("bandit")
    state = train(begin(bandit))
    begin(create_sampler("bandit")).close()
    begin(bandit, state_dict=state).close()
    assert "has learned" not in caplog.text, "a new one, and one that continues its run"
    begin(bandit).close()
    assert "This Bandit has learned from the periods of another run" in caplog.text


@pytest.mark.parametrize("name", ["lisa", "spectrum", "warmup"])
def test_what_learns_nothing_while_layers_train_may_be_given_again(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As a sampler that has measured the whole model is, before the model is cut into shards."""
    options = {"sampler": "spectrum"} if name == "warmup" else {}
    sampler = create_sampler(name, options)
    train(begin(sampler))
    begin(sampler).close()
    assert "has learned" not in caplog.text


def test_one_that_was_given_its_first_state_back_is_as_new(caplog: pytest.LogCaptureFixture) -> None:
    """A Trainer's callback does so before each training."""
    bandit = create_sampler("bandit")
    train(begin(bandit))
    forget(bandit)
    begin(bandit).close()
    assert "has learned" not in caplog.text
