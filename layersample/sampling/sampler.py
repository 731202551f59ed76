"""What a sampler is: one method that picks the layers of a period, from a context that holds all it may use."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import nn

from layersample.errors import ConfigError, unknown
from layersample.layers.costs import LayerCosts
from layersample.layers.find import ModelLayers
from layersample.sampling.draw_budget import DrawBudget
from layersample.sampling.full_rank import FullRank
from layersample.sampling.pace import PROGRESS, Say, pace, paced
from layersample.sampling.statistics import COLLECTABLE, GRADIENTS, LayerStatistics


@dataclass(frozen=True)
class SamplingContext:
    """All that a sampler may look at when it picks the layers of one period.

    Args:
        layers: Names of the layers to pick from, from the input to the output; or of parts of layers, where the user
            has chosen a finer granularity.
        num_active: How many layers the user asked for; with a budget, the most that it has room for.
        round: Number of this period, from 0.
        step: Optimizer steps done so far.
        seed: The user's seed; every rank has the same.
        statistics: What is known of each layer from the run so far; by default that none has trained.
        allow_empty: Whether a period without any layer still trains something (embeddings, head, norm).
        costs: What it costs to train each layer; ``None`` where there is no model to count it on.
        active: Where a sampler observes: indices of the layers that train in this period; else empty.
        budget: What a draw may hold, in place of a number of layers; ``None`` where ``num_active`` holds.
        inclusion: Where a sampler observes: the chance of each layer to be in this period's set, as it was at the
            draw; ``None`` if it isn't known. Within another sampler, it is what both come to together.
        probing: Whether what is observed is a probe before the first draw, in place of a period.
    """

    layers: tuple[str, ...]
    num_active: int
    round: int = 0
    step: int = 0
    seed: int = 0
    statistics: LayerStatistics = None  # type: ignore[assignment]  # filled in below: its length is the layers'
    allow_empty: bool = False
    costs: LayerCosts | None = None
    active: tuple[int, ...] = ()
    budget: DrawBudget | None = None
    inclusion: tuple[float, ...] | None = None
    probing: bool = False

    def __post_init__(self) -> None:
        none, never = (0,) * self.num_layers, (None,) * self.num_layers
        statistics = self.statistics or LayerStatistics(none, never, self.round)
        object.__setattr__(self, "statistics", statistics)
        for what, values in (("visits", statistics.visits), ("last_active", statistics.last_active)):
            if len(values) != self.num_layers:
                raise ValueError(
                    f"statistics.{what} must hold one entry for each of the {self.num_layers} layers, "
                    f"but holds {len(values)}."
                )

    @property
    def num_layers(self) -> int:
        """Number of layers to pick from."""
        return len(self.layers)

    @cached_property
    def generator(self) -> torch.Generator:
        """The only randomness allowed: fresh for each period, from the seed and the period alone."""
        return self.generator_at(self.round)

    def take(self, order: Iterable[int]) -> list[int]:
        """The layers of an order that a draw has room for: the first ``num_active``, or all that the budget allows.

        Args:
            order: Indices of layers, the preferred one first. Under a budget, one that doesn't fit is left out.
        """
        if self.budget is None:
            return list(islice(order, self.num_active))
        return self.budget.fit(order)

    def among(self, indices: Sequence[int], num_active: int, *, taken: Sequence[int] = ()) -> SamplingContext:
        """The same period with some of the layers alone, for samplers that let another one choose among these.

        Args:
            indices: Which layers; what is drawn then counts along them.
            num_active: How many layers to ask for.
            taken: Layers that are chosen already: a budget has less room.
        """
        place = {index: number for number, index in enumerate(indices)}
        return replace(
            self,
            layers=tuple(self.layers[index] for index in indices),
            num_active=num_active,
            statistics=self.statistics.subset(indices),
            costs=None if self.costs is None else self.costs.subset(indices),
            active=tuple(place[index] for index in self.active if index in place),
            budget=None if self.budget is None else self.budget.among(indices, taken),
            inclusion=None if self.inclusion is None else tuple(self.inclusion[index] for index in indices),
        )

    def generator_at(self, round: int) -> torch.Generator:
        """The generator of another period, for plans that reach over several (one order for an epoch)."""
        return _generator(f"layersample:{self.seed}:{round}")


def _generator(seed: str) -> torch.Generator:
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Measurement:
    """All that a sampler may look at when it measures the model.

    Args:
        model: The model. It must be left as it was.
        model_layers: Its layers and groups; where parts of layers are sampled, these stand for the layers.
        layers: Names of the layers to pick from, as in the context.
        num_active: How many layers the user asked for.
        changed: Names of the layers that have trained since the last measurement; all of them at the first.
        batches: Gives the calibration batches anew at each call, each a mapping of the model's arguments;
            ``None`` where the user gave none.
        round: Number of the period that it is measured for, from 0.
        seed: The user's seed; every rank has the same.
        report: Is told what is read and how long it will take; the log by default, which the command line shows.
        warn: Is told what the user should know of the result; the log by default.
    """

    model: nn.Module
    model_layers: ModelLayers
    layers: tuple[str, ...]
    num_active: int
    changed: tuple[str, ...]
    batches: Callable[[], Iterable[Mapping[str, Any]]] | None = None
    round: int = 0
    seed: int = 0
    report: Say = PROGRESS.info
    warn: Say = logging.getLogger(__name__).warning

    @cached_property
    def generator(self) -> torch.Generator:
        """The only randomness allowed, fresh for each measurement; it isn't that of the draw."""
        return _generator(f"layersample:measure:{self.seed}:{self.round}")

    def read(self, what: str, count: int) -> Iterator[Mapping[str, Any]]:
        """The first calibration batches, with a word on how long they take.

        Args:
            what: What is done with them, in a few words.
            count: Most batches.

        Raises:
            ConfigError: If the user gave none.
        """
        if self.batches is None:
            raise ConfigError(
                f"{what} needs calibration batches, but got none: give batches= to the scheduler."
            )
        return paced(self.batches(), f"{what}, batches", count, self.report)

    def pace(self, what: str) -> Callable[[int, int], None]:
        """A callback for progress (done, all of them), that says once how long the rest takes."""
        return pace(what, self.report)


