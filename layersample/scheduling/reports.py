"""What a scheduler tells of its run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layersample.layers.rules import Units
from layersample.optim.optimizers import Optimizers
from layersample.option_files import make_options
from layersample.sampling.history import LayerHistory
from layersample.sampling.sampler import LayerSampler
from layersample.sampling.statistics import LayerStatistics
from layersample.scheduling.options import SchedulerOptions, StepCount, describe_reach
from layersample.scheduling.switch import Switch


class Reports:
    """The part of a scheduler that is only looked at."""

    _optimizers: Optimizers
    _switch: Switch
    _units: Units
    _history: LayerHistory
    _round: int
    _steps: int
    _active: tuple[int, ...]
    _inclusion: Sequence[float] | None
    num_active: int
    period: int
    options: SchedulerOptions
    sampler: LayerSampler

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all that is sampled, from the input to the output.

        These are the model's layers, and the groups whose rule is ``"sample"``. Where the layers are, which the
        argument ``layers`` says, is in :attr:`model_layers`.
        """
        return tuple(unit.name for unit in self._units.sampled)

    @property
    def active(self) -> tuple[int, ...]:
        """Indices into :attr:`layers` of those that train now, ascending."""
        return self._active

    @property
    def active_layers(self) -> tuple[str, ...]:
        """Names of the sampled layers that train now."""
        return tuple(self._units.sampled[i].name for i in self._active)

    @property
    def moving_layers(self) -> tuple[str, ...]:
        """Names of the sampled layers that move though they aren't active, see the argument ``inactive``."""
        return tuple(self._units.sampled[i].name for i in self._switch.moving)

    @property
    def moving_parameters(self) -> frozenset[str]:
        """Names of the parameters that move without state."""
        return self._switch.moving_parameters

    @property
    def optimizer(self) -> Any:
        """What the scheduler was given, an optimizer or a list of them, as learning-rate schedulers have it."""
        return self._optimizers.given

    @property
    def lr_factors(self) -> dict[str, float]:
        """What the learning rates of active layers are multiplied by where it isn't 1, by name."""
        return {self._units.sampled[i].name: factor for i, factor in self._switch.lr_factors.items()}

    @property
    def projected(self) -> frozenset[str]:
        """Names of the weights whose gradients are projected when they train."""
        return self._switch.projected

    @property
    def gradient_norm(self) -> float | None:
        """With ``step_in_backward``: norm of all gradients of the last step, before clipping."""
        return None if self._switch.stepper is None else self._switch.stepper.norm

    @property
    def largest_gradient(self) -> int:
        """With ``step_in_backward``: most bytes of gradients that stood side by side."""
        return 0 if self._switch.stepper is None else self._switch.stepper.largest_gradient

    @property
    def round(self) -> int:
        """Number of the current period, from 0."""
        return self._round

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self._steps

    @property
    def inclusion_probabilities(self) -> list[float] | None:
        """The chance that each of :attr:`layers` had to be active now, computed; ``None`` if not known."""
        return None if self._inclusion is None else list(self._inclusion)

    @property
    def coverage(self) -> float:
        """Share of :attr:`layers` that have trained so far, those that train now included."""
        return self._history.coverage(self._active)

    @property
    def staleness(self) -> list[int]:
        """Periods since each of :attr:`layers` last trained: 0 for those that train now."""
        return self._history.staleness(self._round, self._active)

    @property
    def statistics(self) -> LayerStatistics:
        """What the sampler may know of the run so far: visits, and what it has asked to collect."""
        if self._switch.norms is not None and self._history.gradients is not None:
            self._switch.norms.hand_over(self._history.gradients)
        return self._history.statistics(self._round)

    def reach(self, steps: int) -> str:
        """What a run of some steps leaves untrained for want of periods, in a sentence; empty if nothing.

        Empty too where the sampler may end a period early, so that their number isn't known.

        Args:
            steps: Optimizer steps still to do.
        """
        steps = make_options(StepCount, [("", {"steps": steps})], "argument").steps
        if self.sampler.watches_steps:
            return ""
        at_a_time = max(self.num_active, len(self._active))  # GUM trains all of them, and draws some
        unit = self.options.granularity
        return describe_reach(steps, self.period, at_a_time, len(self._units.sampled), unit)
