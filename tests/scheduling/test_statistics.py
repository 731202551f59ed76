"""What is collected for samplers while layers train, against norms taken by hand."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
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
    StepInBackward,
)
from tests.helpers import make_batch, make_llama

LAYERS = 3


class Watching(LayerSampler):
    """One layer after another; keeps what it is told."""

    collects = frozenset({"gradients", "loss", "weights"})

    def __init__(self, *, every_step: bool = False, ends_at: float = -1.0) -> None:
        self.watches_steps, self.ends_at = every_step, ends_at
        self.told: list[tuple[LayerStatistics, SamplingContext]] = []
        self.asked: list[int] = []

    def sample(self, context: SamplingContext) -> list[int]:
        return [context.round % context.num_layers]

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        self.told.append((statistics, context))

    def wants_new_period(self, statistics: LayerStatistics, context: SamplingContext) -> bool:
        self.asked.append(context.step)
        last = statistics.loss.last
        return last is not None and last < self.ends_at


def norm_of(model: nn.Module, index: int) -> float:
    layer = model.get_submodule(f"model.layers.{index}")
    squares = [float(p.grad.double().square().sum()) for p in layer.parameters() if p.grad is not None]
    return float(sum(squares) ** 0.5)


def run(
    sampler: Watching,
    steps: int = 6,
    *,
    batches: int = 1,
    clip: float | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[LayerScheduler, list[float], list[float]]:
    """Train; return the scheduler, and norms and losses of each step taken by hand."""
    model = make_llama(LAYERS, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = LayerScheduler(model, optimizer, sampler, num_active=1, period=3, **options)
    norms: list[float] = []
    losses: list[float] = []
    for step in range(steps):
        (active,) = scheduler.active
        loss = torch.zeros(())
        for part in range(batches):
            if part == batches - 1 and "step_in_backward" in options:
                norms.append(0.0)  # nothing is left to look at
            loss = model(**make_batch(step * batches + part)).loss
            loss.backward()
        if "step_in_backward" not in options:
            norms.append(norm_of(model, active))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        scheduler.step(loss=loss)
        optimizer.zero_grad()
    scheduler.close()
    return scheduler, norms, losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batches": 2},
        {"clip": 1e-6},
        {"projection": "galore", "projection_options": {"rank": 2}},
        {"dtype": torch.bfloat16},
    ],
    ids=["plain", "accumulated", "clipped", "projected", "bf16"],
)
def test_norms_are_those_of_the_whole_gradients(options: dict[str, Any]) -> None:
    sampler = Watching()
    _, norms, losses = run(sampler, **options)
    (first, _), (second, context) = sampler.told
    tolerance = 1e-2 if options.get("dtype") == torch.bfloat16 else 1e-5
    assert first.gradient_norm[0] == pytest.approx(sum(norms[:3]) / 3, rel=tolerance)
    assert first.gradient_norm[1:] == (None, None)
    assert second.gradient_norm[0] == first.gradient_norm[0], "a layer that didn't train keeps its own"
    assert second.gradient_norm[1] == pytest.approx(sum(norms[3:]) / 3, rel=tolerance)
    assert second.gradients is not None
    assert second.gradients.last_norm[1] == pytest.approx(norms[5], rel=tolerance)
    size = second.gradients.sizes[1]
    assert second.gradient_rms[1] == pytest.approx(sum(norms[3:]) / 3 / size**0.5, rel=tolerance)
    assert (context.active, context.round, second.period) == ((1,), 1, 1)
    assert second.staleness == (1, 0, 2) and second.visits == (1, 1, 0)
    # Of three losses the line's ends differ by twice its slope, which is half of what the outer two differ by.
    before, after = first.loss.before, first.loss.after
    assert before is not None and after is not None and first.loss.told == 3
    assert before - after == pytest.approx(losses[0] - losses[2], rel=1e-4)
    assert (before + after) / 2 == pytest.approx(sum(losses[:3]) / 3, rel=1e-5)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_in_backward_has_the_same_norms_before_it_clips(batches: int) -> None:
    usual, backward = Watching(), Watching()
    run(usual, 3, batches=batches)
    # So small a norm that, clipped first, none would be left.
    stepping = StepInBackward(accumulation=batches, max_norm=1e-6, clip_by="parameter")
    run(backward, 3, batches=batches, step_in_backward=stepping)
    last = backward.told[0][0].gradients
    assert last is not None and last.norm[0] is not None and last.norm[0] > 1e-3
    # The first step's weights are the same in both.
    first = [Watching(every_step=True) for _ in range(2)]
    states = [
        run(first[0], 1, batches=batches)[0],
        run(first[1], 1, batches=batches, step_in_backward=stepping)[0],
    ]
    one, other = (scheduler.statistics.gradient_norm[0] for scheduler in states)
    assert one == pytest.approx(other, rel=1e-6)


def test_a_gradient_that_the_loop_made_itself_is_looked_at_as_it_is_stepped_with() -> None:
    model = make_llama(LAYERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = LayerScheduler(model, optimizer, Watching(), num_active=1, period=9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = sum(p.numel() for p in model.get_submodule("model.layers.0").parameters())
    assert scheduler.statistics.gradient_norm[0] == pytest.approx(size**0.5)
    # A backward pass that failed leaves nothing behind that would count.
    loss = model(**make_batch()).loss
    weight = model.get_parameter("model.embed_tokens.weight")
    handle = weight.register_hook(lambda gradient: 1 / 0)  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    optimizer.zero_grad()
    model(**make_batch()).loss.backward()
    norm = norm_of(model, 0)
    optimizer.step()
    assert scheduler.statistics.gradients is not None
    assert scheduler.statistics.gradients.last_norm[0] == pytest.approx(norm, rel=1e-6)
    scheduler.close()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_s_scale_is_undone_where_the_loop_clips_before_the_step(fused: bool) -> None:
    model = make_llama(LAYERS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scheduler = LayerScheduler(model, optimizer, Watching(), num_active=1, period=9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for clips in (True, False):
        scaler.scale(model(**make_batch()).loss).backward()
        norm = norm_of(model, 0) / 2**10
        if clips:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        gradients = scheduler.statistics.gradients
        assert gradients is not None and gradients.last_norm[0] == pytest.approx(norm, rel=1e-5)
    scheduler.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"inactive": "sgd"}], ids=["plain", "moving"])
def test_changes_of_weights_are_those_from_the_period_s_first_to_its_last_step(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = make_llama(LAYERS, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = LayerScheduler(model, optimizer, Watching(), num_active=1, period=2, **options)
    expected: list[float | None] = [None] * LAYERS
    for period in range(4):
        before = {name: value.clone() for name, value in scheduler.fp32_state_dict().items()}
        prefix = f"model.layers.{period % LAYERS}."
        for step in range(2):
            model(**make_batch(2 * period + step)).loss.backward()
            optimizer.step()
            if step == 1:
                after = scheduler.fp32_state_dict()
                squares = [
                    float((after[name] - value).double().square().sum())
                    for name, value in before.items()
                    if name.startswith(prefix)
                ]
                expected[period % LAYERS] = sum(squares) ** 0.5
            scheduler.step()
            optimizer.zero_grad()
        changes = scheduler.statistics.weight_change
        assert [change is None for change in changes] == [change is None for change in expected]
        assert [change or 0 for change in changes] == pytest.approx([e or 0 for e in expected], rel=1e-6)
    assert min(change or 0 for change in expected) > 1e-3
    scheduler.close()


def test_a_scaler_s_scale_is_undone_and_the_steps_it_skips_are_left_out() -> None:
    model = make_llama(LAYERS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = Watching()
    scheduler = LayerScheduler(model, optimizer, sampler, num_active=1, period=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(**make_batch()).loss).backward()
    scaled = norm_of(model, 0)
    scaler.step(optimizer)
    scheduler.step()
    assert scheduler.statistics.gradient_norm[0] == pytest.approx(scaled / 2**10, rel=1e-5)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(model(**make_batch()).loss * float("inf")).backward()
    before = scheduler.statistics.gradient_norm
    scaler.step(optimizer)
    assert scheduler.statistics.gradient_norm == before
    scheduler.close()


def test_a_gradient_that_is_no_number_names_its_layer_and_leaves_its_statistics_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_llama(LAYERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = LayerScheduler(model, optimizer, Watching(), num_active=1, period=9)
    for factor in (1.0, float("nan"), float("nan")):
        (model(**make_batch()).loss * factor).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        model.load_state_dict(make_llama(LAYERS).state_dict())
    with caplog.at_level(logging.WARNING):
        statistics = scheduler.statistics
    assert statistics.gradient_norm[0] is not None and statistics.gradient_norm[0] > 0
    assert [r.getMessage() for r in caplog.records] == [
        "The gradient of model.layers.0 has a norm of nan: its statistics leave this step out."
    ]
    scheduler.close()


def test_a_sampler_may_end_a_period_early() -> None:
    sampler = Watching(every_step=True, ends_at=1e9)  # any loss is below it
    scheduler, _, _ = run(sampler, 4)
    assert scheduler.round == 4 and [context.round for _, context in sampler.told] == [0, 1, 2, 3]
    assert [statistics.loss.told for statistics, _ in sampler.told] == [1, 1, 1, 1]
    patient = Watching(every_step=True)
    scheduler, _, _ = run(patient, 7)
    assert scheduler.round == 2
    assert patient.asked == [1, 2, 4, 5, 7], "where the period ends anyway, nobody asks"


def test_a_sampler_must_say_whether_a_period_ends() -> None:
    class Vague(Watching):
        def wants_new_period(self, statistics: LayerStatistics, context: SamplingContext) -> Any:
            return "no"

    with pytest.raises(ConfigError, match="must return True or False, but returned 'no'"):
        run(Vague(every_step=True), 2)


def test_statistics_are_resumed_in_the_middle_of_a_period() -> None:
    def start(state: Any = None) -> tuple[nn.Module, torch.optim.Optimizer, LayerScheduler]:
        model = make_llama(LAYERS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # weights stay, so a new model is the old one
        return (
            model,
            optimizer,
            LayerScheduler(
                model, optimizer, Watching(every_step=True), num_active=1, period=3, state_dict=state
            ),
        )

    def train(parts: tuple[nn.Module, torch.optim.Optimizer, LayerScheduler], steps: range) -> None:
        model, optimizer, scheduler = parts
        for step in steps:
            loss: Tensor = model(**make_batch(step)).loss
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step(loss=loss)
            optimizer.zero_grad()

    whole = start()
    train(whole, range(8))
    first = start()
    train(first, range(4))
    state = json.loads(json.dumps(first[2].state_dict()))
    second = start(state)
    train(second, range(4, 8))
    assert whole[2].statistics.weight_change == (0.0, 0.0, None), "the learning rate is 0"
    assert second[2].statistics.weight_change == (0.0, None, None), "the optimizer wasn't loaded"
    assert replace(second[2].statistics, changes=whole[2].statistics.changes) == whole[2].statistics
    assert isinstance(second[2].sampler, Watching) and isinstance(whole[2].sampler, Watching)
    told = [statistics.gradients for statistics, _ in second[2].sampler.told]
    assert told == [statistics.gradients for statistics, _ in whole[2].sampler.told[1:]]
    # A state of before there were statistics.
    for key in ("gradients", "losses", "changes", "began"):
        del state[key]
    assert start(state)[2].steps == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loads_late", [False, True], ids=["made-with-state", "loaded-later"])
def test_changes_of_weights_are_the_same_in_a_run_that_is_resumed_within_a_period(
    dtype: torch.dtype, loads_late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def train(steps: range, saved: dict[str, Any] | None = None) -> tuple[Any, bytes]:
        model = make_llama(LAYERS, dtype=dtype)
        groups = [{"params": [p]} for p in model.parameters()]  # numbered as checkpoints number them
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        options: dict[str, Any] = {"num_active": 1, "period": 3}
        if saved is not None and not loads_late:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            options["state_dict"] = saved["scheduler"]
        scheduler = LayerScheduler(model, optimizer, Watching(), **options)
        if saved is not None and loads_late:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
        for step in steps:
            loss = model(**make_batch(step)).loss
            loss.backward()
            optimizer.step()
            scheduler.step(loss=loss)
            optimizer.zero_grad()
        file = io.BytesIO()
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        return scheduler.statistics, file.getvalue()

    whole, _ = train(range(9))
    _, saved = train(range(4))
    _, again = train(
        range(4, 5), torch.load(io.BytesIO(saved), weights_only=True)
    )  # a checkpoint of a run that was resumed in the same period
    found, _ = train(range(5, 9), torch.load(io.BytesIO(again), weights_only=True))
    assert found == whole and all(change for change in whole.weight_change)
    assert not caplog.records
    state = torch.load(io.BytesIO(saved), weights_only=True)
    del state["optimizer"]["state"]["layersample"]["begun"]
    lacking, _ = train(range(4, 9), state)
    assert lacking.weight_change == (whole.weight_change[0], None, whole.weight_change[2])
    assert "weight_change of model.layers.1 is None for the period" in caplog.text


def test_what_is_not_collected_or_unknown_is_said() -> None:
    statistics = LayerStatistics((0,), (None,))
    with pytest.raises(
        ConfigError, match=r"'gradients' isn't collected.*collects = frozenset\({'gradients'}\)"
    ):
        _ = statistics.gradient_norm
    with pytest.raises(ConfigError, match="'loss' isn't collected"):
        _ = statistics.loss
    with pytest.raises(ConfigError, match="'weights' isn't collected"):
        _ = statistics.weight_change
    model = make_llama(LAYERS)

    class Wrong(Watching):
        collects = frozenset({"gradient"})

    with pytest.raises(ConfigError, match="Did you mean 'gradients'"):
        LayerScheduler(model, torch.optim.AdamW(model.parameters()), Wrong())


def test_nothing_is_collected_for_who_does_not_ask() -> None:
    model = make_llama(LAYERS)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = LayerScheduler(model, optimizer, "lisa", num_active=1)
    scheduler.step(loss=1.0)
    state = scheduler.state_dict()
    assert state["gradients"] is None and state["losses"] is None
    scheduler.close()


def test_losses_that_are_no_numbers_are_told_but_not_fitted() -> None:
    from layersample.sampling.statistics import LossRecord

    record = LossRecord()
    for step, loss in ((0, 3.0), (1, float("nan")), (2, 1.0)):
        record.add(step, loss)
    statistics = record.statistics
    assert (statistics.told, statistics.before, statistics.after, statistics.last) == (3, 3.0, 1.0, 1.0)
