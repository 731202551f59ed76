"""Every layer, always."""

from __future__ import annotations

from dataclasses import dataclass

from layersample import LayerSampler, SamplingContext, register


@register("full")
@dataclass(kw_only=True, eq=False)
class Full(LayerSampler):
    """Train every layer in every period: full fine-tuning, the reference for all others.

    Whatever required a gradient trains, the towers beside a language model too. ``num_active`` has no effect.
    """

    source = "full fine-tuning"
    trains_everything = True

    def inclusion_probabilities(self, context: SamplingContext) -> list[float]:
        """1 for each layer."""
        return [1.0] * context.num_layers

    def sample(self, context: SamplingContext) -> range:
        """Return all layers."""
        return range(context.num_layers)
