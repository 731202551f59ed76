"""What searches for recipes have tried, as their folders hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layersample.errors import ConfigError

from .entries import MethodEntry
from .recipe_space import RecipeSpace
from .results import SEARCHES

TRIED = "tried.json"


def read_tried(folder: Path) -> list[dict[str, Any]]:
    """What each search of a benchmark's folder has tried.

    Raises:
        ConfigError: If a file of them is damaged.
    """
    return [_read_tried(path) for path in sorted((folder / SEARCHES).glob(f"*/{TRIED}"))]


def _read_tried(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        RecipeSpace(**stored["space"])
        MethodEntry(**stored["chosen"])
        for one in stored["tries"]:
            _ = one["chosen"], one["losses"], one["error"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"{path}: must be what a search has tried, but it is damaged ({type(error).__name__}). Remove it, and the "
            "search's command writes it anew from its runs."
        ) from error
    return dict(stored)
