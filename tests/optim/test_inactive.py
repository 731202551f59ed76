"""What inactive layers do beside freezing: steps without state, against a loop that takes them with plain hooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layersample import ConfigError, LayerScheduler, StepInBackward, find_layers
from layersample.choices import Granularity, Inactive, InactiveScope
from layersample.layers.units import split_layers
from layersample.optim import masters
from layersample.optim.inactive import moving_units
from layersample.sampling.sampler import LayerSampler, Measurement, SamplingContext
from layersample.versions import checkpoint_activations
from tests.helpers import Given, make_batch, make_llama

SETS = ((1,), (2, 3), (0,))
PERIOD = 2
STEPS = 6
LRS = (1e-2, 3e-3)


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Two groups with learning rates of their own."""
    ends = [p for n, p in model.named_parameters() if layer_of(n) is None]
    layers = [p for n, p in model.named_parameters() if layer_of(n) is not None]
    return torch.optim.AdamW(
        [{"params": ends, "lr": LRS[0]}, {"params": layers, "lr": LRS[1]}], weight_decay=0.1
    )


def train(
    *,
    dtype: torch.dtype = torch.float64,
    steps: Iterable[int] = range(STEPS),
    passes: int = 1,
    resume: tuple[dict[str, Any], dict[str, Any], Any] | None = None,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, LayerScheduler]:
    """Some steps with a learning rate that falls at each; ``resume`` is a state of all three."""
    model = make_llama(4, dtype=dtype)
    prepare(model)
    optimizer = make_optimizer(model)
    state = None
    if resume is not None:
        model.load_state_dict(resume[0])
        optimizer.load_state_dict(resume[1])
        state = resume[2]
    given: dict[str, Any] = {"sampler": Given(*SETS), "num_active": 1, "period": PERIOD, "check": True}
    scheduler = LayerScheduler(model, optimizer, **{**given, **options}, state_dict=state)
    for step in steps:
        for group, rate in zip(optimizer.param_groups, LRS, strict=True):
            group["lr"] = rate / (1 + step)
        for number in range(passes):
            (model(**make_batch(step * passes + number)).loss / passes).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer, scheduler


