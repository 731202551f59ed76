"""What can be exported: the model of a run, or a saved model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layersample.errors import ConfigError, some
from layersample.option_files import read_yaml

MODEL = "model"
"""Folder of the model in that of its run."""


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Args:
        model: Its folder.
        run: The folder of its run; ``None`` where the model alone was given.
        base: The model that the run began with, as the run named it.
    """

    model: Path
    run: Path | None = None
    base: str | None = None


def find_trained(path: Path) -> Trained:
    """The trained model that a folder is, or holds.

    Args:
        path: Folder of a run of ``layersample train``, or of a saved model.

    Raises:
        ConfigError: If it is neither, or the run has written no model yet.
    """
    if not path.is_dir():
        raise ConfigError(f"A run or a saved model must be a folder, but there is no folder {str(path)!r}.")
    if (path / "config.json").is_file():
        return Trained(path)
    if not (path / "config.yaml").is_file():
        names = sorted(entry.name for entry in path.iterdir())
        raise ConfigError(
            f"{path}: must be the folder of a run (with config.yaml) or of a saved model (with config.json), but it "
            f"holds {some(names)}."
        )
    model = path / MODEL
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"{path}: the run must have ended, but it has no model yet. Continue it with: layersample train --output "
            f"{path} --resume"
        )
    base = read_yaml(path / "config.yaml").get("model")
    return Trained(model, path, base if isinstance(base, str) else None)
