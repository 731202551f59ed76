"""``layersample llamafactory train``: LLaMA-Factory's own training, a few layers at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from layersample.option_files import parse_pairs, read_yaml


def llamafactory_command(
    action: Annotated[Literal["train"], typer.Argument(metavar="train", help="What LLaMA-Factory is to do.")],
    config: Annotated[
        Path, typer.Argument(help="LLaMA-Factory's YAML file, with our options under layersample:.")
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that win over the file's.")
    ] = None,
) -> None:
    """Run LLaMA-Factory's training, a few layers at a time."""
    settings = {**read_yaml(config), **parse_pairs(changes or (), "a setting")}
    _run(_nested(settings))


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Put ``layersample.period=5`` among our options."""
    ours = {key: value for key, value in settings.items() if key.startswith("layersample.")}
    rest = {key: value for key, value in settings.items() if key not in ours}
    if not ours:
        return rest
    inside = {key.partition(".")[2]: value for key, value in ours.items()}
    return {**rest, "layersample": {**(rest.get("layersample") or {}), **inside}}


def _run(settings: dict[str, Any]) -> None:
    # Seconds of imports that the other commands don't need.
    from layersample.integrations.llamafactory import train

    train(settings)
