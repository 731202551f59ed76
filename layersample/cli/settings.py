"""All options of a run, from a stored run, a preset, a file and flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from layersample.config import TrainConfig, make_config, read_preset
from layersample.errors import ConfigError
from layersample.option_files import parse_pairs, read_yaml


def gather_settings(
    config: Path | None,
    preset: str | None,
    sampler_option: list[str] | None,
    projection_option: list[str] | None,
    trainer_option: list[str] | None,
    flags: dict[str, Any],
) -> TrainConfig:
    """All options from a stored run, a preset, a file and the command line; later ones win."""
    given = {key: value for key, value in flags.items() if value is not None}
    sources: list[tuple[str, dict[str, Any]]] = []
    if given.get("resume") and (stored := Path(given.get("output") or "") / "config.yaml").is_file():
        sources.append((str(stored), _stored_options(stored, runs_code=given.get("plugin") is not None)))
    if preset is not None:
        sources.append((f"preset {preset}", read_preset(preset)))
    if config is not None:
        sources.append((str(config), read_yaml(config)))
    for key, pairs in (
        ("sampler_options", sampler_option),
        ("projection_options", projection_option),
        ("trainer", trainer_option),
    ):
        if pairs:
            base: dict[str, Any] = {}
            for _, options in sources:
                base = options.get(key, base)
            given[key] = {**base, **parse_pairs(pairs, key)}
    return make_config(*_with_one_length([*sources, ("command line", given)]))


def _stored_options(stored: Path, *, runs_code: bool) -> dict[str, Any]:
    """The options of a run that is resumed; its plug-in's code runs only where the user says so again."""
    options = read_yaml(stored)
    if options.get("plugin") is not None and not runs_code:
        raise ConfigError(
            f"{stored} names a plug-in, {options['plugin']}, and resuming would run its code: if you trust it, add "
            f"--plugin {options['plugin']}."
        )
    return options


def _with_one_length(sources: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The sources, so that the last one that says how long the run is decides: in steps or in epochs.

    Raises:
        ConfigError: If one says both.
    """
    settled = []
    for name, options in sources:
        in_steps, in_epochs = (options.get(key) is not None for key in ("steps", "epochs"))
        if in_steps and in_epochs:
            raise ConfigError(f"{name}: steps and epochs both say how long the run is: choose one of them.")
        settled.append((name, {**options, "epochs": None} if in_steps else options))
    return settled


def parse_sampler(text: str) -> tuple[str, dict[str, Any]]:
    """Split NAME:key=value,key=value; a comma inside of a value (a list) doesn't end it."""
    name, _, options = text.partition(":")
    pairs = re.split(r",(?=\w+=)", options) if options else []
    return name, parse_pairs(pairs, f"an option of sampler {name!r}")
