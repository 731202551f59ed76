"""How long examples may be for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layersample.config import TrainConfig
from layersample.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def positions_of(model: PretrainedConfig) -> int | None:
    """How many tokens a model reads at most, by its configuration; ``None`` where it sets no limit."""
    positions: int | None = getattr(model.get_text_config(), "max_position_embeddings", None)
    return positions


def fit_length(config: TrainConfig, model: PretrainedConfig) -> tuple[TrainConfig, str | None]:
    """Have examples no longer than a model reads.

    Args:
        config: The options.
        model: The model's configuration.

    Returns:
        The options, with a default ``max_length`` that follows the model, and where it does a sentence that says so.

    Raises:
        ConfigError: If a ``max_length`` that was given is above the model's positions.
    """
    positions = positions_of(model)
    if positions is None or config.max_length <= positions:
        return config, None
    if "max_length" in config.model_fields_set:
        raise ConfigError(
            f"max_length must be at most the model's {positions} positions, but got {config.max_length}."
        )
    said = f"Examples have {positions} tokens at most (max_length), the model's positions."
    return config.model_copy(update={"max_length": positions}), said
