"""LBFGS, which keeps one history for all parameters: against a new one of the active parameters in each period."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from layersample import ConfigError, LayerScheduler
from tests.helpers import make_batch, make_llama, weights_of

SEARCHES: dict[str, dict[str, Any]] = {
    "fixed": {"lr": 0.3, "max_iter": 3},
    "line search": {"lr": 0.3, "max_iter": 3, "line_search_fn": "strong_wolfe"},
}
PERIOD = 2


def step(model: nn.Module, optimizer: LBFGS) -> None:
    def closure() -> Tensor:
        model.zero_grad()
        loss: Tensor = model(**make_batch(), use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def scheduled(model: nn.Module, optimizer: Any, **options: Any) -> LayerScheduler:
    return LayerScheduler(model, optimizer, "cyclic", num_active=1, period=PERIOD, **options)


@pytest.mark.parametrize("rule", ["train", "freeze"])
@pytest.mark.parametrize("search", SEARCHES)
def test_it_is_a_new_one_of_what_trains_in_each_period(search: str, rule: Any) -> None:
    # Sums of another length are rounded otherwise, which a history magnifies: not so that it shows in float64.
    model, naive = make_llama(dtype=torch.float64), make_llama(dtype=torch.float64)
    optimizer = LBFGS(model.parameters(), **SEARCHES[search])
    of_now: Any = None
    with scheduled(model, optimizer, check=True, embeddings=rule) as scheduler:
        for index in range(3 * PERIOD):
            training = {name for name, p in model.named_parameters() if p.requires_grad}
            if index % PERIOD == 0:
                for name, parameter in naive.named_parameters():
                    parameter.requires_grad_(name in training)
                of_now = LBFGS([p for p in naive.parameters() if p.requires_grad], **SEARCHES[search])
            before = weights_of(model)
            step(model, optimizer)
            step(naive, of_now)
            after, expected = weights_of(model), weights_of(naive)
            assert {n for n in before if not torch.equal(before[n], after[n])} == training
            for name in expected:
                torch.testing.assert_close(after[name], expected[name], rtol=1e-6, atol=1e-9)
            scheduler.step()
            assert bool(optimizer.state) == bool((index + 1) % PERIOD)


def test_a_resumed_run_goes_on_with_its_history() -> None:
    model = make_llama()
    optimizer = LBFGS(model.parameters(), lr=0.3, max_iter=3)
    with scheduled(model, optimizer) as scheduler:
        for _ in range(3):
            step(model, optimizer)
            scheduler.step()
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        states = copy.deepcopy(
            (optimizer.state_dict(), scheduler.state_dict())
        )  # steps change tensors in place
        loaded = make_llama()
        loaded.load_state_dict(saved)
        second = LBFGS(loaded.parameters(), lr=0.3, max_iter=3)
        with scheduled(loaded, second) as resumed:
            second.load_state_dict(states[0])
            resumed.load_state_dict(states[1])
            for one, its, by in ((model, optimizer, scheduler), (loaded, second, resumed)):
                for _ in range(3):
                    step(one, its)
                    by.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_history_of_before_moves_nothing_that_is_frozen() -> None:
    model = make_llama()
    optimizer = LBFGS(model.parameters(), lr=0.3, max_iter=3)
    step(model, optimizer)
    with scheduled(model, optimizer):
        before = weights_of(model)
        step(model, optimizer)
        frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
        assert frozen and all(torch.equal(before[name], parameter) for name, parameter in frozen)


def test_a_layer_that_trains_is_not_said_to_get_no_gradient(caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=1)
    with LayerScheduler(model, optimizer, "cyclic", num_active=1, period=1) as scheduler:
        for _ in range(10):
            step(model, optimizer)
            scheduler.step()
    assert "got no gradient" not in caplog.text


@pytest.mark.parametrize(
    ("options", "dtype", "needed"),
    [
        ({"state": "keep"}, torch.float32, "state='drop' alone"),
        (
            {"state": "offload", "step_in_backward": True},
            torch.float32,
            "state='drop', step_in_backward=False",
        ),
        ({"projection": "galore"}, torch.float32, "projection=None"),
        ({"switch_warmup": 2}, torch.float32, "switch_warmup=0"),
        ({"inactive": "sgd"}, torch.float32, "inactive='freeze'"),
        ({}, torch.bfloat16, "master_weights=False"),
    ],
)
def test_what_it_cannot_have_is_refused_by_name(
    options: dict[str, Any], dtype: torch.dtype, needed: str
) -> None:
    model = make_llama(dtype=dtype)
    with pytest.raises(ConfigError, match=f"LBFGS needs a closure.*{needed}"):
        scheduled(model, LBFGS(model.parameters()), **options)
    assert all(p.requires_grad for p in model.parameters())


def test_a_step_without_a_closure_is_refused() -> None:
    model = make_llama()
    optimizer: Any = LBFGS(model.parameters())
    with scheduled(model, optimizer), pytest.raises(ConfigError, match="must be called with a closure"):
        optimizer.step(None)
