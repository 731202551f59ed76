"""Samplers that let others choose: what each promises of the draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layersample import (
    ConfigError,
    LayerSampler,
    LayerScheduler,
    Measurement,
    SamplingContext,
    create_sampler,
    register,
)
from layersample.sampling.answers import draw
from layersample.sampling.history import LayerHistory
from layersample.sampling.statistics import GradientStatistics, LayerStatistics
from tests.helpers import make_batch, make_llama

NAMES = tuple(map(str, range(7)))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def draws(
    name: str, options: dict[str, Any], rounds: int, num_active: int = 2, seed: int = 0
) -> list[tuple[int, ...]]:
    """The draws of a run, with visits and staleness as they come."""
    sampler, history = create_sampler(name, options), LayerHistory(len(NAMES))
    drawn = []
    for round in range(rounds):
        given = SamplingContext(NAMES, num_active, round, seed=seed, statistics=history.statistics(round))
        drawn.append(draw(sampler, given))
        history.record(round, drawn[-1])
    return drawn


@pytest.mark.parametrize(
    "inner", [{"sampler": "lisa"}, {"sampler": "prior", "sampler_options": {"weights": "increase"}}]
)
@pytest.mark.parametrize("periods", [3, 4, 6])
def test_no_layer_waits_longer_than_it_may(inner: dict[str, Any], periods: int) -> None:
    drawn = draws("max_wait", {**inner, "periods": periods}, 300)
    assert {len(chosen) for chosen in drawn} == {2}
    for layer in range(len(NAMES)):
        trained = [-1, *(round for round, chosen in enumerate(drawn) if layer in chosen)]
        waits = [after - before - 1 for before, after in zip(trained, trained[1:], strict=False)]
        assert max(waits) <= periods
    assert periods == 3 or len(set(drawn)) > 7, "the other sampler has a say"


def test_a_wait_that_can_not_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match="periods must be at least 3 for 7 layers, 2 at a time"):
        draws("max_wait", {"periods": 2}, 1)


def test_without_a_deadline_the_other_sampler_chooses() -> None:
    assert draws("max_wait", {"periods": 10_000}, 20) == draws("lisa", {}, 20)


def test_a_warm_up_begins_with_more_layers() -> None:
    sizes = [len(chosen) for chosen in draws("warmup", {"first": 6, "periods": 4}, 6)]
    assert sizes == [6, 5, 4, 3, 2, 2]
    assert [len(chosen) for chosen in draws("warmup", {"first": 99, "periods": 2}, 3)] == [7, 4, 2]
    assert draws("warmup", {"periods": 2}, 5)[2:] == draws("lisa", {}, 5)[2:]


def test_a_mixture_draws_who_chooses() -> None:
    options = {"samplers": ["cyclic", "full"], "shares": [3, 1]}
    drawn = draws("mixture", options, 400)
    everything = sum(len(chosen) == 7 for chosen in drawn)
    assert everything / 400 == pytest.approx(0.25, abs=0.06)
    sampler: Any = create_sampler("mixture", options)
    assert sampler.inclusion_probabilities(SamplingContext(NAMES, 2)) == [1, 1, 0.25, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samplers": []}, "at least one sampler"),
        ({"samplers": ["lisa"], "shares": [1, 2]}, "one entry for each of the 1 samplers"),
        ({"samplers": ["lisa"], "shares": [0]}, "not all of them 0"),
        ({"samplers": ["lsia"]}, "Did you mean 'lisa'"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_sampler("mixture", options)


def test_each_sampler_of_a_mixture_measures_when_it_would_alone() -> None:
    """At their common divisor both would measure six times as often as either asks."""
    told: list[tuple[str, int, tuple[str, ...]]] = []

    def make(name: str, own: int | None) -> Any:
        class Measures(LayerSampler):
            """Note when it measures, and what has changed."""

            measure_every = own

            def measure(self, measurement: Measurement) -> None:
                told.append((name, measurement.round, measurement.changed))

            def sample(self, context: SamplingContext) -> list[int]:
                return [context.round % context.num_layers]

        return register(name)(Measures)

    for name, own in (("twos", 2), ("threes", 3), ("once", None)):
        make(name, own)
    model = make_llama()
    options = {"samplers": ["twos", "threes", "once"]}
    everything = tuple(f"model.layers.{i}" for i in range(4))
    with LayerScheduler(model, adamw(model), "mixture", sampler_options=options, period=1) as scheduler:
        scheduler.advance_to(3)
        saved = scheduler.state_dict()
        scheduler.advance_to(4)
    first = [(name, 0, everything) for name in ("twos", "threes", "once")]
    then = [("twos", 2, everything[:2]), ("threes", 3, everything[:3]), ("twos", 4, everything[2:])]
    assert told == [*first, *then]
    del told[:]
    with LayerScheduler(
        model, adamw(model), "mixture", sampler_options=options, period=1, state_dict=saved
    ) as scheduler:
        scheduler.advance_to(4)
    assert told == then[-1:], "a resumed run knows what each hasn't seen"
    del told[:]
    changed: Any = {"sampler_options": options, "period": 1, "allow_changes": True}
    with LayerScheduler(model, adamw(model), "lisa", period=1) as scheduler:
        scheduler.advance_to(1)
        saved = scheduler.state_dict()
    with LayerScheduler(model, adamw(model), "mixture", state_dict=saved, **changed):
        assert told == [(name, 1, everything) for name in ("twos", "threes", "once")]


def test_a_probe_is_for_those_of_a_mixture_that_ask_for_one() -> None:
    """A bandit learns from losses, which a probe hasn't any of."""
    model = make_llama()
    options = {"samplers": ["bandit", "grass"], "options": [{}, {"probe_batches": 2}]}
    batches = [make_batch(seed=seed) for seed in range(2)]
    with LayerScheduler(
        model, adamw(model), "mixture", sampler_options=options, period=2, batches=batches
    ) as scheduler:
        bandit, grass = scheduler.sampler.inner  # type: ignore[attr-defined]
        assert not bandit.scores and grass.scores


