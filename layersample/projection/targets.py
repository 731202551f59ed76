"""Which weights a projection projects: the matrices of the layers, or those that the user names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from layersample.errors import ConfigError, some
from layersample.layers.find import ModelLayers
from layersample.projection.projection import Projection

logger = logging.getLogger(__name__)


def find_targets(model: nn.Module, layers: ModelLayers, projection: Projection | None) -> frozenset[str]:
    """Names of the weights whose gradients are projected.

    Args:
        model: The model.
        layers: Its layers.
        projection: The projection, with its targets and rank; without one, there are no names.

    Raises:
        ConfigError: If a target is part of no weight's name.
    """
    if projection is None:
        return frozenset()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() in (2, 3)}
    if projection.targets is None:
        chosen = [name for layer in layers.layers for name in layer.parameters if name in matrices]
    else:
        chosen = [name for name in matrices if any(_is_part(t, name) for t in projection.targets)]
        _check_targets(projection.targets, list(matrices))
    full = [name for name in chosen if min(matrices[name].shape[-2:]) <= projection.rank]
    if full:
        logger.warning(
            "rank %d is not below the shorter side of %d of the %d matrices to project (%s): they train at full rank.",
            projection.rank,
            len(full),
            len(chosen),
            some(full),
        )
    return frozenset(chosen) - frozenset(full)


def _is_part(target: str, name: str) -> bool:
    return f".{target}." in f".{name}."


def _check_targets(targets: Sequence[str], matrices: Sequence[str]) -> None:
    for target in targets:
        if not any(_is_part(target, name) for name in matrices):
            parts = {part for name in matrices for part in name.split(".") if not part.isdigit()}
            raise ConfigError(
                f"A projection's target must be part of the name of a matrix, but {target!r} is part of none. "
                f"There are: {', '.join(sorted(parts - {'weight'}))}."
            )
