"""Two ways to step on a projected weight, by chance: so that their mean is the whole gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from layersample.errors import ConfigError
from layersample.layers.find import Layer
from layersample.projection.projection import Projection
from layersample.sampling.full_rank import FullRank


@dataclass(frozen=True)
class Branch:
    """What one weight gets in a period.

    Args:
        full_rank: What the projection leaves out, at full rank; else the projected gradient.
        factor: What the gradient is multiplied by.
    """

    full_rank: bool
    factor: float


def branches_of(
    projected: Mapping[str, Tensor], active: Mapping[int, Layer], drawn: FullRank | None
) -> dict[Tensor, Branch]:
    """What each projected weight of some layers gets; nothing where no layers were drawn.

    Args:
        projected: The weights that are projected now, by name.
        active: The layers that train, by index.
        drawn: Those that get what the projection leaves out.
    """
    if drawn is None:
        return {}
    full, low = Branch(True, 1 / drawn.chance), Branch(False, 1 / (1 - drawn.chance))
    return {
        projected[name]: full if index in drawn.layers else low
        for index, layer in active.items()
        for name in layer.parameters
        if name in projected
    }


def check_branches(projection: Projection | None, sampler: str) -> None:
    """Make sure that a projection's updates and what it leaves out add up to a whole.

    Args:
        projection: The projection, if any.
        sampler: Name of the sampler that asks for it.

    Raises:
        ConfigError: If there is none, or it makes more of an update than the projected one.
    """
    if projection is None:
        raise ConfigError(
            f"The sampler {sampler!r} needs a projection, but got none: give projection='galore'."
        )
    if type(projection).apply is not Projection.apply:
        raise ConfigError(
            f"The sampler {sampler!r} needs a projection that updates a weight by what is projected alone, but "
            f"{type(projection).__name__} does more: give projection='galore'."
        )
