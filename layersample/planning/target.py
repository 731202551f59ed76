"""What is planned: a model by name, folder, configuration or object, and the options that a run of it really has."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from layersample.activations.chunked_loss import why_not_chunked
from layersample.config import TrainConfig
from layersample.errors import ConfigError
from layersample.lengths import fit_length
from layersample.planning.fake_models import fake_model
from layersample.planning.model_kinds import ModelKind, find_kind
from layersample.planning.shapes import load_shape
from layersample.registry import PROJECTIONS

ModelLike = str | PretrainedConfig | PreTrainedModel


@dataclass(frozen=True)
class Target:
    """A model to plan for.

    Args:
        name: Its name.
        shape: Its configuration; a copy, since building a model writes into it.
        kind: How it is built and fed.
        notes: What had to be assumed.
    """

    name: str
    shape: PretrainedConfig
    kind: ModelKind
    notes: tuple[str, ...]


def find_target(model: ModelLike, config: TrainConfig) -> tuple[Target, TrainConfig]:
    """The model to plan for, and the options as a run of it has them.

    Args:
        model: A built-in shape, a folder with ``config.json``, a hub id, a configuration, or a model.
        config: All options of the run.

    Raises:
        ConfigError: If the model is unknown or of a kind that isn't planned, or an option doesn't go with it.
    """
    PROJECTIONS.resolve_optional(config.projection, config.projection_arguments)
    name = model if isinstance(model, str) else type(model).__name__
    shape: PretrainedConfig
    if isinstance(model, str):
        shape = load_shape(model)
    else:
        shape = copy.deepcopy(model.config if isinstance(model, PreTrainedModel) else model)
    if str(getattr(shape, "_attn_implementation", "")).startswith("flash"):
        shape._attn_implementation = "sdpa"  # it holds as much, and runs where no GPU is
    if shape.is_encoder_decoder and getattr(shape, "decoder_start_token_id", None) is None:
        shape.decoder_start_token_id = 0  # any token: a model without one can't shift its labels
    kind = find_kind(shape, type(model) if isinstance(model, PreTrainedModel) else None)
    config, fitted = fit_length(config, shape)
    config, notes = _with_its_loss(shape, kind, config)
    if fitted is not None:
        notes = (fitted, *notes)
    if kind.note is not None:
        notes = (kind.note, *notes)
    if config.trainer:
        notes = (*notes, f"Options under trainer aren't planned: {', '.join(sorted(config.trainer))}.")
    return Target(name, shape, kind, notes), config


def _with_its_loss(
    shape: PretrainedConfig, kind: ModelKind, config: TrainConfig
) -> tuple[TrainConfig, tuple[str, ...]]:
    """The options without a chunked loss where a model can't have it, unless it was asked for."""
    # Built in any case: an error of its own, or a warning, comes here and once.
    with fake_model(shape, config.precision, kind=kind) as model:
        reason = why_not_chunked(model)
    if config.loss_chunk is None or reason is None:
        return config, ()
    if config.loss_chunk != "auto":
        raise ConfigError(reason)
    note = f"Planned with the model's own loss (--loss-chunk 0). {reason}"
    return config.model_copy(update={"loss_chunk": None}), (note,)
