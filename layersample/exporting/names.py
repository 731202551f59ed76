"""Names of models and data for others to read, which say nothing of this machine's folders."""

from __future__ import annotations

from pathlib import Path

from layersample.model_files import is_path


def public_name(name: str) -> str:
    """A model's or a data set's name; of a path of this machine the last part alone.

    Args:
        name: As an option gives it.
    """
    return name if is_hub_id(name) else Path(name).expanduser().absolute().name


def is_hub_id(name: str) -> bool:
    """Whether a name can be the hub's, and is no folder here."""
    return not is_path(name) and not Path(name).exists()
