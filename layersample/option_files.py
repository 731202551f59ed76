"""Options as files give them: YAML read safely, and several sources laid over each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from layersample.errors import ConfigError, unknown


def merge_sources(
    layers: Iterable[tuple[str, Mapping[str, Any]]], kind: str, known: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Lay mappings of several sources over each other.

    Args:
        layers: Pairs of a source's name and what it says; a later one wins.
        kind: What a key is called in messages.
        known: The keys there are.

    Returns:
        All values by key, and of each key the source that it comes from.

    Raises:
        ConfigError: If a key is unknown; it names the source.
    """
    merged: dict[str, Any] = {}
    source_of: dict[str, str] = {}
    for source, values in layers:
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"{source}: {unknown(kind, str(key), known)}")
            merged[key] = value
            source_of[key] = source
    return merged, source_of


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        ConfigError: If the file can't be read, is no YAML, or isn't a mapping; it names the line.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: a configuration file must be readable text, but: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: must be YAML, but {getattr(error, 'problem', error)}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must hold a mapping of options to values, but holds a {type(content).__name__}."
        )
    return content