@pytest.mark.parametrize(
    ("name", "options", "chances"),
    [
        ("warmup", {"first": 4, "periods": 5}, [1.0, 1.0, 1.0, 1.0]),
        ("mixture", {"samplers": ["bandit", "full"]}, [0.75] * 4),
    ],
)
def test_a_bandit_divides_by_the_chance_that_its_layers_had_to_train(
    name: str, options: dict[str, Any], chances: list[float]
) -> None:
    """With another sampler around it, these aren't those of its own draw of two."""
    own = {"rate": 0.3, "per": "period"}
    options = (
        {**options, "options": [own, {}]}
        if "samplers" in options
        else {**options, "sampler": "bandit", "sampler_options": own}
    )
    model = make_llama()
    with LayerScheduler(
        model, adamw(model), name, sampler_options=options, period=2, num_active=2
    ) as scheduler:
        wrapper: Any = scheduler.sampler
        bandit = wrapper.inner[0] if "samplers" in options else wrapper.inner
        assert scheduler.inclusion_probabilities == pytest.approx(chances)
        active = scheduler.active_layers
        for loss in (2.0, 1.0):
            scheduler.step(loss=loss)
        assert bandit.scores == pytest.approx({layer: 0.3 / chances[0] for layer in active})


def test_layers_that_have_converged_are_never_drawn_again() -> None:
    sampler: Any = create_sampler("freeze_converged", {"threshold": 0.5, "grace": 2})

    def told(round: int, norms: tuple[float | None, ...]) -> None:
        gradients = GradientStatistics(norms, norms, (4,) * 7)
        statistics = LayerStatistics((1,) * 7, (round,) * 7, round, gradients)
        active = tuple(i for i, norm in enumerate(norms) if norm is not None)
        given = SamplingContext(NAMES, 2, round, statistics=statistics, active=active)
        sampler.observe(statistics, given)

    told(0, (8.0, 8.0, *(None,) * 5))
    told(1, (1.0, 8.0, *(None,) * 5))
    assert sampler.converged == [], "a period of grace"
    told(2, (3.9, 4.1, *(None,) * 5))
    assert sampler.converged == ["0"], "below half of what it was"
    drawn = {i for seed in range(50) for i in sampler.sample(SamplingContext(NAMES, 2, 3, seed=seed))}
    assert drawn == {1, 2, 3, 4, 5, 6}
    assert sampler.inclusion_probabilities(SamplingContext(NAMES, 2, 3)) == pytest.approx([0, *(1 / 3,) * 6])
    for round in (3, 4):
        told(round, (8.0,) * 7 if round == 3 else (0.1,) * 7)
    assert len(sampler.converged) == 5, "as many as a draw holds are left"


def test_wrappers_of_wrappers_are_resumed_to_the_bit() -> None:
    inner = {"sampler": "freeze_converged", "sampler_options": {"sampler": "bandit", "grace": 1}}

    def start(state: Any = None, seed: int = 0) -> tuple[Any, torch.optim.Optimizer, LayerScheduler]:
        model = make_llama(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        return (
            model,
            optimizer,
            LayerScheduler(
                model, optimizer, "max_wait", sampler_options=inner, num_active=1, period=2, state_dict=state
            ),
        )

    def train(parts: tuple[Any, torch.optim.Optimizer, LayerScheduler], steps: range) -> None:
        model, optimizer, scheduler = parts
        for step in steps:
            loss = model(**make_batch(step)).loss
            loss.backward()
            optimizer.step()
            scheduler.step(loss=loss)
            optimizer.zero_grad()

    whole, first = start(), start()
    train(whole, range(12))
    train(first, range(5))
    second = start(first[2].state_dict())
    second[0].load_state_dict(first[0].state_dict())
    train(second, range(5, 12))
    assert second[2].state_dict() == whole[2].state_dict()
    assert all(map(torch.equal, second[0].parameters(), whole[0].parameters()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("warmup", {"sampler": "gum"}),
        ("mixture", {"samplers": ["lisa", "gum"]}),
        ("max_wait", {"sampler": "freeze_converged", "sampler_options": {"sampler": "gum"}}),
    ],
)
def test_a_sampler_that_does_more_than_choose_is_not_wrapped(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must choose layers alone, but 'gum' also says"):
        create_sampler(name, options)
