"""The options of a scheduler, in one place: the loop, the Trainer, the command line and plans take them from here."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from layersample.choices import Granularity, Inactive, InactiveScope, Rule, StatePolicyName
from layersample.option_files import Options
from layersample.options import MOST, Role, option

DEFAULT_SAMPLER = "lisa"

DEFAULT_PERIOD = 20
"""Optimizer steps between draws in the authors' code of LISA."""

DEFAULT_INACTIVE_LR_SCALE = 5.0
"""What layers without state move by, relative to what Adam moves by, in BREAD's experiments."""

_SETS = 8
"""Sets of layers that a run shall draw at least, where its length is known."""

_RUN = (Role.IDENTITY, Role.MEMORY)


def default_period(steps: int | None = None) -> int:
    """The period of a run that was given none: the authors' 20 steps, or less, so that a short run draws 8 sets.

    Args:
        steps: Optimizer steps of the run; ``None`` where that isn't known, as in a loop of one's own.
    """
    return DEFAULT_PERIOD if steps is None else max(1, min(DEFAULT_PERIOD, steps // _SETS))


def describe_reach(steps: int, period: int, num_active: int, num_layers: int, unit: str = "layer") -> str:
    """Say which layers a run can't reach for want of periods, and what would; empty if it can reach all.

    Args:
        steps: Optimizer steps of the run.
        period: Optimizer steps between draws.
        num_active: Layers of a draw.
        num_layers: Layers to draw from.
        unit: What these are: layers, or parts of them.
    """
    most = ceil(steps / period) * num_active
    if most >= num_layers:
        return ""
    wanted = steps // ceil(num_layers / num_active)
    advice = (
        f"period={wanted} could reach them all" if wanted else "more steps or a larger num_active reach more"
    )
    return f"{steps} steps of period {period} train at most {most} of {num_layers} {unit}s; {advice}."


def _as_text(value: Any) -> Any:
    """A number as it is written, so that 0.03 and "0.03" are the same."""
    return value if value is None or isinstance(value, bool) else str(value)


class SamplingOptions(Options):
    """Which layers train, and when."""

    sampler: str | object = option(
        DEFAULT_SAMPLER, "Name of the sampler; `layersample list` shows them.", *_RUN, Role.SHOWN
    )
    sampler_options: dict[str, Any] | None = option(
        None, "Options of the sampler: `layersample list NAME`.", *_RUN
    )
    num_active: int = option(2, "Layers that train at a time (γ).", *_RUN, Role.SHOWN, ge=1, le=MOST)
    granularity: Granularity = option(
        "layer",
        "What is sampled of a layer: all of it, its attention and MLP apart (block), each module, or each tensor.",
        *_RUN,
        Role.SHOWN,
    )
    draw_budget: Annotated[str | float | None, BeforeValidator(_as_text)] = option(
        None,
        "In place of num_active: the most that what is drawn may hold, in bytes of weights (500MB), or as a part of "
        "all parameters (3%).",
        *_RUN,
        Role.SHOWN,
    )
    period: int | None = option(
        None,
        "Optimizer steps between draws (K). Default: 20, or an eighth of the run's steps where that is less.",
        Role.IDENTITY,
        Role.SHOWN,
        ge=1,
        le=MOST,
    )
    seed: int | None = option(
        None, "Seed of the draws. Default: that of the run.", Role.IDENTITY, Role.SUITE, ge=0, lt=2**32
    )
    layers: str | object | None = option(
        None, "Path of the ModuleList of layers, if it can't be found.", *_RUN
    )
    embeddings: Rule = option("train", "Embeddings: train always, freeze, or sample as a layer.", *_RUN)
    head: Rule = option("train", "Output head: train, freeze or sample.", *_RUN)
    norm: Rule = option("train", "Final norm: train, freeze or sample.", *_RUN)
    other: Rule = option("train", "Parameters outside of these and the layers.", *_RUN)
    check: bool = option(False, "Check each period, bit by bit, that frozen weights don't move.")
    allow_changes: bool = option(False, "Resume though other options have changed.", Role.SUITE)


class ProjectionOptions(Options):
    """Low-rank projection of the gradients."""

    projection: str | object | None = option(
        None, "Name of the projection; `layersample list` shows them. Default: full rank.", *_RUN
    )
    projection_options: dict[str, Any] | None = option(
        None, "Options of the projection: `layersample list NAME`.", *_RUN
    )


class UpdateOptions(Options):
    """How weights are updated, and what becomes of optimizer state."""

    state: StatePolicyName = option("drop", "Optimizer state of frozen layers.", *_RUN, Role.SHOWN)
    master_weights: bool = option(
        True, "Train bf16 weights on fp32 masters, so that no update is lost in rounding.", *_RUN
    )
    step_in_backward: bool | object = option(
        False, "Update each parameter in the backward pass, as soon as its gradient is whole.", *_RUN
    )
    frozen_weights: str | object | None = option(
        None,
        "Hold the matrices of frozen layers in 8 or 4 bits (int8, nf4), and their exact values in the host's memory.",
        *_RUN,
        Role.SHOWN,
    )
    inactive: Inactive = option(
        "freeze",
        "What layers do that aren't active: freeze, or a step without state in the same backward pass (sgd, signsgd).",
        *_RUN,
    )
    inactive_lr_scale: float = option(
        DEFAULT_INACTIVE_LR_SCALE,
        "Learning rate of inactive layers, relative to that of their group.",
        Role.IDENTITY,
        gt=0,
        le=1e6,
    )
    inactive_scope: InactiveScope = option(
        "all", "Which inactive layers move: all, or those above the lowest active one.", *_RUN
    )

    switch_warmup: int = option(
        0,
        "Optimizer steps over which the learning rate of layers rises that have just become active; 0: none.",
        Role.IDENTITY,
        ge=0,
        le=MOST,
    )
    lr_correction: float | None = option(
        None,
        "Multiply an active layer's learning rate by the mean inclusion probability over its own, at most by this.",
        Role.IDENTITY,
        ge=1,
        le=1e6,
    )

    @model_validator(mode="after")
    def _says_what_inactive_layers_do(self) -> Self:
        for name in ("inactive_lr_scale", "inactive_scope"):
            value = getattr(self, name)
            if self.inactive == "freeze" and value != UpdateOptions.model_fields[name].default:
                raise ValueError(
                    f"{name} is for layers that move while they are inactive: choose inactive='sgd' or 'signsgd' as "
                    f"well, or leave it out, but got inactive='freeze' and {name}={value!r}"
                )
        if self.inactive != "freeze" and self.frozen_weights is not None:
            raise ValueError(
                f"inactive={self.inactive!r} moves the weights of inactive layers, and frozen_weights="
                f"{self.frozen_weights!r} holds them rounded: leave one of the two out"
            )
        return self


class SchedulerOptions(SamplingOptions, ProjectionOptions, UpdateOptions):
    """All options of a :class:`~layersample.LayerScheduler`, with their defaults and bounds.

    A new option of the scheduler is a field here and an argument there; what is made from the fields (the Trainer's
    callback, configuration files, flags, plans, what a resumed run must share) follows.
    """

    def arguments(self) -> dict[str, Any]:
        """Every option by name, as arguments of a ``LayerScheduler``; nested ones as they were given."""
        return {name: getattr(self, name) for name in SchedulerOptions.model_fields}


class StepCount(Options):
    """A number of steps that a loop tells a scheduler."""

    steps: int = option(0, "Optimizer steps.", ge=0, le=MOST)
