"""Probabilities that the user gives."""

from __future__ import annotations

from typing import Literal

from layersample import Cost, Draw, SamplingContext, WeightedSampler, register

_SHAPES = ("uniform", "increase", "decrease", "middle")


@register("prior")
class Prior(WeightedSampler):
    """Draw layers by weights that you give: a list, or a shape over depth.

    Args:
        weights: One number of at least 0 a layer, from the input to the output; or ``"uniform"`` (to divide by
            a cost), ``"increase"`` (1, 2, …, N: the top layers most), ``"decrease"`` (N, …, 2, 1) or
            ``"middle"`` (1, 2, … up to the middle and down again).

    References:
        The modes of OwLore's code (arXiv 2405.18380); the shapes are linear here.
    """

    source = "OwLore's modes, arXiv 2405.18380"

    def __init__(
        self,
        *,
        weights: list[float] | Literal["uniform", "increase", "decrease", "middle"],
        temperature: float = 1.0,
        min_probability: float = 0.0,
        draw: Draw = "sequential",
        cost: Cost = "none",
        cost_tokens: int = 1024,
    ) -> None:
        super().__init__(
            temperature=temperature,
            min_probability=min_probability,
            draw=draw,
            cost=cost,
            cost_tokens=cost_tokens,
        )
        if isinstance(weights, str) and weights not in _SHAPES:
            raise ValueError(f"weights must be numbers or one of {', '.join(_SHAPES)}, but got {weights!r}.")
        self._weights = weights

    def weights(self, context: SamplingContext) -> list[float]:
        """Return the weights; their number is checked against the layers."""
        if not isinstance(self._weights, str):
            return self._weights
        up = [float(index + 1) for index in range(context.num_layers)]
        down = up[::-1]
        shapes = {
            "uniform": [1.0] * context.num_layers,
            "increase": up,
            "decrease": down,
            "middle": [min(a, b) for a, b in zip(up, down, strict=True)],
        }
        return shapes[self._weights]
