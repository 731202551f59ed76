"""Samplers that weigh layers: by a rule of their own, or by scores that they measure on the model."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from layersample.errors import ConfigError
from layersample.sampling.draws import (
    Draw,
    draw_sequential,
    draw_systematic,
    sequential_inclusion,
    systematic_inclusion,
)
from layersample.sampling.sampler import LayerSampler, SamplingContext

Cost = Literal["none", "flops", "memory"]
_COST_FLOOR = 0.1


@dataclass(kw_only=True, eq=False)
class WeightedSampler(LayerSampler):
    """Draws ``num_active`` layers without replacement, by weights. Write :meth:`weights`.

    Args:
        temperature: Probabilities are in proportion to ``weights ** (1 / temperature)``: above 1 they come
            closer to uniform, below 1 they sharpen.
        min_probability: Exploration floor of each layer's probability p, between 0 and 1 / number of layers:
            p becomes ``min_probability + (1 - num_layers * min_probability) * p``.
        draw: ``"sequential"`` draws one layer after another from those that are left, as the papers' code
            does; a layer's chance to be in the set is then not ``num_active`` times its probability.
            ``"systematic"`` makes it exactly that (at most 1). Either way it is computed and logged. Under a
            ``draw_budget`` the draw is sequential, and a layer that doesn't fit any more is left out.
        cost: What weights are divided by: ``"none"``; ``"flops"``, a layer's share of the backward pass, which
            goes the deeper the lower the layer is; or ``"memory"``, the bytes of its gradients, optimizer state
            and activations. With a cost and no ``min_probability``, that is a tenth of 1 / number of layers, so
            that the most expensive layers train too.
        cost_tokens: Tokens of a batch, for the activations of ``cost="memory"``.
    """

    fixed_size = True
    keeps_budget = True
    # A subclass whose constructor doesn't call this one has these defaults too.
    temperature: float = 1.0
    min_probability: float = 0.0
    draw: Draw = "sequential"
    cost: Cost = "none"
    cost_tokens: int = 1024

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, but got {self.temperature}.")
        if not 0 <= self.min_probability <= 1:
            raise ValueError(f"min_probability must be between 0 and 1, but got {self.min_probability}.")
        if self.draw not in get_args(Draw):
            raise ValueError(f"draw must be 'sequential' or 'systematic', but got {self.draw!r}.")
        if self.cost not in get_args(Cost):
            raise ValueError(f"cost must be one of {', '.join(get_args(Cost))}, but got {self.cost!r}.")
        if self.cost_tokens < 1:
            raise ValueError(f"cost_tokens must be at least 1 token, but got cost_tokens={self.cost_tokens}.")

    @abstractmethod
    def weights(self, context: SamplingContext) -> Sequence[float]:
        """Return one finite weight of at least 0 for each of ``context.layers``; they need not sum to 1."""

    def probabilities(self, context: SamplingContext) -> list[float]:
        """The probability p of each layer, with temperature, cost and floor; they sum to 1.

        Raises:
            ConfigError: If the weights aren't one finite number of at least 0 a layer, fewer than
                ``num_active`` probabilities are above 0, or the floor is above 1 / number of layers.
        """
        weights = check_weights(self.weights(context), context)
        # Relative to the largest one, so that no power overflows.
        powers = (weights / weights.max()) ** (1 / self.temperature)
        if self.cost != "none":
            powers = powers / self._costs(context)
        floor = self.min_probability
        if self.cost != "none" and not floor:
            floor = _COST_FLOOR / context.num_layers
        if floor * context.num_layers > 1 + 1e-9:
            raise ConfigError(
                f"min_probability must be at most 1 / {context.num_layers} layers, but got {floor}."
            )
        probabilities = floor + (1 - floor * context.num_layers) * powers / powers.sum()
        positive = int((probabilities > 0).sum())
        if positive < context.num_active and context.budget is None:
            raise ConfigError(
                f"At least num_active={context.num_active} layers must have a probability above 0, but "
                f"{positive} have. Lower num_active, or give min_probability."
            )
        return [float(value) for value in probabilities]

    def _costs(self, context: SamplingContext) -> torch.Tensor:
        """The cost of each layer relative to the cheapest one: fp64, ``(num_layers,)``."""
        if context.costs is None:
            raise ConfigError(
                f"cost={self.cost!r} needs the costs of the layers, but the context has none: make it with a "
                f"LayerScheduler, or give SamplingContext(costs=layer_costs(model, units))."
            )
        found = context.costs.flops if self.cost == "flops" else context.costs.memory(self.cost_tokens)
        costs = torch.tensor(found, dtype=torch.float64)
        return costs / costs[costs > 0].min() if bool((costs > 0).any()) else torch.ones_like(costs)

    def sample(self, context: SamplingContext) -> list[int]:
        """Draw ``context.num_active`` layers, or as many as a budget has room for.

        Raises:
            ConfigError: As :meth:`probabilities`; or if the draw is systematic, and there is a budget.
        """
        probabilities = torch.tensor(self.probabilities(context), dtype=torch.float64)
        if context.budget is not None:
            self._check_budget()
            possible = int((probabilities > 0).sum())
            return context.take(draw_sequential(probabilities, possible, context.generator))
        draw = draw_sequential if self.draw == "sequential" else draw_systematic
        return draw(probabilities, context.num_active, context.generator)

    def _check_budget(self) -> None:
        if self.draw != "sequential":
            raise ConfigError(
                "draw='systematic' gives each layer its chance in a draw of a fixed number: a draw_budget needs "
                "draw='sequential'."
            )

    def inclusion_probabilities(self, context: SamplingContext) -> list[float]:
        """The chance of each layer to be in the set, for the weights of this period.

        Under a budget it may be an estimate: see :meth:`~layersample.sampling.draw_budget.DrawBudget.inclusion`.
        """
        if context.budget is not None:
            return context.budget.inclusion(self.probabilities(context))
        inclusion = sequential_inclusion if self.draw == "sequential" else systematic_inclusion
        return inclusion(self.probabilities(context), context.num_active)


@dataclass(kw_only=True, eq=False)
class MeasuredSampler(WeightedSampler):
    """Weighs layers by scores measured on the model. Write ``measure``, and put into :attr:`scores` what it finds.

    Something sampled that has no score (an embedding, where only layers are measured) gets the mean score. The
    scores are part of the state, so a resumed run measures nothing again.

    Args:
        every: Periods between measurements; none measures once.
    """

    every: int | None = None
    scores: dict[str, float] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1 period, but got {self.every}.")
        self.measure_every = self.every

    @property
    def has_measured(self) -> bool:
        """Whether there are scores."""
        return bool(self.scores)

    def weights(self, context: SamplingContext) -> list[float]:
        """Return the scores by layer."""
        known = [self.scores[name] for name in context.layers if name in self.scores]
        mean = sum(known) / max(len(known), 1)
        return [self.scores.get(name, mean) for name in context.layers]

    def state_dict(self) -> dict[str, Any]:
        """The scores."""
        return {"scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the scores back."""
        self.scores = dict(state["scores"])


def check_weights(weights: Sequence[float], context: SamplingContext) -> torch.Tensor:
    """Return the weights as an fp64 tensor of shape ``(num_layers,)``, or say what is wrong with them.

    Raises:
        ConfigError: If they aren't one finite number of at least 0 a layer, or are all 0.
    """
    values = [float(weight) for weight in weights]
    if len(values) != context.num_layers:
        raise ConfigError(
            f"A sampler must give {context.num_layers} weights, one a layer, but gave {len(values)}."
        )
    for name, value in zip(context.layers, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"Weights must be finite and at least 0, but the weight of {name} is {value}.")
    if not any(values):
        raise ConfigError(
            f"At least one of the {len(values)} weights must be above 0, but all of them are 0."
        )
    return torch.tensor(values, dtype=torch.float64)
