"""What a sampler is: one method that picks the layers of a period, from a context that holds all it may use."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch


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


class LayerSampler(ABC):
    """Picks the layers that train in a period. Subclass it, write :meth:`sample`, and ``@register`` a name.

    Options are keyword-only constructor arguments with annotations; their bounds, defaults and units go into
    the docstring's ``Args``, which ``layersample list NAME`` prints.
    """

    source: ClassVar[str] = ""
    """Where the rule comes from: an arXiv id or a repository."""

    fixed_size: bool = False
    """Whether every draw holds exactly ``num_active`` layers."""

    @abstractmethod
    def sample(self, context: SamplingContext) -> Iterable[int]:
        """Return the indices into ``context.layers`` that train in period ``context.round``."""

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs, of JSON types; none for a sampler that only uses its context."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what :meth:`state_dict` gave."""


class WeightedSampler(LayerSampler):
    """Draws ``num_active`` layers without replacement, in proportion to weights. Write :meth:`weights`.

    Layers are drawn one after another, each from the weights of those that are left. A layer's chance to be
    in the set is therefore not ``num_active`` times its weight.
    """

    fixed_size = True

    @abstractmethod
    def weights(self, context: SamplingContext) -> Sequence[float]:
        """Return one finite weight of at least 0 for each of ``context.layers``; they need not sum to 1."""

    def sample(self, context: SamplingContext) -> list[int]:
        """Draw ``context.num_active`` layers.

        Raises:
            ValueError: If the weights aren't one finite number of at least 0 a layer, or fewer than
                ``num_active`` of them are above 0.
        """
        weights = check_weights(self.weights(context), context)
        return torch.multinomial(weights, context.num_active, generator=context.generator).tolist()


def check_weights(weights: Sequence[float], context: SamplingContext) -> torch.Tensor:
    """Return the weights as an fp64 tensor of shape ``(num_layers,)``, or say what is wrong with them.

    Raises:
        ValueError: As :meth:`WeightedSampler.sample` says.
    """
    values = [float(weight) for weight in weights]
    if len(values) != context.num_layers:
        raise ValueError(
            f"A sampler must give {context.num_layers} weights, one a layer, but gave {len(values)}."
        )
    for name, value in zip(context.layers, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"Weights must be finite and at least 0, but the weight of {name} is {value}.")
    if sum(value > 0 for value in values) < context.num_active:
        raise ValueError(
            f"At least num_active={context.num_active} layers must have a weight above 0, "
            f"but {sum(value > 0 for value in values)} have."
        )
    return torch.tensor(values, dtype=torch.float64)
