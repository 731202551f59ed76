"""What a step in the backward pass can't be: it is refused, when the scheduler is made or before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from layersample import ConfigError, LayerScheduler, StepInBackward
from layersample.optim.one_at_a_time import check_one_at_a_time
from layersample.optim.optimizers import Optimizers
from tests.helpers import make_batch, make_llama, weights_of
from tests.optim.test_optimizers import SAM, Chain, Lookahead, muon_and_adamw


class ClipsInside(torch.optim.AdamW):
    """Clips by the norm of all gradients in its step."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        return super().step(closure)


class WantsMore(torch.optim.SGD):
    """Its constructor wants what isn't among its options."""

    def __init__(self, params: Any, bound: float) -> None:
        super().__init__(params, lr=1e-2)
        self.bound = bound

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.bound)
        return super().step(closure)


class CountsItsSteps(Optimizer):
    """Its learning rate falls with the steps of a group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"] / group["steps"])


class SizesByAll(Optimizer):
    """A trust ratio of the norms of all weights and gradients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        own = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        ratio = nn.utils.get_total_norm(own) / nn.utils.get_total_norm([p.grad for p in own])
        for p in own:
            p.add_(p.grad * ratio, alpha=-1e-3)


@pytest.mark.parametrize("kind", [ClipsInside, CountsItsSteps, SizesByAll, lambda p: WantsMore(p, 0.5)])
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_optimizer_that_treats_parameters_together_is_refused(kind: Any, scheduled: bool) -> None:
    model = make_llama()
    optimizer = kind(model.parameters())
    if scheduled:
        torch.optim.lr_scheduler.LinearLR(optimizer)  # puts its own step on the optimizer
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ConfigError, match=f"{type(optimizer).__name__} does to one depends on the others"):
        LayerScheduler(model, optimizer, "lisa", step_in_backward=True)
    assert all(
        before.items() == after.items() for before, after in zip(groups, optimizer.param_groups, strict=True)
    )
    assert not optimizer.state
    LayerScheduler(model, optimizer, "lisa").close()


def transformers_adafactor(parameters: Any) -> Any:
    from transformers import Adafactor

    return Adafactor(parameters, lr=None, relative_step=True)


def schedule_free(parameters: Any) -> Any:
    return pytest.importorskip("schedulefree").AdamWScheduleFree(parameters)


@pytest.mark.parametrize(
    "kind",
    [
        *(getattr(torch.optim, name) for name in ("AdamW", "SGD", "Adafactor", "Adagrad", "NAdam", "Rprop")),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
        lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True, maximize=True),
        lambda p: torch.optim.Muon([q for q in p if q.dim() == 2]),
        transformers_adafactor,
    ],
)
def test_those_of_torch_step_one_at_a_time(kind: Callable[[Any], Optimizer]) -> None:
    optimizers = Optimizers(kind(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).parameters()))
    random = torch.get_rng_state()
    check_one_at_a_time(optimizers)
    assert torch.equal(random, torch.get_rng_state())


def test_parameters_without_values_are_not_tried() -> None:
    """As in a plan, where nothing can be compared."""
    with FakeTensorMode():
        check_one_at_a_time(Optimizers(ClipsInside(nn.Linear(3, 3).parameters())))


def test_a_count_of_steps_in_a_group_is_seen_in_schedule_free_as_well() -> None:
    with pytest.raises(ConfigError, match="AdamWScheduleFree does to one depends"):
        check_one_at_a_time(Optimizers(schedule_free(nn.Linear(3, 3).parameters())))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: SAM(model.parameters(), torch.optim.AdamW, lr=1e-3),
        lambda model: Lookahead(torch.optim.AdamW(model.parameters())),
        lambda model: Chain(*muon_and_adamw(model)),
    ],
    ids=["SAM", "Lookahead", "Chain"],
)
def test_a_step_around_another_would_be_passed_over(wrap: Any) -> None:
    model = make_llama()
    with pytest.raises(ConfigError, match="has a step of its own around that of"):
        LayerScheduler(model, wrap(model), "lisa", step_in_backward=True)


def test_two_backward_passes_a_step_are_refused_at_the_second() -> None:
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with LayerScheduler(model, optimizer, "lisa", step_in_backward=True) as scheduler:
        for step in range(3):  # one pass a step is none of it, with gradients set to zero or not
            model(**make_batch(step)).loss.backward()
            optimizer.step()
            scheduler.step()
        model(**make_batch(3)).loss.backward()
        moved = weights_of(model)
        with pytest.raises(
            ConfigError, match="with accumulation=1 a parameter that has been updated got another"
        ):
            model(**make_batch(4)).loss.backward()
        assert all(torch.equal(moved[name], p) for name, p in model.named_parameters())


def test_more_passes_than_were_told_are_refused() -> None:
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with LayerScheduler(model, optimizer, "lisa", step_in_backward=StepInBackward(accumulation=2)):
        for step in range(2):
            (model(**make_batch(step)).loss / 3).backward()
        with pytest.raises(ConfigError, match="accumulation=2"):
            (model(**make_batch(2)).loss / 3).backward()


def test_a_loop_may_leave_the_step_to_the_backward_pass_alone() -> None:
    ends = []
    for steps_too in (False, True):
        model = make_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        with LayerScheduler(model, optimizer, "lisa", period=2, step_in_backward=True) as scheduler:
            for step in range(4):
                model(**make_batch(step)).loss.backward()
                if steps_too:
                    optimizer.step()
                scheduler.step()
        ends.append(weights_of(model))
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())
    start = weights_of(make_llama())
    assert any(not torch.equal(start[name], weight) for name, weight in ends[0].items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_grad_scaler_is_refused_before_anything_moves() -> None:
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = weights_of(model)
    scaler = torch.amp.GradScaler("cpu")
    with LayerScheduler(model, optimizer, "lisa", step_in_backward=True):
        with pytest.raises(ConfigError, match="a GradScaler has multiplied the loss.*Nothing has changed"):
            scaler.scale(model(**make_batch()).loss).backward()
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
        del scaler
        model.zero_grad()
        disabled = torch.amp.GradScaler("cpu", enabled=False)
        disabled.scale(model(**make_batch()).loss).backward()


@pytest.mark.parametrize("clips", [False, True])
def test_a_loop_s_own_clipping_is_named(clips: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def step_and_clip() -> None:
        model(**make_batch()).loss.backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0
        optimizer.step()

    def step() -> None:
        model(**make_batch()).loss.backward()
        optimizer.step()

    with LayerScheduler(model, optimizer, "lisa", step_in_backward=True) as scheduler:
        for _ in range(2):
            (step_and_clip if clips else step)()
            scheduler.step()
    assert caplog.text.count("The loop calls clip_grad_norm_, which finds no gradients") == clips
