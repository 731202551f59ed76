"""What the doors to other trainers share: which package is needed, and what doesn't go beside layer sampling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

from layersample.errors import ConfigError, some
from layersample.integrations.transformers import LayerSamplingCallback

_PROJECTS = re.compile("galore|apollo")


def need(module: str, distribution: str, minimum: str) -> None:
    """Make sure that a package is installed, and not too old.

    Args:
        module: Its name in an import.
        distribution: Its name for pip.
        minimum: The oldest version that has what is used.

    Raises:
        ConfigError: If it isn't there, or older. A checkout that isn't installed has no version, and will do.
    """
    if find_spec(module) is None:
        raise ConfigError(
            f"This needs {distribution} {minimum} or later, which isn't installed: pip install {distribution}."
        )
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return
    if Version(found) < Version(minimum):
        raise ConfigError(
            f"This needs {distribution} {minimum} or later, but {found} is installed: pip install -U {distribution}."
        )


def too_old(distribution: str, minimum: str, what: str) -> ConfigError:
    """The error that a package lacks what it has from some version on."""
    return ConfigError(
        f"This needs {distribution} {minimum} or later, but the one that is installed has no {what}: pip install -U "
        f"{distribution}."
    )


def cannot_import(error: ImportError, distribution: str, minimum: str, what: str) -> ConfigError:
    """The error that a package can't be imported: it is too old, or lacks a package of others.

    Args:
        error: What the import raised.
        distribution: The package's name for pip.
        minimum: The oldest version that has what is used.
        what: What is used.
    """
    package = what.partition(".")[0]
    if error.name is None or error.name.partition(".")[0] == package:
        return too_old(distribution, minimum, what)
    return ConfigError(
        f"{distribution} is installed, but what it needs isn't, or can't be imported: {error}. Install that first."
    )


def make_callback(options: object, place: str) -> LayerSamplingCallback:
    """A callback with the options of a trainer's own file.

    Args:
        options: A mapping, or ``None`` for the defaults.
        place: Where they stand, for messages.

    Raises:
        ConfigError: If they aren't a mapping, or one of them can't be used.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"{place}: must hold options and their values, but holds {options!r}.")
    try:
        return LayerSamplingCallback(**{str(key): value for key, value in (options or {}).items()})
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def refuse_beside(settings: Mapping[str, Any], keys: Iterable[str], trainer: str) -> None:
    """Refuse a trainer's own way to choose what trains, or to project gradients, beside ours.

    Args:
        settings: The trainer's settings.
        keys: Those that must not be set.
        trainer: Its name, for messages.

    Raises:
        ConfigError: If one is set.
    """
    found = [f"{key}={settings.get(key)!r}" for key in keys if is_on(settings.get(key))]
    if found:
        raise ConfigError(
            f"What trains must be chosen by one of the two, but besides layersample's options {trainer}'s own are "
            f"set: {some(found)}. Take them out, or leave layersample's out."
        )


def refuse_projecting(optimizer: object, trainer: str, instead: str) -> None:
    """Refuse an optimizer that projects gradients by itself, of weights that it takes to train always.

    Args:
        optimizer: Its name, if the trainer's settings give one.
        trainer: The trainer's name, for messages.
        instead: Where a projection is chosen, for messages.

    Raises:
        ConfigError: If it does.
    """
    if _PROJECTS.search(str(optimizer or "").lower()):
        raise ConfigError(
            f"{trainer}'s optimizer {optimizer!r} projects gradients by itself, of weights that always train: choose "
            f"a plain one, and a projection {instead}."
        )


def is_on(value: object) -> bool:
    """Whether a setting is on, as a file or a command line may say it."""
    return value not in (None, False, 0, "", "0", "false", "False", "none", "None")