class LayerSampler(ABC):
    """Picks the layers that train in a period. Subclass it, write :meth:`sample`, and ``@register`` a name.

    Options are the fields of a keyword-only dataclass, ``@dataclass(kw_only=True, eq=False)``, checked in
    ``__post_init__``; so a subclass has the options of its base too. Keyword-only arguments of an ``__init__`` of
    your own do as well. Their bounds, defaults and units go into the docstring's ``Args``, which
    ``layersample list NAME`` prints.
    """

    source: ClassVar[str] = ""
    """Where the rule comes from: an arXiv id or a repository."""

    fixed_size: bool = False
    """Whether every draw holds exactly ``num_active`` layers, where there is no budget."""

    keeps_budget: bool = False
    """Whether draws keep to ``context.budget``, as those do that ``context.take`` gives."""

    outlier_threshold: float | None = None
    """M of the outliers that it counts, if it does: those that a profile shows beside its probabilities."""

    needs_batches: bool = False
    """Whether :meth:`measure` reads calibration batches, with the options that it has."""

    trains_everything: bool = False
    """Whether it trains the whole model in every period, the towers beside a language model too."""

    needs_projection: bool = False
    """Whether it works beside a projection alone, and says by :meth:`full_rank` which layers aren't projected."""

    measure_every: int | None = None
    """Periods between two calls of :meth:`measure`; ``None`` measures once."""

    collects: frozenset[str] = frozenset()
    """What must be collected for it while layers train: ``"gradients"`` (norms), ``"loss"``."""

    probe_batches: int = 0
    """Calibration batches on which the gradients of all layers are looked at before the first draw, without training.
    It then observes them, with all layers in ``context.active``. It must collect ``"gradients"``."""

    watches_steps: bool = False
    """Whether :meth:`wants_new_period` is asked after each step. Norms then come off the device at each step."""

    @property
    def measures(self) -> bool:
        """Whether it measures the model: whether :meth:`measure` does anything."""
        return type(self).measure is not LayerSampler.measure

    @property
    def has_measured(self) -> bool:
        """Whether it needs no measurement before its first draw."""
        return not self.measures

    def num_drawn(self, context: SamplingContext) -> int:
        """How many layers it draws in this period; a plan asks one that hasn't measured, and can't be asked which."""
        return context.num_active

    @abstractmethod
    def sample(self, context: SamplingContext) -> Iterable[int]:
        """Return the indices into ``context.layers`` that train in period ``context.round``."""

    def measure(self, measurement: Measurement) -> None:  # noqa: B027
        """Look at the model: before the first draw, and again every :attr:`measure_every` periods."""

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:  # noqa: B027
        """Learn from a period that has ended, before the next draw.

        Whatever it keeps must be in :meth:`state_dict`. Statistics are the same on every rank, so what follows from
        them is too.

        Args:
            statistics: What is known of each layer. With ``collects``, gradients and the loss of this period.
            context: That of the draw, with the layers that trained in ``context.active``.
        """

    def wants_new_period(self, statistics: LayerStatistics, context: SamplingContext) -> bool:
        """Whether the period must end now, ahead of time; asked after each step if :attr:`watches_steps`.

        Args:
            statistics: What is known of each layer so far.
            context: That of the draw, with the layers that train in ``context.active`` and the steps done.
        """
        return False

    def full_rank(self, context: SamplingContext) -> FullRank | None:
        """Layers that get, in this period, what the projection leaves out; ``None`` if it is the same for all."""
        return None

    def inclusion_probabilities(self, context: SamplingContext) -> Sequence[float] | None:
        """The chance of each layer to be in this period's set, over all seeds; ``None`` if it isn't known."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs, of JSON types; none for a sampler that only uses its context."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what :meth:`state_dict` gave."""


def check_collects(sampler: LayerSampler) -> frozenset[str]:
    """What a sampler wants collected.

    Raises:
        ConfigError: If there is no such statistic.
    """
    collects = frozenset(sampler.collects)
    for name in sorted(collects - COLLECTABLE):
        raise ConfigError(unknown("statistic", name, sorted(COLLECTABLE)))
    if sampler.probe_batches and GRADIENTS not in collects:
        raise ConfigError(
            f"A sampler that probes gradients must collect them, but {type(sampler).__name__} has probe_batches="
            f"{sampler.probe_batches} and collects {sorted(collects) or 'nothing'}."
        )
    return collects
