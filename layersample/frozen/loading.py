"""Load a model whose layers are rounded from the start: it is never whole on the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layersample.errors import ConfigError
from layersample.frozen.quantized import refuse_quantized, save_plainly
from layersample.frozen.weights import FrozenWeights
from layersample.layers.find import find_layers
from layersample.model_files import loading


def load_frozen(
    folder: str | Path,
    *,
    frozen_weights: str = "nf4",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    layers: str | Sequence[str] | None = None,
) -> nn.Module:
    """Load a causal language model, its layers in 8 or 4 bits on the device, and nothing of them twice in memory.

    transformers maps safetensors files into memory; a layer's exact values stay there until it trains. Each matrix
    goes to the device by itself to be rounded. Give ``LayerScheduler`` the same ``frozen_weights``; when that is
    closed, the model stays rounded, and its ``state_dict()`` and ``save_pretrained`` stay exact.

    Args:
        folder: Folder of the model, or a hub id.
        frozen_weights: The format: ``"nf4"``, ``"int8"``, or the name of a registered one.
        device: Where it is to train; by default a GPU where there is one.
        dtype: Type of the weights; by default that of the file. Another one takes the host's memory for all layers.
        layers: Where the layers are, if they can't be found.

    Raises:
        ConfigError: If the model can't be loaded, came quantized, or the format is unknown; if the host's memory is
            too small.

    Example:
        >>> model = load_frozen("llama-2-7b", frozen_weights="nf4", device="cuda")  # doctest: +SKIP
    """
    from transformers import AutoModelForCausalLM

    with loading(str(folder)):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return freeze_model(model, frozen_weights, device, layers)


def freeze_model(
    model: nn.Module,
    frozen_weights: Any,
    device: torch.device | str | None = None,
    layers: str | Sequence[str] | None = None,
) -> nn.Module:
    """Round the layers of a model that is in the host's memory, and move the model to the device.

    Args:
        model: The model.
        frozen_weights: The format, or its name.
        device: Where to; by default a GPU where there is one.
        layers: Where the layers are, if they can't be found.

    Raises:
        ConfigError: As :func:`load_frozen`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = find_layers(model, layers)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    refuse_quantized(model, found)
    save_plainly(model)
    frozen = FrozenWeights(model, found, frozen_weights, stays=True)
    frozen.freeze((), torch.device(device))
    model.to(device)
    return model