def train_naively(
    rule: str,
    scope: str,
    *,
    passes: int = 1,
    scale: float = 5.0,
    unit_of: Callable[[str], int | None] = layer_of,
    sets: Sequence[tuple[int, ...]] = SETS,
) -> nn.Module:
    """The same by hooks that know all: everything requires a gradient, and nothing is left out of the backward."""
    model = make_llama(4, dtype=torch.float64)
    optimizer = make_optimizer(model)
    now: dict[str, Any] = {"active": (), "step": 0}

    def hook(name: str, parameter: Tensor) -> None:
        layer, active = unit_of(name), now["active"]
        if layer is None or layer in active:
            return
        assert parameter.grad is not None
        if scope == "all" or layer > min(active):
            gradient = parameter.grad.sign() if rule == "signsgd" else parameter.grad
            parameter.data -= LRS[1] / (1 + now["step"]) * scale * gradient
        parameter.grad = None

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(hook, name))  # type: ignore[no-untyped-call]
    for step in range(STEPS):
        now["step"], now["active"] = step, sets[step // PERIOD % len(sets)]
        for name, parameter in model.named_parameters():
            if unit_of(name) is not None and unit_of(name) not in now["active"]:
                optimizer.state.pop(parameter, None)
        for group, rate in zip(optimizer.param_groups, LRS, strict=True):
            group["lr"] = rate / (1 + step)
        for number in range(passes):
            # Saved tensors were changed through .data: the hooks run when nothing needs them any more.
            (model(**make_batch(step * passes + number)).loss / passes).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_close(model: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("scope", ["all", "above"])
@pytest.mark.parametrize("rule", ["sgd", "signsgd"])
def test_it_equals_a_loop_with_plain_hooks(rule: str, scope: str) -> None:
    model, _, _ = train(inactive=rule, inactive_scope=scope)
    assert_close(model, train_naively(rule, scope))
    frozen, _, _ = train()
    moved = model.get_parameter("model.layers.3.mlp.up_proj.weight")
    assert not torch.equal(moved, frozen.get_parameter("model.layers.3.mlp.up_proj.weight"))


@pytest.mark.parametrize("scope", ["all", "above"])
@pytest.mark.parametrize("rule", ["sgd", "signsgd"])
@pytest.mark.parametrize(
    ("granularity", "count", "sets"),
    [
        ("block", 8, ((3,), (2, 5), (0,))),
        ("module", 28, ((10,), (4, 15), (1, 2))),
        ("tensor", 36, ((20,), (3, 8), (0,))),
    ],
)
def test_parts_of_layers_equal_a_loop_with_plain_hooks(
    granularity: Granularity,
    count: int,
    sets: tuple[tuple[int, ...], ...],
    rule: Inactive,
    scope: InactiveScope,
) -> None:
    model, _, scheduler = train(
        sampler=Given(*sets), granularity=granularity, inactive=rule, inactive_scope=scope
    )
    assert len(scheduler.layers) == count
    plain = make_llama(4)
    units = split_layers(plain, find_layers(plain), granularity)
    places = {name: index for index, unit in enumerate(units) for name in unit.parameters}
    assert_close(model, train_naively(rule, scope, unit_of=places.get, sets=sets))


def test_its_learning_rate_is_relative() -> None:
    model, _, _ = train(inactive="sgd", inactive_lr_scale=0.5)
    assert_close(model, train_naively("sgd", "all", scale=0.5))


def test_each_pass_of_an_accumulated_step_moves_by_its_part() -> None:
    model, _, _ = train(inactive="sgd", passes=2)
    assert_close(model, train_naively("sgd", "all", passes=2))


def enable_checkpointing(reentrant: bool) -> Callable[[nn.Module], None]:
    def enable(model: Any) -> None:
        model.train()
        checkpoint_activations(model, {"use_reentrant": reentrant})

    return enable


@pytest.mark.parametrize(
    "options",
    [
        {"step_in_backward": True},
        {"step_in_backward": StepInBackward(accumulation=2), "passes": 2},
        {"prepare": enable_checkpointing(False)},
        {"prepare": enable_checkpointing(True)},
        {"prepare": enable_checkpointing(True), "embeddings": "freeze", "norm": "freeze", "head": "freeze"},
    ],
    ids=["in-backward", "accumulated-in-backward", "checkpointing", "reentrant", "reentrant-frozen-input"],
)
def test_what_it_goes_together_with(options: dict[str, Any]) -> None:
    usual = {k: v for k, v in options.items() if k not in ("step_in_backward", "prepare")}
    assert_close(train(inactive="sgd", **options)[0], train(inactive="sgd", **usual)[0])


def test_a_projection_is_that_of_active_layers_alone() -> None:
    options: dict[str, Any] = {"projection": "galore", "projection_options": {"rank": 2}}
    model, _, _ = train(inactive="sgd", steps=range(1), **options)
    one, _, _ = train(inactive="sgd", steps=range(1))
    for (name, parameter), other in zip(model.named_parameters(), one.parameters(), strict=True):
        if layer_of(name) in (0, 2, 3):
            assert torch.equal(parameter, other), "an inactive layer was projected"


def test_no_gradient_is_held_beyond_one_parameter_s() -> None:
    most = 0

    def look(model: nn.Module) -> None:
        def hook(parameter: Tensor) -> None:
            nonlocal most
            inactive = [p for n, p in model.named_parameters() if layer_of(n) in (0, 2, 3)]
            most = max(most, sum(p.grad is not None for p in inactive))

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    train(inactive="sgd", steps=range(1), prepare=look)
    assert most == 1


@pytest.mark.parametrize("rule", ["sgd", "signsgd"])
def test_with_every_layer_active_it_is_full_fine_tuning(rule: str) -> None:
    options: dict[str, Any] = {"sampler": "full", "num_active": 4}
    for one, other in zip(
        train(inactive=rule, **options)[0].parameters(), train(**options)[0].parameters(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("piece", [100, 2**18])
def test_bf16_weights_move_exactly_on_what_they_hold_beyond_16_bits(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against fp32 copies of inactive weights, whose bf16 parts are what the model computes with."""
    monkeypatch.setattr(masters, "_PIECE", piece)
    model = make_llama(4, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = LayerScheduler(
        model, optimizer, Given((1,), (2,)), num_active=1, period=3, inactive="sgd", check=True
    )
    exact = {n: p.detach().float() for n, p in model.named_parameters() if layer_of(n) in (0, 3)}
    gradients: dict[str, Tensor] = {}
    for name in exact:  # in front of the scheduler's own hooks, which free them

        def note(gradient: Tensor, name: str = name) -> None:
            gradients[name] = gradient.float()

        model.get_parameter(name).register_hook(note)  # type: ignore[no-untyped-call]
    rounded = 0
    for step in range(7):
        model(**make_batch(step)).loss.backward()
        for name, gradient in gradients.items():
            before = exact[name].bfloat16()
            exact[name].add_(gradient, alpha=-5e-4)
            rounded += int((exact[name].bfloat16() == before).sum())
            assert torch.equal(model.get_parameter(name), exact[name].bfloat16()), name
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    shown = scheduler.fp32_state_dict()
    assert all(torch.equal(shown[name], value) for name, value in exact.items())
    assert rounded > 1000, "no step was lost in bf16 alone, so nothing was tried"
    scheduler.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_resumed_in_the_middle_of_a_period(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"dtype": dtype, "inactive": "sgd"}
    whole, _, _ = train(**options)
    model, optimizer, scheduler = train(**options, steps=range(3))
    state = json.loads(json.dumps(scheduler.state_dict()))
    saved = (model.state_dict(), optimizer.state_dict(), state)
    resumed, _, _ = train(**options, steps=range(3, STEPS), resume=saved)
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    scheduler.close()
    with pytest.raises(ConfigError, match="must be resumed with the inactive it was begun with"):
        train(dtype=dtype, steps=range(0), resume=saved)


def test_what_moves_is_shown_and_measured_anew() -> None:
    class Measuring(LayerSampler):
        measure_every = 1
        changed: list[tuple[str, ...]]

        def __init__(self) -> None:
            self.changed = []

        def measure(self, measurement: Measurement) -> None:
            self.changed.append(measurement.changed)

        def sample(self, context: SamplingContext) -> list[int]:
            return [2]

    sampler = Measuring()
    _, _, scheduler = train(
        sampler=sampler, inactive="sgd", inactive_scope="above", embeddings="sample", steps=range(2)
    )
    assert scheduler.layers[2] == "model.layers.1"
    assert scheduler.moving_layers == ("model.layers.2", "model.layers.3")
    assert "model.layers.3.mlp.up_proj.weight" in scheduler.moving_parameters
    assert sampler.changed[1] == ("model.layers.1", "model.layers.2", "model.layers.3")


def test_what_moves_for_which_set() -> None:
    assert moving_units(5, (1, 3), "sgd", "all") == [0, 2, 4]
    assert moving_units(5, (1, 3), "sgd", "above") == [2, 4]
    assert moving_units(5, (1, 3), "freeze", "all") == []
    assert moving_units(5, (), "sgd", "above") == []
    assert moving_units(5, (), "sgd", "all") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frozen_weights": "nf4", "inactive": "sgd"}, "holds them rounded: leave one of the two out"),
        ({"inactive_scope": "above"}, "choose inactive='sgd' or 'signsgd' as well"),
        ({"inactive_lr_scale": 2.0}, "inactive_lr_scale is for layers that move"),
        ({"inactive": "adam"}, "inactive must be 'freeze', 'sgd' or 'signsgd'"),
        ({"inactive": "sgd", "inactive_lr_scale": 0.0}, "inactive_lr_scale must be greater than 0"),
        ({"inactive": "signsgd", "passes": 2}, "needs one backward pass an optimizer step"),
    ],
)
def test_what_can_not_be_right_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train(**options)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layersample.parallel.base.is_distributed", lambda: True)
    with pytest.raises(ConfigError, match="leave inactive='sgd' out"):
        train(inactive="sgd", steps=range(0))


def test_a_scaler_is_refused_before_anything_moves() -> None:
    model = make_llama(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with LayerScheduler(model, optimizer, Given((1,)), num_active=1, inactive="sgd"):
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ConfigError, match="gradients that aren't scaled"):
            scaler.scale(model(**make_batch()).loss).backward()
        assert all(map(torch.equal, before, model.parameters()))


def test_a_wrapper_with_state_of_its_own_is_refused() -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            super().__init__([p for g in base.param_groups for p in g["params"]], {})
            self.base_optimizer, self.param_groups = base, base.param_groups

    model = make_llama(2)
    around = Around(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="Around keeps state of its own around it"):
        LayerScheduler(model, around, Given((1,)), num_active=1, inactive="sgd")


def test_a_group_that_ascends_moves_upward_and_its_rate_may_be_a_tensor() -> None:
    moved = []
    for lr in (0.1, torch.tensor(0.1)):
        model = make_llama(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, maximize=True)
        before = model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().clone()
        with LayerScheduler(model, optimizer, Given((1,)), num_active=1, inactive="sgd"):
            model(**make_batch()).loss.backward()
        moved.append(model.get_parameter("model.layers.0.mlp.up_proj.weight").detach() - before)
    model = make_llama(2)
    model(**make_batch()).loss.backward()
    gradient = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad
    assert gradient is not None
    for change in moved:
        torch.testing.assert_close(change, 0.5 * gradient, rtol=1e-3, atol=1e-6)
