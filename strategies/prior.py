"""Probabilities that the user gives."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Literal, get_args

from layersample import SamplingContext, WeightedSampler, register

Shape = Literal["uniform", "increase", "decrease", "middle", "upper"]


@dataclass(kw_only=True, eq=False)
class _WeightsOption:
    """The option that is called as the method is: in one class, dataclasses would take the method for its default."""

    weights: InitVar[list[float] | Shape]


@register("prior")
@dataclass(kw_only=True, eq=False)
class Prior(_WeightsOption, WeightedSampler):
    """Draw layers by weights that you give: a list, or a shape over depth.

    Args:
        weights: One number of at least 0 a layer, from the input to the output; or ``"uniform"`` (to divide by
            a cost), ``"increase"`` (1, 2, …, N: the top layers most), ``"decrease"`` (N, …, 2, 1), ``"middle"``
            (1, 2, … up to the middle and down again) or ``"upper"`` (1 for the upper half, 0 for the others).

    References:
        The modes of OwLore's code (arXiv 2405.18380); the shapes are linear here, and ``"upper"`` is ours.
    """

    source = "OwLore's modes, arXiv 2405.18380"

    def __post_init__(self, weights: list[float] | Shape) -> None:
        super().__post_init__()
        if isinstance(weights, str) and weights not in get_args(Shape):
            raise ValueError(
                f"weights must be numbers or one of {', '.join(get_args(Shape))}, but got {weights!r}."
            )
        self._weights = weights

    def weights(self, context: SamplingContext) -> list[float]:  # type: ignore[misc]  # the option is no attribute
        """Return the weights; their number is checked against the layers."""
        if not isinstance(self._weights, str):
            return self._weights
        up = [float(index + 1) for index in range(context.num_layers)]
        down = up[::-1]
        shapes = {
            "uniform": [1.0] * context.num_layers,
            "increase": up,
            "decrease": down,
            "upper": [float(index >= context.num_layers // 2) for index in range(context.num_layers)],
            "middle": [min(a, b) for a, b in zip(up, down, strict=True)],
        }
        return shapes[self._weights]
