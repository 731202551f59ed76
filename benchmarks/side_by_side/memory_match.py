"""How much of a method fits the memory of another one: the planner chooses its layers or its rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from layersample.config import TrainConfig
from layersample.errors import ConfigError
from layersample.planning.active_sets import ActiveSets, find_active_sets
from layersample.planning.fake_models import quietly
from layersample.planning.simulation import simulate_step
from layersample.planning.target import Target, find_target
from layersample.registry import create_sampler

from ..methods.method import Method
from .wording import exact_mib

_HIGHEST_RANK = 1024  # beyond it, low rank saves nothing on the models that are compared


class DoesNotFitError(Exception):
    """A method takes more than the memory that it is given; the text says the least that it takes."""


@dataclass(frozen=True)
class Fit:
    """What a method is given of some memory.

    Args:
        options: Options that were chosen for it.
        bytes: What it then takes at most, by the plan.
    """

    options: dict[str, Any]
    bytes: int


class MemoryPlanner:
    """Plans the peak tensors of methods on one model; what was simulated is kept.

    Args:
        model: As ``layersample train`` takes it.
        steps: Steps of its runs, which limit how many layers leave something behind; ``None`` where they aren't known.
        attention: Its implementation; the model's own by default.
    """

    def __init__(self, model: str, steps: int | None = None, attention: str | None = None) -> None:
        self._model = model
        self._steps = steps
        self._attention = attention
        self._known: dict[str, int] = {}

    def can_plan(self, method: Method) -> bool:
        """Whether the planner knows what a method does."""
        return method.samples or method.adapter_rank is not None

    def peak(self, method: Method, config: TrainConfig) -> int:
        """Bytes of all tensors at most in a step, whatever layers are drawn, of examples of full length.

        Those of the host's memory count: what is measured counts them, and a CPU has no other.

        Raises:
            ConfigError: If the model or the options can't be planned.
        """
        rank = None if method.adapter_rank is None else method.adapter_rank(config)
        if rank is not None:  # the adapters' own, and no projection's
            config = config.model_copy(update={"rank": None})
        key = f"{rank} {config.model_dump_json(exclude={'learning_rate', 'steps', 'seed'})}"
        if key not in self._known:
            with quietly():
                target, planned = find_target(self._model, config)
                if self._attention is not None:
                    target.shape._attn_implementation = self._attention
                self._known[key] = _peak(target, planned, rank, self._steps)
        return self._known[key]

    def fit(self, method: Method, config: TrainConfig, limit: int, own: frozenset[str]) -> Fit:
        """The most layers, or the highest rank, with which a method stays within a limit.

        Args:
            method: One that can be planned.
            config: Its options.
            limit: Bytes of all tensors.
            own: Options that its row gives itself, which stay as they are.

        Raises:
            ConfigError: If the model or the options can't be planned.
            DoesNotFitError: If it takes more than the limit at its least.
        """
        knob = None if config.budget is not None else _knob(method, config)
        if knob is None or knob in own:
            taken = self.peak(method, config)
            if taken > limit:
                why = (
                    f"with {knob}={getattr(config, knob)}"
                    if knob
                    else "and has no number of layers to choose"
                )
                raise DoesNotFitError(f"takes {exact_mib(taken)} {why}")
            return Fit({}, taken)

        def cost(value: int) -> int:
            return self.peak(method, config.model_copy(update={knob: value}))

        chosen = _most_within(cost, limit, self._highest(knob, config))
        if chosen is None:
            least = "one layer" if knob == "num_active" else "rank 1"
            raise DoesNotFitError(f"takes at least {exact_mib(cost(1))}, with {least}")
        return Fit({knob: chosen}, cost(chosen))

    def _highest(self, knob: str, config: TrainConfig) -> int:
        if knob == "rank":
            return _HIGHEST_RANK
        with quietly():
            target, planned = find_target(self._model, config.model_copy(update={"num_active": 1}))
            return len(find_active_sets(target.shape, planned, kind=target.kind).possible)


def _knob(method: Method, config: TrainConfig) -> str | None:
    """The option that decides how much of a method trains; ``None`` where there is none."""
    if method.adapter_rank is not None:
        return "rank"
    if config.draw_budget is not None:  # which num_active has no say beside
        return None
    if not create_sampler(config.sampler, config.sampler_options).trains_everything:
        return "num_active"
    return None if config.projection is None else "rank"


def _peak(target: Target, config: TrainConfig, adapter_rank: int | None, steps: int | None) -> int:
    shape, kind = target.shape, target.kind
    if adapter_rank is not None:
        return simulate_step(shape, config, (), lora_rank=adapter_rank, kind=kind).peak_bytes
    sets = find_active_sets(shape, config, kind=kind)
    planned = (
        simulate_step(shape, config, active, kind=kind, trained=_trained(sets, active, config, steps))
        for active in sets.worst
    )
    return max(step.peak_bytes + step.host_bytes for step in planned)


def _trained(
    sets: ActiveSets, active: Sequence[int], config: TrainConfig, steps: int | None
) -> Sequence[int]:
    """The layers that can have trained by the end of a run: as many as there is time for, the largest first."""
    if steps is None:
        return sets.possible
    draws = math.ceil(steps / config.run_period)
    others = sorted(set(sets.possible) - set(active), key=lambda index: -sets.sizes[index])
    return [*active, *others[: (draws - 1) * len(active)]]


def _most_within(cost: Callable[[int], int], limit: int, highest: int) -> int | None:
    """The largest value whose cost is within a limit; ``None`` where 1 costs more. More never costs less."""
    if cost(1) > limit:
        return None
    low, high = 1, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _within(cost, middle, limit) else (low, middle - 1)
    return low


def _within(cost: Callable[[int], int], value: int, limit: int) -> bool:
    try:
        return cost(value) <= limit
    except ConfigError:  # a rank above what the smallest matrix has
        return False
