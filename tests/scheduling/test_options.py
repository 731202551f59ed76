"""One set of options: what is made from its fields can't drift from them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from layersample import LayerSamplingCallback, LayerScheduler, TrainConfig
from layersample.integrations.transformers import CallbackOptions
from layersample.options import Role, names_with
from layersample.scheduling.options import SchedulerOptions, default_period, describe_reach
from tests.helpers import make_llama


def test_the_scheduler_s_signature_is_the_fields() -> None:
    parameters = inspect.signature(LayerScheduler).parameters
    objects = {"model", "optimizer", "batches", "state_dict"}
    given = {name: p.default for name, p in parameters.items() if name not in objects}
    assert given == {name: field.default for name, field in SchedulerOptions.model_fields.items()}
    documented = inspect.getdoc(LayerScheduler) or ""
    assert [name for name in parameters if f"\n    {name}: " not in documented] == []


@pytest.mark.parametrize("other", [TrainConfig, CallbackOptions])
def test_defaults_are_the_same_wherever_an_option_stands(other: type[SchedulerOptions]) -> None:
    for name, field in SchedulerOptions.model_fields.items():
        assert other.model_fields[name].default == field.default, name


def test_the_callback_takes_every_option_by_name() -> None:
    given: dict[str, Any] = {"num_active": 3, "embeddings": "freeze", "state": "keep", "seed": 7}
    options = LayerSamplingCallback("cyclic", **given).options
    assert {name: getattr(options, name) for name in given} == given and options.sampler == "cyclic"
    with pytest.raises(ValueError, match="^Unknown option 'num_actve'. Did you mean 'num_active'"):
        LayerSamplingCallback("lisa", num_actve=3)


def test_a_configuration_gives_the_scheduler_its_options() -> None:
    config = TrainConfig(projection="galore", rank=4, step_in_backward=True, clip_by="running", head="freeze")
    options = config.scheduler_options
    assert options.projection_options == {"rank": 4} and options.head == "freeze"
    assert options.step_in_backward == config.backward_stepping


def test_what_a_run_must_share_follows_from_the_fields() -> None:
    identity = names_with(SchedulerOptions, Role.IDENTITY)
    assert {"sampler", "embeddings", "head", "norm", "other", "state", "master_weights"} <= identity
    assert not {"check", "allow_changes"} & identity


@pytest.mark.parametrize(("steps", "period"), [(None, 20), (1000, 20), (160, 20), (40, 5), (7, 1)])
def test_the_period_follows_from_the_steps(steps: int | None, period: int) -> None:
    assert default_period(steps) == period


def test_what_a_run_can_not_reach_is_said() -> None:
    assert describe_reach(15, 20, 2, 30) == (
        "15 steps of period 20 train at most 2 of 30 layers; period=1 could reach them all."
    )
    assert describe_reach(10, 5, 2, 30).endswith("more steps or a larger num_active reach more.")


@pytest.mark.parametrize(
    ("sampler", "options", "says"),
    [
        ("lisa", {}, "4 steps of period 3 train at most 2 of 4 layers; period=1 could reach them all."),
        ("lisa", {"granularity": "module"}, "train at most 2 of 28 modules"),
        ("gum", {"projection": "galore", "projection_options": {"rank": 4}}, ""),  # all train at a low rank
        ("misa", {}, ""),  # it ends the first periods after a step
    ],
)
def test_a_scheduler_says_what_its_sampler_can_not_reach(
    sampler: str, options: dict[str, Any], says: str
) -> None:
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with LayerScheduler(model, optimizer, sampler, num_active=1, period=3, **options) as scheduler:
        found = scheduler.reach(4)
        assert says in found and bool(found) == bool(says)
    assert describe_reach(75, 5, 2, 30) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embeddings", "freeze"),
        ("norm", "sample"),
        ("state", "keep"),
        ("master_weights", False),
        ("step_in_backward", True),
    ],
)
def test_resuming_with_another_rule_is_refused(name: str, value: Any) -> None:
    import torch

    model = make_llama()
    with LayerScheduler(model, torch.optim.AdamW(model.parameters())) as scheduler:
        state = scheduler.state_dict()
    what = "layers" if name == "norm" else name
    with pytest.raises(ValueError, match=f"must be resumed with the {what} it was begun with"):
        LayerScheduler(model, torch.optim.AdamW(model.parameters()), state_dict=state, **{name: value})
