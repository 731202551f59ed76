"""The probe phase: gradients of all layers before anything trains, against gradients taken by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layersample import (
    ConfigError,
    LayerSampler,
    LayerScheduler,
    LayerStatistics,
    SamplingContext,
    create_sampler,
)
from layersample.sampling.calibration import OwnLoss
from layersample.scheduling.gradient_probe import probe_gradients
from layersample.versions import checkpoint_activations
from tests.helpers import make_batch, make_llama, weights_of

LAYERS = 5
BATCHES = [make_batch(i) for i in range(3)]


def layers_of(model: nn.Module) -> list[list[nn.Parameter]]:
    return [list(model.get_submodule(f"model.layers.{i}").parameters()) for i in range(LAYERS)]


def norms_by_hand(model: nn.Module, count: int) -> list[list[float]]:
    found = []
    for batch in BATCHES[:count]:
        model.zero_grad()
        model(**batch).loss.backward()
        found.append(
            [
                float(sum(p.grad.double().square().sum() for p in own if p.grad is not None)) ** 0.5
                for own in layers_of(model)
            ]
        )
    model.zero_grad()
    return found


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_norms_are_those_of_whole_gradients_whatever_the_turns(at_once: int) -> None:
    model = make_llama(LAYERS)
    told = probe_gradients(model, layers_of(model), lambda: BATCHES, count=2, at_once=at_once)
    by_hand = norms_by_hand(model, 2)
    assert [list(one.values()) for one in told] == [pytest.approx(one, rel=1e-5) for one in by_hand]


def test_a_loss_of_the_loop_s_own_counts() -> None:
    model = make_llama(LAYERS)
    batch = make_batch(0)
    own = OwnLoss({"pairs": None}, lambda given: given(**batch).loss * 2)
    plain, twice = (
        probe_gradients(model, layers_of(model), lambda b=b: [b], count=1, at_once=9)  # type: ignore[misc]
        for b in (batch, own)
    )
    assert list(twice[0].values()) == pytest.approx([2 * norm for norm in plain[0].values()], rel=1e-5)


def test_it_holds_one_gradient_and_asks_for_some_layers_at_a_time() -> None:
    model = make_llama(LAYERS)
    most = {"gradients": 0, "layers": 0}

    def look(parameter: Tensor) -> None:
        most["gradients"] = max(most["gradients"], sum(p.grad is not None for p in model.parameters()))
        asked = sum(any(p.requires_grad for p in own) for own in layers_of(model))
        most["layers"] = max(most["layers"], asked)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    probe_gradients(model, layers_of(model), lambda: BATCHES, count=1, at_once=2)
    assert most == {"gradients": 1, "layers": 2}


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails: bool) -> None:
    model = make_llama(LAYERS)
    model.eval()
    model.register_buffer("seen", torch.zeros(()))

    def count(module: Any, args: Any) -> None:
        module.seen += 1
        torch.rand(1)
        if fails and module.seen > 3:
            raise RuntimeError("no more")

    model.register_forward_pre_hook(count)
    model.get_parameter("lm_head.weight").requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    weights, state = weights_of(model), torch.get_rng_state()
    hooks = len(model._forward_pre_hooks)

    def probe() -> Any:
        return probe_gradients(model, layers_of(model), lambda: BATCHES, count=2, at_once=2)

    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            probe()
    else:
        probe()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert float(model.get_buffer("seen")) == 0 and len(model._forward_pre_hooks) == hooks
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "lm_head.weight")
        assert parameter.grad is None or bool((parameter.grad == 1).all())
        assert not parameter._post_accumulate_grad_hooks


def schedule(model: nn.Module, sampler: Any = "grass", **options: Any) -> LayerScheduler:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    given: dict[str, Any] = {"num_active": 2, "batches": BATCHES, "embeddings": "freeze"}
    if sampler == "grass":
        given["sampler_options"] = {"probe_batches": 2}
    return LayerScheduler(model, optimizer, sampler, **{**given, **options})


def checkpoint(reentrant: bool) -> Callable[[Any], None]:
    return lambda model: checkpoint_activations(model, {"use_reentrant": reentrant})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "prepare",
    [lambda model: None, checkpoint(False), checkpoint(True)],
    ids=["plain", "checkpointing", "reentrant"],
)
def test_a_sampler_knows_all_layers_before_its_first_draw(prepare: Callable[[Any], None]) -> None:
    model = make_llama(LAYERS)
    by_hand = norms_by_hand(model, 2)
    prepare(model)
    with schedule(model) as scheduler:
        means = [sum(pair) / 2 for pair in zip(*by_hand, strict=True)]
        assert scheduler.statistics.gradient_norm == pytest.approx(means, rel=1e-5)
        assert scheduler.statistics.visits == (0,) * LAYERS
        rms = scheduler.statistics.gradient_rms
        sampler: Any = scheduler.sampler
        assert sampler.scores == dict(zip(scheduler.layers, rms, strict=True))
        assert len(scheduler.active) == 2
        state = json.loads(json.dumps(scheduler.state_dict()))
    with schedule(make_llama(LAYERS), state_dict=state, batches=None) as resumed:
        assert resumed.statistics == scheduler.statistics, "a resumed run probes nothing"


def test_a_sampler_around_another_probes_for_it() -> None:
    options = {"sampler": "grass", "sampler_options": {"probe_batches": 1}}
    with schedule(make_llama(LAYERS), create_sampler("max_wait", options)) as scheduler:
        assert None not in scheduler.statistics.gradient_norm


class Probing(LayerSampler):
    """Has a probe, and nowhere to put it."""

    probe_batches = 1

    def sample(self, context: SamplingContext) -> list[int]:
        return [0]

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        raise AssertionError("it was told something")


@pytest.mark.parametrize(
    ("sampler", "options", "says"),
    [
        ("grass", {"batches": None}, "needs calibration batches, but got none: give batches="),
        ("grass", {"batches": []}, "needs at least one calibration batch"),
        ("grass", {"frozen_weights": "int8"}, "frozen_weights holds them rounded"),
        (
            "grass",
            {"batches": [{"input_ids": BATCHES[0]["input_ids"]}]},
            "needs batches that the model gives one for",
        ),
        ("grass", {"sampler_options": {"probe_batches": -1}}, "probe_batches must be at least 0"),
        (Probing(), {}, "must collect them, but Probing has probe_batches=1 and collects nothing"),
    ],
)
def test_what_can_not_be_probed_is_refused(sampler: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        schedule(make_llama(LAYERS), sampler, **options)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layersample.parallel.base.is_distributed", lambda: True)
    with pytest.raises(ConfigError, match="A probe of gradients needs a single process"):
        schedule(make_llama(LAYERS))
