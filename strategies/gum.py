"""GUM: all layers train at a low rank, but for a few that are drawn, which get what the projection leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layersample import ConfigError, FullRank, LayerSampler, SamplingContext, register


@register("gum")
@dataclass(kw_only=True, eq=False)
class Gum(LayerSampler):
    """Train all layers at a low rank, and of a few that are drawn what the projection leaves out (GUM).

    It goes with a projection such as ``"galore"``, whose basis is P. In each period ``num_active`` of N layers are
    drawn uniformly, each with chance q = γ / N. Their projected weights get the gradient (G − PPᵀG) / q at full rank,
    and those of all other layers PᵀG / (1 − q) at low rank: the mean is G, which a projection alone never gives.
    Weights that aren't projected train as ever. The state of projected weights begins anew in each period.

    The paper takes one SVD a period (``basis="svd"`` and ``update_gap`` as long as the period) and Muon; here the
    optimizer is the user's. That exactly γ layers are drawn, as LISA does, in place of each by itself, and that state
    begins anew, which the text that we have read doesn't say, are ours.

    References:
        Unbiased Gradient Low-Rank Projection, arXiv 2510.17802; there is no code.
    """

    source = "arXiv 2510.17802"
    needs_projection = True

    def sample(self, context: SamplingContext) -> range:
        """Return all layers."""
        return range(context.num_layers)

    def inclusion_probabilities(self, context: SamplingContext) -> list[float]:
        """1 for each layer: all of them train."""
        return [1.0] * context.num_layers

    def full_rank(self, context: SamplingContext) -> FullRank:
        """Draw the layers that get what the projection leaves out.

        Raises:
            ConfigError: If that would be all of them.
        """
        if context.num_active >= context.num_layers:
            raise ConfigError(
                f"num_active must be below the {context.num_layers} layers, of which the others train at a low rank, "
                f"but got num_active={context.num_active}."
            )
        order = torch.randperm(context.num_layers, generator=context.generator)
        drawn = frozenset(order[: context.num_active].tolist())
        return FullRank(drawn, context.num_active / context.num_layers)
