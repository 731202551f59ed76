"""Files of suites: those that come with layersample, the example, and that of a benchmark's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from layersample.errors import ConfigError, unknown
from layersample.files import write_text
from layersample.option_files import read_yaml

_SUITES = Path(__file__).parent / "suites"
_EXAMPLE = Path(__file__).parent / "templates" / "suite.yaml"


def builtin_suites() -> list[str]:
    """Names of the suites that come with layersample."""
    return sorted(_suites())


def read_builtin(name: str) -> dict[str, Any]:
    """The keys of a suite that comes with layersample.

    Raises:
        ConfigError: If there is none of that name.
    """
    suites = _suites()
    if name not in suites:
        raise ConfigError(f"{unknown('suite', name, suites)} A YAML file will do too.")
    keys: dict[str, Any] = yaml.safe_load(suites[name])
    return keys


def _suites() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in _SUITES.glob("*.yaml")}


def read_example() -> str:
    """The commented example of a suite, with every key there is."""
    return _EXAMPLE.read_text(encoding="utf-8")


def write_example(path: Path) -> None:
    """Write the commented example.

    Raises:
        ConfigError: If there is a file already, or it can't be written.
    """
    if path.exists():
        raise ConfigError(f"--write-suite must name a new file, but {path} is there already.")
    try:
        write_text(path, read_example())
    except OSError as error:
        raise ConfigError(f"--write-suite must name a file that can be written, but: {error}.") from error


def read_stored_keys(path: Path) -> dict[str, Any]:
    """The keys of the suite of a benchmark's folder.

    Raises:
        ConfigError: If the file is damaged.
    """
    keys = read_yaml(path)
    if not keys:
        raise ConfigError(f"{path}: must be the suite of a benchmark, but it is empty.")
    return {"timing_whole": False, **keys}  # a folder of before it was a key had none
