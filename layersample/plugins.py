"""What installed packages add, found through their entry points: samplers, commands and files of settings."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SAMPLERS = "layersample.samplers"
"""Group of modules whose import registers samplers and projections."""

COMMANDS = "layersample.commands"
"""Group of typer applications that become commands of ``layersample``."""

SETTINGS = "layersample.settings"
"""Group of packages that hold YAML files: ``presets/`` for ``--preset``, ``comparisons/`` for what a plan and a
profile show beside a run."""


@cache
def load_group(group: str) -> dict[str, Any]:
    """Load what a group of entry points names, once.

    A package that raises is left out and named in a warning: one that is broken must not end a command that
    may have nothing to do with it.

    Returns:
        What was loaded, by the entry's name.
    """
    loaded: dict[str, Any] = {}
    for entry in installed(group):
        try:
            loaded[entry.name] = entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a package of someone else's raises
            package = entry.dist.name if entry.dist is not None else entry.value
            logger.warning(
                "The package %s is left out, because loading its entry point %s raised %s: %s",
                package,
                entry.value,
                type(error).__name__,
                error,
            )
    return loaded


@cache
def settings_files(kind: str) -> dict[str, str]:
    """The YAML files that packages ship in one folder: their text by name.

    The packages themselves aren't imported, since that would take the seconds that torch takes.

    Args:
        kind: Name of the folder.
    """
    found: dict[str, str] = {}
    for entry in installed(SETTINGS):
        folder = find_folder(entry.value)
        for path in sorted((folder / kind).glob("*.yaml")) if folder is not None else ():
            found[path.stem] = path.read_text(encoding="utf-8")
    return found


def installed(group: str) -> list[EntryPoint]:
    """The entry points of a group, by name; nothing is imported."""
    return sorted(entry_points(group=group), key=lambda entry: entry.name)


def find_folder(package: str) -> Path | None:
    """Where a package lies, without running it."""
    top, *inside = package.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)), *inside)


def find_file(module: str) -> Path | None:
    """The file of a module of a package, without running it."""
    package, _, name = module.rpartition(".")
    folder = find_folder(package) if package else None
    path = folder / f"{name}.py" if folder is not None else None
    return path if path is not None and path.is_file() else None
