"""Configurations of well-known models, so that a plan needs no network; sizes alone, without weights."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from layersample.errors import ConfigError, unknown
from layersample.model_files import check_folder, loading


def list_shapes() -> list[str]:
    """Names of the built-in configurations."""
    return sorted(e.name.removesuffix(".json") for e in files(__name__).iterdir() if e.name.endswith(".json"))


def load_shape(model: str) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        model: A built-in name, a folder with ``config.json``, or a hub id.

    Raises:
        ConfigError: If it is none of them, or the hub can't be reached; it lists the built-in ones.
    """
    if model in list_shapes():
        text = (files(__name__) / f"{model}.json").read_text(encoding="utf-8")
        config = json.loads(text)["config"]
        built: PretrainedConfig = AutoConfig.for_model(config.pop("model_type"), **config)
        return built
    if not Path(model).is_dir() and model.count("/") != 1:
        raise ConfigError(
            f"{unknown('model', model, list_shapes())} Or give a folder with config.json, or a hub id."
        )
    if Path(model).is_dir():
        check_folder(Path(model), model)
    with loading(model, f"Without a network there are: {', '.join(list_shapes())}."):
        loaded: PretrainedConfig = AutoConfig.from_pretrained(model)
    return loaded
