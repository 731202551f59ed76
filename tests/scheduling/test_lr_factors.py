"""Learning rates of single layers, against a loop that sets those of a group a layer by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from layersample import ConfigError, LayerSampler, LayerScheduler, SamplingContext
from layersample.scheduling.lr_factors import correction_factor, lr_factors, warmup_factor
from tests.helpers import Given, make_batch, make_llama

SETS = ((0, 1), (1, 2), (3,), (0, 3))
PERIOD, STEPS, LR = 3, 12, 1e-3
CHANCES = [0.5, 0.25, 0.125, 0.125]


class Chances(Given):
    """The sets of a test, with the chances that it says they had."""

    def inclusion_probabilities(self, context: SamplingContext) -> Sequence[float]:
        return CHANCES


def base_rate(step: int) -> float:
    return LR / (1 + step)


def groups_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """A group a layer, and one of all else."""
    layers = [list(model.get_submodule(f"model.layers.{i}").parameters()) for i in range(4)]
    known = {p for own in layers for p in own}
    return [*layers, [p for p in model.parameters() if p not in known]]


def factor_by_hand(layer: int, step: int, *, warmup: int, most: float | None) -> float:
    period = step // PERIOD
    now, before = SETS[period % 4], SETS[(period - 1) % 4] if period else SETS[0]
    factor = (
        min(1.0, (step % PERIOD + 1) / warmup) if warmup and layer in now and layer not in before else 1.0
    )
    return factor if most is None else factor * min(most, 0.25 / CHANCES[layer])


def train(
    by_hand: bool,
    *,
    warmup: int = 2,
    most: float | None = None,
    dtype: torch.dtype = torch.float64,
    steps: Iterable[int] = range(STEPS),
    resume: tuple[dict[str, Any], dict[str, Any], Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, LayerScheduler]:
    model = make_llama(4, dtype=dtype)
    optimizer = torch.optim.AdamW([{"params": own} for own in groups_of(model)], lr=LR, weight_decay=0.1)
    if resume is not None:
        model.load_state_dict(resume[0])
        optimizer.load_state_dict(resume[1])
    given: dict[str, Any] = {} if by_hand else {"switch_warmup": warmup, "lr_correction": most}
    scheduler = LayerScheduler(
        model,
        optimizer,
        Chances(*SETS),
        num_active=2,
        period=PERIOD,
        state_dict=None if resume is None else resume[2],
        **given,
        **options,
    )
    for step in steps:
        for layer, group in enumerate(optimizer.param_groups):
            factor = factor_by_hand(layer, step, warmup=warmup, most=most) if by_hand and layer < 4 else 1.0
            group["lr"] = base_rate(step) * factor
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        if not by_hand:
            assert [group["lr"] for group in optimizer.param_groups] == [base_rate(step)] * 5
            assert [len(group["params"]) for group in optimizer.param_groups] == [9, 9, 9, 9, 3]
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer, scheduler  # open: a checkpoint has what masters hold


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-12), name


@pytest.mark.parametrize(
    "options",
    [
        {"warmup": 2},
        {"warmup": 5},
        {"warmup": 0, "most": 1.5},
        {"warmup": 2, "most": 8.0},
        {"warmup": 2, "most": 8.0, "step_in_backward": True},
        {"warmup": 2, "most": 8.0, "dtype": torch.bfloat16},
        {"warmup": 2, "most": 8.0, "projection": "galore", "projection_options": {"rank": 2}},
        {"warmup": 2, "state": "keep"},
    ],
    ids=["warmup", "longer", "capped", "both", "in-backward", "masters", "projected", "kept"],
)
def test_it_is_what_a_loop_does_that_sets_each_layer_s_rate(options: dict[str, Any]) -> None:
    assert_same(train(False, **options)[0], train(True, **options)[0])


def test_without_either_nothing_changes_and_with_them_something_does() -> None:
    plain = train(True, warmup=0)[0]
    assert_same(train(False, warmup=0)[0], plain)
    assert_same(train(False, warmup=1)[0], plain)  # the first step of one has all of it
    moved = train(False, warmup=3)[0]
    assert any(not torch.equal(a, b) for a, b in zip(moved.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_resumed_in_the_middle_of_a_warm_up(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"warmup": 3, "most": 4.0, "dtype": dtype}
    whole, _, _ = train(False, **options)
    model, optimizer, scheduler = train(False, **options, steps=range(4))
    saved = (model.state_dict(), optimizer.state_dict(), json.loads(json.dumps(scheduler.state_dict())))
    assert [len(group["params"]) for group in saved[1]["param_groups"]] == [9, 9, 9, 9, 3]
    assert saved[1]["param_groups"][2]["lr"] == base_rate(3), "a checkpoint has the group's own rate"
    resumed, _, _ = train(False, **options, steps=range(4, STEPS), resume=saved)
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ConfigError, match="resumed with the switch_warmup it was begun with"):
        train(False, **{**options, "warmup": 2}, steps=range(0), resume=saved)


def test_what_layers_step_with_is_shown() -> None:
    scheduler = train(False, warmup=4, steps=range(4))[2]
    assert scheduler.lr_factors == {"model.layers.2": 0.5}, "layer 1 trained in the period before too"


def test_factors() -> None:
    assert [warmup_factor(step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warmup_factor(0, 0) == 1.0
    assert correction_factor(0, CHANCES, 9.0) == 0.5
    assert correction_factor(3, CHANCES, 9.0) == 2.0
    assert correction_factor(3, CHANCES, 1.5) == 1.5
    assert correction_factor(0, [0.0, 1.0], 3.0) == 3.0
    both = lr_factors((0, 1, 2), entered=(1, 2), step=0, warmup=2, inclusion=CHANCES, most=9.0)
    assert both == {0: 0.5, 1: 0.5}, "of the last, half of twice its rate is its rate"


class Silent(LayerSampler):
    """Doesn't say what chance its layers have."""

    def sample(self, context: SamplingContext) -> list[int]:
        return [0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr_correction": 2.0}, "lr_correction needs a sampler that knows the chance"),
        ({"lr_correction": 0.5}, "lr_correction must be greater than or equal to 1"),
        ({"switch_warmup": -1}, "switch_warmup must be greater than or equal to 0"),
    ],
)
def test_what_can_not_be_right_is_refused(options: dict[str, Any], says: str) -> None:
    model = make_llama(2)
    with pytest.raises(ConfigError, match=says):
        LayerScheduler(model, torch.optim.AdamW(model.parameters()), Silent(), num_active=1, **options)


def test_an_optimizer_that_knows_places_is_refused() -> None:
    class Places(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.settings = {(0, 0): 1}

    model = make_llama(2)
    optimizer = Places(model.parameters())
    with LayerScheduler(
        model, optimizer, Given((0,), (1,)), num_active=1, period=1, switch_warmup=2
    ) as scheduler:
        model(**make_batch(0)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        model(**make_batch(1)).loss.backward()
        with pytest.raises(ConfigError, match="under Places, which knows parameters by their place"):
            optimizer.step()
