"""BlockLLM: what has the largest gradients for how often it trained, until the loss stalls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layersample import ConfigError, LayerSampler, LayerStatistics, SamplingContext, register


@register("blockllm")
@dataclass(kw_only=True, eq=False)
class BlockLLM(LayerSampler):
    """Train what has the largest gradients for how often it trained, until the loss stalls (BlockLLM).

    Units are taken by ‖g_l‖ / e^(n_l / t), the largest first, with n_l the periods in which l trained, of t in all.
    Those that have not trained yet come first, since nothing is known of their gradients: the authors' code
    looks at one more in each step, which costs its backward pass. The choice stays until the mean of the last
    ``patience`` losses is above that of all losses since it was made; ``period`` is the longest it may stay.

    The paper's units are tensors, up to a part 1 − s of the parameters: ``granularity="tensor"`` and ``draw_budget``,
    as the preset has them. One that doesn't fit is left out here, and the next tried; the code stops there, and fills
    up with random ones. The code divides n_l by its sum over all units and then by the number of optimizer steps, so
    that e^(…) is as good as 1; here it is the paper's. It looks at the losses every 1000 steps, here after each. The
    paper ends a choice where one loss is at least the mean of the last ``patience``; the rule above is the code's.

    The loss must be told: ``scheduler.step(loss=loss)``, or a Trainer that logs each step (``logging_steps=1``).

    Args:
        patience: Last losses (m) that are compared with all of them, at least 1.

    References:
        arXiv 2406.17296 and the authors' code.
    """

    source = "arXiv 2406.17296"
    collects = frozenset({"gradients", "loss"})
    fixed_size = True
    keeps_budget = True
    watches_steps = True

    patience: int = 100
    norms: dict[str, float] = field(init=False, repr=False, default_factory=dict)
    _losses: list[float] = field(init=False, repr=False, default_factory=list)  # the last of the choice
    _sum: float = field(init=False, repr=False, default=0.0)  # of all losses of the choice
    _count: int = field(init=False, repr=False, default=0)
    _told: int = field(init=False, repr=False, default=0)  # losses of the choice that the loop has told

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 step, but got patience={self.patience}.")

    def sample(self, context: SamplingContext) -> list[int]:
        """Take the layers with the largest scores; of equal ones the lowest."""
        visits = context.statistics.visits
        periods = max(context.round, 1)

        def rank(index: int) -> tuple[bool, float, int]:
            norm = self.norms.get(context.layers[index], 0.0)
            return visits[index] > 0, -norm / math.exp(visits[index] / periods), index

        return context.take(sorted(range(context.num_layers), key=rank))

    def wants_new_period(self, statistics: LayerStatistics, context: SamplingContext) -> bool:
        """Whether the last losses are no better than all of them."""
        loss, told = statistics.loss.last, statistics.loss.told
        if told == self._told:  # the loop tells one now and then: the last counts once
            return False
        self._told = told
        if loss is None or not math.isfinite(loss):
            return False
        self._losses = [*self._losses, loss][-self.patience :]
        self._sum, self._count = self._sum + loss, self._count + 1
        return self._count > self.patience and self._sum / self._count < sum(self._losses) / self.patience

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        """Keep the norms, and forget the losses of the choice that ends.

        Raises:
            ConfigError: If the loop told no loss.
        """
        if statistics.loss.told == 0:
            raise ConfigError(
                "BlockLLM chooses anew where the loss stalls, but was told none: call scheduler.step(loss=loss), or "
                "let the Trainer log each step (logging_steps=1)."
            )
        for index in context.active:
            norm = statistics.gradient_norm[index]
            if norm is not None:
                self.norms[context.layers[index]] = norm
        self._losses, self._sum, self._count, self._told = [], 0.0, 0, 0

    def inclusion_probabilities(self, context: SamplingContext) -> list[float]:
        """1 for the layers that are taken: nothing is drawn."""
        taken = self.sample(context)
        return [float(index in taken) for index in range(context.num_layers)]

    def state_dict(self) -> dict[str, Any]:
        """Norms, and losses of the choice that runs."""
        counts = {"sum": self._sum, "count": self._count, "told": self._told}
        return {"norms": self.norms, "losses": list(self._losses), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.norms, self._losses = dict(state["norms"]), list(state["losses"])
        self._sum, self._count = state["sum"], state["count"]
        self._told = state.get("told", self._count)  # states of before had a loss for each step
