"""What a sampler is: one method that picks the layers of a period, from a context that holds all it may use."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, get_args

import torch
from torch import nn

from layersample.draws import (
    Draw,
    draw_sequential,
    draw_systematic,
    sequential_inclusion,
    systematic_inclusion,
)
from layersample.layers import ModelLayers


@dataclass(frozen=True)
class LayerStatistics:
    """What is known of each layer from the run so far.

    Args:
        visits: Number of earlier periods in which each layer trained, one number a layer.
        last_active: The last period in which each layer trained; ``None`` where it hasn't yet.
    """

    visits: tuple[int, ...]
    last_active: tuple[int | None, ...]


@dataclass(frozen=True)
class SamplingContext:
    """All that a sampler may look at when it picks the layers of one period.

    Args:
        layers: Names of the layers to pick from, from the input to the output.
        num_active: How many layers the user asked for.
        round: Number of this period, from 0.
        step: Optimizer steps done so far.
        seed: The user's seed; every rank has the same.
        statistics: What is known of each layer from the run so far.
        allow_empty: Whether a period without any layer still trains something (embeddings, head, norm).
    """

    layers: tuple[str, ...]
    num_active: int
    round: int = 0
    step: int = 0
    seed: int = 0
    statistics: LayerStatistics = field(default=LayerStatistics((), ()))
    allow_empty: bool = False

    @property
    def num_layers(self) -> int:
        """Number of layers to pick from."""
        return len(self.layers)

    @cached_property
    def generator(self) -> torch.Generator:
        """The only randomness allowed: fresh for each period, from the seed and the period alone."""
        return self.generator_at(self.round)

    def generator_at(self, round: int) -> torch.Generator:
        """The generator of another period, for plans that reach over several (one order for an epoch)."""
        digest = hashlib.sha256(f"layersample:{self.seed}:{round}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Measurement:
    """All that a sampler may look at when it measures the model.

    Args:
        model: The model. It must be left as it was.
        model_layers: Its layers and groups.
        layers: Names of the layers to pick from, as in the context.
        num_active: How many layers the user asked for.
        changed: Names of the layers that have trained since the last measurement; all of them at the first.
        batches: Gives the calibration batches anew at each call, each a mapping of the model's arguments;
            ``None`` where the user gave none.
    """

    model: nn.Module
    model_layers: ModelLayers
    layers: tuple[str, ...]
    num_active: int
    changed: tuple[str, ...]
    batches: Callable[[], Iterable[Mapping[str, Any]]] | None = None


class LayerSampler(ABC):
    """Picks the layers that train in a period. Subclass it, write :meth:`sample`, and ``@register`` a name.

    Options are keyword-only constructor arguments with annotations; their bounds, defaults and units go into
    the docstring's ``Args``, which ``layersample list NAME`` prints.
    """

    source: ClassVar[str] = ""
    """Where the rule comes from: an arXiv id or a repository."""

    fixed_size: bool = False
    """Whether every draw holds exactly ``num_active`` layers."""

    measure_every: int | None = None
    """Periods between two calls of :meth:`measure`; ``None`` measures once."""

    @abstractmethod
    def sample(self, context: SamplingContext) -> Iterable[int]:
        """Return the indices into ``context.layers`` that train in period ``context.round``."""

    def measure(self, measurement: Measurement) -> None:  # noqa: B027
        """Look at the model: before the first draw, and again every :attr:`measure_every` periods."""

    def inclusion_probabilities(self, context: SamplingContext) -> Sequence[float] | None:
        """The chance of each layer to be in this period's set, over all seeds; ``None`` if it isn't known."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs, of JSON types; none for a sampler that only uses its context."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what :meth:`state_dict` gave."""


class WeightedSampler(LayerSampler):
    """Draws ``num_active`` layers without replacement, by weights. Write :meth:`weights`.

    Args:
        temperature: Probabilities are in proportion to ``weights ** (1 / temperature)``: above 1 they come
            closer to uniform, below 1 they sharpen.
        min_probability: Exploration floor of each layer's probability p, between 0 and 1 / number of layers:
            p becomes ``min_probability + (1 - num_layers * min_probability) * p``.
        draw: ``"sequential"`` draws one layer after another from those that are left, as the papers' code
            does; a layer's chance to be in the set is then not ``num_active`` times its probability.
            ``"systematic"`` makes it exactly that (at most 1). Either way it is computed and logged.
    """

    fixed_size = True
    # For a subclass whose constructor doesn't call this one.
    temperature: float = 1.0
    min_probability: float = 0.0
    draw: Draw = "sequential"

    def __init__(
        self, *, temperature: float = 1.0, min_probability: float = 0.0, draw: Draw = "sequential"
    ) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, but got {temperature}.")
        if not 0 <= min_probability <= 1:
            raise ValueError(f"min_probability must be between 0 and 1, but got {min_probability}.")
        if draw not in get_args(Draw):
            raise ValueError(f"draw must be 'sequential' or 'systematic', but got {draw!r}.")
        self.temperature, self.min_probability, self.draw = temperature, min_probability, draw

    @abstractmethod
    def weights(self, context: SamplingContext) -> Sequence[float]:
        """Return one finite weight of at least 0 for each of ``context.layers``; they need not sum to 1."""

    def probabilities(self, context: SamplingContext) -> list[float]:
        """The probability p of each layer, with temperature and floor; they sum to 1.

        Raises:
            ValueError: If the weights aren't one finite number of at least 0 a layer, fewer than
                ``num_active`` probabilities are above 0, or the floor is above 1 / number of layers.
        """
        weights = check_weights(self.weights(context), context)
        # Relative to the largest one, so that no power overflows.
        powers = (weights / weights.max()) ** (1 / self.temperature)
        floor = self.min_probability
        if floor * context.num_layers > 1 + 1e-9:
            raise ValueError(
                f"min_probability must be at most 1 / {context.num_layers} layers, but got {floor}."
            )
        probabilities = floor + (1 - floor * context.num_layers) * powers / powers.sum()
        positive = int((probabilities > 0).sum())
        if positive < context.num_active:
            raise ValueError(
                f"At least num_active={context.num_active} layers must have a probability above 0, but "
                f"{positive} have. Lower num_active, or give min_probability."
            )
        return [float(value) for value in probabilities]

    def sample(self, context: SamplingContext) -> list[int]:
        """Draw ``context.num_active`` layers.

        Raises:
            ValueError: As :meth:`probabilities`.
        """
        probabilities = torch.tensor(self.probabilities(context), dtype=torch.float64)
        draw = draw_sequential if self.draw == "sequential" else draw_systematic
        return draw(probabilities, context.num_active, context.generator)

    def inclusion_probabilities(self, context: SamplingContext) -> list[float]:
        """The chance of each layer to be in the set, for the weights of this period."""
        inclusion = sequential_inclusion if self.draw == "sequential" else systematic_inclusion
        return inclusion(self.probabilities(context), context.num_active)


def check_weights(weights: Sequence[float], context: SamplingContext) -> torch.Tensor:
    """Return the weights as an fp64 tensor of shape ``(num_layers,)``, or say what is wrong with them.

    Raises:
        ValueError: If they aren't one finite number of at least 0 a layer, or are all 0.
    """
    values = [float(weight) for weight in weights]
    if len(values) != context.num_layers:
        raise ValueError(
            f"A sampler must give {context.num_layers} weights, one a layer, but gave {len(values)}."
        )
    for name, value in zip(context.layers, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"Weights must be finite and at least 0, but the weight of {name} is {value}.")
    if not any(values):
        raise ValueError(f"At least one of the {len(values)} weights must be above 0, but all of them are 0.")
    return torch.tensor(values, dtype=torch.float64)
