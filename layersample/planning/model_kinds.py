"""The kinds of models that can be planned: how a configuration's model is built, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from layersample.config import TrainConfig
from layersample.errors import ConfigError

Batch = dict[str, Tensor]

_TEXT_ALONE = (
    "The model reads images or audio too, and is planned for text alone: what passes through its other towers "
    "comes on top."
)
_TEXT_MODEL = (
    "The model reads text and images; the text model alone is planned, as `layersample train` loads it."
)


@dataclass(frozen=True)
class ModelKind:
    """How a model is planned.

    Args:
        build: Makes the model from its configuration and the type of its weights.
        make_batch: A batch of a run, from the model's configuration and the options.
        note: What is planned, where that isn't all that the model does.
    """

    build: Callable[..., nn.Module]
    make_batch: Callable[[PretrainedConfig, TrainConfig], Batch]
    note: str | None = None


def _tokens(shape: PretrainedConfig, config: TrainConfig) -> Batch:
    """Tokens of full length, each with a label; an encoder-decoder reads and writes as many."""
    tokens = torch.empty((config.batch_size, config.max_length), dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens}


def _classes_of_texts(shape: PretrainedConfig, config: TrainConfig) -> Batch:
    labels = torch.empty((config.batch_size,), dtype=torch.int64)
    return {"input_ids": _tokens(shape, config)["input_ids"], "labels": labels}


def _classes_of_images(shape: PretrainedConfig, config: TrainConfig) -> Batch:
    vision = getattr(shape, "vision_config", shape)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.empty((config.batch_size, getattr(vision, "num_channels", 3), height, width))
    return {"pixel_values": pixels, "labels": torch.empty((config.batch_size,), dtype=torch.int64)}


# From transformers' classes to a batch for them; the first that knows a configuration decides.
_KINDS: tuple[tuple[Any, Callable[[PretrainedConfig, TrainConfig], Batch]], ...] = (
    (AutoModelForCausalLM, _tokens),
    (AutoModelForSeq2SeqLM, _tokens),
    (AutoModelForImageTextToText, _tokens),
    (AutoModelForMaskedLM, _tokens),
    (AutoModelForImageClassification, _classes_of_images),
    (AutoModelForSequenceClassification, _classes_of_texts),
)
_PLANNED = (
    "causal, masked and encoder-decoder language models, models of images and text (for their text), and "
    "classifiers of images or of texts"
)


def find_kind(shape: PretrainedConfig, model_class: type[Any] | None = None) -> ModelKind:
    """How the model of a configuration is planned.

    Args:
        shape: The model's configuration.
        model_class: The class of the model, where there is one; else the one that ``layersample train`` loads, or
            failing that, the first of transformers' kinds that knows the configuration.

    Raises:
        ConfigError: If it is of a kind that isn't planned.
    """
    for auto, make_batch in _KINDS:
        if type(shape) not in auto._model_mapping:
            continue
        known = auto._model_mapping[type(shape)]
        classes = known if isinstance(known, list | tuple) else (known,)
        if model_class is not None and model_class in classes:
            return ModelKind(model_class._from_config, make_batch, _note(shape, model_class))
        # Of an encoder-decoder the first kind would be its decoder alone.
        if model_class is None and not (auto is AutoModelForCausalLM and shape.is_encoder_decoder):
            return ModelKind(auto.from_config, make_batch, _note(shape, classes[0]))
    name = repr(shape.model_type) if model_class is None else model_class.__name__
    raise ConfigError(f"What is planned must be one of {_PLANNED}, but {name} is of another kind.")


def _note(shape: PretrainedConfig, model_class: Any) -> str | None:
    text_class = shape.sub_configs.get("text_config")
    if text_class is None or shape.is_encoder_decoder:
        return None
    return _TEXT_MODEL if getattr(model_class, "config_class", None) == text_class else _TEXT_ALONE
