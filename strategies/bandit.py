"""A bandit: layers drawn by how much the loss falls while they train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from layersample import ConfigError, LayerStatistics, ObservedSampler, SamplingContext, register

_MOST = 1.0  # EXP3's bound on what one period adds to a score

Per = Literal["period", "flops", "memory"]


@register("bandit")
@dataclass(kw_only=True, eq=False)
class Bandit(ObservedSampler):
    """Draw layers by how much the loss falls while they train, per unit of cost (EXP3 with a floor).

    After a period with decrease of the loss Δ, each layer l that trained has the reward r = Δ / c_l, where c_l is its
    cost relative to the mean of all layers. Rewards are divided by the largest |r| so far, and

        s_l ← s_l + clip(rate · r / π_l, −1, 1),    p = (1 − exploration) · softmax(s) + exploration / N,

    with π_l the chance that l had to be in the period's set. Dividing by it makes the estimate of each layer's
    reward unbiased, however seldom it is drawn. Within ``max_wait``, whose chances aren't known, π is that of the
    bandit's own draw.

    EXP3 has rewards from 0 to 1, whose bounds are known, and rate = exploration / N, so that no period adds more than
    1 to a score. That is too slow for the tens of periods of a fine-tuning: here the rate is larger, and what a period
    adds is cut off at 1, which biases the estimate of what is seldom drawn towards 0. Scaling by the largest |r| so
    far, rewards below 0, costs and the default of ``rate`` are ours too. Rewards of a period are those of all its
    layers together: with more than one at a time it takes more periods to tell them apart.

    The loss must be told: ``scheduler.step(loss=loss)``, or a Trainer that logs each step (``logging_steps=1``).

    Args:
        rate: Learning rate of the scores, above 0.
        exploration: Share of all draws that is spread evenly over the layers, above 0 and at most 1.
        per: What the decrease is divided by: ``"period"`` nothing, every layer costs the same; ``"flops"``, a
            layer's share of the backward pass, which goes the deeper the lower it is; ``"memory"``, the bytes of its
            gradients, optimizer state and activations of ``cost_tokens``.

    References:
        Auer et al., SIAM J. Comput. 32 (2002) 48, there EXP3; to use it on layers, per unit of cost, is ours.
    """

    source = "EXP3, SIAM J. Comput. 32 (2002) 48"
    collects = frozenset({"loss"})

    rate: float = 0.2
    exploration: float = 0.1
    per: Per = "flops"
    _largest: float = field(init=False, repr=False, default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate must be finite and above 0, but got {self.rate}.")
        if not 0 < self.exploration <= 1:
            raise ValueError(f"exploration must be above 0 and at most 1, but got {self.exploration}.")
        if self.per not in get_args(Per):
            raise ValueError(f"per must be one of {', '.join(get_args(Per))}, but got {self.per!r}.")

    def observe(self, statistics: LayerStatistics, context: SamplingContext) -> None:
        """Reward the layers that trained.

        Raises:
            ConfigError: If the loop told the loss of fewer than two steps.
        """
        loss = statistics.loss
        if loss.told < 2:
            raise ConfigError(
                "A bandit needs the training loss of at least two steps of each period, but was told that of "
                f"{loss.told}: call scheduler.step(loss=loss), or let the Trainer log each step (logging_steps=1); "
                "and let period be at least 2."
            )
        if loss.before is None or loss.after is None:
            return  # losses that are no numbers
        costs = self._relative_costs(context)
        # As they were at the draw: the scores haven't changed since. A sampler around this one has its say in them.
        chances = context.inclusion or self.inclusion_probabilities(context)
        rewards = {index: (loss.before - loss.after) / costs[index] for index in context.active}
        self._largest = max([self._largest, *map(abs, rewards.values())])
        for index, reward in rewards.items():
            name = context.layers[index]
            gain = self.rate * reward / (self._largest or 1.0) / chances[index]
            self.scores[name] = self.scores.get(name, 0.0) + min(max(gain, -_MOST), _MOST)

    def weights(self, context: SamplingContext) -> list[float]:
        """Return the probabilities p."""
        scores = [self.scores.get(name, 0.0) for name in context.layers]
        powers = [math.exp(score - max(scores)) for score in scores]
        total, even = sum(powers), self.exploration / context.num_layers
        return [(1 - self.exploration) * power / total + even for power in powers]

    def state_dict(self) -> dict[str, Any]:
        """The scores and the largest reward."""
        return {**super().state_dict(), "largest": self._largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self._largest = state["largest"]

    def _relative_costs(self, context: SamplingContext) -> list[float]:
        """The cost of each layer over the mean of all."""
        if self.per == "period" or context.costs is None:
            return [1.0] * context.num_layers
        found = context.costs.flops if self.per == "flops" else context.costs.memory(self.cost_tokens)
        mean = sum(found) / len(found)
        return [max(cost / mean, 0.01) if mean else 1.0 for cost in found]
